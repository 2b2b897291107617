"""From the endpoint's log to the next night: every entry once, read as the owner's events, and known to the
night that read it.
"""

import datetime as dt
import sqlite3
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import private_overrides, synthetic_overrides

from recray import pipeline
from recray.config import DataSettings, load_settings
from recray.dataset.reader import is_holdout
from recray.errors import StateError
from recray.events import collect as collecting
from recray.events.log import Entry
from recray.events.rewards import SHOWN, Rewards
from recray.events.store import open_log
from recray.prepare.files import InputFile, list_collected_files
from recray.prepare.partition import (
    LIVE_POSITION,
    PartitionPlan,
    partition_row_group,
    read_partition,
    read_stats,
)
from recray.prepare.sources import inspect_events
from recray.prepare.times import TimeRule
from recray.serving.api import RecommendRequest
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query
from recray.serving.state import ServingState
from recray.storage import Storage
from recray.storage.opt_out import OptOut
from recray.testing.published import prepare_here, publish_untrained
from recray.tracking.runs import Tracking

REWARDS = Rewards({"click": 1.0}, 1.0)


def event(key, user="7", at_s=100.25, **body):
    return Entry("event", key, user, at_s, {"item_id": "a", "event": "view", "value": 1.0, **body})


def decision(key):
    return Entry(
        "decision",
        key,
        "7",
        5.0,
        {
            "items": [1, 2],
            "source": "snapshot",
            "night": "n",
            "bundle": "b",
            "degraded": [],
            "ms": 1.5,
            "arm": 3,
        },
    )


def outcome(key, request, kind="outcome"):
    return Entry(
        kind, key, None, 6.0, {"request_id": request, "outcome": "click", "item_id": 1, "value": 2.0}
    )


def test_each_entry_is_collected_once_as_it_was_recorded(log, tmp_path):
    storage = Storage(tmp_path)
    assert collecting.collect(storage, log) == (None, {})
    log.append(
        [
            event("e1", context={"page": True}),
            decision("d1"),
            outcome("o1", "d1"),
            outcome("o2", "?", "set_aside"),
        ]
    )
    first, counts = collecting.collect(storage, log)
    assert counts == {"decision": 1, "event": 1, "outcome": 1, "set_aside": 1}
    assert collecting.collect(storage, log) == (None, {})
    (row,) = pq.read_table(first / "events.parquet").to_pylist()
    when = dt.datetime.fromtimestamp(100.25, dt.UTC)
    responses = {
        "user_id": "7",
        "item_id": "a",
        "timestamp": when,
        "event": "view",
        "value": 1.0,
        "context": '{"page": true}',
        "event_id": None,
    }
    assert row == {"number": 1, **responses}
    (row,) = pq.read_table(first / "decisions.parquet").to_pylist()
    assert (row["request_id"], row["items"], row["ms"], row["more"]) == ("d1", ["1", "2"], 1.5, '{"arm": 3}')
    rows = pq.read_table(first / "outcomes.parquet").to_pylist()
    assert [(row["request_id"], row["item_id"], row["set_aside"]) for row in rows] == [
        ("d1", "1", False),
        ("?", "1", True),
    ]
    log.append([event("e1"), event("e2", "8")])
    second, counts = collecting.collect(storage, log)
    assert counts == {"event": 1} and [file.uri for file in list_collected_files(tmp_path)] == [
        str(first / "events.parquet"),
        str(second / "events.parquet"),
    ]
    assert not (second / "decisions.parquet").exists()
    assert pq.read_table(second / "events.parquet").schema == pq.read_table(first / "events.parquet").schema


def test_an_outcome_whose_decision_came_after_all_is_like_the_others(log, tmp_path):
    log.append([outcome("o1", "late", "set_aside"), outcome("o2", "never", "set_aside"), decision("late")])
    folder, counts = collecting.collect(Storage(tmp_path), log)
    assert counts == {"decision": 1, "outcome": 1, "set_aside": 1}
    rows = pq.read_table(folder / "outcomes.parquet").to_pylist()
    assert {row["request_id"]: row["set_aside"] for row in rows} == {"late": False, "never": True}


