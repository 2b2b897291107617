"""Which events are targets: in training, in evaluation, in baselines, and what cannot be one."""

import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.config import load_settings
from recray.errors import DataError, SettingsError
from recray.evaluation.baselines import fit_baselines
from recray.evaluation.protocol import EvaluationQueries
from recray.model.losses import Targets
from recray.testing.published import prepare_here
from recray.training.batches import TrainingBatches
from recray.training.trainer import check_dataset
from recray.training.worker import build_loop

T, HOUR = 1_709_251_200, 3600
WEIGHTS = {"purchase": 1.0, "cart": 0.25}


def write_log(folder, users, value=None):
    """users: a list of (item, event type) for each user, an hour apart."""
    flat = [(user, n, *event) for user, events in enumerate(users) for n, event in enumerate(events)]
    columns = {
        "user_id": [row[0] for row in flat],
        "item_id": [f"i{row[2]}" for row in flat],
        "timestamp": [T + HOUR * row[1] + row[0] for row in flat],
        "event": [row[3] for row in flat],
    }
    if value is not None:
        columns["value"] = [value(*row) for row in flat]
    pq.write_table(pa.table(columns), folder / "events.parquet")


def prepared(folder, *overrides):
    path = json.dumps([str(folder / "events.parquet")])
    return prepare_here(
        load_settings(
            None, [f"data.events={path}", f"storage.root={folder / 'root'}", "data.shards=2", *overrides]
        )
    )


def moment(hour):
    return dt.datetime.fromtimestamp(T + HOUR * hour, dt.UTC).isoformat()


def said(targets=WEIGHTS):
    return f"data.targets={json.dumps(targets)}"


def example(users=30, events=12):
    random = np.random.default_rng(0)
    return [
        [
            (int(item), ("view", "view", "cart", "purchase")[kind])
            for item, kind in zip(random.integers(0, 9, events), random.integers(0, 4, events), strict=True)
        ]
        for _ in range(users)
    ]


def read_queries(data, **options):
    """(items up to the query, target items, their weights) of every training query."""
    batches = TrainingBatches(
        data, history=100, batch_tokens=500, sequences="all", popularity_prior_days=0, seed=0, **options
    )
    queries = []
    for batch, targets, total in batches.epoch(0):
        offsets = targets.offsets.tolist()
        assert total == len(offsets) - 1
        for n, (user, position) in enumerate(
            zip(batch.user_N.tolist(), batch.position_N.tolist(), strict=True)
        ):
            part = slice(offsets[n], offsets[n + 1])
            weights = None if targets.weight is None else tuple(targets.weight[part].tolist())
            context = tuple(batch.item_BT[user, : position + 1].tolist())
            queries.append((context, tuple(targets.item[part].tolist()), weights))
    return sorted(queries)


def test_a_query_predicts_the_next_targets_and_knows_all_events_before_them(tmp_path):
    users = example()
    write_log(tmp_path, users)
    data = prepared(tmp_path, said(), "split.kind=random")
    index = {name: n + 1 for n, name in enumerate(data.items["item_id"].to_pylist())}
    for ahead in (1, 2):
        expected = []
        for shard in data.shards():
            for row, user in enumerate(shard.user_ids.to_pylist()):
                events = [(index[f"i{item}"], kind) for item, kind in users[user]]
                # a random split permutes the baskets; the shard says in which order
                order = [(int(i), data.event_types[e]) for i, e, *_ in zip(*shard.history(row), strict=True)]
                assert sorted(order) == sorted(events)
                trained = order[: int(shard.train_lengths[row])]
                for end in range(1, len(trained)):
                    following = [event for event in trained[end:] if event[1] in WEIGHTS][:ahead]
                    if following:
                        context = tuple(item for item, _ in trained[:end])
                        items = tuple(item for item, _ in following)
                        expected.append((context, items, tuple(WEIGHTS[kind] for _, kind in following)))
        assert read_queries(data, target_baskets=ahead) == sorted(expected)


EVENTS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["view", "cart", "purchase"])), min_size=1, max_size=9
)


@settings(max_examples=15, deadline=None)
@given(st.lists(EVENTS, min_size=3, max_size=8), st.sampled_from(["cutoff", "target"]))
def test_users_are_asked_for_their_next_target_after_the_cut(tmp_path_factory, users, query_time):
    folder = tmp_path_factory.mktemp("log")
    users = [*users, [(0, "view"), (1, "purchase"), (2, "cart")] * 3]  # all types occur, before and after
    write_log(folder, users)
    last = max(map(len, users))
    cuts = [f"split.{part}_from={moment(at)}" for part, at in (("validation", 1), ("test", 3))]
    if last < 5:
        return
    data = prepared(folder, said(), f"split.query_time={query_time}", "split.validation_users=1", *cuts)
    names = data.items["item_id"].to_pylist()
    for part, cut, until in (("validation", 1, 3), ("test", 3, last)):
        queries_of = {}
        for batch in EvaluationQueries(data, part).batches(100):
            for query in batch:
                user = data.shard(query.shard).user_ids[query.row].as_py()
                history = [names[i - 1] for i in query.history.item_index]
                queries_of[user] = (history, [names[i - 1] for i in query.target])
        expected = {}
        for user, events in enumerate(users):
            at = next((n for n, event in enumerate(events) if cut <= n < until and event[1] in WEIGHTS), None)
            if at is not None:
                known = at if query_time == "target" else cut
                history = [f"i{item}" for item, _ in events[:known]]
                expected[user] = (history, [f"i{events[at][0]}"])
        assert queries_of == expected


