"""The handler without HTTP: snapshot look-up, real time, unknown users."""

import datetime as dt
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import synthetic_overrides
from pydantic import ValidationError

from recray.config import ScoreSettings, load_settings
from recray.dataset.reader import assign_buckets
from recray.errors import DamagedArtifactError, MissingArtifactError, RequestError, SettingsError
from recray.inference import Vocabulary
from recray.serving.api import RecommendRequest
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query, rank_inputs
from recray.serving.sources import look_up_complete_list, look_up_list
from recray.serving.state import ServingState
from recray.snapshot.reader import Snapshot
from recray.snapshot.score import BucketScorer
from recray.snapshot.writer import write_part
from recray.storage import Storage
from recray.testing.published import prepare_here, publish_untrained, untrained_bundle

K = 20  # score.k of the world
NO_RULES = ScoreSettings().rules()
RULES = {"exclude": ("brand=brand 3",), "caps": {"category": 4}}


@pytest.fixture(scope="module")
def storage(synthetic_settings, synthetic_dataset, tmp_path_factory) -> Storage:
    settings = synthetic_settings.model_copy(
        update={"score": synthetic_settings.score.model_copy(update=RULES)}
    )
    return publish_untrained(settings, synthetic_dataset, tmp_path_factory.mktemp("night"))


@pytest.fixture(scope="module")
def served_state(storage) -> ServingState:
    return ServingState.load(storage)


def ask(served_state, **body):
    query = resolve_query(RecommendRequest(**body), served_state)
    ranked = (look_up_list if query.mode == "batch" else look_up_complete_list)(
        query, served_state
    ) or rank_inputs([bind_query(query, served_state)])[0]
    return SimpleNamespace(items=ranked.to_items(), source=ranked.source)


def test_every_user_is_in_the_snapshot_once(storage, synthetic_dataset):
    snapshot = Snapshot.latest(storage)
    assert snapshot.manifest["users"] == synthetic_dataset.n_users == 300
    assert all(len(snapshot.find(user).item_ids) == K for user in range(300))
    assert (
        snapshot.find(300) is None
        and snapshot.find("nobody") is None
        and snapshot.find("7") == snapshot.find(7)
    )


def test_the_snapshot_is_what_the_predictor_says_now(served_state):
    for user in (0, 17, 250):
        stored = ask(served_state, user_id=user, k=10)
        live = ask(
            served_state,
            user_id=user,
            k=10,
            now=dt.datetime.fromtimestamp(served_state.dataset.now_s, dt.UTC),
        )
        assert (stored.source, live.source) == ("snapshot", "realtime")
        np.testing.assert_allclose([i.score for i in stored.items], [i.score for i in live.items], atol=1e-5)


def test_nightly_lists_and_live_answers_keep_the_rules(served_state, synthetic_dataset):
    items = {row["item_id"]: row for row in synthetic_dataset.items.to_pylist()}
    assert sum(row["brand"] == "brand 3" for row in items.values()) > 3
    for body in (
        {"user_id": 7, "k": K},
        {"user_id": 7, "k": K, "now": "2025-01-01"},
        {"user_id": "nobody", "k": K},
        {"history": [], "k": K},
    ):
        shown = [items[item.item_id] for item in ask(served_state, **body).items]
        assert len(shown) == K and "brand 3" not in {row["brand"] for row in shown}, body
        assert max(Counter(row["category"] for row in shown).values()) <= 4, body


def test_a_history_sent_along_is_read(served_state):
    items = served_state.predictor.vocabulary.item_ids.to_pylist()
    a = ask(served_state, history=[{"item_id": items[3]}], k=5)
    b = ask(served_state, history=[{"item_id": items[3]}, {"item_id": items[40], "event": "purchase"}], k=5)
    assert a.source == b.source == "realtime"
    assert [i.score for i in a.items] != [i.score for i in b.items]
    new = ask(served_state, history=[{"item_id": items[3]}], k=50, filter_seen=True, deny=[items[5]])
    assert not {items[3], items[5]} & {i.item_id for i in new.items}


def test_order_is_by_time_not_by_place(served_state):
    items = served_state.predictor.vocabulary.item_ids.to_pylist()
    first = {"item_id": items[1], "timestamp": "2024-04-01T00:00:00Z"}
    second = {"item_id": items[2], "timestamp": "2024-04-02T00:00:00Z"}
    a, b = (ask(served_state, history=h, k=5) for h in ([first, second], [second, first]))
    assert a == b


