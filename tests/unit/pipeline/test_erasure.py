"""A user who is forgotten: no byte of the id is left under the root, answers are those for nobody, and a kill
anywhere does no harm.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import synthetic_overrides
from hypothesis import given
from hypothesis import strategies as st

from recray.cli import main
from recray.config import ServeSettings, load_settings
from recray.dataset.reader import Dataset
from recray.errors import SettingsError
from recray.events import collect as collecting
from recray.events.log import Entry, make_key
from recray.events.store import open_log
from recray.pipeline.erasure import forget
from recray.serving.api import EventsRequest, FeedbackRequest, HistoryRequest, RecommendRequest, ScoreRequest
from recray.serving.service import Service
from recray.snapshot.reader import Snapshot
from recray.storage import Storage, lease, open_immutable
from recray.storage.lease import FAULT
from recray.storage.opt_out import OptOut
from recray.testing.published import prepare_here, publish_untrained
from recray.testing.synthetic import SyntheticShop

WHO, OTHER = "forget-me-4711", "another-0815"


def named(user: int) -> str:
    return {5: WHO, 6: OTHER}.get(user, f"user-{user}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A root with a published night, an older dataset, a log, collected events, and bad rows, all of which
    name the user.
    """
    folder = tmp_path_factory.mktemp("erasure")
    SyntheticShop(users=60, items=30, events_per_user=8, seed=2).write(folder)
    events = pq.read_table(folder / "events")
    users = pa.array([named(user) for user in events["user_id"].to_pylist()])
    events = events.set_column(0, "user_id", users)
    shutil.rmtree(folder / "events")
    (folder / "events").mkdir()
    broken = (
        events.slice(0, 3)
        .set_column(0, "user_id", pa.array([WHO] * 3))
        .set_column(2, "timestamp", pa.array([None] * 3, events["timestamp"].type))
    )
    pq.write_table(pa.concat_tables([events, broken]), folder / "events" / "a.parquet")
    root = folder / "root"
    overrides = [*synthetic_overrides(folder, root), "data.shards=3"]
    settings = load_settings(None, overrides)
    log = open_log("sqlite", root)
    log.append(entries())
    collecting.collect(Storage(root), log)
    log.append(entries("later"))
    log.close()
    prepare_here(load_settings(None, [*overrides, "data.min_item_events=1"]))  # of another night
    publish_untrained(settings, prepare_here(settings), root)
    return folder, overrides


def entries(prefix="e") -> list[Entry]:
    rows = []
    for user in (WHO, OTHER):
        rows.append(
            Entry(
                "event",
                make_key(user, f"{prefix}1"),
                user,
                1e9,
                {"item_id": "i0000001", "event": "view", "value": 1.0},
            )
        )
        rows.append(
            Entry(
                "decision",
                f"{prefix}-of-{user}",
                user,
                1e9,
                {"items": ["i0000001"], "source": "realtime", "user": user},
            )
        )
        rows.append(
            Entry(
                "outcome",
                f"{prefix}-out-{user}",
                None,
                1e9,
                {"request_id": f"{prefix}-of-{user}", "outcome": "click"},
            )
        )
    return rows


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole[0] / "root", tmp_path / "root")


def holding(root: Path, text: str) -> list[str]:
    """Files that have a text, as bytes or within what Parquet compresses."""
    holders = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        held = text.encode() in path.read_bytes()
        if path.suffix == ".parquet":
            held |= text in str(pq.read_table(path).to_pylist())
        holders += [str(path.relative_to(root))] * held
    return holders


def run(root: Path, who: str = WHO):
    log = open_log("sqlite", root)
    try:
        with lease.hold(root, "forget", 5.0):
            return forget(Storage(root), who, log)
    finally:
        log.close()


