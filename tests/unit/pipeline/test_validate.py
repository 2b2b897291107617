"""`recray validate` says all that is wrong at once, and refuses what a nightly run would refuse later."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray import pipeline
from recray.config import load_settings
from recray.errors import RecrayError
from recray.prepare import rehearse
from recray.testing.published import prepare_here

pytestmark = pytest.mark.second

T, DAY = 1_709_251_200, 86_400


def shop(tmp_path, price=None, ids=None, **columns):
    count = 600
    events = {
        "user_id": [n % 40 for n in range(count)],
        "item_id": [f"i{n * 7 % 20}" for n in range(count)],
        "timestamp": [T + n * DAY // 10 for n in range(count)],
        **columns,
    }
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    prices = pa.array([0.85, *np.linspace(1, 9, 19).round(2).tolist()], price or pa.float32())
    pq.write_table(
        pa.table({"item_id": ids or [f"i{n}" for n in range(20)], "price": prices, "brand": ["a", "b"] * 10}),
        tmp_path / "items.parquet",
    )


def validate(tmp_path, *overrides):
    said = []
    where = [
        f"data.events=[{tmp_path / 'events.parquet'}]",
        f"data.items={tmp_path / 'items.parquet'}",
        f"storage.root={tmp_path / 'root'}",
    ]
    options = ["data.features={price: numeric, brand: categorical}", *overrides]
    result = pipeline.run(
        "validate", load_settings(None, [*where, *options]), None, lambda text, **_: said.append(text)
    )
    return result, "\n".join(said)


def test_a_page_says_what_will_be_learned_and_nothing_is_written(tmp_path):
    shop(tmp_path)
    result, said = validate(tmp_path)
    assert (
        result.status == "ok"
        and result.warnings == []
        and json.loads(result.to_json())["metrics"]["users"] == 40
    )
    for words in (
        "events     600 rows in 1 file, ordered by timestamp",
        "users      40; events of a user: half have up to 15, nine in ten up to 15, one 15",
        "items      20; 0 without events; a tenth of the items has 10% of the events",
        "events     600 from 2024-03-01 to 2024-04-29: interaction 600",
        "invalid    0 rows",
        "duplicates 0 rows equal another and are kept",
        "feature    price: numeric, 100% of the items have one, 20 values",
        "training   5",
        "test       40 users, from 2024-",
        " an epoch on ",
    ):
        assert words in said, said
    assert not (tmp_path / "root").exists()


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    shop(tmp_path)
    with pytest.raises(RecrayError) as error:
        validate(
            tmp_path,
            "data.columns={user_id: who, basket: order, event: kind}",
            "data.context=[device]",
            "data.available_from=born",
            "storage.root=here",
        )
    for named in ("'who'", "'order'", "'kind'", "'device'", "'born'", "'here' is relative"):
        assert named in error.value.message, error.value.message


def test_ten_faults_of_settings_columns_rows_and_rules_are_said_in_one_run(tmp_path):
    shop(tmp_path, user_id=[None if n % 20 == 7 else n % 40 for n in range(600)])
    items = pq.read_table(tmp_path / "items.parquet")
    items = items.append_column("size", pa.array(["wide"] * 20))
    pq.write_table(pa.concat_tables([items, items.slice(3, 2)]), tmp_path / "items.parquet")
    with pytest.raises(RecrayError) as error:
        validate(
            tmp_path,
            "storage.root=here",
            "serve.keys=/nowhere.yaml",
            "data.columns.basket=order",
            "data.context=[device]",
            "data.features={price: numeric, colour: categorical, size: numeric, brand: categorical}",
            "score.exclude=[brand=zzz]",
            "policy.actions=[event.nope]",
        )
    lines = error.value.message.splitlines()
    for named in (
        "'here' is relative",
        "/nowhere.yaml cannot be read",
        "no column 'order'",
        "no column 'device'",
        "no column 'colour'",
        "feature size has type string",
        "2 item ids occur more than once",
        "30 of 600 rows are invalid (30 × user_id is null)",
        "there is no 'nope'",
        "no item has brand=zzz",
    ):
        assert sum(named in line for line in lines) == 1, (named, lines)
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({"timestamp": [19_783 + n // 10 for n in range(600)]}, [], "data.time_unit=days if they are days"),
        ({"timestamp": list(range(600))}, [], "whole numbers from 0 to 599"),
        ({"user_id": ["", " "] * 300}, [], "600 of 600 rows are invalid"),
        (
            {"item_id": [f" i{n * 7 % 20}" for n in range(600)]},
            [],
            r"no item of data.events is in data.items: data.events has ' i\d+'.*'i\d+'",
        ),
        ({"item_id": [f"I{n * 7 % 20}" for n in range(600)]}, [], "no item of data.events is in data.items"),
        ({}, ["split.test_from=2031-01-01"], "impossible split"),
        ({}, ["data.min_item_events=1000"], "no item has 1000 events"),
        ({}, ["data.min_value=2"], "600 have a value below data.min_value"),
        ({}, ["score.exclude=[brand=c]"], "score: no item has brand=c"),
        ({}, ["score.boosts={price=0.86: 1}"], "score: no item has price=0.86"),
        (
            {},
            ["score.filter_seen=true", "score.seen_events=[buys]"],
            "score.seen_events: no event type 'buys'",
        ),
    ],
)
def test_what_prepare_would_refuse_is_refused(tmp_path, change, overrides, message):
    shop(tmp_path, **change)
    with pytest.raises(RecrayError, match=message):
        validate(tmp_path, *overrides)


def test_items_that_do_not_join_are_a_warning_with_examples_of_both_sides(tmp_path):
    shop(tmp_path, item_id=[f"i{n * 7 % 20}" if n % 10 else f"I{n % 20}" for n in range(600)])
    result, _ = validate(tmp_path)
    (note,) = result.warnings
    assert (
        note.startswith("90.0% of the events and ")
        and "data.events has 'I0'" in note
        and "data.items" in note
    )


@pytest.mark.parametrize("price", [pa.float32(), pa.float64(), pa.decimal128(10, 2)])
@pytest.mark.parametrize("rule", ["score.exclude=[price=0.85]", "score.boosts={price=0.850: 1}"])
def test_a_rule_finds_a_price_in_the_precision_of_its_column(tmp_path, price, rule):
    from decimal import Decimal

    prices = (
        None
        if not pa.types.is_decimal(price)
        else [Decimal("0.85"), *(Decimal(f"{n}.00") for n in range(1, 20))]
    )
    shop(tmp_path, price=price if prices is None else None)
    if prices is not None:
        items = pq.read_table(tmp_path / "items.parquet")
        pq.write_table(items.set_column(1, "price", pa.array(prices, price)), tmp_path / "items.parquet")
    assert validate(tmp_path, rule)[0].status == "ok"


@pytest.mark.parametrize(
    ("change", "override", "noted"),
    [
        ({}, None, None),
        ({}, "data.min_user_events=12", None),
        ({}, "data.min_item_events=20", None),
        ({"user_id": [None] * 4 + [n % 40 for n in range(596)]}, None, "4 of 250 rows are invalid"),
        ({}, "split.test_from=2024-04-29", "impossible split"),
    ],
)
def test_a_large_log_is_looked_at_in_part_and_what_only_the_whole_can_say_is_no_error(
    tmp_path, monkeypatch, change, override, noted
):
    monkeypatch.setattr(rehearse, "SAMPLE_ROWS", 300)
    shop(tmp_path, **change)
    pq.write_table(pq.read_table(tmp_path / "events.parquet"), tmp_path / "events.parquet", row_group_size=50)
    overrides = [] if override is None else [override]
    result, said = validate(tmp_path, *overrides)
    assert "in a sample of 250 of 600 rows" in said and (
        result.metrics["rows"],
        result.metrics["sample_rows"],
    ) == (600, 250)
    assert result.metrics["events"] == 250 - (4 if change else 0)
    assert ["sample of 250" in note for note in result.warnings] == (
        [] if noted is None else [True] * len(result.warnings)
    )
    assert noted is None or noted in said
    where = [
        f"data.events=[{tmp_path / 'events.parquet'}]",
        f"data.items={tmp_path / 'items.parquet'}",
        f"storage.root={tmp_path / 'root'}",
    ]
    assert (
        prepare_here(load_settings(None, [*where, "data.features={price: numeric}", *overrides])).n_events
        >= 596
    )


def test_every_file_is_looked_at_and_what_a_sample_lacks_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "SAMPLE_ROWS", 300)
    shop(tmp_path)
    events = pq.read_table(tmp_path / "events.parquet")
    (tmp_path / "log").mkdir()
    for name in ("cart", "purchase", "view"):
        table = events.append_column("event", pa.array([name] * 600)).append_column(
            "value", pa.array([5 if name == "purchase" else 0] * 600)
        )
        pq.write_table(table, tmp_path / "log" / f"{name}.parquet", row_group_size=100)
    items = [
        f"data.events=[{tmp_path / 'log'}]",
        "policy.actions=[event.purchase]",
        "data.min_value=1",
        "score.exclude=[brand=rare]",
    ]
    result, said = validate(tmp_path, *items)
    assert result.metrics["sample_rows"] == 300 and "event.purchase" not in said
    assert any(
        "in a sample of 300 of 1800 rows: score: no item has brand=rare" in note for note in result.warnings
    )


def test_what_is_wrong_with_many_files_is_said_once(tmp_path):
    shop(tmp_path)
    (tmp_path / "log").mkdir()
    for n in range(30):
        (tmp_path / "log" / f"{n}.parquet").write_bytes((tmp_path / "events.parquet").read_bytes())
    with pytest.raises(RecrayError) as error:
        validate(tmp_path, f"data.events=[{tmp_path / 'log'}]", "data.columns={user_id: users_id}")
    (line,) = error.value.message.splitlines()
    assert (
        "0.parquet has no column 'users_id'" in line
        and "29 more files" in line
        and error.value.fix.endswith("data.columns.user_id=user_id")
    )


def test_one_problem_does_not_hide_the_next(tmp_path):
    shop(
        tmp_path,
        item_id=[f"I{n * 7 % 20}" for n in range(600)],
        user_id=[None] * 60 + [n % 40 for n in range(540)],
    )
    (tmp_path / "taken").touch()
    overrides = (
        "split.test_from=2031-01-01",
        "policy.actions=[event.bought, weight.size, recency]",
        f"storage.root={tmp_path / 'taken' / 'root'}",
    )
    with pytest.raises(RecrayError) as error:
        validate(tmp_path, *overrides)
    for named in (
        "60 of 600 rows are invalid (60 × user_id is null), for example user_id None, item_id 'I0', "
        "timestamp '1709251200' in",
        "no item of data.events is in data.items",
        "impossible split",
        "event.bought: there is no 'bought'",
        "weight.size",
        "taken is no folder",
    ):
        assert named in error.value.message, error.value.message
    assert "recray-validate" not in error.value.message and "quarantine" not in error.value.message
    with pytest.raises(RecrayError) as error:
        validate(tmp_path, "data.features={size: numeric, brand: vector, colour: text}", *overrides)
    for named in ("'size', 'colour'", "60 of 600 rows are invalid", "impossible split"):
        assert named in error.value.message, error.value.message


def test_rules_that_leave_nothing_are_refused(tmp_path):
    shop(tmp_path)
    with pytest.raises(RecrayError, match="score.exclude leaves no item"):
        validate(tmp_path, "score.exclude=[brand=a, brand=b]")
