"""recray from Python: equal to the endpoint, with any kind of table, and clear about what it cannot do."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import recray
from recray.errors import (
    DataError,
    MissingArtifactError,
    RefusedError,
    RequestError,
    SettingsError,
    UnknownItemError,
)
from recray.serving.api import RecommendRequest
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query, rank_inputs
from recray.serving.state import ServingState
from recray.storage.opt_out import OptOut
from recray.testing.published import publish_untrained

pytestmark = pytest.mark.second

USERS = [7, 3, 250]


@pytest.fixture(scope="module")
def storage(synthetic_settings, synthetic_dataset, tmp_path_factory):
    return publish_untrained(synthetic_settings, synthetic_dataset, tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(storage):
    return recray.open_recommender(storage.root)


def rows_of(table):
    return list(zip(*table.select(["item_id", "score"]).to_pydict().values(), strict=True))


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ({}, {}),
        ({"filter_seen": True}, {"filter_seen": True}),
        ({"where": {"brand": ["brand 1"]}}, {"where": {"brand": "brand 1"}}),
        ({"where": {"price": {"max": 20}}}, {"where": {"price": {"max": 20}}}),
        ({"controls": {"temperature": 0.5}}, {"controls": {"temperature": 0.5}}),
        ({"now": "2024-05-01T00:00:00"}, {"now": dt.datetime(2024, 5, 1)}),
    ],
)
def test_recommendations_are_those_of_the_endpoint(storage, model, body, arguments):
    table = model.recommend(USERS, k=7, **arguments)
    assert table.column_names == ["user_id", "rank", "item_id", "score", "source"]
    state = ServingState.load(storage)
    for user in USERS:
        query = resolve_query(RecommendRequest(user_id=user, k=7, mode="realtime", **body), state)
        (expected,) = rank_inputs([bind_query(query, state)])
        own = table.filter(pa.compute.equal(table["user_id"], user))
        assert [item for item, _ in rows_of(own)] == [item for item, _ in expected.items]
        np.testing.assert_allclose(own["score"], [score for _, score in expected.items], rtol=1e-5, atol=1e-6)
        assert own["rank"].to_pylist() == list(range(1, len(own) + 1))


class Capsule:
    """A table of a library that recray does not know."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def test_every_kind_of_table_gives_the_same(model):
    items = model.items["item_id"][:3].to_pylist()
    times = [dt.datetime(2024, 6, 1, hour, tzinfo=dt.UTC) for hour in range(3)]
    frame = pd.DataFrame(
        {"user_id": ["a", "a", "b"], "item_id": items, "timestamp": times, "value": [1, 2, 3]}
    )
    arrow = pa.Table.from_pandas(frame, preserve_index=False)
    seconds = frame.assign(timestamp=[int(time.timestamp()) for time in times])
    expected = model.recommend(events=frame, k=4, filter_seen=True)
    assert set(expected["user_id"].to_pylist()) == {"a", "b"} and set(expected["source"].to_pylist()) == {
        "realtime"
    }
    assert not set(items[:2]) & set(expected["item_id"][:4].to_pylist())
    for table in (arrow, Capsule(arrow), seconds, frame.assign(event="view")):
        assert model.recommend(events=table, k=4, filter_seen=True).equals(expected)


def test_ids_may_be_arrays(model):
    expected = model.recommend(USERS, k=2)
    for users in (np.array(USERS), pd.Series(USERS), pa.array(USERS), iter(USERS)):
        assert model.recommend(users, k=2).equals(expected)


def test_more_users_than_a_batch_are_served_in_order(model, monkeypatch):
    monkeypatch.setattr("recray.api.BATCH", 7)
    assert model.recommend(range(30), k=1)["user_id"].to_pylist() == list(range(30))


def test_scores_similar_items_and_reasons(model):
    top = model.recommend([7], k=3)
    items = top["item_id"].to_pylist()
    scores = model.score([7], [*items, "no such item"])
    np.testing.assert_allclose(
        scores["score"].to_pylist()[:3], top["score"].to_pylist(), rtol=1e-5, atol=1e-6
    )
    assert scores["score"][3].as_py() is None
    alike = model.similar(items[:2], k=4)
    assert len(alike) == 8 and alike["rank"].to_pylist() == [1, 2, 3, 4] * 2
    assert all(item != other for item, other in zip(*alike.select([0, 2]).to_pydict().values(), strict=True))
    reasons = model.explain([7], items[:1])
    assert 0 < len(reasons) <= 3 and 0 < sum(reasons["share"].to_pylist()) <= 1.001


def test_users_who_opted_out_are_unknown_users(storage, model):
    before = model.recommend([7], k=3)
    opt_out_list = OptOut.of(storage.root)
    opt_out_list.add("7")
    try:
        after = recray.open_recommender(storage.root).recommend([7], k=3)
    finally:
        opt_out_list.path.unlink()
    assert before["source"][0].as_py() == "realtime" and after["source"][0].as_py() == "popular"