@pytest.mark.parametrize(
    "body",
    [
        {"user_id": "nobody"},
        {},
        {"history": []},
        {"history": [{"item_id": "unheard of"}]},
        {"user_id": 10**9},
    ],
)
def test_nothing_known_gets_the_popular_list(served_state, body):
    answer = ask(served_state, k=5, **body)
    assert answer.source == "popular" and len(answer.items) == 5


def test_what_the_nightly_list_cannot_answer_is_computed(served_state):
    assert ask(served_state, user_id=3, k=K + 5).source == "realtime"
    assert len(ask(served_state, user_id=3, k=K + 5).items) == K + 5
    assert ask(served_state, user_id=3, k=5, filter_seen=True).source == "realtime"
    first = ask(served_state, user_id=3, k=1).items[0].item_id
    assert first not in {i.item_id for i in ask(served_state, user_id=3, k=5, deny=[first]).items}


@pytest.mark.parametrize("body", [{"k": 0}, {"k": 10**6}, {"bogus": 1}, {"history": [{}]}, {"now": "soon"}])
def test_requests_that_make_no_sense_are_refused(body):
    with pytest.raises(ValidationError):
        RecommendRequest(**body)


def test_an_unknown_event_type_is_named(served_state):
    with pytest.raises(RequestError, match="zap"):
        ask(served_state, history=[{"item_id": "i0000001", "event": "zap"}])


def test_the_context_of_a_request_is_heard(storage):
    state = ServingState.load(storage)
    torch.nn.init.normal_(state.predictor.model.context[0].table.weight[1:].data)
    history = [{"item_id": "i0000003"}]
    morning, evening, unknown = (
        ask(state, history=history, **now).items
        for now in ({"now": "2024-05-01T08:00"}, {"now": "2024-05-01T20:00"}, {})
    )
    assert morning != evening != unknown
    with pytest.raises(RequestError, match="context: unknown field 'device'"):
        ask(state, history=history, context={"device": "phone"})


def test_damaged_and_missing_snapshots_are_refused(storage, tmp_path):
    with pytest.raises(MissingArtifactError):
        ServingState.load(Storage(tmp_path))
    part = next(Snapshot.latest(storage).path.glob("index-*.arrow"))
    content = part.read_bytes()
    try:
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DamagedArtifactError, match=part.name):
            ServingState.load(storage)
    finally:
        part.write_bytes(content)


def test_the_index_says_what_the_parts_say_and_a_snapshot_without_one_is_read(storage, tmp_path):
    snapshot = Snapshot.latest(storage)
    parts = [row for file in snapshot.path.glob("part-*.parquet") for row in pq.read_table(file).to_pylist()]
    older = Snapshot(snapshot.path, {**snapshot.manifest, "files": {}})
    for row in parts:
        indexed_row = snapshot.find(row["user_id"])
        assert (indexed_row.item_ids, indexed_row.scores, indexed_row.source) == (
            row["item_ids"],
            row["scores"],
            row["source"],
        )
        assert older.find(row["user_id"]) == indexed_row


def test_a_bucket_without_a_user_is_read(tmp_path):
    none = pa.array([], pa.string())
    write_part(
        tmp_path, 0, pa.array([], pa.int64()), none, pa.array([0], pa.int32()), pa.array([], pa.float32()), []
    )
    fields = {
        "as_of_s": 0,
        "buckets": 1,
        "k": 1,
        "users": 1,
        "user_type": "int64",
        "run_key": "k",
        "files": {"index-00000.arrow": {}},
    }
    assert Snapshot(tmp_path, fields).find(3) is None


def test_users_with_text_ids_are_found(tmp_path):
    names = sorted({f"user {n}" for n in range(50)} | {"ä", "Z", "\U0001f600"})
    write_part(
        tmp_path, 0, pa.array(names), pa.array(names), pa.array(range(len(names) + 1), pa.int32()),
        pa.array(range(len(names)), pa.float32()), ["model"] * len(names),
    )  # fmt: skip
    fields = {
        "as_of_s": 0,
        "buckets": 1,
        "k": 1,
        "users": len(names),
        "user_type": "string",
        "run_key": "k",
        "files": {"index-00000.arrow": {}},
    }
    snapshot = Snapshot(tmp_path, fields)
    assert [snapshot.find(name).item_ids for name in names] == [[name] for name in names]
    assert (
        snapshot.find("user 5x") is None
        and snapshot.find("zz") is None
        and snapshot.find("\U0001f601") is None
    )


