import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import synthetic_overrides

from recray.config import load_settings
from recray.dataset.reader import Dataset, assign_buckets
from recray.errors import DamagedArtifactError, DataError, OutputExistsError, TooManyInvalidRowsError
from recray.evaluation.protocol import EvaluationQueries
from recray.prepare.files import join_uri
from recray.prepare.partition import LIVE_POSITION
from recray.prepare.prepare import prepare, prepare_key, run_in_process
from recray.prepare.split import quantile
from recray.testing.published import prepare_here


def table(rows, **types):
    names = ["user_id", "item_id", "timestamp"]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    columns["timestamp"] = pa.array(columns["timestamp"], types.get("timestamp", pa.int64()))
    return pa.table(columns)


ROWS = [(u, f"i{(u * 3 + t) % 7}", 1_600_000_000 + 86_400 * t + u) for u in range(20) for t in range(10)]


def dataset(tmp_path, rows=ROWS, overrides=(), as_of=None, source=None) -> Dataset:
    path = tmp_path / "events.parquet"
    pq.write_table(table(rows) if source is None else source, path)
    return prepare_here(
        load_settings(None, [f"data.events={path}", f"storage.root={tmp_path / 'root'}", *overrides]), as_of
    )


def everything(data: Dataset) -> dict:
    ids = [None, *data.items["item_id"].to_pylist()]
    content = {}
    for shard in data.shards():
        for row, user in enumerate(shard.user_ids.to_pylist()):
            history = shard.history(row)
            content[user] = [
                (ids[i], t) for i, t in zip(history.item_index, history.timestamp_s.tolist(), strict=True)
            ]
    return content


def test_histories_hold_every_event_in_order_of_time(tmp_path):
    shuffled = [ROWS[i] for i in np.random.default_rng(0).permutation(len(ROWS))]
    data = dataset(tmp_path, shuffled)
    assert everything(data) == {u: [(i, t) for v, i, t in ROWS if v == u] for u in range(20)}
    assert data.items["item_id"].to_pylist() == sorted({row[1] for row in ROWS})
    for number, shard in enumerate(data.shards()):
        assert (assign_buckets(shard.user_ids.to_pylist(), data.n_shards) == number).all()
        assert shard.user_ids.to_pylist() == sorted(shard.user_ids.to_pylist())