def test_an_id_is_the_same_as_text_and_as_a_number(model):
    item = model.items["item_id"][5].as_py()
    expected = model.recommend([7], events=pd.DataFrame({"user_id": [7], "item_id": [item]}), k=4)
    for users, own in (([7], ["7"]), (["7"], [7]), ([7], [7.0])):
        own_events = pd.DataFrame({"user_id": own, "item_id": [item], "unused": [{"a": object()}]})
        table = model.recommend(users, events=own_events, k=4)
        assert table["item_id"].equals(expected["item_id"])
    mixed = model.recommend([7, "nobody"], k=2)
    assert mixed["user_id"].to_pylist() == ["7", "7", "nobody", "nobody"]
    assert model.score([7], [5, item])["score"][0].as_py() is None


def test_times_may_be_dates(model):
    item = model.items["item_id"][5].as_py()
    by_date = EVENTS.assign(item_id=item, timestamp=[dt.date(2024, 4, 29)] * 2)
    by_time = EVENTS.assign(item_id=item, timestamp=[dt.datetime(2024, 4, 29)] * 2)
    assert model.recommend(events=by_date, k=3).equals(model.recommend(events=by_time, k=3))


EVENTS = pd.DataFrame({"user_id": ["a", "b"], "item_id": ["i0000001", "i0000002"]})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda model: model.recommend(17850), RequestError, "pass [17850]"),
        (lambda model: model.recommend([1.5]), RequestError, "1.5 is not an id"),
        (lambda model: model.recommend([7], where={"colour": ["red"]}), RequestError, "no column 'colour'"),
        (lambda model: model.similar(["nothing"]), UnknownItemError, "'nothing'"),
        (lambda model: model.recommend(events=3), DataError, "int is no table"),
        (
            lambda model: model.recommend(
                events=pd.DataFrame({"item_id": ["a"]}, index=pd.Index([1], name="user_id"))
            ),
            DataError,
            "reset_index",
        ),
        (lambda model: model.recommend(events=pd.DataFrame({"user": [1]})), DataError, "no column 'user_id'"),
        (
            lambda model: model.recommend(
                events=pd.DataFrame({"user_id": [1], "item_id": ["a"], "timestamp": ["tomorrow"]})
            ),
            DataError,
            "times cannot be read",
        ),
        (lambda model: model.recommend([7], k=0), RequestError, "k: "),
        (lambda model: model.recommend([7], where="brand"), RequestError, "is no dict"),
        (lambda model: model.recommend([7], where={"price": {"maximum": 1}}), RequestError, "maximum"),
        (lambda model: model.recommend([7], controls={"temperature": 5}), RequestError, "temperature"),
        (lambda model: model.recommend(pd.DataFrame({"user_id": [1]})), RequestError, "not a list of ids"),
        (lambda model: model.similar(model.items["item_id"][:1], k=0), RequestError, "k: "),
        (lambda model: model.explain([7], ["nothing"]), RequestError, "knows none"),
        (lambda model: model.score([7], []), RequestError, "items: "),
        (lambda model: model.recommend(events=EVENTS.assign(user_id=[None, "b"])), DataError, "no user_id"),
        (lambda model: model.recommend(events=EVENTS.assign(item_id=[1, "b"])), DataError, "several types"),
        (lambda model: model.recommend(events=EVENTS.assign(timestamp=[19_800, 19_801])), DataError, "days"),
        (lambda model: recray.evaluate(model, EVENTS, split="foo"), RequestError, "split"),
        (lambda _: recray.run("frobnicate"), SettingsError, "there is no job 'frobnicate'"),
        (lambda _: recray.open_recommender("/nowhere"), MissingArtifactError, "recray nightly"),
    ],
)
def test_what_cannot_be_done_is_named_with_the_fix(model, call, error, words):
    with pytest.raises(error) as raised:
        call(model)
    assert words in str(raised.value)


def test_a_model_is_evaluated_on_later_events_alone(model, synthetic_dataset):
    rows = []
    ids = synthetic_dataset.items["item_id"].to_pylist()
    for shard in synthetic_dataset.shards():
        for row, user in enumerate(shard.user_ids.to_pylist()):
            history = shard.history(row)
            rows += [
                (user, ids[item - 1], time)
                for item, time in zip(history.item_index.tolist(), history.timestamp_s.tolist(), strict=True)
            ]
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    with pytest.raises(RefusedError, match="another split"):
        recray.evaluate(model, events, split="leave_one_out")
    half = events[events["timestamp"] < events["timestamp"].median()]
    with pytest.raises(RefusedError, match="after the test cutoff"):
        recray.evaluate(model, half, split="time")

    later = events.assign(timestamp=events["timestamp"] + 200 * 86_400)
    metrics = recray.evaluate(model, later, split="time", k=[10]).to_pandas()
    assert set(metrics["protocol"]) == {"with_repeats", "filter_seen"}
    assert {"recray", "most popular", "personal frequency"} <= set(metrics["ranker"])
    assert ((metrics["low"] <= metrics["value"]) & (metrics["value"] <= metrics["high"])).all()
    assert "model_lead" in set(metrics[metrics["ranker"] == "most popular"]["metric"])


def test_jobs_run_and_their_lines_are_heard(tmp_path):
    lines = []
    result = recray.run("validate", None, f"storage.root={tmp_path / 'root'}", progress=lines.append)
    assert result.status == "ok" and any("training" in line for line in lines)
