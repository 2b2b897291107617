"""The comparison with baselines: lists of libraries as rankers, baselines of the last item, and a whole run
on a small log. The libraries themselves take minutes to install.
"""

import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import synthetic_overrides

from recray import benchmark
from recray.benchmark import baselines
from recray.errors import SettingsError
from recray.evaluation.baselines import fit_last_item_baselines
from recray.evaluation.protocol import EvaluationQueries


@pytest.fixture(scope="module")
def queries(synthetic_dataset):
    return EvaluationQueries(synthetic_dataset, "test")


def test_stored_lists_are_those_of_the_user_and_popular_items_stand_in(synthetic_dataset, queries):
    batch = [query for batch in queries.batches(50) for query in batch][:50]
    first_number = baselines.count_users(synthetic_dataset)
    number = np.array([first_number[query.shard] + query.row for query in batch])
    stored = np.sort(number[::2])  # every other user has a list
    lists = {"users": stored, "filter_seen": np.tile(np.arange(1, 11), (len(stored), 1))}
    lists["with_repeats"] = stored[:, None] * 100 + np.arange(10)
    popular = np.arange(synthetic_dataset.n_items, 0, -1)
    ranker = baselines.StoredLists(lists, first_number, popular)
    result = ranker(batch, 10, filter_seen=False)
    for row, user in enumerate(number):
        expected = user * 100 + np.arange(10) if user in stored else popular[:10]
        np.testing.assert_array_equal(result[row], expected)
    filtered = ranker(batch, 10, filter_seen=True)
    for row, user in enumerate(number):
        if user not in stored:
            assert not set(filtered[row]) & set(batch[row].history.item_index.tolist())


def test_transitions_count_what_followed_the_last_item_directly(synthetic_dataset, queries):
    fitted = dict(fit_last_item_baselines(synthetic_dataset, queries))
    follows, events = Counter(), Counter()
    for shard in synthetic_dataset.shards():
        for row in np.flatnonzero(shard.split[:, 2] > 0):
            items = shard.history_before(int(row), int(shard.split[row, 2])).item_index.tolist()
            follows.update(zip(items, items[1:], strict=False))
            events.update(set(items))
    batch = next(queries.batches(40))
    lists = fitted["transitions"](batch, 5, filter_seen=False)
    for query, items in zip(batch, lists, strict=True):
        last = int(query.history.item_index[-1])
        expected = sorted(
            range(1, synthetic_dataset.n_items + 1),
            key=lambda item: (-follows[last, item], -events[item], item),
        )
        assert items.tolist() == expected[:5]


def test_a_comparison_has_every_baseline_and_the_users_behind_it(tmp_path, synthetic_folder, monkeypatch):
    monkeypatch.setattr(baselines, "SEEDS", 2)
    settings = tmp_path / "settings.yaml"
    settings.write_text("{}\n")
    overrides = [*synthetic_overrides(synthetic_folder, tmp_path / "workspace"), "train.epochs=1"]
    overrides = [line for line in overrides if not line.startswith("storage.root")]
    result = benchmark.run(
        "quality",
        tmp_path / "out",
        lambda line: None,
        data=str(settings),
        against="baselines",
        overrides=overrides,
    )
    path = tmp_path / "out" / result.outputs["result"].rsplit("/", 1)[-1]
    rankers = json.loads(path.read_text())["metrics"]["rankers"]
    assert {"recray", "most popular", "item-kNN", "EASE", "transitions", "last item's neighbours"} <= set(
        rankers
    )
    own = rankers["recray"]
    assert own["seeds"] == len(own["with_repeats"]["of_seeds"]) == 2 and own["peak_memory_mb"] > 0
    for protocol in ("with_repeats", "filter_seen"):
        users = pq.read_table(path.with_suffix(f".{protocol}.parquet")).to_pandas()
        for name, line in rankers.items():
            if name != "recray" and protocol in line["lead"]:
                mean, low, high = line["lead"][protocol]
                assert low <= mean <= high
                assert mean == pytest.approx((users["recray"] - users[name]).mean(), abs=1e-5)
            if protocol in line:
                assert users[name].mean() == pytest.approx(line[protocol]["ndcg@10"], abs=1e-5)


def test_models_that_are_not_known_are_named(tmp_path):
    with pytest.raises(SettingsError, match="--against gru4rec") as error:
        benchmark.run("quality", tmp_path, lambda line: None, data=str(tmp_path), against="baselines,gru4rec")
    assert "rectools-hstu" in error.value.fix and not list(tmp_path.iterdir())