@pytest.mark.parametrize("dates", [False, True])
def test_the_data_end_with_the_last_event_of_those_who_are_held_out(tmp_path, dates):
    """So that nobody of whom something is learned is told by the second of their last event."""
    overrides = ["split.holdout_users=0.3", "split.kind=leave_one_out"]
    plain = dataset(tmp_path, overrides=overrides)
    held = {
        user
        for shard in plain.shards()
        for user in shard.user_ids.filter(pa.array(shard.holdout)).to_pylist()
    }
    assert 2 < len(held) < 10
    last = max(t for user, _, t in ROWS if user in held)
    protected = next(user for user in range(20) if user not in held)
    day = 86_400
    after_end = [(protected, "i0", t) for t in (last, last + 1, last + 3 * day)]

    def read(rows, as_of=None):
        if not dates:
            return dataset(tmp_path, rows, overrides, as_of)
        source = table(
            [(user, item, dt.date.fromtimestamp(t)) for user, item, t in rows], timestamp=pa.date32()
        )
        return dataset(tmp_path, None, overrides, as_of, source)

    without, with_it = read(ROWS), read(ROWS + after_end)
    end = last if not dates else (last // day + 1) * day - 1
    assert without.as_of_s == with_it.as_of_s == end
    theirs, with_user = everything(without), everything(with_it)
    own = with_user.pop(protected)
    assert with_user == {user: history for user, history in theirs.items() if user != protected}
    assert len(own) == len(theirs[protected]) + (2 if dates else 1) and with_it.manifest["late_rows"] == (
        1 if dates else 2
    )
    assert read(ROWS + after_end, dt.datetime(2030, 1, 1, tzinfo=dt.UTC)).manifest["late_rows"] == 0, (
        "--as-of says what counts"
    )


def test_users_who_are_held_out_alone_say_which_types_of_events_there_are(tmp_path):
    held_out = ["split.holdout_users=0.3", "split.kind=leave_one_out"]
    held = {
        user
        for shard in dataset(tmp_path, overrides=held_out).shards()
        for user in shard.user_ids.filter(pa.array(shard.holdout)).to_pylist()
    }
    types = [
        "view" if user in held and n % 3 else "buy" if user in held else "wish"
        for n, (user, *_) in enumerate(ROWS)
    ]
    source = table(ROWS).append_column("event", pa.array(types))
    data = dataset(tmp_path, source=source, overrides=held_out)
    assert (data.event_types, data.manifest["default_event"]) == (["buy", "view"], "view"), (
        "by name; the most frequent is the default"
    )
    assert {
        int(shard.event_index[0])
        for shard in data.shards()
        if len(shard) and shard.user_ids[0].as_py() not in held
    } == {1}
    named = dataset(tmp_path, source=source, overrides=[*held_out, "data.default_event=other"])
    assert (named.event_types, named.manifest["default_event"]) == (["buy", "other", "view"], "other")
    plain = dataset(tmp_path, source=source)
    assert (plain.event_types[0], plain.manifest["default_event"]) == ("wish", "wish")


@pytest.mark.parametrize("whole", [False, True])
def test_the_item_table_alone_may_say_which_items_there_are(tmp_path, whole):
    rows = [(user, (int(item[1:]) if whole else item), t) for user, item, t in ROWS]
    listed = [0, 1, 2, 3] if whole else ["i0", "i1", "i2", "i3"]
    pq.write_table(
        pa.table({"item_id": [*listed, 99] if whole else [*listed, "new"]}), tmp_path / "items.parquet"
    )
    of_table = [f"data.items={tmp_path / 'items.parquet'}", "data.catalogue=items"]
    data = dataset(tmp_path, rows, of_table)
    assert data.items["item_id"].to_pylist() == sorted([*listed, 99 if whole else "new"])
    others = sum(item not in listed for _, item, _ in rows)
    assert (data.n_events, data.manifest["unlisted"], data.n_users) == (len(ROWS) - others, others, 20)
    assert (
        dataset(tmp_path, rows, of_table[:1]).n_items == 8
        and dataset(tmp_path, rows, of_table[:1]).manifest["unlisted"] == 0
    )
    if whole:  # a text among the ids of events makes no text of the others'
        source = table(
            [(user, str(item), t) for user, item, t in [*rows, (0, "none of ours", 1_600_000_000)]]
        )
        mixed = dataset(tmp_path, source=source, overrides=[*of_table, "data.max_invalid_fraction=0.1"])
        assert mixed.items["item_id"].to_pylist() == [0, 1, 2, 3, 99] and mixed.n_events == data.n_events
        assert mixed.manifest["reasons"] == {"item_id is no whole number, as those of data.items are": 1}


def test_items_with_few_events_are_counted(tmp_path):
    few = [(user, "seldom", 1_600_000_000 + user) for user in range(3)]
    assert dataset(tmp_path, [*ROWS, *few], ["data.min_item_events=4"]).manifest["rare"] == 1


def test_equal_times_keep_the_order_of_files_and_rows(tmp_path):
    rows = [(1, f"i{n}", 1_600_000_000) for n in (5, 2, 9)] + [
        (1, "i1", 1_600_000_001),
        (1, "i3", 1_600_100_000),
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(table(rows[:2]), folder / "a.parquet")
    pq.write_table(table(rows[2:]), folder / "b.parquet", row_group_size=1)
    overrides = [f"data.events={folder}", f"storage.root={tmp_path / 'root'}", "split.kind=leave_one_out"]
    data = prepare_here(load_settings(None, overrides))
    assert [item for item, _ in everything(data)[1]] == ["i5", "i2", "i9", "i1", "i3"]
    assert data.shard(int(assign_buckets([1], data.n_shards)[0])).basket.tolist() == [0, 0, 0, 1, 2]


def test_columns_are_mapped_and_types_adapted(tmp_path):
    source = pa.table(
        {
            "who": pa.array(["a", "a", "b", "b"]).dictionary_encode(),
            "what": pa.array([1, 2, 1, 3], pa.int32()),
            "when": pa.array([dt.datetime(2024, 1, d, 12) for d in (1, 2, 3, 9)], pa.timestamp("ms")),
            "stars": pa.array([5, None, 3, 4], pa.int8()),
        }
    )
    columns = "data.columns={user_id: who, item_id: what, timestamp: when, value: stars}"
    data = dataset(tmp_path, source=source, overrides=[columns, "split.kind=leave_one_out"])
    values = np.concatenate([shard.value for shard in data.shards()])
    assert sorted(values.tolist()) == [1.0, 3.0, 4.0, 5.0]
    assert data.items["item_id"].type == pa.int64()
    assert data.as_of_s == int(dt.datetime(2024, 1, 9, 12, tzinfo=dt.UTC).timestamp())


def test_a_basket_is_what_has_one_name_until_another_comes_or_a_pause(tmp_path):
    t, hour = 1_600_000_000, 3600
    source = pa.table(
        {
            "user_id": [1] * 9,
            "item_id": list("abcdefghi"),
            "timestamp": [
                t,
                t,
                t,
                t + 10,
                t + hour,
                t + 7 * hour + 1,
                t + 8 * hour,
                t + 9 * hour,
                t + 10 * hour,
            ],
            "basket": ["x", "y", "x", "y", "y", "y", "z", "y", None],
        }
    )
    data = dataset(tmp_path, source=source, overrides=["split.kind=leave_one_out"])
    shard = data.shard(int(assign_buckets([1], data.n_shards)[0]))
    assert [item for item, _ in everything(data)[1]] == list("acbdefghi"), (
        "what happened at one time lies together"
    )
    assert shard.basket.tolist() == [0, 0, 1, 1, 1, 2, 3, 4, 5]
    longer = dataset(tmp_path, source=source, overrides=["split.kind=leave_one_out", "data.basket_gap=22000"])
    assert longer.shard(int(assign_buckets([1], data.n_shards)[0])).basket.tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
        2,
        3,
        4,
    ]


def test_events_without_a_basket_belong_to_their_time_and_no_event_after_the_cut_is_history(tmp_path):
    t, day = 1_600_000_000, 86_400
    source = pa.table(
        {
            "user_id": [1] * 6 + [2] * 3,
            "item_id": list("abcdefabc"),
            "timestamp": [
                t,
                t,
                t + day,
                t + 9 * day,
                t + 11 * day,
                t + 20 * day,
                t + 5,
                t + 2 * day,
                t + 15 * day,
            ],
            "basket": pa.array([None, None, None, "x", "x", None, "p", "q", "r"]),
        }
    )
    cuts = [f"split.test_from={at(t + 10 * day)}", f"split.validation_from={at(t + day + 5)}"]
    data = dataset(tmp_path, source=source, overrides=[*cuts, f"data.basket_gap={2 * day}"])
    shard = data.shard(int(assign_buckets([1], data.n_shards)[0]))
    row = shard.find(1)
    assert shard.basket[shard.offsets[row] : shard.offsets[row + 1]].tolist() == [0, 0, 1, 2, 2, 3]
    assert shard.split[row, 2:].tolist() == [4, 5], (
        "basket x began before the cut: what came after it is to be predicted"
    )
    unnamed = source.set_column(3, "basket", pa.nulls(9, pa.string()))
    assert dataset(tmp_path, source=unnamed, overrides=cuts).n_events == 9


def at(seconds):
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat()


def test_invalid_rows_go_to_quarantine_with_a_reason(tmp_path):
    source = pa.table(
        {
            "user_id": pa.array([1, None, 3, 4, 5] + [6] * 95, pa.int64()),
            "item_id": pa.array(["a", "b", None, "d", "e"] + ["f"] * 95),
            "timestamp": pa.array(
                [1_600_000_000, 1_600_000_000, 1_600_000_000, None, -5]
                + list(range(1_600_000_000, 1_600_000_095))
            ),
            "value": [1.0] * 99 + [float("inf")],
        }
    )
    with pytest.raises(TooManyInvalidRowsError, match="5 of 100 rows are invalid.*item_id is null") as error:
        dataset(tmp_path, source=source)
    assert "max_invalid_fraction" in error.value.fix
    data = dataset(
        tmp_path, source=source, overrides=["data.max_invalid_fraction=0.05", "split.kind=leave_one_out"]
    )
    assert (data.manifest["bad_rows"], data.n_events) == (5, 95)
    reasons = pq.read_table(tmp_path / "root" / "quarantine" / data.key)["reason"].to_pylist()
    outside = "time is outside 1970 to 2100, or a number before 1990 (s: see data.time_unit)"
    assert sorted(reasons) == sorted(
        ["user_id is null", "item_id is null", "time is null", outside, "value is not finite"]
    )


def test_a_position_is_any_whole_number(tmp_path):
    now = 1_700_000_000_000_000_000  # nanoseconds of a clock, say
    rows = [(1, "i1", now + 1), (1, "i2", -5), (1, "i3", 0), (1, "i4", now)]
    data = dataset(
        tmp_path, rows, ["data.columns={timestamp: null, position: timestamp}", "split.kind=leave_one_out"]
    )
    assert everything(data) == {1: [("i2", -5), ("i3", 0), ("i4", now), ("i1", now + 1)]}
    assert now < LIVE_POSITION, "what the endpoint was told comes later"


def test_nothing_after_as_of_is_read(tmp_path):
    as_of = dt.datetime.fromtimestamp(1_600_000_000 + 86_400 * 5, dt.UTC)
    data = dataset(tmp_path, as_of=as_of)
    assert max(t for events in everything(data).values() for _, t in events) <= as_of.timestamp()
    assert data.as_of_s == as_of.timestamp()
    with pytest.raises(DataError, match="no event at or before as-of"):
        dataset(tmp_path, as_of=dt.datetime(2001, 1, 1, tzinfo=dt.UTC))


def test_time_split_predicts_the_next_basket(tmp_path):
    data = dataset(tmp_path, overrides=["split.validation_users=1.0"])
    times = sorted(row[2] for row in ROWS)
    cut = data.cut_s("test")
    assert cut == int(np.ceil(np.quantile(times, 0.9)))
    for shard in data.shards():
        for row in range(len(shard)):
            train_end, validation_end, start, end = shard.split[row]
            t = shard.history(row).timestamp_s
            assert (t[:start] < cut).all() and (t[start:] >= cut).all()
            assert end - start == (1 if start < len(t) else 0)
            assert (t[:train_end] < data.cut_s("validation")).all() and validation_end <= start


def test_who_has_few_events_is_left_out_of_everything(tmp_path):
    few = [(99 + n, "one", 1_600_000_000 + 86_400 * 9) for n in range(50)]
    data = dataset(tmp_path, [*ROWS, *few], ["data.min_user_events=5"])
    assert set(everything(data)) == set(range(20)) and (
        data.n_users,
        data.n_events,
        data.manifest["few"],
    ) == (20, 200, 50)
    assert data.popularity.total()[1:].tolist() == data.items["events"].to_pylist()
    assert "one" not in data.items["item_id"].to_pylist() and data.shard(0).split.any()


def test_what_only_left_out_rows_have_is_not_known(tmp_path):
    named = {
        "user_id": [*range(90, 100)],
        "item_id": ["bot"] * 10,
        "timestamp": [1_600_000_000] * 10,
        "event": ["click"] * 10,
    }
    vectors = {
        "user_id": [7] * 3,
        "item_id": ["again"] * 3,
        "timestamp": [1_600_000_001] * 3,
        "event": ["view"] * 3,
    }
    table = pa.concat_tables(
        [
            pa.table(
                {
                    **dict(zip(("user_id", "item_id", "timestamp"), zip(*ROWS, strict=True), strict=True)),
                    "event": ["view"] * len(ROWS),
                }
            ),
            pa.table(named),
            pa.table(vectors),
        ]
    )
    data = dataset(
        tmp_path,
        source=table,
        overrides=["data.min_user_events=5", "data.min_item_events=2", "data.duplicates=drop"],
    )
    items = data.items["item_id"].to_pylist()
    assert (
        "bot" not in items
        and "again" not in items
        and data.event_types == ["view"]
        and data.manifest["few"] == 10
    )
    assert dataset(tmp_path, source=table).event_types == ["view", "click"]


def test_leave_one_out_never_shows_the_targets_own_basket(tmp_path):
    t = 1_600_000_000
    data = dataset(
        tmp_path,
        [(1, "a", t), (1, "b", t + 1), (1, "c", t + 2), (1, "d", t + 2)],
        ["split.kind=leave_one_out"],
    )
    shard = data.shard(int(assign_buckets([1], data.n_shards)[0]))
    start, end = shard.split[0, 2:]
    assert [data.items["item_id"][int(i) - 1].as_py() for i in shard.targets(0, start, end)] == ["d"]
    assert len(shard.history_before(0, int(start)).item_index) == 2


def test_random_split_holds_out_whole_baskets_anywhere_in_time(tmp_path):
    rows = [
        (u, f"i{(u * 3 + 5 * t + j) % 11}", 1_600_000_000 + 86_400 * t)
        for u in range(30)
        for t in range(10)
        for j in range(2)
    ]
    data = dataset(tmp_path, rows, ["split.kind=random", "split.test_fraction=0.2"])
    assert not data.has_time, "histories are not in the order of time"
    days = []
    for shard in data.shards():
        for row in range(len(shard)):
            train_end, validation_end, start, end = shard.split[row]
            t = shard.history(row).timestamp_s
            assert (train_end, validation_end, start, end) == (12, 16, 16, 20)
            parts = [set(t[:train_end]), set(t[train_end:validation_end]), set(t[start:end])]
            assert [len(part) for part in parts] == [6, 2, 2], "no basket lies in two parts"
            assert (np.diff(t[:train_end]) >= 0).all()
            days += sorted((np.array(list(parts[2])) - 1_600_000_000) // 86_400)
    assert set(days) == set(range(10))


def test_leave_one_out_queries_at_the_time_of_the_target(tmp_path):
    data = dataset(tmp_path, overrides=["split.kind=leave_one_out"])
    for part, last in (("validation", 2), ("test", 1)):
        for query in next(EvaluationQueries(data, part).batches(100)):
            times = data.shard(query.shard).history(query.row).timestamp_s
            assert query.now == times[-last] and query.history.timestamp_s.max() < query.now
            # the popularity of that moment holds no event of its day or later
            assert data.popularity.window(query.now, 10_000).sum() == sum(
                t < query.now // 86_400 * 86_400 for _, _, t in ROWS
            )


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://{}/"])
def test_folders_and_uris_are_listed_below(tmp_path, form):
    folder = tmp_path / "a folder"
    (folder / "sub").mkdir(parents=True)
    pq.write_table(table(ROWS[:100]), folder / "x.parquet")
    pq.write_table(table(ROWS[100:]), folder / "sub" / "y.parquet")
    path = form.format(str(folder).replace(" ", "%20") if "://" in form else folder)
    data = prepare_here(load_settings(None, [f"data.events=['{path}']", f"storage.root={tmp_path / 'root'}"]))
    assert data.n_events == len(ROWS)
    assert join_uri("s3://bucket/data?region=eu", "x 1.parquet") == "s3://bucket/data/x%201.parquet?region=eu"
    assert join_uri("hdfs://host:9000/data", "x.parquet") == "hdfs://host:9000/data/x.parquet"


def test_nobody_with_enough_events_is_named(tmp_path):
    with pytest.raises(DataError, match="min_user_events"):
        dataset(tmp_path, overrides=["data.min_user_events=1000"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.columns={user_id: customer}"],
            "no column 'customer' for user_id; it has user_id, item_id, timestamp",
        ),
        (
            ["data.columns={user_id: timestamp, timestamp: item_id}"],
            "item_id holds text such as 'i0', which is not a time",
        ),
        (["split.test_from=2031-01-01"], "impossible split"),
        (["data.items=/nowhere.parquet"], "/nowhere.parquet"),
        (["data.features={price: numeric}"], "data.items is null"),
        (["data.columns={timestamp: null}"], "needs a timestamp column"),
    ],
)
def test_unusable_input_is_named_with_a_fix(tmp_path, overrides, message):
    with pytest.raises(DataError) as error:
        dataset(tmp_path, overrides=overrides)
    assert message in str(error.value)
    assert error.value.fix
    assert not list((tmp_path / "root").glob("datasets/*")), "nothing half-written where a reader looks"


def test_truncated_and_empty_files_are_named(tmp_path):
    pq.write_table(table(ROWS), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    pq.write_table(table(ROWS).slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "flipped.parquet").write_bytes(content[:8] + bytes(200) + content[208:])
    for name, word in (("cut", "truncated"), ("empty", "no rows"), ("flipped", "cannot be read")):
        with pytest.raises(DataError) as error:
            prepare_here(
                load_settings(
                    None, [f"data.events={tmp_path / name}.parquet", f"storage.root={tmp_path / 'root'}"]
                )
            )
        assert word in str(error.value) and f"{name}.parquet" in str(error.value)


def test_preparing_twice_is_a_no_op_and_the_key_ignores_places(tmp_path, synthetic_folder):
    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path / "a"))
    first = prepare_here(settings)
    stamps = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    assert prepare_here(settings).key == first.key
    assert {p: p.stat().st_mtime_ns for p in first.path.rglob("*")} == stamps
    other = prepare_here(load_settings(None, synthetic_overrides(synthetic_folder, tmp_path / "b")))
    assert (first.path / "manifest.json").read_bytes() == (other.path / "manifest.json").read_bytes()


