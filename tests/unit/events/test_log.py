"""The log of the endpoint in sqlite and in a real Redis, and the writer in front of it."""

import asyncio
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter

import pytest
from harness import DEADLINE_S
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recray.errors import SettingsError, StateError
from recray.events.items import ItemChange
from recray.events.log import MAX_RECENT, Entry
from recray.events.sqlite import SqliteLog
from recray.events.store import open_log
from recray.events.writer import MAX_WAITING_OUTCOMES, Writer


def event(n, user="u", key=None, at_s=None):
    return Entry(
        "event",
        key or f"{user}-{n}",
        user,
        float(n if at_s is None else at_s),
        {"item_id": n, "event": "ä view"},
    )


def test_entries_come_back_once_and_in_order(log):
    assert log.last() == 0 and log.read(0, 10) == []
    assert log.append([event(1), event(2, "v"), event(1)]) == [1, 2, 0]
    before, third = log.append(
        [event(2, "v"), Entry("decision", "u-1", None, 5.5, {"shown": [1, "x", None]})]
    )
    assert before == 0 and third > 2
    bodies = log.read(0, 10)
    assert [number for number, _ in bodies] == [1, 2, third] and bodies[0][1] == event(1)
    assert bodies[2][1] == Entry("decision", "u-1", None, 5.5, {"shown": [1, "x", None]})
    assert log.read(1, 1) == [bodies[1]] and log.last() == third
    assert log.has("decision", "u-1") and log.has("event", "v-2") and not log.has("decision", "v-2")


def test_recent_events_are_those_that_the_snapshot_lacks(log):
    log.append([event(n, at_s=100 - n) for n in range(1, 6)])
    log.append([event(9, "somebody else"), Entry("decision", "d", "u", 1e9, {})])
    assert [entry.body["item_id"] for entry in log.recent("u", 3, 1e9)] == [4, 5]
    assert [entry.body["item_id"] for entry in log.recent("u", 3, 98)] == [1, 2, 4, 5]
    assert log.recent("nobody", 0, 0.0) == []


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    users=st.lists(st.sampled_from(["u", "v", "ä", "a\0b", "a", "%"]), max_size=30),
    after=st.integers(0, 40),
    limit=st.integers(1, 4),
)
def test_recent_events_of_many_users_are_those_of_each(log, users, after, limit):
    before = log.last()
    log.append([event(n, user, at_s=float(n)) for n, user in enumerate(users)])
    after, asked = before + after, [*dict.fromkeys(users), "nobody"]
    each = {user: log.recent(user, after, 1e9, limit) for user in asked}
    some = {user: events for user, events in each.items() if events}
    assert log.recent_of(asked, after, 1e9, limit) == some


def test_a_user_keeps_the_last_events_only(log):
    log.append([event(n) for n in range(MAX_RECENT + 20)])
    item_ids = [entry.body["item_id"] for entry in log.recent("u", 0, 0.0)]
    assert item_ids == list(range(20, MAX_RECENT + 20))


def test_what_is_forgotten_is_absent_and_numbers_go_on(log):
    log.append([event(n) for n in range(1, 6)])
    log.drop_through(5)
    assert log.read(0, 10) == [] and log.last() == 5
    assert log.append([event(6)]) == [6]
    log.drop_through(3)
    assert [number for number, _ in log.read(0, 10)] == [6]


def test_changes_of_items_add_up_and_are_read_once(log, tmp_path):
    assert log.read_items(0) == (0, [])
    big = 2**53 + 1  # no float
    log.change_items(
        [ItemChange(big, False, {"price": 1.5}, 10.0), ItemChange("ä", None, {"tags": ["x"]}, 10.0)]
    )
    first, changes = log.read_items(0)
    assert {change.item_id for change in changes} == {big, "ä"}
    log.change_items([ItemChange(big, None, {"title": None}, 11.0), ItemChange(big, True, {}, 12.0)])
    second, changes = log.read_items(first)
    assert second > first and changes == [ItemChange(big, True, {"price": 1.5, "title": None}, 12.0)]
    assert log.read_items(second) == (second, [])
    log.change_items([ItemChange(big, is_removed=True, at_s=13.0)])
    log.change_items([ItemChange(big, False, {}, 14.0)])
    assert log.read_items(second)[1] == [ItemChange(big, False, {}, 14.0)], "what was removed is forgotten"
    log.append([event(1)])
    log.drop_through(log.last())
    assert len(log.read_items(0)[1]) == 2, "they are not collected"


def test_an_identity_lasts_as_long_as_the_store(log, tmp_path):
    reopened = open_log("sqlite" if isinstance(log, SqliteLog) else log.url, tmp_path)
    assert reopened.identity == log.identity and len(log.identity) == 32
    reopened.close()


