"""What every ranker promises, the model and each baseline: one list a query, of items that may be shown."""

import numpy as np
import pytest

from recray.evaluation.baselines import fit_baselines
from recray.evaluation.evaluate import to_ranker
from recray.evaluation.protocol import EvaluationQueries
from recray.inference import Predictor
from recray.testing.published import untrained_bundle

NAMES = ("recray", "most popular", "popular, last 7 days", "personal frequency", "item-kNN", "EASE")
K = 7


@pytest.fixture(scope="module")
def queries(synthetic_dataset):
    return next(EvaluationQueries(synthetic_dataset, "test", max_users=40, seed=3).batches(40))


@pytest.fixture(scope="module")
def rankers(synthetic_settings, synthetic_dataset, tmp_path_factory):
    """Each ranker by its name."""
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    predictor = Predictor.load(untrained_bundle(synthetic_settings, synthetic_dataset, path, "bundle").path)
    test_queries = EvaluationQueries(synthetic_dataset, "test")
    baselines = dict(fit_baselines(synthetic_dataset, test_queries, ease_max_items=1000, ease_l2=500.0))
    return {"recray": to_ranker(predictor, synthetic_dataset), **baselines}


def test_the_rankers_are_all_here(rankers):
    assert tuple(rankers) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("filter_seen", [False, True])
def test_a_list_has_k_different_items_of_the_catalogue(
    rankers, queries, synthetic_dataset, name, filter_seen
):
    lists = rankers[name](queries, K, filter_seen=filter_seen)
    assert lists.shape == (len(queries), K) and lists.dtype == np.int64
    assert lists.min() > 0 and lists.max() <= synthetic_dataset.n_items, "index 0 is padding"
    assert all(len(set(row)) == K for row in lists.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_the_filter_leaves_out_what_was_seen_and_changes_nothing_else(
    rankers, queries, synthetic_dataset, name
):
    unfiltered = rankers[name](queries, synthetic_dataset.n_items, filter_seen=False)
    filtered = rankers[name](queries, K, filter_seen=True)
    for query, order, items in zip(queries, unfiltered.tolist(), filtered.tolist(), strict=True):
        seen_items = set(np.asarray(query.history.item_index).tolist())
        assert items == [item for item in order if item not in seen_items][:K]


@pytest.mark.parametrize("name", NAMES)
def test_a_query_is_ranked_alike_alone_and_among_others(rankers, queries, name):
    together = rankers[name](queries, K, filter_seen=False)
    for row in (0, len(queries) - 1):
        assert rankers[name]([queries[row]], K, filter_seen=False)[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_longer_list_begins_with_the_shorter_one(rankers, queries, name):
    ranker = rankers[name]
    longer = ranker(queries, 2 * K, filter_seen=True)
    assert ranker(queries, K, filter_seen=True).tolist() == longer[:, :K].tolist()