def test_a_dataset_with_newer_items_is_translated(served_state, synthetic_dataset):
    ids = pa.array([f"x{n}" for n in range(served_state.predictor.n_items)])
    older = Vocabulary(ids, ["view"])
    translation = older.translation(synthetic_dataset)
    shard = synthetic_dataset.shard(0)
    assert not translation.history(shard.history(0)).item_index.any()
    same = served_state.predictor.vocabulary.translation(synthetic_dataset)
    assert same.to_bundle.tolist() == same.to_dataset.tolist() == list(range(synthetic_dataset.n_items + 1))


def test_users_without_a_known_item_get_the_popular_list_marked_so(tmp_path, synthetic_folder):
    table = pq.read_table(synthetic_folder / "events").select(["user_id", "item_id", "timestamp"])
    lonely = pa.table(
        {"user_id": [999], "item_id": ["met by nobody else"], "timestamp": table["timestamp"][:1]}
    )
    pq.write_table(pa.concat_tables([table, lonely]), tmp_path / "e.parquet")
    overrides = [
        *synthetic_overrides(synthetic_folder, tmp_path),
        f"data.events={tmp_path / 'e.parquet'}",
        "data.min_item_events=2",
    ]
    settings = load_settings(None, overrides)
    data = prepare_here(settings)
    bundle = untrained_bundle(settings, data, tmp_path / "b", "b")
    shared = {
        "policy": None,
        "bundle": str(bundle.path),
        "dataset": str(data.path),
        "batch_users": 64,
        "threads": 1,
        "rules": NO_RULES,
    }
    bucket = int(assign_buckets([999], data.n_shards)[0])
    part = BucketScorer(**shared, folder=str(tmp_path), k=5, filter_seen=False)({"item": bucket})
    rows = {row["user_id"]: row for row in pq.read_table(tmp_path / f"part-{bucket:05d}.parquet").to_pylist()}
    assert part["popular_users"] == 1 and rows[999]["source"] == "popular" and len(rows[999]["item_ids"]) == 5
    assert {row["source"] for user, row in rows.items() if user != 999} == {"model"}
    assert rows[999]["state"] is None
    for user, row in rows.items():
        if user != 999:
            (spread, margin), is_known = row["state"], _met(data, user)
            assert 0 <= spread <= np.log(max(len(data.user_history(user).item_index), 2)) and len(is_known)
            assert margin == pytest.approx(row["scores"][0] - row["scores"][1], abs=1e-6)
    everything = BucketScorer(**shared, folder=str(tmp_path), k=500, filter_seen=True)({"item": bucket})
    lists = pq.read_table(tmp_path / f"part-{bucket:05d}.parquet").to_pylist()
    assert all(not set(row["item_ids"]) & _met(data, row["user_id"]) for row in lists)
    assert np.isfinite(everything["best"]).all()
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="score.gpus_per_actor asks for a GPU"):
            BucketScorer(**shared, folder=str(tmp_path), k=5, filter_seen=True, gpu=True)


def test_batch_recommendations_in_bfloat16_are_nearly_the_same(
    synthetic_settings, synthetic_dataset, tmp_path
):
    bundle = untrained_bundle(synthetic_settings, synthetic_dataset, tmp_path / "b", "b")
    shared = {
        "policy": None,
        "bundle": str(bundle.path),
        "dataset": str(synthetic_dataset.path),
        "batch_users": 64,
        "threads": 1,
        "rules": NO_RULES,
    }
    nights = []
    for precision in ("float32", "bfloat16"):
        (folder := tmp_path / precision).mkdir()
        BucketScorer(**shared, folder=str(folder), k=10, filter_seen=True, precision=precision)({"item": 0})
        nights.append(pq.read_table(folder / "part-00000.parquet").to_pylist())
    exact, near = (np.array([row["scores"] for row in of_one_run]) for of_one_run in nights)
    assert 0 < abs(exact - near).max() < 0.05 * exact.std() + 1e-3
    together = [
        len(set(one["item_ids"]) & set(other["item_ids"])) for one, other in zip(*nights, strict=True)
    ]
    assert np.mean(together) > 9.5


def _met(data, user_id) -> set:
    ids = data.items["item_id"].to_pylist()
    return {ids[index - 1] for index in data.user_history(user_id).item_index}


@pytest.mark.parametrize(
    ("clock", "as_of_s", "begins_s"),
    [("timestamp", 99, 100), ("position", 99, 100), ("position", 0, math.inf)],
)
def test_what_comes_after_the_as_of_is_not_in_the_snapshot(clock, as_of_s, begins_s):
    """Also where the owner's events have no times: what was told has one, and was cut by it."""
    stage = SimpleNamespace(dataset=SimpleNamespace(clock=clock, as_of_s=as_of_s))
    assert ServingState.begins_s.fget(stage) == begins_s