APPEND_MANY = """
import sys
from pathlib import Path
from recray.events.log import Entry
from recray.events.store import open_log

url, root, name = sys.argv[1:]
log = open_log(url, Path(root))
for n in range(100):
    own = Entry("event", f"{name}-{n}", name, float(n), {"item_id": n})
    shared = Entry("event", f"shared {n}", "all of them", float(n), {"item_id": n})
    assert log.append([own, shared])[0]
"""


def test_processes_write_at_once(log, tmp_path):
    url = "sqlite" if isinstance(log, SqliteLog) else log.url
    command = [sys.executable, "-c", APPEND_MANY, url, str(tmp_path)]
    writers = [subprocess.Popen([*command, f"w{n}"]) for n in range(3)]
    assert [process.wait(timeout=DEADLINE_S) for process in writers] == [0, 0, 0]
    numbers = [number for number, _ in log.read(0, 1000)]
    assert len(numbers) == 400 and numbers == sorted(set(numbers)) and numbers[-1] <= log.last()


def _die_while_writing(url, root, report_fd):
    log = open_log(url, root)
    for n in range(10_000):
        log.append([event(n, "first"), event(n, "second")])
        os.write(report_fd, b"%d\n" % n)


def test_what_was_acknowledged_survives_a_kill(log, tmp_path):
    url = "sqlite" if isinstance(log, SqliteLog) else log.url
    reads, writes = os.pipe()
    os.set_inheritable(writes, True)
    child = multiprocessing.get_context("fork").Process(
        target=_die_while_writing, args=(url, tmp_path, writes)
    )
    child.start()
    os.close(writes)
    with os.fdopen(reads) as reports:
        acknowledged = [int(reports.readline()) for _ in range(50)]
        os.kill(child.pid, signal.SIGKILL)  # in the midst of what comes next
        child.join()
        acknowledged += [int(line) for line in reports.read().split("\n")[:-1]]
    users = [entry.user for _, entry in log.read(0, 100_000)]
    assert users.count("first") == users.count("second") >= len(acknowledged)


def test_sqlite_waits_for_the_disk(tmp_path, monkeypatch):
    connections, connect = [], sqlite3.connect

    def remembered(*args, **options):
        connections.append(connect(*args, **options))
        return connections[-1]

    monkeypatch.setattr(sqlite3, "connect", remembered)
    log = open_log("sqlite", tmp_path)
    writer = threading.Thread(target=log.append, args=([event(1)],))
    writer.start()
    writer.join()
    assert log.last() == 1 and len(connections) == 2, "one for each thread"
    for connection in connections:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    log.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StateError, match="log.sqlite"):
        open_log("sqlite", tmp_path)
    with pytest.raises(SettingsError, match="serve.state"):
        open_log("mysql://here", tmp_path)


def test_a_redis_that_would_lose_something_is_refused(redis_server, tmp_path):
    redis = pytest.importorskip("redis")
    client = redis.Redis.from_url(redis_server)
    client.config_set("appendfsync", "everysec")
    try:
        with pytest.raises(StateError, match="appendfsync everysec"):
            open_log(redis_server, tmp_path)
    finally:
        client.config_set("appendfsync", "always")
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StateError, match="allkeys-lru"):
            open_log(redis_server, tmp_path)
        client.config_set("maxmemory-policy", "noeviction")
        open_log(redis_server, tmp_path, keep_days=90).append([event(1, key="kept long")])
        assert client.ttl("recray:key:event:kept long") > 89 * 86_400
    finally:
        client.config_set("maxmemory", "0")
    with pytest.raises(StateError, match="127.0.0.1:1/0"):
        open_log("redis://user:secret@127.0.0.1:1/0", tmp_path)


def test_a_redis_that_was_emptied_is_a_new_store(redis_server, tmp_path):
    client = pytest.importorskip("redis").Redis.from_url(redis_server)
    client.flushall()
    log = open_log(redis_server, tmp_path)
    before = log.identity
    log.append([event(1), event(2)])
    client.flushall()
    assert log.append([event(3)]) == [1] and log.identity != before
    log.close()


