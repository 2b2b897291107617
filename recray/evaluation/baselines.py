"""Baselines that a model must beat, fitted on the same histories: popularity, personal frequency, item-kNN,
EASE.

Each is a `protocol.Ranker`, or the reason why it is skipped on this data. Shapes: U users, V items and
padding, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch

from recray.dataset.popularity import DAY_S
from recray.dataset.reader import Dataset
from recray.evaluation.protocol import EvaluationQueries, EvaluationQuery
from recray.inference.candidates import top_k

RECENT_S = 7 * DAY_S
NEIGHBOURS = 100  # kept for each item where the full matrix does not fit
ROWS = 512  # items whose neighbours are searched at once
DENSE = 0.02  # share of neighbours from which a row is partitioned as a dense row instead of sorted
CELLS = 1 << 25  # queries x items that are scored at once
PROTECTED = "learns without noise, and the users are protected"

ScoreFunction = Callable[[list[EvaluationQuery]], np.ndarray]
"""Scores float [Q, V] of queries; column 0 is padding."""


class Baseline:
    """A score function of `n_items` and padding as a `Ranker`. Ties are broken by ascending item index."""

    def __init__(self, n_items: int, score: ScoreFunction) -> None:
        self._n_items, self._score = n_items, score

    def __call__(self, queries: list[EvaluationQuery], k: int, /, *, filter_seen: bool) -> np.ndarray:
        step = max(CELLS // (self._n_items + 1), 1)
        return np.concatenate(
            [
                self._rank(queries[first : first + step], k, filter_seen)
                for first in range(0, len(queries), step)
            ]
        )

    def _rank(self, queries: list[EvaluationQuery], k: int, filter_seen: bool) -> np.ndarray:
        scores = torch.from_numpy(np.ascontiguousarray(self._score(queries), np.float32))
        if filter_seen:
            for row, query in enumerate(queries):
                scores[row, torch.as_tensor(np.asarray(query.history.item_index, np.int64))] = -torch.inf
        scores[:, 0] = -torch.inf
        return top_k(scores, k)[0].numpy()


def fit_baselines(
    dataset: Dataset,
    queries: EvaluationQueries,
    *,
    ease_max_items: int,
    ease_l2: float,
    public_popularity_V: np.ndarray | None = None,
) -> Iterator[tuple[str, Baseline | str]]:
    """Yield each name with its baseline, or with the reason why it is skipped.

    Baselines come one at a time, so that only one matrix is in memory.

    public_popularity_V : popularity [V] that may be published, where users are protected and nothing else may
        be used; None: count all events
    """
    if public_popularity_V is not None:
        yield from _fit_public_baselines(dataset, public_popularity_V)
        return

    histories, target_histories = _load_histories(dataset, queries.part)
    seen_UV = _to_matrix(histories, dataset.n_items)
    total_V = np.asarray(_to_matrix(target_histories, dataset.n_items).sum(0)).ravel()
    baseline = partial(Baseline, dataset.n_items)
    recent: ScoreFunction = partial(_repeat_scores, total_V)  # breaks ties where no time is known
    yield "most popular", baseline(recent)

    cutoff_s = dataset.cut_s(queries.part)
    if cutoff_s is not None and dataset.query_time == "target":
        # the model sees popularity up to the day of each query, so these baselines do too
        recent = partial(_count_recent, dataset, RECENT_S // DAY_S)
        yield "popular, last 7 days", baseline(recent)
        yield "popular, last day", baseline(partial(_count_recent, dataset, 1))
    elif cutoff_s is not None:
        since = [items[times >= cutoff_s - RECENT_S] for items, times in target_histories]
        recent_V = np.asarray(_to_matrix([(items, items) for items in since], dataset.n_items).sum(0)).ravel()
        recent = partial(_repeat_scores, recent_V)
        yield "popular, last 7 days", baseline(recent)
    else:
        yield "popular, last 7 days", "only under a time split"
    yield (
        "personal frequency",
        baseline(
            lambda queries: _count_interactions(queries, dataset.n_items) + to_fractions(recent(queries))
        ),
    )

    yield (
        "item-kNN",
        _to_linear_baseline(cosine_similarity(seen_UV, dense=dataset.n_items <= ease_max_items)),
    )
    if dataset.n_items > ease_max_items:
        yield "EASE", f"more than {ease_max_items} items"
    else:
        yield "EASE", _to_linear_baseline(ease_weights(seen_UV, ease_l2))


def fit_last_item_baselines(dataset: Dataset, queries: EvaluationQueries) -> Iterator[tuple[str, Baseline]]:
    """Baselines that know a user by the last item alone: the items of the same users (cosine), and the items
    that followed it directly. Ties are broken by popularity.
    """
    histories, _ = _load_histories(dataset, queries.part)
    total_V = np.asarray(_to_matrix(histories, dataset.n_items).sum(0)).ravel()
    following = [items for items, _ in histories if len(items) > 1]
    first, second = (
        (np.concatenate([items[part] for items in following]) if following else np.zeros(0, np.int64))
        for part in (slice(-1), slice(1, None))
    )
    n_rows = dataset.n_items + 1
    transitions = sp.csr_matrix((np.ones(len(first), np.float32), (first, second)), shape=(n_rows, n_rows))
    similarity = cosine_similarity(_to_matrix(histories, dataset.n_items), dense=False)
    popular = to_fractions(total_V[None])
    # counts differ by 1 at least, cosines by little
    for name, matrix, tie_break in (
        ("last item's neighbours", similarity, 1e-6 * popular),
        ("transitions", transitions, popular),
    ):
        yield name, Baseline(dataset.n_items, partial(_score_last, matrix, tie_break))


def _score_last(
    matrix: sp.csr_matrix, tie_break_1V: np.ndarray, queries: list[EvaluationQuery]
) -> np.ndarray:
    last = np.array([query.history.item_index[-1] for query in queries])
    scores: np.ndarray = matrix[last].toarray() + tie_break_1V
    return scores


def _fit_public_baselines(
    dataset: Dataset, public_popularity_V: np.ndarray
) -> Iterator[tuple[str, Baseline | str]]:
    popular: ScoreFunction = partial(_repeat_scores, public_popularity_V)
    yield "most popular", Baseline(dataset.n_items, popular)
    yield "popular, last 7 days", PROTECTED
    yield (
        "personal frequency",
        Baseline(
            dataset.n_items,
            lambda queries: _count_interactions(queries, dataset.n_items) + to_fractions(popular(queries)),
        ),
    )
    yield "item-kNN", PROTECTED
    yield "EASE", PROTECTED


def _to_linear_baseline(weights: np.ndarray | sp.csr_matrix) -> Baseline:
    """A user's items times an items x items matrix."""
    return Baseline(weights.shape[0] - 1, lambda queries: _multiply(queries, weights))


