"""Ranking metrics and their intervals, numpy alone.

Shapes: U users, K length of the lists. A list holds item indices; 0 is an empty place.
"""

from __future__ import annotations

import numpy as np

METRICS = ("hr", "ndcg", "mrr", "recall")


def hits(lists_UK: np.ndarray, targets: list[np.ndarray]) -> np.ndarray:
    """Whether the item at each place is a target, bool [U, K]."""
    found = np.zeros(lists_UK.shape, bool)
    for row, wanted in enumerate(targets):
        found[row] = np.isin(lists_UK[row], wanted) & (lists_UK[row] > 0)
    return found


def per_user(lists_UK: np.ndarray, targets: list[np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Metrics of each user at k, float64 [U] each; targets are distinct and not empty.

    hr: any target among the first k. recall: share of the targets found. mrr: 1 / place of the first target.
    ndcg: Σ 1 / log2(1 + place) over the found, over the same sum for min(k, targets) found at the top
    (Järvelin and Kekäläinen 2002, binary gains).
    """
    found = hits(lists_UK[:, :k], targets)
    sizes = np.array([len(wanted) for wanted in targets])
    discount = 1.0 / np.log2(np.arange(2, found.shape[1] + 2))
    ideal = np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))[np.minimum(sizes, k) - 1]
    first = np.argmax(found, 1)
    return {
        "hr": found.any(1).astype(float),
        "ndcg": (found * discount).sum(1) / ideal,
        "mrr": np.where(found.any(1), 1.0 / (first + 1), 0.0),
        "recall": found.sum(1) / sizes,
    }


def coverage(lists_UK: np.ndarray, k: int, n_items: int) -> float:
    """Share of the catalogue that appears in anybody's first k."""
    shown = np.unique(lists_UK[:, :k])
    return float((shown > 0).sum() / n_items)


def popularity_share(lists_UK: np.ndarray, k: int, popularity: np.ndarray) -> float:
    """Share of shown places that go to the most popular tenth of the catalogue; `popularity` [items + 1]."""
    head = np.argsort(-popularity[1:], kind="stable")[: max(len(popularity) // 10, 1)] + 1
    shown = lists_UK[:, :k]
    return float(np.isin(shown, head).sum() / max((shown > 0).sum(), 1))


def bootstrap_means(values_UM: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of M columns over resampled users, float64 [resamples, M]. Columns share resamples, so differences are paired.

    The multinomial bootstrap of Efron (1979).
    """
    random = np.random.default_rng(seed)
    users = len(values_UM)
    means = np.empty((resamples, values_UM.shape[1]))
    for row in range(resamples):
        means[row] = np.bincount(random.integers(0, users, users), minlength=users) @ values_UM / users
    return means


def interval(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile interval of bootstrap samples [resamples]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)
