import numpy as np
import pytest

from recray.evaluation import metrics as m

LISTS = np.array([[3, 1, 2], [5, 6, 0], [7, 8, 9]])
TARGETS = [np.array([1]), np.array([5, 6, 9, 10]), np.array([1])]


def test_values_by_hand():
    values = m.per_user(LISTS, TARGETS, 3)
    np.testing.assert_allclose(values["hr"], [1, 1, 0])
    np.testing.assert_allclose(values["mrr"], [1 / 2, 1, 0])
    np.testing.assert_allclose(values["recall"], [1, 2 / 4, 0])
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    np.testing.assert_allclose(values["ndcg"], [1 / np.log2(3), (1 + 1 / np.log2(3)) / ideal, 0])


def test_k_cuts_the_list():
    assert m.per_user(LISTS, TARGETS, 1)["hr"].tolist() == [0, 1, 0]


def test_padding_never_counts():
    assert not m.hits(np.array([[0, 0]]), [np.array([0])]).any()
    assert m.coverage(LISTS, 3, 10) == pytest.approx(8 / 10)
    popularity = np.zeros(21)
    popularity[[5, 6]] = 10
    assert m.popularity_share(LISTS, 2, popularity) == pytest.approx(2 / 6)


def test_bootstrap_interval_covers_the_mean_and_is_paired():
    random = np.random.default_rng(0)
    a = random.normal(1.0, 1.0, 400)
    samples = m.bootstrap_means(np.column_stack([a, a + 0.1]), 500, seed=0)
    low, high = m.interval(samples[:, 0], 0.95)
    assert low < a.mean() < high
    assert 0.15 < high - low < 0.25  # 2 × 1.96 / sqrt(400)
    np.testing.assert_allclose(samples[:, 1] - samples[:, 0], 0.1)