def test_leave_one_out_leaves_out_the_last_target_of_each_user(tmp_path):
    users = [
        [(0, "view"), (1, "purchase"), (2, "view"), (3, "cart"), (4, "view")],
        [(1, "view"), (2, "view"), (3, "purchase")],  # a single target: all of it is trained
        [(1, "purchase"), (3, "purchase")],  # nothing before them
        [(5, "view"), (1, "cart"), (3, "cart")],
    ]
    write_log(tmp_path, users)
    data = prepared(tmp_path, said(), "split.kind=leave_one_out")
    split = {}
    for shard in data.shards():
        split |= dict(zip(shard.user_ids.to_pylist(), shard.split.tolist(), strict=True))
    assert split == {0: [1, 2, 3, 4], 1: [3, 3, 3, 3], 2: [2, 2, 2, 2], 3: [1, 2, 2, 3]}


def test_returns_are_history_and_no_targets_without_a_word(tmp_path):
    users = example()

    def value(user, n, item, kind):
        return -1.0 if n % 3 == 2 else 5.0

    write_log(tmp_path, users, value)
    data = prepared(tmp_path, "split.kind=random")
    assert "are history, but no targets" in "\n".join(data.manifest["notes"])
    targets = sum(len(shard.target_positions) for shard in data.shards())
    assert targets == sum(n % 3 != 2 for events in users for n in range(len(events)))
    assert data.popularity.total().sum() == targets
    assert sum(data.items["events"].to_pylist()) == data.n_events
    assert all(set(weights) == {1.0} for _, _, weights in read_queries(data))


def test_what_every_event_is_a_target_of_costs_nothing(tmp_path):
    write_log(tmp_path, example(), lambda user, n, item, kind: 0.0)
    data = prepared(tmp_path, "split.kind=random")
    assert data.target_rule is None and "targets" not in data.manifest
    assert all(weights is None for _, _, weights in read_queries(data))


def test_a_weight_scales_the_gradient_of_its_query_and_shares_it_among_targets(tmp_path):
    write_log(tmp_path, example())

    def gradient(targets):
        data = prepared(tmp_path, said(targets), "split.kind=random")
        config = ["model.dim=8", "model.heads=1", "model.dropout=0", "model.cooccurrence=false"]
        loop = build_loop(data, load_settings(None, config), torch.device("cpu"))
        loop.model.eval()
        batch, batch_targets, total = next(loop._prepare_batches(0))
        loop.criterion.backward(loop.model, batch, batch_targets, 1.0 / total)
        return torch.cat([p.grad.flatten() for p in loop.model.parameters() if p.grad is not None])

    whole, half = gradient({"purchase": 1.0}), gradient({"purchase": 0.5})
    assert whole.abs().sum() > 0
    torch.testing.assert_close(half, 0.5 * whole, rtol=1e-4, atol=1e-6)
    shared = Targets(torch.tensor([0, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([1.0, 0.25, 0.25]))
    query, share, weight = shared.shares()
    assert query.tolist() == [0, 0, 1]
    torch.testing.assert_close(share, torch.tensor([0.8, 0.2, 1.0]))
    torch.testing.assert_close(weight, torch.tensor([0.625, 0.25]))


def test_popular_baselines_count_targets(tmp_path):
    """Item 0 is viewed by all, and item 1 bought by some."""
    users = [[(0, "view"), (0, "view"), (1, "purchase"), (2, "view"), (2, "purchase")] for _ in range(20)]
    write_log(tmp_path, users)
    data = prepared(tmp_path, said({"purchase": 1.0}), "split.kind=leave_one_out")
    queries = EvaluationQueries(data, "test")
    popular = dict(fit_baselines(data, queries, ease_max_items=0, ease_l2=1.0))["most popular"]
    batch = next(queries.batches(20))
    names = data.items["item_id"].to_pylist()
    assert {names[i - 1] for i in popular(batch, 1, filter_seen=False)[:, 0]} == {"i1"}


@pytest.mark.parametrize(
    ("targets", "words"),
    [({"buy": 1.0}, "no event has the type 'buy'; types are view"), ({"purchase": 1.0, "x": 0.1}, "'x'")],
)
def test_a_type_that_does_not_occur_is_an_error_before_training(tmp_path, targets, words):
    write_log(tmp_path, example())
    with pytest.raises(DataError) as error:
        prepared(tmp_path, said(targets), "split.kind=random")
    assert words in error.value.message and "data.columns.event" in error.value.fix


@pytest.mark.parametrize("weight", [0, -1, 2])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(SettingsError, match="a weight is above 0"):
        load_settings(None, [said({"purchase": weight})])


def test_a_target_that_is_always_a_users_first_event_cannot_be_learned(tmp_path):
    write_log(tmp_path, [[(0, "purchase"), *[(n, "view") for n in range(1, 6)]] for _ in range(20)])
    cuts = [f"split.validation_from={moment(2)}", f"split.test_from={moment(4)}"]
    with pytest.raises(DataError, match="no training event of a type"):
        check_dataset(prepared(tmp_path, said({"purchase": 1.0}), *cuts))


def test_a_log_that_leaves_no_user_says_so_whatever_its_targets(tmp_path):
    write_log(tmp_path, example(events=3))
    for targets in (said(), said({})):
        with pytest.raises(DataError, match="no user has data.min_user_events events"):
            prepared(tmp_path, targets, "data.min_user_events=9")


def test_zeros_are_doubtful_where_no_targets_are_declared(tmp_path):
    write_log(tmp_path, example(), lambda user, n, item, kind: 0.0)
    for targets, is_noted in ((said({}), True), (said(), False)):
        notes = prepared(tmp_path, targets, "split.kind=random").manifest["notes"]
        assert any("have a value of 0" in note for note in notes) == is_noted