def test_writers_wait_together_and_decisions_come_before_their_outcome(log):
    commits, all_queued = [], threading.Event()
    inner = log.append

    def held(entries):
        """The first commit goes on when as many wait as will."""
        commits.append(len(entries))
        assert all_queued.wait(DEADLINE_S)
        return inner(entries)

    log.append = held
    writer = Writer(log)

    async def talk():
        writer.enqueue([Entry("decision", "r1", "u", 1.0, {})])
        appends = [asyncio.create_task(writer.append([event(n), event(n)])) for n in range(50)]
        await asyncio.sleep(0)  # each begins: it is in the queue
        all_queued.set()
        assert all(first and not second for first, second in await asyncio.gather(*appends))
        writer.enqueue([Entry("decision", "r2", "u", 1.0, {})])
        assert await writer.append_outcomes(
            [Entry("outcome", "o2", "u", 2.0, {"request_id": "r2"})], "r2"
        ) == (True, True)
        assert await writer.append_outcomes(
            [Entry("outcome", "o3", "u", 2.0, {"request_id": "r3"})], "r3"
        ) == (True, False)
        assert await writer.append_outcomes(
            [Entry("outcome", "o3", "u", 2.0, {"request_id": "r3"})], "r3"
        ) == (False, False)
        return await writer.recent("u", 0, 0.0)

    recent = asyncio.run(talk())
    writer.close()
    assert len(recent) == 50 and len(commits) < 10
    kinds = [(entry.kind, entry.key) for _, entry in log.read(0, 1000) if entry.kind != "event"]
    assert kinds == [("decision", "r1"), ("decision", "r2"), ("outcome", "o2"), ("set_aside", "o3")]
    assert writer.set_aside == 1 and writer.lost == 0


def test_an_outcome_waits_for_a_decision_of_another_replica(log, monkeypatch):
    monkeypatch.setattr("recray.events.writer.DECISION_WAIT_S", DEADLINE_S)  # however slow this disk is
    here, there = Writer(log), Writer(log)
    threading.Timer(0.1, lambda: there.enqueue([Entry("decision", "far", "u", 1.0, {})])).start()
    assert asyncio.run(here.append_outcomes([Entry("outcome", "o", "u", 2.0, {})], "far")) == (True, True)
    here.close(), there.close()


def test_outcomes_of_made_up_requests_do_not_make_others_wait(log, monkeypatch):
    monkeypatch.setattr("recray.events.writer.DECISION_WAIT_S", DEADLINE_S)  # who waits does so to the end
    writer = Writer(log)
    impatient = 40 - MAX_WAITING_OUTCOMES

    async def many(times):
        outcomes = {
            f"made up {times}.{n}": asyncio.create_task(
                writer.append_outcomes(
                    [Entry("outcome", f"o{times}.{n}", "u", 2.0, {})], f"made up {times}.{n}"
                )
            )
            for n in range(40)
        }
        ended = asyncio.as_completed(outcomes.values(), timeout=DEADLINE_S / 4)
        assert [await next(ended) for _ in range(impatient)] == [(True, False)] * impatient
        waiting = {request: outcome for request, outcome in outcomes.items() if not outcome.done()}
        assert len(waiting) == MAX_WAITING_OUTCOMES
        for request in waiting:
            writer.enqueue([Entry("decision", request, "u", 1.0, {})])
        assert await asyncio.gather(*waiting.values()) == [(True, True)] * MAX_WAITING_OUTCOMES

    for times in range(2):  # those that waited have made room for others
        asyncio.run(many(times))
    kinds = Counter(entry.kind for _, entry in log.read(0, 100))
    assert kinds == {
        "set_aside": 2 * impatient,
        "decision": 2 * MAX_WAITING_OUTCOMES,
        "outcome": 2 * MAX_WAITING_OUTCOMES,
    }
    writer.close()


def test_a_log_that_fails_is_heard_of_and_the_writer_lives_on(log):
    inner, broken = log.append, [True]

    def sometimes(entries):
        if broken:
            raise StateError("gone")
        return inner(entries)

    log.append = sometimes
    writer = Writer(log)

    async def talk():
        writer.enqueue([Entry("decision", "lost", "u", 1.0, {})])
        with pytest.raises(StateError, match="gone"):
            await writer.append([event(1)])
        broken.clear()
        assert await writer.append([event(1)]) == [1]

    asyncio.run(talk())
    writer.close()
    assert writer.lost == 1 and not log.has("decision", "lost")


def test_a_caller_that_leaves_while_it_waits_cancels_nobody_else(log):
    inner = log.append

    taken, go_on = threading.Event(), threading.Event()

    def held(entries):
        taken.set()
        assert go_on.wait(DEADLINE_S)
        return inner(entries)

    log.append = held
    writer = Writer(log)

    async def talk():
        cancelled = asyncio.create_task(writer.append([event(1)]))
        await asyncio.to_thread(taken.wait)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        go_on.set()
        return await asyncio.wait_for(writer.append([event(2)]), DEADLINE_S)

    assert asyncio.run(talk())[0] > 0 and log.has("event", "u-1")
    writer.close()


def test_a_writer_that_is_closed_has_written_all(log):
    writer = Writer(log)
    for n in range(200):
        writer.enqueue([Entry("decision", f"d{n}", None, 1.0, {})])
    writer.close()
    assert log.last() == 200