def test_an_unmatched_outcome_that_is_sent_again_counts_once(log, tmp_path):
    log.append([outcome("o1", "late", "set_aside"), decision("late"), outcome("o1", "late")])
    folder, counts = collecting.collect(Storage(tmp_path), log)
    assert counts == {"decision": 1, "outcome": 1, "set_aside": 1}
    assert sum(not row["set_aside"] for row in pq.read_table(folder / "outcomes.parquet").to_pylist()) == 1


def test_a_collect_that_breaks_leaves_nothing_and_the_next_does_its_work(log, tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    log.append([event(f"e{n}", str(n % 5)) for n in range(100)])
    monkeypatch.setattr(collecting, "BATCH_ENTRIES", 30)
    inner, calls = log.read, []

    def breaks(after, limit):
        calls.append(after)
        if len(calls) == 3:
            raise StateError("gone")
        return inner(after, limit)

    monkeypatch.setattr(log, "read", breaks)
    with pytest.raises(StateError):
        collecting.collect(storage, log)
    assert list(storage.collected.iterdir()) == []
    collecting.collect(storage, log)
    log.append([event("late")])
    collecting.collect(storage, log)
    users = [
        user
        for file in list_collected_files(tmp_path)
        for user in pq.read_table(file.uri)["user_id"].to_pylist()
    ]
    assert Counter(users) == {**{str(user): 20 for user in range(5)}, "7": 1}


def test_what_was_shown_is_counted_apart_from_outcomes(log, tmp_path):
    def shown(request, item, position, kind="outcome"):
        body = {"request_id": request, "outcome": SHOWN, "item_id": item, "value": float(position)}
        return Entry(kind, f"{request} {item}", None, 6.0, body)

    log.append([decision("d1"), decision("d2")])
    items = log.read(0, 1)[0][1].body["items"]
    log.append([shown("d1", items[0], 1), shown("d1", items[-1], 4), outcome("o1", "d1")])
    log.append([shown("?", "a", 1, "set_aside")])
    folder, _ = collecting.collect(Storage(tmp_path), log)
    summary = collecting.summarize(folder, REWARDS)
    assert (summary["shown/answers"], summary["shown/items"]) == (1, 2)
    assert summary["outcomes/click/an_answer"] == 0.5
    assert not [name for name in summary if "recray" in name or "undeclared" in name]
    rows = pq.read_table(folder / "outcomes.parquet").to_pylist()
    assert [
        (row["item_id"], row["value"]) for row in rows if row["outcome"] == SHOWN and not row["set_aside"]
    ] == [(str(items[0]), 1.0), (str(items[-1]), 4.0)]


def test_each_collected_range_is_logged_to_mlflow_once(synthetic_folder, tmp_path):
    from mlflow import MlflowClient

    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path / "root"))
    log = open_log("sqlite", settings.root())
    degraded = {**decision("d2").body, "degraded": ["model"], "ms": 3.5, "arm": "challenger", "bundle": "c"}
    shadow = {**degraded, "arm": "shadow", "degraded": []}
    plain = {name: value for name, value in decision("d1").body.items() if name != "arm"}
    log.append(
        [
            Entry("decision", "d1", "7", 5.0, plain),
            Entry("decision", "d2", "8", 5.0, degraded),
            Entry("decision", "d2.shadow", "8", 5.0, shadow),
        ]
    )
    log.append([outcome("o1", "d2"), outcome("o2", "?", "set_aside"), event("e1")])
    result = pipeline.run("collect", settings, None)
    storage = Storage(settings.root())
    summary = collecting.summarize(Path(result.outputs["collected"]), REWARDS)
    assert summary == {
        "answers": 2, "answers/source/snapshot": 2, "answers/bundle/b": 1, "answers/bundle/c": 1,
        "degraded/model": 0.5, "latency_ms/p50": 2.5,
        "latency_ms/p95": pytest.approx(3.4), "latency_ms/p99": pytest.approx(3.48), "outcomes/set_aside": 1,
        "outcomes/click/an_answer": 0.5,
        "outcomes/challenger/an_answer": 1.0, "events": 1,
    }  # fmt: skip
    tracking = Tracking(settings.tracking, storage)
    run_id = tracking.run(f"endpoint {log.identity}", "endpoint")
    client = MlflowClient(tracking.uri)
    run = client.get_run(run_id)
    assert run.data.metrics["answers/bundle/c"] == 1 and run.data.metrics["degraded/model"] == 0.5
    assert pipeline.run("collect", settings, None).status == "skipped"
    assert len(client.get_metric_history(run_id, "answers")) == 1
    log.close()


