"""Baselines that a model must beat, fitted on the same histories: popularity, personal frequency, item-kNN, EASE.

Each is a `protocol.Ranker`; a baseline that cannot be had on this data says why in `skipped`. Shapes: U users, V items
and padding, Q questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch

from recray.dataset.popularity import DAY_S
from recray.dataset.reader import Dataset
from recray.evaluation.protocol import Question, Questions
from recray.inference.topk import top_k

RECENT_S = 7 * DAY_S
NEIGHBOURS = 100  # of each item, where all of them do not fit
ROWS = 512  # items whose neighbours are looked for at once
DENSE = 0.02  # share of items that are neighbours from which on a whole row is looked through, not sorted
CELLS = 1 << 25  # questions x items that are scored at once
PROTECTED = "learns without noise, and the users are protected"

Score = Callable[[list[Question]], np.ndarray]
"""Scores float [Q, V] of questions; column 0 is padding."""


class Baseline:
    """A function that scores `n_items` and padding as a `Ranker`; ties are broken by ascending item index."""

    def __init__(self, n_items: int, score: Score) -> None:
        self._n_items, self._score = n_items, score

    def __call__(self, questions: list[Question], k: int, *, new_only: bool) -> np.ndarray:
        step = max(CELLS // (self._n_items + 1), 1)
        return np.concatenate([self._best(questions[first : first + step], k, new_only) for first in range(0, len(questions), step)])

    def _best(self, questions: list[Question], k: int, new_only: bool) -> np.ndarray:
        scores = torch.from_numpy(np.ascontiguousarray(self._score(questions), np.float32))
        if new_only:
            for row, question in enumerate(questions):
                scores[row, torch.as_tensor(np.asarray(question.history.item_index, np.int64))] = -torch.inf
        scores[:, 0] = -torch.inf
        found: np.ndarray = top_k(scores, k)[0].numpy()
        return found


def baselines(
    dataset: Dataset, questions: Questions, *, ease_max_items: int, ease_l2: float, told_V: np.ndarray | None = None
) -> Iterator[tuple[str, Baseline | str]]:
    """Name and baseline, or the reason why it is skipped, one after the other so that one matrix lives at a time.

    told_V : how popular each item is said to be [V], where users are protected and that alone may be told; None: all is counted
    """
    if told_V is not None:
        popular: Score = partial(_alike, told_V)
        yield "most popular", Baseline(dataset.n_items, popular)
        yield "popular, last 7 days", PROTECTED
        yield "personal frequency", Baseline(dataset.n_items, lambda asked: _counts(asked, dataset.n_items) + _below_one(popular(asked)))
        yield "item-kNN", PROTECTED
        yield "EASE", PROTECTED
        return
    histories = _histories(dataset, questions.part)
    seen_UV = _matrix(histories, dataset.n_items)
    popular_V = np.asarray(seen_UV.sum(0)).ravel()
    baseline = partial(Baseline, dataset.n_items)
    recent: Score = partial(_alike, popular_V)  # for what breaks ties where no time is known
    yield "most popular", baseline(recent)
    cut_s = dataset.cut_s(questions.part)
    if cut_s is not None and dataset.asked_at == "target":  # the model knows what was popular until the day of each question, so these do
        recent = partial(_recent, dataset, RECENT_S // DAY_S)
        yield "popular, last 7 days", baseline(recent)
        yield "popular, last day", baseline(partial(_recent, dataset, 1))
    elif cut_s is not None:
        since = [items[times >= cut_s - RECENT_S] for items, times in histories]
        recent_V = np.asarray(_matrix([(items, items) for items in since], dataset.n_items).sum(0)).ravel()
        recent = partial(_alike, recent_V)
        yield "popular, last 7 days", baseline(recent)
    else:
        yield "popular, last 7 days", "only under a time split"
    yield "personal frequency", baseline(lambda asked: _counts(asked, dataset.n_items) + _below_one(recent(asked)))
    yield "item-kNN", _linear(_cosine(seen_UV, dense=dataset.n_items <= ease_max_items))
    if dataset.n_items > ease_max_items:
        yield "EASE", f"more than {ease_max_items} items"
    else:
        yield "EASE", _linear(_ease(seen_UV, ease_l2))


def _linear(weights: np.ndarray | sp.csr_matrix) -> Baseline:
    """What the user met, times an items x items matrix."""
    return Baseline(weights.shape[0] - 1, lambda asked: _product(asked, weights))


def _histories(dataset: Dataset, part: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Items and times of every user's events before the part's targets."""
    column = 0 if part == "validation" else 2
    found = []
    for shard in dataset.shards():
        for row in np.flatnonzero(shard.split[:, column] > 0):
            history = shard.history_before(int(row), int(shard.split[row, column]))
            found.append((history.item_index, history.timestamp_s))
    return found


