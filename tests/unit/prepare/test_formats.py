"""What files of other people hold that Parquet of one's own would not: odd JSON, CSV with texts of several
lines, lists as text.
"""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_input import DAY, T, histories, prepared, rows, written

from recray.errors import DataError
from recray.prepare import formats
from recray.prepare.files import InputFile
from recray.prepare.texts import parse_list


def lines(**changed):
    """The rows of `rows` as JSON objects, the seventh with other values."""
    row = rows().to_pylist()
    row[7] |= changed
    return row


def as_json(path, objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


@pytest.mark.parametrize("odd", [["3"], "u\ud83d", [2**64], {"a": ["\ud800"]}])
def test_what_is_no_single_value_spoils_its_own_row_alone(tmp_path, odd):
    objects = [{**one, "event": "view", "value": 1} for one in lines()]
    for column_index, column in enumerate(("user_id", "item_id", "event", "value", "timestamp")):
        objects[20 + column_index][column] = odd
    data = prepared(
        tmp_path, "data.max_invalid_fraction=0.1", events=[as_json(tmp_path / "e.jsonl", objects)]
    )
    assert (data.n_events, data.manifest["bad_rows"], data.n_users) == (195, 5, 20)
    assert pa.types.is_integer(data.user_type) and data.event_types == ["view"]


def test_the_last_line_alone_of_a_batch_is_no_other_type(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LINES", 50)
    objects = [*lines(), {"user_id": [3], "item_id": "i1", "timestamp": T}]
    data = prepared(tmp_path, events=[as_json(tmp_path / "e.jsonl", objects)])
    assert (data.n_events, data.manifest["bad_rows"]) == (200, 1)
    with pytest.raises(DataError, match="column for user_id has type list"):
        prepared(
            tmp_path / "all",
            events=[
                as_json(tmp_path / "all.jsonl", [{**one, "user_id": [one["user_id"]]} for one in lines()])
            ],
        )


def test_columns_that_are_not_asked_for_may_hold_anything(tmp_path):
    objects = lines(
        comment="half \ud83d", payload={"id": 2**70, "n": [1, "a", None, {"\ud800": 1}]}, **{"\udc00": 1}
    )
    assert prepared(tmp_path, events=[as_json(tmp_path / "e.jsonl", objects)]).n_events == 200


@pytest.mark.parametrize("second_value", [None, [], ["a", 1], [1.5], "a,b"])
def test_lists_that_change_their_type_from_line_to_line_are_lists(tmp_path, monkeypatch, second_value):
    monkeypatch.setattr(formats, "LINES", 4)
    items = [{"item_id": f"i{n}", "tags": ["a", "b"] if n < 4 else second_value} for n in range(7)]
    overrides = [f"data.items={as_json(tmp_path / 'i.jsonl', items)}", "data.features={tags: multi}"]
    tags = written(tmp_path, rows(), *overrides).items["tags"].to_pylist()
    expected = {
        "None": (None, []),
        "[]": ([],),
        "['a', 1]": (["a", "1"],),
        "[1.5]": (["1.5"], [1.5]),
        "a,b": (["a", "b"],),
    }
    assert tags[0] == ["a", "b"] and tags[-1] in expected[str(second_value)]


def test_an_item_file_of_json_lines_that_lacks_a_column_has_nothing_there(tmp_path):
    folder = tmp_path / "items"
    folder.mkdir()
    as_json(folder / "a.jsonl", [{"item_id": f"i{n}", "price": n} for n in range(4)])
    as_json(folder / "b.jsonl", [{"item_id": f"i{n}"} for n in range(4, 7)])
    data = written(tmp_path, rows(), f"data.items={folder}", "data.features={price: numeric}")
    assert data.items["price"].to_pylist()[:3] == [0, 1, 2] and data.items["price"].null_count == 3
    with pytest.raises(DataError, match="has no column 'cost'"):
        written(tmp_path, rows(), f"data.items={folder / 'a.jsonl'}", "data.features={cost: numeric}")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_known_whatever_they_begin_with(tmp_path, start):
    folder = tmp_path / "events"
    folder.mkdir()
    objects = [{**one, "comment": "x" * (70_000 if n == 0 else 1)} for n, one in enumerate(lines())]
    (folder / "a.json").write_bytes(start + as_json(tmp_path / "a", objects).read_bytes())
    assert prepared(tmp_path, events=[folder]).n_events == 200


@pytest.mark.parametrize("title", ["two\nlines", "of\nthree\nlines", "7,8\n9"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_texts_of_several_lines_are_read(tmp_path, title, position):
    table = pa.table({"item_id": list(range(7)), "price": [n / 2 for n in range(7)]})
    table = table.add_column(
        position, "title", pa.array([title if n == 4 else f"thing {n}" for n in range(7)])
    )
    pacsv.write_csv(table, tmp_path / "items.csv")
    data = rows().set_column(1, "item_id", pa.array([n % 7 for n in range(200)]))
    titles = written(
        tmp_path, data, f"data.items={tmp_path / 'items.csv'}", "data.features={title: text, price: numeric}"
    )
    assert (
        titles.items["title"].to_pylist()[4] == title
        and titles.items["price"].to_pylist() == table["price"].to_pylist()
    )


@pytest.mark.parametrize(("opened", "closed"), [(3, 4), (0, 150)])
def test_a_stray_quote_that_makes_one_row_of_many_refuses_the_file(tmp_path, opened, closed):
    text = [f"{u},view {n},{T + n * DAY},{n % 7}" for u in range(20) for n in range(10)]
    text[opened] = text[opened].replace("view", '"view')
    text[closed] = text[closed].replace(f"view {closed % 10}", f'view {closed % 10}"')
    (tmp_path / "e.csv").write_text("\n".join(["user_id,event,timestamp,item_id", *text, ""]))
    with pytest.raises(
        DataError, match=rf"a quote in line {opened + 2} opens a text of {closed - opened + 1} lines"
    ):
        prepared(tmp_path, events=[tmp_path / "e.csv"])


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_part_with_the_names_alone_has_no_rows(tmp_path, end):
    pacsv.write_csv(rows(), tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("user_id,item_id,timestamp" + end)
    assert prepared(tmp_path, events=[tmp_path / "a.csv", tmp_path / "b.csv"]).n_events == 200


def test_a_part_without_rows_says_nothing_of_types(tmp_path):
    folder = tmp_path / "events"
    folder.mkdir()
    pq.write_table(rows(), folder / "a.parquet")
    pq.write_table(
        pa.table({name: pa.array([], pa.string()) for name in ("user_id", "item_id", "timestamp")}),
        folder / "b.parquet",
    )
    assert pa.types.is_integer(prepared(tmp_path, events=[folder]).user_type)


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"PK\x03\x04", b"PAR1", b"BZh9"])
def test_a_csv_file_that_is_something_else_is_called_what_it_is(tmp_path, magic):
    (tmp_path / "e.csv").write_bytes(magic + bytes(range(200)))
    with pytest.raises(DataError, match="is not CSV: its first bytes are those of (gzip|zip|Parquet|bzip2)"):
        formats.open_file(InputFile(str(tmp_path / "e.csv"), "csv")).names  # noqa: B018


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_value_that_is_no_number_is_an_invalid_row(tmp_path, kind):
    table = rows().append_column("value", pa.array(["1,50" if n == 5 else "2.5" for n in range(200)]))
    path = tmp_path / f"e.{kind}"
    if kind == "csv":
        pacsv.write_csv(table, path)
    elif kind == "jsonl":
        as_json(path, table.to_pylist())
    else:
        pq.write_table(table, path)
    data = prepared(tmp_path, events=[path])
    assert data.n_events == 199 and data.manifest["reasons"] == {"value is not a number": 1}


@given(st.lists(st.text("ab ,'\"\\é|", min_size=1, max_size=5), max_size=4))
def test_a_list_is_the_same_however_it_is_written(values):
    assert parse_list(json.dumps(values)) == values
    assert parse_list(repr(values)) == values
    assert parse_list(repr(tuple(values))) == values
    plain = [value for value in values if value.strip() and not set("'\"\\,") & set(value)]
    if plain:
        assert parse_list("[" + " ".join(map(repr, plain)) + "]") == plain  # as numpy does


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("['rock', nan]", ["rock", None]),
        ("[rock, pop]", ["rock", "pop"]),
        ("[1 2]", ["1", "2"]),
        ("{'b', 'a'}", ["a", "b"]),
        ("frozenset({'a'})", ["a"]),
        ("[Live] at home", None),
        ("(feat. somebody)", None),
        ("{curly}", None),
        ("", None),
    ],
)
def test_texts_that_are_lists_and_texts_that_are_none(text, values):
    assert parse_list(text) == values


def test_an_identifier_with_blanks_around_it_is_said(tmp_path):
    table = rows().set_column(0, "user_id", pa.array([f"{n % 20}{' ' * (n < 3)}" for n in range(200)]))
    data = written(tmp_path, table)
    assert data.n_users == 23 and any(
        note.startswith("3 ids in events begin or end with a blank") for note in data.said
    )


def test_identifiers_are_as_long_as_the_endpoint_takes_them(tmp_path):
    table = rows().set_column(
        1, "item_id", pa.array(["x" * (1001 if n == 9 else 1000 - n % 7) for n in range(200)])
    )
    data = written(tmp_path, table)
    assert data.manifest["reasons"] == {"item_id has more than 1000 letters": 1} and data.n_items == 7


def test_one_price_in_two_precisions_is_one_price(tmp_path):
    folder = tmp_path / "items"
    folder.mkdir()
    for name, kind, ids in (("a", pa.float32(), range(4)), ("b", pa.float64(), range(4, 7))):
        pq.write_table(
            pa.table({"item_id": [f"i{n}" for n in ids], "price": pa.array([0.85] * len(ids), kind)}),
            folder / f"{name}.parquet",
        )
    assert set(
        written(tmp_path, rows(), f"data.items={folder}", "data.features={price: numeric}")
        .items["price"]
        .to_pylist()
    ) == {0.85}


def test_numbers_in_the_names_of_folders_are_numbers(tmp_path):
    for n in range(7):
        folder = tmp_path / "items" / f"price={n}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"item_id": [f"i{n}"]}), folder / "a.parquet")
    prices = written(tmp_path, rows(), f"data.items={tmp_path / 'items'}", "data.features={price: numeric}")
    assert prices.items["price"].to_pylist() == list(range(7))


def test_a_folder_under_two_names_is_read_once_and_said(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    pq.write_table(rows(), real / "a.parquet")
    for name in ("event=view", "event=buy"):
        (tmp_path / "log").mkdir(exist_ok=True)
        (tmp_path / "log" / name).symlink_to(real)
    data = prepared(tmp_path, events=[tmp_path / "log"])
    assert data.n_events == 200 and any(
        "a folder that is already read under another name" in note for note in data.said
    )


def test_what_recray_wrote_below_the_events_is_no_event(tmp_path):
    pq.write_table(rows(), tmp_path / "e.parquet")
    for _ in range(2):
        data = prepared(tmp_path, "data.shards=3", events=[tmp_path])
        assert data.n_events == 200 and data.said == []


def test_the_log_of_a_table_is_said(tmp_path):
    (tmp_path / "table" / "_delta_log").mkdir(parents=True)
    pq.write_table(rows(), tmp_path / "table" / "e.parquet")
    assert any("_delta_log" in note for note in prepared(tmp_path, events=[tmp_path / "table"]).said)


@pytest.mark.parametrize("kind", ["nanoseconds", "text"])
def test_rows_that_differ_below_the_microsecond_are_two(tmp_path, kind):
    times = [f"2024-03-0{1 + n % 9}T10:00:00.000000{n % 2}07Z" for n in range(200)]
    texts = (
        pa.array(times)
        if kind == "text"
        else pa.array(times).cast(pa.timestamp("ns", "UTC")).cast(pa.int64())
    )
    table = pa.table(
        {"user_id": [n // 18 for n in range(180)], "item_id": ["i1"] * 180, "timestamp": texts[:180]}
    )
    assert written(tmp_path, table, "data.duplicates=drop").n_events == 180


@pytest.mark.parametrize(("zone", "clock"), [("Asia/Tokyo", "120000"), ("America/Los_Angeles", "")])
def test_digits_of_a_date_are_of_the_zone_of_the_log(tmp_path, zone, clock):
    days = [f"2024-03-{1 + n % 9:02}" for n in range(200)]
    digits = rows().set_column(2, "timestamp", pa.array([int(day.replace("-", "") + clock) for day in days]))
    text = rows().set_column(2, "timestamp", pa.array([day + (" 12:00:00" if clock else "") for day in days]))
    of_digits, theirs = (written(tmp_path, table, f"data.timezone={zone}") for table in (digits, text))
    assert histories(of_digits) == histories(theirs) and of_digits.as_of_s == theirs.as_of_s


@settings(max_examples=8)
@given(st.data())
def test_a_log_is_the_same_in_every_format(tmp_path_factory, data):
    word = st.text("ab1 ,;\"'\\é|", min_size=1, max_size=4).filter(lambda text: text.strip())
    users, items = (data.draw(st.lists(word, min_size=2, max_size=5, unique=True)) for _ in range(2))
    table = pa.table(
        {
            "user_id": [users[n % len(users)] for n in range(40)],
            "item_id": [items[n % len(items)] for n in range(40)],
            "timestamp": [T + n * DAY for n in range(40)],
            "event": [f"type {n % 3}" for n in range(40)],
        }
    )
    folder = tmp_path_factory.mktemp("formats")
    pq.write_table(table, folder / "e.parquet")
    pacsv.write_csv(table, folder / "e.csv")
    as_json(folder / "e.jsonl", table.to_pylist())
    datasets = [
        prepared(folder / kind, events=[folder / f"e.{kind}"]) for kind in ("parquet", "csv", "jsonl")
    ]
    texts = [{str(user): history for user, history in histories(one).items()} for one in datasets]
    assert texts[0] == texts[1] == texts[2]