def test_a_file_that_comes_while_the_input_is_read_is_of_the_next_run_and_one_that_changes_is_an_error(
    tmp_path,
):
    folder = tmp_path / "events"
    folder.mkdir()
    pq.write_table(table(ROWS), folder / "a.parquet")
    settings = load_settings(None, [f"data.events={folder}", f"storage.root={tmp_path / 'root'}"])
    key = prepare_key(settings, None)

    def meanwhile(rows, name):
        def each(task, count):
            pq.write_table(table(rows), folder / name)
            run_in_process(task, count)

        return each

    with pytest.raises(DataError, match=r"a\.parquet changed while it was read"):
        prepare(settings, None, run_tasks=meanwhile(ROWS[::-1], "a.parquet"))
    assert not list((tmp_path / "root" / "datasets").glob("*"))
    pq.write_table(table(ROWS), folder / "a.parquet")
    made = prepare(settings, None, run_tasks=meanwhile([(99, "i1", 1_600_000_000)], "b.parquet"))
    assert made.key == key and made.n_events == len(ROWS)
    assert prepare_key(settings, None) != key


def test_what_does_not_fit_the_types_is_named(tmp_path):
    large = pa.array([2**64 - 1, *range(1, len(ROWS))], pa.uint64())
    source = table(ROWS).set_column(1, "item_id", large)
    with pytest.raises(DataError, match="events.parquet: item_id: an id does not fit"):
        dataset(tmp_path, source=source)
    types = [f"type {n}" for n in range(1 << 15)] + ["one too many"]
    rows = pa.table(
        {
            "user_id": [1] * len(types),
            "item_id": ["i"] * len(types),
            "timestamp": [1_600_000_000] * len(types),
            "event": types,
        }
    )
    with pytest.raises(DataError, match=r"32769 types of events.*\n.*data.columns.event"):
        dataset(tmp_path, source=rows)
    items = tmp_path / "items"
    items.mkdir()
    pq.write_table(pa.table({"item_id": ["i1"], "brand": ["a"]}), items / "a.parquet")
    pq.write_table(pa.table({"item_id": ["i2"], "brand": [["a"]]}), items / "b.parquet")
    with pytest.raises(DataError, match="the other item files differ"):
        dataset(tmp_path, overrides=[f"data.items={items}", "data.features={brand: categorical}"])
    pq.write_table(pa.table({"item_id": large}), items / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: item_id: an id does not fit"):
        dataset(tmp_path, overrides=[f"data.items={items / 'a.parquet'}"])


def test_damage_and_foreign_output_are_refused(tmp_path, synthetic_folder):
    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path))
    data = prepare_here(settings)
    file = data.path / "shards" / "00000.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedArtifactError, match="shards/00000.arrow"):
        Dataset.open(data.path, verify=True)
    other = load_settings(None, [*synthetic_overrides(synthetic_folder, tmp_path), "split.seed=5"])
    (tmp_path / "datasets" / prepare_key(other, None)).mkdir()
    with pytest.raises(OutputExistsError, match="move"):
        prepare_here(other)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_quantile_in_chunks_is_numpys(q):
    values = np.random.default_rng(1).integers(-(10**9), 10**12, 4001)
    assert quantile(lambda: iter(np.array_split(values, 7)), q) == pytest.approx(
        np.quantile(values, q), rel=1e-12
    )
