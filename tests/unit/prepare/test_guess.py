"""Settings are guessed from the layouts that logs come in, and what cannot be guessed is asked for."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_input import prepared

from recray.cli.init import write_settings
from recray.config import load_settings
from recray.errors import DataError, RecrayError
from recray.prepare.guess import PATTERNS, guess_settings
from recray.prepare.times import parse_pattern

pytestmark = pytest.mark.second

FIRST = dt.datetime(2024, 3, 1, 8, 26)


def log(users=40, events=15):
    """Users, items and times of a small shop in which nobody buys an item twice."""
    random = np.random.default_rng(0)
    return [
        (f"u{user}", f"sku-{item}", FIRST + dt.timedelta(hours=31 * n, minutes=user))
        for user in range(users)
        for n, item in enumerate(random.permutation(60)[:events])
    ]


def write_csv(path, header, rows, delimiter=","):
    lines = [delimiter.join(header), *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def as_dict(guesses):
    return {guess.setting: guess.value for guess in guesses}


def test_the_layout_of_online_retail(tmp_path):
    rows = [
        (
            536365 + n // 3,
            item,
            f"A {item} OF TIN",
            -1 if n % 20 == 7 else 6,
            f"{time.month}/{time.day}/{time.year} {time.hour}:{time:%M}",
            2.55,
            "" if n % 5 == 0 else user[1:],
            "France",
        )
        for n, (user, item, time) in enumerate(log())
    ]
    header = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID"]
    header += ["Country"]
    guessed = as_dict(guess_settings(write_csv(tmp_path / "retail.csv", header, rows), None, {}))
    mapping = {name: guessed[f"data.columns.{name}"] for name in ("user_id", "item_id", "basket", "value")}
    assert mapping == {
        "user_id": "CustomerID",
        "item_id": "StockCode",
        "basket": "InvoiceNo",
        "value": "Quantity",
    }
    assert guessed["data.columns.timestamp"] == "InvoiceDate"
    assert guessed["data.time_unit"] == "%m/%d/%Y %H:%M"
    assert guessed["data.min_value"] == 1
    assert 0.2 < guessed["data.max_invalid_fraction"] < 0.3
    assert guessed["evaluate.protocol"] == "filter_seen" and guessed["score.filter_seen"] is True


def test_the_layout_of_personalize(tmp_path):
    events = [
        (user, item, int(time.timestamp()), ("View", "Purchase")[n % 2], 0.25)
        for n, (user, item, time) in enumerate([*log(), *log()])
    ]
    items = [(f"sku-{n}", ("a|b", "c")[n % 2], 1.5 * n, 1_700_000_000 + n) for n in range(60)]
    header = ["USER_ID", "ITEM_ID", "TIMESTAMP", "EVENT_TYPE", "EVENT_VALUE"]
    guesses = as_dict(
        guess_settings(
            write_csv(tmp_path / "e.csv", header, events),
            write_csv(tmp_path / "i.csv", ["ITEM_ID", "GENRES", "PRICE", "PUBLISHED_AT"], items),
            {},
        )
    )
    assert guesses["data.columns.event"] == "EVENT_TYPE" and guesses["data.columns.value"] == "EVENT_VALUE"
    assert "data.time_unit" not in guesses
    assert guesses["data.features.GENRES"] == "multi" and guesses["data.features.PRICE"] == "numeric"
    assert guesses["data.available_from"] == "PUBLISHED_AT"
    assert guesses["serve.outcomes"] == {"View": 1.0, "Purchase": 5.0}
    assert guesses["evaluate.protocol"] == "with_repeats"


def test_the_layout_of_recbole(tmp_path):
    rows = [(user, item, 4.0, float(time.timestamp())) for user, item, time in log()]
    header = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    guesses = as_dict(guess_settings(write_csv(tmp_path / "x.inter", header, rows, "\t"), None, {}))
    assert [
        guesses[f"data.columns.{name}"] for name in ("user_id", "item_id", "value", "timestamp")
    ] == header[:2] + header[2:]


TIMES = {
    "iso": lambda time: time.isoformat(sep=" "),
    "seconds": lambda time: int(time.replace(tzinfo=dt.UTC).timestamp()),
    "milliseconds": lambda time: 1000 * int(time.replace(tzinfo=dt.UTC).timestamp()),
    "digits": lambda time: f"{time:%Y%m%d%H%M}",
    "german": lambda time: f"{time:%d.%m.%Y %H:%M}",
    "worded": lambda time: f"{time:%d %b %Y %I:%M %p}",
}


@settings(max_examples=12, deadline=None)
@given(
    names=st.tuples(
        st.sampled_from(["user", "Customer ID", "visitor-id", "UID"]),
        st.sampled_from(["SKU", "productId", "item", "movie_id"]),
        st.sampled_from(["time", "Created At", "event_time", "ts"]),
    ),
    order=st.permutations([0, 1, 2]),
    written=st.sampled_from(sorted(TIMES)),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
)
def test_guesses_prepare_the_same_data_however_a_log_is_written(
    tmp_path_factory, names, order, written, delimiter
):
    folder = tmp_path_factory.mktemp("guess")
    rows = [(user, item, TIMES[written](time)) for user, item, time in log()]
    path = folder / "log.csv"
    write_csv(path, [names[n] for n in order], [[row[n] for n in order] for row in rows], delimiter)
    write_settings(folder / "guessed.yaml", [], [str(path)])
    guessed = load_settings(folder / "guessed.yaml")

    plain = pa.table(
        {
            "user_id": [user for user, _, _ in log()],
            "item_id": [item for _, item, _ in log()],
            "timestamp": pa.array([time for *_, time in log()], pa.timestamp("us", "UTC")),
        }
    )
    pq.write_table(plain, folder / "plain.parquet")
    expected = prepared(folder / "a", events=[folder / "plain.parquet"])
    columns = json.dumps(dict(guessed.data.columns))
    actual = prepared(
        folder / "b",
        f"data.columns={columns}",
        f"data.time_unit={json.dumps(guessed.data.time_unit)}",
        events=[path],
    )
    assert (actual.n_users, actual.n_items, actual.n_events) == (40, expected.n_items, 600)
    assert actual.as_of_s == expected.as_of_s


@pytest.mark.parametrize(
    ("header", "time", "overrides", "words"),
    [
        (("who", "item_id", "time"), "2024-03-01", [], "data.columns.user_id=COLUMN"),
        (("user_id", "what", "time"), "2024-03-01", [], "what (60 values)"),
        (("user_id", "item_id", "time"), "04/05/2024", [], "data.time_unit='%d/%m/%Y'"),
        (("user_id", "item_id", "time"), "2024-03-01", ["data.columns.user_id=nobody"], "no column 'nobody'"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for_and_no_file_is_left(tmp_path, header, time, overrides, words):
    rows = [(user, item, time) for user, item, _ in log()]
    path = write_csv(tmp_path / "log.csv", header, rows)
    with pytest.raises(DataError) as error:
        write_settings(tmp_path / "r.yaml", overrides, [path])
    assert words in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.csv"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1::1193::5::978300760\n1::661::3::978302109\n", "first line looks like data"),
        ("1,1193,5,978300760\n1,661,3,978302109\n", "first line looks like data"),
        ("user_id,item_id,day\n1,2,17\n1,3,18\n", "day is named like a time, but 17 is not one"),
        (
            "user_id,item_id,born,bought\n1,2,1990-01-01,2024-03-01\n1,3,1990-01-01,2024-03-02\n",
            "several columns",
        ),
        ("user_id,item_id,time\n1,2,2024-03-01\n".encode("utf-16"), "UTF-16"),
        ("user_id,user_id,time\n1,2,2024-03-01\n", "twice"),
        ("", "empty"),
        ("user_id,item_id,time\n", "no rows"),
    ],
)
def test_a_file_that_is_no_log_is_named_with_the_fix(tmp_path, text, words):
    path = tmp_path / "log.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words) as error:
        write_settings(tmp_path / "r.yaml", [], [str(path)])
    assert error.value.fix and not (tmp_path / "r.yaml").exists()


BOUGHT = [("user_id", "item_id", "time", "order_id")] + [
    (user, item, f"{time:%Y-%m-%d %H:%M}", "" if n % 10 else f"o{n}")
    for n, (user, item, time) in enumerate(log())
]


def guess_csv(tmp_path, rows, items=None, given=None):
    path = write_csv(tmp_path / "log.csv", rows[0], rows[1:])
    return as_dict(guess_settings(path, items, given or {}))


def test_repeats_count_events_without_a_basket(tmp_path):
    again = BOUGHT[1:200]
    guesses = guess_csv(tmp_path, [*BOUGHT, *again, *again])
    assert guesses["data.columns.basket"] == "order_id" and guesses["score.filter_seen"] is False
    empty = [(*row[:3], "") for row in BOUGHT[1:]]
    guesses = guess_csv(tmp_path, [BOUGHT[0], *empty])
    assert "data.columns.basket" not in guesses and guesses["score.filter_seen"] is True


@pytest.mark.parametrize("form", ["{:020d}", "1e{}", "000{}", "{}.0", "{:018d}"])
def test_ids_of_digits_stay_apart(tmp_path, form):
    rows = [("user_id", "item_id", "time")]
    rows += [(form.format(10**7 + 7 * int(user[1:])), item, time) for user, item, time in log()]
    guesses = guess_csv(tmp_path, rows)
    assert guesses["score.filter_seen"] is True
    write_settings(tmp_path / "r.yaml", [], [str(tmp_path / "log.csv")])
    assert "40 values" in (tmp_path / "r.yaml").read_text()


def test_a_log_without_times_is_split_at_random_or_by_its_order(tmp_path):
    rows = [("user_id", "item_id"), *(row[:2] for row in log())]
    assert guess_csv(tmp_path, rows)["split.kind"] == "random"
    write_settings(tmp_path / "a.yaml", [], [str(tmp_path / "log.csv")])
    rows = [("user_id", "item_id", "order_number"), *((*row[:2], n) for n, row in enumerate(log()))]
    guesses = guess_csv(tmp_path, rows)
    assert guesses["data.columns.position"] == "order_number" and guesses["split.kind"] == "leave_one_out"
    write_settings(tmp_path / "b.yaml", [], [str(tmp_path / "log.csv")])


@pytest.mark.parametrize(("name", "dropped"), [("Quantity", True), ("score", False), ("rating", False)])
def test_values_below_zero_are_returns_of_quantities_alone(tmp_path, name, dropped):
    rows = [("user_id", "item_id", "time", name)]
    rows += [(*row, (-1, 0, 1, 2)[n % 4]) for n, row in enumerate(log())]
    guesses = guess_csv(tmp_path, rows)
    assert guesses["data.columns.value"] == name and ("data.min_value" in guesses) == dropped
    write_settings(tmp_path / "r.yaml", [], [str(tmp_path / "log.csv")])
    assert ("50.0% of the rows have a Quantity below 1" in (tmp_path / "r.yaml").read_text()) == dropped


def test_one_feature_decided_leaves_the_others(tmp_path):
    items = write_csv(
        tmp_path / "i.csv",
        ("item_id", "brand", "price"),
        [(f"sku-{n}", f"b{n % 3}", 1.5 * n) for n in range(60)],
    )
    path = write_csv(tmp_path / "log.csv", BOUGHT[0], BOUGHT[1:])
    write_settings(tmp_path / "a.yaml", ["data.features.brand=text"], [path, items])
    assert load_settings(tmp_path / "a.yaml").data.features == {"brand": "text", "price": "numeric"}
    write_settings(tmp_path / "b.yaml", ["data.features={brand: text}"], [path, items])
    assert load_settings(tmp_path / "b.yaml").data.features == {"brand": "text"}


def test_odd_columns_of_items_are_read_or_left_out(tmp_path):
    lines = [
        {
            "item_id": f"sku-{n}",
            "tags": f"red, x{n % 5}",
            "details": {"a": n},
            "embedding": [0.5, 0.25 * n],
            "title": "\x07 bell" if n == 0 else f"a thing of {n}",
            "created_at": 1_700_000_000 + n,
        }
        for n in range(60)
    ]
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = write_csv(tmp_path / "log.csv", BOUGHT[0], BOUGHT[1:])
    write_settings(tmp_path / "a.yaml", [], [path, str(tmp_path / "i.jsonl")])
    data = load_settings(tmp_path / "a.yaml").data
    assert data.features == {"tags": "multi", "embedding": "vector", "title": "text"}
    assert data.available_from == "created_at" and "not used: details" in (tmp_path / "a.yaml").read_text()


def test_ids_of_another_type_in_another_file_are_text(tmp_path):
    for name, ids in (("a", [1, 2, 1, 2]), ("b", ["x", "y", "x", "y"])):
        table = {"user_id": ids, "item_id": ["p", "q", "r", "s"], "time": ["2024-03-01"] * 4}
        (tmp_path / "events").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), tmp_path / "events" / f"{name}.parquet")
    guesses = as_dict(guess_settings(str(tmp_path / "events"), None, {}))
    assert guesses["data.columns.user_id"] == "user_id"


def test_a_byte_order_mark_and_quotes_are_read(tmp_path):
    rows = [f'"{user}","{item}","{time:%Y-%m-%d %H:%M}"' for user, item, time in log()]
    (tmp_path / "log.csv").write_text("\ufeff" + "\n".join(['"user id","item id","time"', *rows]))
    write_settings(tmp_path / "r.yaml", [], [str(tmp_path / "log.csv")])
    assert load_settings(tmp_path / "r.yaml").data.columns["user_id"] == "user id"


def test_an_answer_to_the_question_is_enough(tmp_path):
    rows = [(user, item, "04/05/2024") for user, item, _ in log()]
    path = write_csv(tmp_path / "log.csv", ("who", "item_id", "time"), rows)
    answers = ["data.columns.user_id=who", "data.time_unit='%d/%m/%Y'"]
    write_settings(tmp_path / "r.yaml", answers, [path])
    data = load_settings(tmp_path / "r.yaml").data
    assert data.columns["user_id"] == "who" and data.time_unit == "%d/%m/%Y"


def test_an_existing_file_too_many_paths_and_a_template_without_data_are_refused(tmp_path):
    path = write_csv(
        tmp_path / "log.csv", ("user_id", "item_id", "time"), [(*row[:2], row[2]) for row in log()]
    )
    (tmp_path / "old.yaml").write_text("mine")
    for file, data, template, words in (
        ("old.yaml", [path], None, "exists"),
        ("new.yaml", [path, path, path], None, "folder that holds several files"),
        ("new.yaml", [], "shop", "--from-data"),
    ):
        with pytest.raises(RecrayError, match=words):
            write_settings(tmp_path / file, [], data, template)
    assert (tmp_path / "old.yaml").read_text() == "mine" and not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("template", ["shop", "news", "video"])
def test_a_template_gives_the_settings_of_the_model(tmp_path, template):
    path = write_csv(
        tmp_path / "log.csv", ("user_id", "item_id", "time"), [(*row[:2], row[2]) for row in log()]
    )
    write_settings(tmp_path / "r.yaml", [], [path], template)
    written = load_settings(tmp_path / "r.yaml")
    assert written.model != load_settings(None).model
    assert written.data.features == {} and written.score.caps == {}


def test_kinds_of_features(tmp_path):
    table = pa.table(
        {
            "item_id": [f"i{n}" for n in range(200)],
            "colour": ["red", "green"] * 100,
            "title": [f"a thing called {n}" for n in range(200)],
            "ean": [4_000_000_000_000 + n for n in range(200)],
            "stock": [n % 90 for n in range(200)],
            "size": [n % 4 for n in range(200)],
            "price": [0.5 * n for n in range(200)],
            "tags": [["a"], ["a", "b"]] * 100,
            "embedding": [[0.1, 0.2]] * 200,
            "picture": [f"https://shop.example/{n}.png" for n in range(200)],
            "currency": ["EUR"] * 200,
            "nothing": pa.nulls(200),
        }
    )
    pq.write_table(table, tmp_path / "i.parquet")
    events = write_csv(
        tmp_path / "e.csv", ("user_id", "item_id", "time"), [(*row[:2], row[2]) for row in log()]
    )
    guesses = as_dict(guess_settings(events, str(tmp_path / "i.parquet"), {}))
    kinds = {
        name.removeprefix("data.features."): kind
        for name, kind in guesses.items()
        if name.startswith("data.features.")
    }
    assert kinds == {
        "colour": "categorical",
        "title": "text",
        "stock": "numeric",
        "size": "categorical",
        "price": "numeric",
        "tags": "multi",
        "embedding": "vector",
    }


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PATTERNS), st.datetimes(dt.datetime(1990, 1, 1), dt.datetime(2060, 1, 1)))
def test_a_pattern_reads_what_it_writes(pattern, moment):
    text = moment.strftime(pattern)
    (parsed,) = parse_pattern(pa.array([text]), pattern).to_pylist()
    assert parsed == dt.datetime.strptime(text, pattern)


@pytest.mark.parametrize(
    "text", ["30/02/2024 10:00", "1/3/2024", "x 1/3/2024 10:00", "", None, "1/3/24 10:00"]
)
def test_a_pattern_refuses_everything_else(text):
    assert parse_pattern(pa.array([text], pa.string()), "%d/%m/%Y %H:%M").to_pylist() == [None]


def test_a_log_in_a_pattern_is_prepared_and_its_invalid_days_are_counted(tmp_path):
    rows = [(user, item, f"{time:%d/%m/%Y %H:%M}") for user, item, time in log()]
    rows[7] = (*rows[7][:2], "30/02/2024 10:00")
    pacsv.write_csv(
        pa.table(
            dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
        ),
        tmp_path / "e.csv",
    )
    data = prepared(tmp_path, "data.time_unit='%d/%m/%Y %H:%M'", events=[tmp_path / "e.csv"])
    assert (data.n_events, data.manifest["bad_rows"]) == (599, 1)
