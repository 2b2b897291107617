"""What a report says of the events since the previous run, against plain Python."""

import datetime as dt
import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recray.config import load_settings
from recray.report.drift import LEAST_SHARE, compare_inputs
from recray.report.runs import find_previous_as_of, sample_invalid_rows
from recray.storage import Storage
from recray.testing.published import prepare_here

START = dt.datetime(2024, 5, 1, tzinfo=dt.UTC)
TYPES = ("view", "cart", "purchase")


def prepare_rows(folder, rows, *overrides):
    """A data set of rows (user, item, type, hours after the start)."""
    lines = [f"{u},{i},{t},{(START + dt.timedelta(hours=h)).isoformat()}" for u, i, t, h in rows]
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,event,timestamp", *lines]) + "\n")
    words = [f"data.events=[{folder / 'events.csv'}]", f"storage.root={folder / 'root'}", *overrides]
    made = load_settings(None, [*words, "split.kind=leave_one_out", "data.shards=2"])
    return prepare_here(made), made


ROWS = st.lists(
    st.tuples(
        st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.sampled_from(TYPES), st.integers(1, 24 * 40)
    ),
    min_size=30,
    max_size=80,
    unique=True,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, cut=st.integers(24 * 5, 24 * 35))
def test_shares_and_counts_are_those_of_plain_python(tmp_path_factory, rows, cut):
    rows = [*rows, ("a", "u", "view", 1), ("b", "u", "view", 24 * 40)]
    dataset, _ = prepare_rows(tmp_path_factory.mktemp("drift"), dict.fromkeys(rows))
    previous_s = int((START + dt.timedelta(hours=cut)).timestamp())
    rows = list(dict.fromkeys(rows))
    before = [row for row in rows if cut - 28 * 24 < row[3] <= cut]
    after = [row for row in rows if row[3] > cut]
    change = compare_inputs(dataset, previous_s)
    if not before:
        assert change is None
        return
    assert change.events == len(after)
    assert change.new_items == len({i for _, i, _, _ in after} - {i for _, i, _, h in rows if h <= cut})
    assert change.new_users == len({u for u, _, _, _ in after} - {u for u, _, _, h in rows if h <= cut})
    (types,) = (shift for shift in change.shifts if shift.name == "event types")
    old, new = (Counter(t for _, _, t, _ in part) for part in (before, after))
    expected = {t: (old[t] / len(before), new[t] / len(after)) for t in old | new}
    assert dict(sorted((name, (b, a)) for name, b, a in types.classes)) == dict(sorted(expected.items()))
    floored = [tuple(max(share, LEAST_SHARE) for share in pair) for pair in expected.values()]
    assert types.psi == pytest.approx(sum((a - b) * math.log(a / b) for b, a in floored))
    for shift in change.shifts:
        for side in (1, 2):
            assert sum(part[side] for part in shift.classes) == pytest.approx(1.0)


def test_the_same_traffic_is_stable_and_another_one_is_not(tmp_path):
    steady = [(f"u{n % 40}", f"i{n % 25}", TYPES[n % 3], n % 960 + 1) for n in range(4000)]
    previous_s = int((START + dt.timedelta(hours=700)).timestamp())
    change = compare_inputs(prepare_rows(tmp_path, steady)[0], previous_s)
    assert {shift.name: shift.level for shift in change.shifts} == {
        "event types": "stable", "time of day": "stable", "items": "stable"
    }  # fmt: skip
    moved = [(u, f"new{i}" if h > 700 else i, "view" if h > 700 else t, h) for u, i, t, h in steady]
    (tmp_path / "moved").mkdir()
    change = compare_inputs(prepare_rows(tmp_path / "moved", moved)[0], previous_s)
    levels = {shift.name: shift.level for shift in change.shifts}
    assert levels["event types"] == levels["items"] == "large" and levels["time of day"] == "stable"
    assert change.new_items == 25


def test_holdout_users_alone_are_counted_where_privacy_demands_it(tmp_path):
    rows = [(f"u{n % 40}", f"i{n % 25}", TYPES[n % 3], n % 960 + 1) for n in range(2000)]
    dataset, _ = prepare_rows(tmp_path, rows, "split.holdout_users=0.3")
    previous_s = int((START + dt.timedelta(hours=700)).timestamp())
    every, held_out = (compare_inputs(dataset, previous_s, holdout_only=only) for only in (False, True))
    assert 0 < held_out.events < every.events
    users = {
        shard.user_ids[row].as_py()
        for shard in dataset.shards()
        for row in range(len(shard))
        if shard.queried[row]
    }
    assert held_out.events == len({row for row in rows if row[0] in users and row[3] > 700})


def test_the_previous_run_and_examples_of_invalid_rows_are_found(tmp_path):
    rows = [(f"u{n % 9}", f"i{n % 7}", "view", n + 1) for n in range(200)]
    dataset, made = prepare_rows(tmp_path, rows)
    assert find_previous_as_of(Storage(made.root()), dataset) is None
    rows.append(("u1", "i1", "view", 500))
    text = [(f"secret{n}", "", "view", 400) for n in range(3)]  # rows without an item
    later, made = prepare_rows(tmp_path, [*rows, *text], "data.max_invalid_fraction=0.05")
    assert find_previous_as_of(Storage(made.root()), later) == dataset.as_of_s
    assert later.manifest["reasons"] and sum(later.manifest["reasons"].values()) == 3
    examples = sample_invalid_rows(Storage(made.root()).quarantine(later.key))
    assert examples.keys() == later.manifest["reasons"].keys()
    assert "2024" in str(examples) and "secret" not in str(examples), "who it was stays out"
