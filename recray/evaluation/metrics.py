"""Ranking metrics and their confidence intervals, in numpy alone.

Shapes: U users, K length of the lists. A list holds item indices; 0 is an empty position.
"""

from __future__ import annotations

import numpy as np

from recray.errors import SettingsError
from recray.plugins import list_plugins, load_plugin

METRICS = ("hr", "ndcg", "mrr", "recall")


def hits(lists_UK: np.ndarray, targets: list[np.ndarray]) -> np.ndarray:
    """Whether the item at each position is a target, bool [U, K]."""
    is_hit = np.zeros(lists_UK.shape, bool)
    for row, items in enumerate(targets):
        is_hit[row] = np.isin(lists_UK[row], items) & (lists_UK[row] > 0)
    return is_hit


def per_user(lists_UK: np.ndarray, targets: list[np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Metrics of each user at k, float64 [U] each; targets are distinct and not empty.

    hr: any target among the first k. recall: share of the targets in the list. mrr: 1 / rank of the first
    target. ndcg: Σ 1 / log2(1 + rank) over the hits, divided by the same sum for min(k, targets) hits at the
    top (Järvelin and Kekäläinen 2002, binary gains).
    """
    is_hit = hits(lists_UK[:, :k], targets)
    sizes = np.array([len(items) for items in targets])
    discount = 1.0 / np.log2(np.arange(2, is_hit.shape[1] + 2))
    ideal = np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))[np.minimum(sizes, k) - 1]
    first = np.argmax(is_hit, 1)
    return {
        "hr": is_hit.any(1).astype(float),
        "ndcg": (is_hit * discount).sum(1) / ideal,
        "mrr": np.where(is_hit.any(1), 1.0 / (first + 1), 0.0),
        "recall": is_hit.sum(1) / sizes,
    }


def own_per_user(lists_UK: np.ndarray, targets: list[np.ndarray], k: int) -> dict[str, np.ndarray]:
    """The metrics of other packages (`recray.plugins`) of each user at k, float64 [U] each.

    Raises SettingsError for one that has the name of a built-in metric, or does not return a number for each
    user.
    """
    values = {}
    for name in list_plugins("metrics"):
        if name in METRICS:
            raise SettingsError(f"recray.metrics: {name} is a built-in metric", "give yours another name")
        result = np.asarray(load_plugin("metrics", name)(lists_UK[:, :k], targets, k), np.float64)
        if result.shape != (len(targets),) or not np.isfinite(result).all():
            raise SettingsError(
                f"recray.metrics: {name} returned shape {result.shape} for {len(targets)} users, or numbers "
                "that are not finite",
                "return a finite number for each user",
            )
        values[name] = result
    return values


def coverage(lists_UK: np.ndarray, k: int, n_items: int) -> float:
    """Share of the catalogue that appears in the first k of any list."""
    shown = np.unique(lists_UK[:, :k])
    return float((shown > 0).sum() / n_items)


def popularity_share(lists_UK: np.ndarray, k: int, popularity: np.ndarray) -> float:
    """Share of the shown items that belong to the top 10 % by popularity; `popularity` [items + 1]."""
    head = np.argsort(-popularity[1:], kind="stable")[: max(len(popularity) // 10, 1)] + 1
    shown = lists_UK[:, :k]
    return float(np.isin(shown, head).sum() / max((shown > 0).sum(), 1))


def bootstrap_means(values_UM: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of M columns over resampled users, float64 [resamples, M], by the multinomial bootstrap of Efron
    (1979).

    All columns share the resamples, so differences between them are paired.
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