def assert_forgotten(root: Path, before: Path) -> None:
    """Nothing names the user, everybody else is as before, and everything is whole."""
    assert holding(root, WHO) == []
    ours, theirs = Snapshot.latest(Storage(root)), Snapshot.latest(Storage(before))
    assert ours.manifest["users"] == theirs.manifest["users"] - 1 and ours.find(WHO) is None
    now, then = (
        Dataset.open(folder / snapshot.manifest["dataset"], verify=True)
        for folder, snapshot in ((root, ours), (before, theirs))
    )
    assert (
        now.digest == ours.manifest["dataset_digest"]
        and now.n_users == then.n_users - 1
        and now.n_events < then.n_events
    )
    for shard, was in zip(now.shards(), then.shards(), strict=True):
        for row, user in enumerate(shard.user_ids.to_pylist()):
            old = was.find(user)
            assert ours.find(user) == theirs.find(user) and (shard.split[row] == was.split[old]).all()
            assert all(
                np.array_equal(one, other)
                for one, other in zip(shard.history(row), was.history(old), strict=True)
            )
    assert [path.name for path in (root / "datasets").glob("*")] == [now.path.name] and len(
        list((root / "scores").glob("dt=*/*"))
    ) == 1
    for path in (root / "collected").glob("*"):
        open_immutable(path, collecting.KIND)
    with contextlib.closing(sqlite3.connect(root / "state" / "log.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM log").fetchone() == (6,), "those of the other one"


def test_everything_goes_and_everybody_else_stays(root, whole):
    before = whole[0] / "root"
    places = {path.split("/")[0] for path in holding(root, WHO)}
    assert places == {"collected", "datasets", "quarantine", "scores", "state"}, (
        "else there is nothing to forget"
    )
    report = run(root)
    assert report.new and report.log == 6 and report.rows == 3 + 3 * 2, (
        "three of the collected, three bad rows of each dataset"
    )
    assert_forgotten(root, before)
    assert holding(root, OTHER) and WHO not in (root / "forgotten.json").read_text()
    repeated = run(root)
    assert (repeated.new, repeated.log, repeated.rows, repeated.artifacts) == (False, 0, 0, [])
    assert_forgotten(root, before)


POINTS = (
    "forget:listed",
    "forget:tables",
    "dataset:complete",
    "snapshot:complete",
    "forget:written",
    "LATEST.json:visible",
    "forget:published",
)


def test_killed_anywhere_and_repeated_it_ends_right(root, whole):
    for point in POINTS:
        child = os.fork()
        if not child:
            os.environ[FAULT] = f"KILL@{point}"
            run(root)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point
        assert Snapshot.latest(Storage(root)).manifest["users"] in (59, 60), "a whole night is published"
    run(root)
    assert_forgotten(root, whole[0] / "root")


def test_the_next_nightly_run_reads_nothing_of_the_user(root, whole):
    folder, overrides = whole
    settings = load_settings(None, [*overrides, f"storage.root={root}"])
    before = prepare_here(settings)
    run(root)
    after = prepare_here(settings)
    assert after.key != before.key and after.n_users == before.n_users - 1 and after.user_history(WHO) is None
    assert after.manifest["opted_out"] > 3 and prepare_here(settings).key == after.key
    assert holding(root / "datasets", WHO) == [] and holding(root / "quarantine", WHO) == [], (
        "bad rows neither"
    )


def test_a_line_that_is_no_row_is_not_kept_where_it_names_the_user(tmp_path):
    lines = [f"user-{n},i{n % 3},{1_600_000_000 + n}" for n in range(200)] + [
        f'"{WHO}",i1',
        f"{WHO},i1,{1_600_000_000}",
        "somebody,i1",
    ]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    where = [
        f"data.events={tmp_path / 'events.csv'}",
        f"storage.root={tmp_path / 'root'}",
        "split.kind=leave_one_out",
        "data.max_invalid_fraction=0.1",
    ]
    settings = load_settings(None, where)
    assert prepare_here(settings).manifest["bad_rows"] == 2 and len(holding(tmp_path / "root", WHO)) > 1
    with lease.hold(tmp_path / "root", "forget", 5.0):
        assert forget(Storage(tmp_path / "root"), WHO, None).rows == 1
    assert holding(tmp_path / "root", WHO) == []
    repeated = prepare_here(settings)
    assert (repeated.manifest["bad_rows"], repeated.manifest["opted_out"]) == (1, 2) and holding(
        tmp_path / "root", WHO
    ) == []


def test_the_command_says_what_went_and_what_remains(root, whole, capsys):
    where = [*whole[1], f"storage.root={root}"]
    assert main(["forget", WHO, *where]) == 0
    said = capsys.readouterr().err
    assert (
        "on the opt-out list" in said
        and "6 entries of the endpoint's event store" in said
        and "the weights of 1 bundles" in said
    )
    assert holding(root, WHO) == []
    assert main(["forget", "nobody-ever", *where]) == 0 and "erased: 0 entries" in capsys.readouterr().err


def test_a_copy_has_all_that_is_kept_of_the_user_and_nothing_of_another(root, whole, tmp_path, capsys):
    where, file = [*whole[1], f"storage.root={root}"], tmp_path / "copy.jsonl"
    assert main(["export", WHO, "--out", str(file), *where]) == 0
    assert "event: 3" in capsys.readouterr().err and file.stat().st_mode & 0o777 == 0o600
    records = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = Counter(record["kind"] for record in records)
    learned = Dataset.open(root / Snapshot.latest(Storage(root)).manifest["dataset"]).user_history(WHO)
    once = {
        "event": 3,
        "decision": 3,
        "outcome": 3,
        "bad_row": 6,
        "published_list": 1,
    }  # two in the log, of which one was collected; of two nights
    assert kinds == {**once, "learned_event": len(learned.item_index)}
    (listed,) = (record for record in records if record["kind"] == "published_list")
    assert listed["item_ids"] == Snapshot.latest(Storage(root)).find(WHO).item_ids
    places = {record["where"].split("/")[0].replace("log", "state") for record in records}
    assert places == {path.split("/")[0] for path in holding(root, WHO)}
    assert OTHER not in file.read_text()

    assert main(["export", WHO, "--out", str(file), *where]) == 2 and "it exists" in capsys.readouterr().err
    assert main(["export", "nobody-ever", "--out", str(tmp_path / "none.jsonl"), *where]) == 0
    assert "nothing is stored" in capsys.readouterr().err and (tmp_path / "none.jsonl").read_text() == ""
    with contextlib.closing(open_log("sqlite", root)) as log:
        (read,) = (entry for _, entry in log.read_user(WHO) if entry.kind == "access")
    assert read.body == {"by": "recray export", "what": "export"}, "that a history was read is logged"
    run(root)
    assert main(["export", WHO, "--out", str(tmp_path / "gone.jsonl"), *where]) == 0
    assert [json.loads(line)["kind"] for line in (tmp_path / "gone.jsonl").read_text().splitlines()] == [
        "opted_out"
    ]


@pytest.mark.parametrize("state", ["sqlite", "redis_server"])
def test_at_the_endpoint_a_user_is_nobody_from_the_next_answer_on(root, whole, request, state):
    settings = load_settings(None, [*whole[1], f"storage.root={root}"])
    options = ServeSettings(
        state="sqlite" if state == "sqlite" else request.getfixturevalue(state), timeout_s=5.0
    )
    if state != "sqlite":
        redis = pytest.importorskip("redis").Redis.from_url(options.state)
        redis.flushall()
    one, two = (Service(Storage(root), options, settings.score) for _ in range(2))  # replicas

    async def scenario():
        event = EventsRequest.model_validate({"user_id": WHO, "events": [{"item_id": "i0000001"}]})
        answer = await one.recommend(RecommendRequest(user_id=WHO))
        await one.intake.feedback(FeedbackRequest(request_id=answer.request_id, outcome="click"))
        assert (await one.intake.events(event)).kept == 1 and answer.source != "popular"
        forgotten = await one.intake.forget(WHO)
        assert forgotten.new and forgotten.dropped >= 3 and not (await two.intake.forget(WHO)).new
        for handler in (one, two):
            handler.refresh()
            kept = await handler.intake.events(event)
            assert (kept.kept, kept.opted_out) == (0, 1)
            assert (await handler.recommend(RecommendRequest(user_id=WHO))).source == "popular"
            assert (await handler.history(HistoryRequest(user_id=WHO))).events == []
            assert (await handler.score(ScoreRequest(user_id=WHO, items=["i0000001"]))).source == "popular"
            assert (await handler.recommend(RecommendRequest(user_id=OTHER))).source != "popular"
        await one.recorder.write(lambda writer: writer.append([]))

    asyncio.run(scenario())
    one.close()
    two.close()
    if state == "sqlite":
        assert holding(root / "state", WHO) == []
    else:
        left = [key for key in redis.scan_iter() if WHO.encode() in key]
        assert left == [] and WHO not in str(redis.xrange("recray:log"))


def test_whom_the_operator_excludes_is_in_no_dataset_and_nobody_at_the_endpoint(root, whole, tmp_path):
    file = tmp_path / "excluded.txt"
    file.write_text(f"{WHO}\nsomebody else\n")
    settings = load_settings(None, [*whole[1], f"storage.root={root}", f"data.exclude_users={file}"])
    dataset = prepare_here(settings)
    assert (
        dataset.user_history(WHO) is None
        and dataset.user_history(OTHER) is not None
        and dataset.manifest["opted_out"] > 3
    )
    assert holding(dataset.path, WHO) == []
    handler = Service(
        Storage(root), ServeSettings(timeout_s=5.0), settings.score, exclude_users=settings.data.exclude_users
    )

    async def responses(user):
        event = EventsRequest.model_validate({"user_id": user, "events": [{"item_id": "i0000001"}]})
        return (await handler.recommend(RecommendRequest(user_id=user))).source, (
            await handler.intake.events(event)
        ).opted_out

    assert asyncio.run(responses(WHO)) == ("popular", 1) and asyncio.run(responses(OTHER)) == ("realtime", 0)
    file.write_text(f"{OTHER}\n")
    handler.refresh()
    assert asyncio.run(responses(WHO))[1] == 0 and asyncio.run(responses(OTHER)) == ("popular", 1)
    handler.close()


@given(
    st.lists(
        st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(min_size=1, max_size=20)),
        min_size=1,
        max_size=8,
        unique_by=str,
    )
)
def test_who_is_on_the_list_is_known_by_any_way_to_write_the_id_and_by_nothing_else(tmp_path_factory, users):
    root = tmp_path_factory.mktemp("list")
    listed = OptOut.of(root)
    assert len(listed) == 0 and listed.digest is None and users[0] not in listed
    assert [listed.add(user) for user in users] == [True] * len(users) and not listed.add(str(users[0]))
    read = OptOut.of(root)
    assert (
        read.mask_members(users).all()
        and all(str(user) in read for user in users)
        and read.digest == listed.digest
    )
    assert "nobody else at all" not in read


def test_a_file_of_users_is_as_good_as_the_list_and_neither_hides_the_other(tmp_path):
    file = tmp_path / "excluded.txt"
    file.write_text("\ufeff7\n  ann \n\n", encoding="utf-8")
    both, alone = OptOut.of(tmp_path, str(file)), OptOut.of(tmp_path)
    assert (
        7 in both
        and "ann" in both
        and 8 not in both
        and len(both) == 2
        and alone.digest is None is not both.digest
    )
    before = both.digest
    assert alone.add(8) and not alone.add(8)
    file.unlink()
    with pytest.raises(SettingsError, match=r"data.exclude_users: .*excluded.txt cannot be read"):
        both.reload()
    assert 8 in both and 7 in both, "who opted out since is known although the file is gone"
    assert both.digest not in (before, alone.digest) and both.mask_members([7, 8, 9]).tolist() == [
        True,
        True,
        False,
    ]