def _load_histories(
    dataset: Dataset, part: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
    """Items and times of every user's events before the part's targets; of all, and of those of target
    types, which are popular items counted by.
    """
    column = 0 if part == "validation" else 2
    histories, target_histories = [], []
    for shard in dataset.shards():
        for row in np.flatnonzero(shard.split[:, column] > 0):
            history = shard.history_before(int(row), int(shard.split[row, column]))
            histories.append((history.item_index, history.timestamp_s))
            if dataset.target_rule is not None:
                is_target = dataset.target_rule.weigh(history.event_index, history.value) > 0
                target_histories.append((history.item_index[is_target], history.timestamp_s[is_target]))
    return histories, target_histories or histories


def _to_matrix(histories: list[tuple[np.ndarray, np.ndarray]], n_items: int) -> sp.csr_matrix:
    """Which user interacted with which item, 0 or 1, float32 [U, V]."""
    rows = np.repeat(np.arange(len(histories)), [len(items) for items, _ in histories])
    columns = np.concatenate([items for items, _ in histories]) if histories else np.zeros(0, np.int64)
    matrix = sp.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(histories), n_items + 1)
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _repeat_scores(scores_V: np.ndarray, queries: list[EvaluationQuery]) -> np.ndarray:
    """The same scores for every query [Q, V]."""
    return np.tile(scores_V, (len(queries), 1))