def _matrix(histories: list[tuple[np.ndarray, np.ndarray]], n_items: int) -> sp.csr_matrix:
    """Who met what, 0 or 1, float32 [U, V]."""
    rows = np.repeat(np.arange(len(histories)), [len(items) for items, _ in histories])
    columns = np.concatenate([items for items, _ in histories]) if histories else np.zeros(0, np.int64)
    matrix = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(histories), n_items + 1))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _alike(scores_V: np.ndarray, asked: list[Question]) -> np.ndarray:
    return np.tile(scores_V, (len(asked), 1))


def _recent(dataset: Dataset, days: int, asked: list[Question]) -> np.ndarray:
    """Events of each item in the complete days before the day of each question [Q, V]."""
    day, place = np.unique([question.now // DAY_S for question in asked], return_inverse=True)
    found: np.ndarray = dataset.popularity.windows(day, days)[place]
    return found


def _below_one(counts: np.ndarray) -> np.ndarray:
    """Counts [Q, V] as what breaks ties of whole numbers, in [0, 1)."""
    found: np.ndarray = counts / (counts.max(1, keepdims=True) + 1.0)
    return found


def _counts(asked: list[Question], n_items: int) -> np.ndarray:
    return np.stack([np.bincount(question.history.item_index, minlength=n_items + 1) for question in asked]).astype(np.float64)


def _product(asked: list[Question], weights: np.ndarray | sp.csr_matrix) -> np.ndarray:
    met = _matrix([(question.history.item_index, question.history.item_index) for question in asked], weights.shape[0] - 1)
    product = met @ weights
    found: np.ndarray = product.toarray() if sp.issparse(product) else product
    return found


def _cosine(seen_UV: sp.csr_matrix, *, dense: bool) -> np.ndarray | sp.csr_matrix:
    """Cosine of items' user sets [V, V], 0 on the diagonal; all neighbours, or the nearest `NEIGHBOURS` of each."""
    norm = np.sqrt(np.asarray(seen_UV.sum(0)).ravel()) + 1e-9
    unit = (seen_UV @ sp.diags(1.0 / norm)).tocsr().astype(np.float32)
    if dense:
        similarity = (unit.T @ unit).toarray()
        np.fill_diagonal(similarity, 0.0)
        return similarity
    transposed = unit.T.tocsr()
    return sp.vstack([_nearest(transposed[first : first + ROWS] @ unit, first) for first in range(0, transposed.shape[0], ROWS)]).T.tocsr()


def _nearest(similarity: sp.csr_matrix, first: int) -> sp.csr_matrix:
    """The `NEIGHBOURS` highest of each row but that of the item itself; the rows are those of the items first, first + 1, …"""
    if similarity.nnz > DENSE * np.prod(similarity.shape) and np.prod(similarity.shape) <= CELLS:
        block = similarity.toarray()
        block[np.arange(len(block)), first + np.arange(len(block))] = 0.0
        kept = np.argpartition(-block, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS] if block.shape[1] > NEIGHBOURS else np.argsort(-block, axis=1)
        rows = np.repeat(np.arange(len(block)), kept.shape[1])
        nearest = sp.csr_matrix((np.take_along_axis(block, kept, 1).ravel(), (rows, kept.ravel())), shape=block.shape)
        nearest.eliminate_zeros()
        return nearest
    found = similarity.tocoo()
    others = found.col != found.row + first
    row, col, value = found.row[others], found.col[others], found.data[others]
    order = np.lexsort((col, -value, row))
    row, col, value = row[order], col[order], value[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    near = place < NEIGHBOURS
    return sp.csr_matrix((value[near], (row[near], col[near])), shape=similarity.shape)


def _ease(seen_UV: sp.csr_matrix, l2: float) -> np.ndarray:
    """EASE weights [V, V] (Steck, WWW 2019): B = -P / diag(P) off the diagonal, P the inverse of the Gram matrix plus l2."""
    gram = (seen_UV.T @ seen_UV).toarray().astype(np.float32)
    gram[np.diag_indices_from(gram)] += l2
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    found: np.ndarray = weights
    return found