def test_with_privacy_mlflow_gets_holdout_users_alone(synthetic_folder, tmp_path):
    from mlflow import MlflowClient

    settings = load_settings(None, private_overrides(synthetic_folder, tmp_path / "root"))
    users = [str(user) for user in range(60)]
    held = is_holdout(pa.array(users), settings.split.model_dump())
    log = open_log("sqlite", settings.root())
    for user, answers in zip(users, np.random.default_rng(0).integers(1, 4, 60), strict=True):
        for number in range(answers):
            name = f"{user}-{number}"
            log.append(
                [
                    Entry("decision", name, user, 5.0, decision("").body),
                    outcome(f"o{name}", name),
                    event(f"e{name}", user),
                ]
            )
    log.append([Entry("decision", "nobody's", None, 5.0, decision("").body)])
    folder = Path(pipeline.run("collect", settings, None).outputs["collected"])
    summary = collecting.summarize(folder, REWARDS, partial(is_holdout, split=settings.split.model_dump()))
    theirs = sum(
        int(answers)
        for answers, one in zip(np.random.default_rng(0).integers(1, 4, 60), held, strict=True)
        if one
    )
    assert (
        3 < held.sum() < 30
        and summary["answers"] == summary["events"] == theirs
        and summary["outcomes/click/an_answer"] == 1.0
    )
    tracking = Tracking(settings.tracking, Storage(settings.root()))
    run_id = tracking.run(f"endpoint {log.identity}", "endpoint")
    run = MlflowClient(tracking.uri).get_run(run_id)
    assert (
        run.data.metrics["answers"]
        == run.data.metrics["events"]
        == theirs
        < collecting.summarize(folder, REWARDS)["answers"]
    )
    log.close()


def test_another_store_is_counted_anew(tmp_path):
    storage = Storage(tmp_path)
    for name in ("one", "two"):
        log = open_log("sqlite", tmp_path / name)
        log.append([event("e1")])
        assert collecting.collect(storage, log)[1] == {"event": 1}
        log.close()
    assert len(list_collected_files(tmp_path)) == 2