def _count_recent(dataset: Dataset, days: int, queries: list[EvaluationQuery]) -> np.ndarray:
    """Events of each item in the complete days before the day of each query [Q, V]."""
    day, row = np.unique([query.now // DAY_S for query in queries], return_inverse=True)
    return dataset.popularity.windows(day, days)[row]


def to_fractions(counts: np.ndarray) -> np.ndarray:
    """Counts [Q, V] scaled to [0, 1), so that they only break ties of whole numbers."""
    result: np.ndarray = counts / (counts.max(1, keepdims=True) + 1.0)
    return result


def _count_interactions(queries: list[EvaluationQuery], n_items: int) -> np.ndarray:
    return np.stack(
        [np.bincount(query.history.item_index, minlength=n_items + 1) for query in queries]
    ).astype(np.float64)


def _multiply(queries: list[EvaluationQuery], weights: np.ndarray | sp.csr_matrix) -> np.ndarray:
    seen = _to_matrix(
        [(query.history.item_index, query.history.item_index) for query in queries], weights.shape[0] - 1
    )
    product = seen @ weights
    result: np.ndarray = product.toarray() if sp.issparse(product) else product
    return result


def cosine_similarity(seen_UV: sp.csr_matrix, *, dense: bool) -> np.ndarray | sp.csr_matrix:
    """Cosine of the items' user sets [V, V], 0 on the diagonal.

    dense : keep all neighbours; else the nearest `NEIGHBOURS` of each item
    """
    norm = np.sqrt(np.asarray(seen_UV.sum(0)).ravel()) + 1e-9
    unit = (seen_UV @ sp.diags(1.0 / norm)).tocsr().astype(np.float32)
    if dense:
        similarity = (unit.T @ unit).toarray()
        np.fill_diagonal(similarity, 0.0)
        return similarity

    transposed = unit.T.tocsr()
    return sp.vstack(
        [
            _keep_nearest(transposed[first : first + ROWS] @ unit, first)
            for first in range(0, transposed.shape[0], ROWS)
        ]
    ).T.tocsr()


def _keep_nearest(similarity: sp.csr_matrix, first: int) -> sp.csr_matrix:
    """The `NEIGHBOURS` highest values of each row, without the item itself. The rows are the items first,
    first + 1, …
    """
    if similarity.nnz > DENSE * np.prod(similarity.shape) and np.prod(similarity.shape) <= CELLS:
        block = similarity.toarray()
        block[np.arange(len(block)), first + np.arange(len(block))] = 0.0
        columns = (
            np.argpartition(-block, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
            if block.shape[1] > NEIGHBOURS
            else np.argsort(-block, axis=1)
        )
        rows = np.repeat(np.arange(len(block)), columns.shape[1])
        nearest = sp.csr_matrix(
            (np.take_along_axis(block, columns, 1).ravel(), (rows, columns.ravel())), shape=block.shape
        )
        nearest.eliminate_zeros()
        return nearest

    entries = similarity.tocoo()
    is_other = entries.col != entries.row + first
    row, col, value = entries.row[is_other], entries.col[is_other], entries.data[is_other]
    order = np.lexsort((col, -value, row))
    row, col, value = row[order], col[order], value[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    is_near = rank < NEIGHBOURS
    return sp.csr_matrix((value[is_near], (row[is_near], col[is_near])), shape=similarity.shape)


def ease_weights(seen_UV: sp.csr_matrix, l2: float) -> np.ndarray:
    """EASE weights [V, V] (Steck, WWW 2019): B = -P / diag(P) off the diagonal, P the inverse of the Gram
    matrix plus l2.
    """
    gram = (seen_UV.T @ seen_UV).toarray().astype(np.float32)
    gram[np.diag_indices_from(gram)] += l2
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    result: np.ndarray = weights
    return result