def test_a_log_that_was_restored_from_an_older_copy_is_refused(tmp_path):
    storage, log = Storage(tmp_path), open_log("sqlite", tmp_path)
    log.append([event("e1")])
    with closing(sqlite3.connect(tmp_path / "state" / "log.sqlite")) as connection:
        (is_busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert not is_busy, "the file has all of the log"
    older = (tmp_path / "state" / "log.sqlite").read_bytes()
    log.append([event("e2"), event("e3")])
    collecting.collect(storage, log)
    log.close()
    for file in (tmp_path / "state").glob("log.sqlite*"):
        file.unlink()
    (tmp_path / "state" / "log.sqlite").write_bytes(older)
    with pytest.raises(StateError, match="older copy"):
        collecting.collect(storage, open_log("sqlite", tmp_path))


def test_what_was_collected_is_forgotten_after_its_time(log, tmp_path):
    storage = Storage(tmp_path)
    log.append([event("e1"), event("e2")])
    collecting.collect(storage, log)
    log.append([event("e3")])
    assert collecting.drop_collected(storage, log, 1.0, 2) == 0 and len(log.read(0, 10)) == 3
    assert collecting.drop_collected(storage, log, -1.0, 1) == 0 and len(log.read(0, 10)) == 3, (
        "the published night does not know them yet"
    )
    assert collecting.drop_collected(storage, log, -1.0, 2) == 2 and [
        entry.key for _, entry in log.read(0, 10)
    ] == ["e3"]


@pytest.mark.parametrize("ids", [pa.string(), pa.int64()])
def test_live_events_are_read_as_the_owners_whatever_those_look_like(tmp_path, ids):
    """Columns that are renamed, retyped or added after they were collected cost nothing."""
    storage, log = Storage(tmp_path), open_log("sqlite", tmp_path)
    log.append(
        [
            event("e1", context={"page": True}),
            event("e2", value=2.5),
            event("e3", "none of ours"),
            event("e4", str(2**63 - 1)),
            event("e5", str(2**63)),
        ]
    )
    path, _ = collecting.collect(storage, log)
    log.close()
    columns = {
        "user_id": "who",
        "item_id": "what",
        "position": "nr",
        "basket": "order",
        "value": "stars",
        "context_page": "page",
    }
    types = {
        "user_id": ids,
        "item_id": pa.string(),
        "position": pa.int64(),
        "basket": pa.int64(),
        "value": pa.float32(),
        "context_page": pa.string(),
    }
    owner = tmp_path / "owner.parquet"
    pq.write_table(
        pa.table(
            [pa.array(["9" if kind == pa.string() else 9], kind) for kind in types.values()],
            list(columns.values()),
        ),
        owner,
    )
    data = DataSettings(
        events=(str(owner),),
        columns={name: column for name, column in columns.items() if "_page" not in name},
        context=("page",),
    )
    source = inspect_events(data, (InputFile(str(owner)),), list_collected_files(tmp_path))
    assert (source.columns, source.types, source.rows) == (columns, types, 6)
    sent = {
        "as_of_us": None,
        "future_us": None,
        "min_value": None,
        "keeps_low_values": False,
        "has_row_digests": True,
        "integral_float_ids": (),
        "needs_integer_items": False,
    }
    sent |= {
        "holdout_split": None,
        "default_event": "interaction",
        "opted_out": OptOut.of(tmp_path),
        "first_live": 1,
        "shards": 1,
        "staging": tmp_path / "staging",
    }
    plan = PartitionPlan(columns, types, "position", TimeRule(), quarantine=tmp_path / "quarantine", **sent)
    for group in source.row_groups:
        partition_row_group(plan, group)
    rows = read_partition(plan, 2, 0).to_pylist()
    reasons = [] if ids == pa.string() else ["user_id is null"]
    assert [row["user_id"] for row in rows] == (
        ["9", "7", "7", "none of ours", str(2**63 - 1), str(2**63)]
        if ids == pa.string()
        else [9, 7, 7, 2**63 - 1]
    )
    assert (
        [row["t"] for row in rows[1:3]] == [LIVE_POSITION + 1, LIVE_POSITION + 2]
        and rows[1]["basket"] is None
        and rows[1]["live"]
    )
    assert [row["value"] for row in rows[:3]] == [9.0, 1.0, 2.5] and rows[1]["context_page"] != rows[2][
        "context_page"
    ]
    assert [reason for stats, _ in read_stats(plan, 2) for reason in stats.reasons] == reasons


def test_the_next_nightly_run_reads_them_and_the_endpoint_does_not_count_them_twice(
    synthetic_folder, tmp_path
):
    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path / "root"))
    first = prepare_here(settings)
    state = ServingState.load(publish_untrained(settings, first, tmp_path / "one"))
    log = open_log("sqlite", settings.root())
    live = dt.datetime.fromtimestamp(first.as_of_s + 500, dt.UTC)
    log.append(
        [
            Entry(
                "event",
                "e1",
                "7",
                live.timestamp(),
                {"item_id": "i0000003", "event": "purchase", "value": 1.0},
            )
        ]
    )
    fresh = log.recent("7", state.collected.get(log.identity, 0), state.dataset.as_of_s + 1)
    assert len(fresh) == 1
    from_store = bind_query(resolve_query(RecommendRequest(user_id=7), state, fresh), state)
    log.close()

    assert pipeline.run("collect", settings, None).metrics == {"collected_events": 1}
    assert pipeline.run("collect", settings, None).status == "skipped"
    second = prepare_here(settings)
    assert (
        second.key != first.key
        and second.n_events == first.n_events + 1
        and second.as_of_s == int(live.timestamp())
    )
    tonight = ServingState.load(publish_untrained(settings, second, tmp_path / "two"))
    log = open_log("sqlite", settings.root())
    assert tonight.collected == {log.identity: 1}
    assert log.recent("7", tonight.collected[log.identity], tonight.dataset.as_of_s + 1) == []
    from_dataset = bind_query(resolve_query(RecommendRequest(user_id=7), tonight), tonight)
    for stored, theirs in zip(from_store.history, from_dataset.history, strict=True):
        assert stored.tolist() == theirs.tolist()
    assert from_store.now_s == from_dataset.now_s
    log.close()
