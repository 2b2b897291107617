"""Neighbours of items by the training events: which items occur together, follow each other, or predict each
other in a linear model. Shapes: U users, V items and padding, M neighbours of an item, S sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file

from recray.dataset.popularity import DAY_S
from recray.dataset.reader import Dataset, Shard
from recray.errors import SettingsError
from recray.evaluation.baselines import cosine_similarity, ease_weights
from recray.model.cooccurrence import SOURCES, Neighbours

WINDOW = 10  # events apart, at most, of a pair
FADE_S = 30 * DAY_S  # a pair counts exp(-time between / FADE_S)
SHRINKAGE = 5.0  # added to the transitions from an item, so that rare ones are no certainties
LINEAR_BYTES = 20  # of an entry of the matrix that the linear model inverts, with what that takes beside it
MOST_USER_PAIRS = 1e8  # of items of one user, for the cosine of the items' users
PAIR_BYTES = 48  # of a counted pair, with what adding to the counts takes beside it


def fit_neighbours(
    dataset: Dataset, *, neighbours: int, l2: float, memory_bytes: float, with_validation: bool = False
) -> Neighbours:
    """The strongest `neighbours` of each item.

    l2 : L2 regularisation of the linear model. Where its matrix does not fit in the memory, the cosine of the
        items' users takes its place
    memory_bytes : memory for counts and matrices
    with_validation : count all events before the test, not those of training alone. The weights are chosen on
        validation targets, which must not be in the counts by then; what is served should know the latest

    Raises SettingsError where not even the neighbours fit.
    """
    n_rows = dataset.n_items + 1
    need = n_rows * neighbours * (4 + 2 * len(SOURCES))
    if need > memory_bytes:
        raise SettingsError(
            f"train.cooccurrence_memory: {neighbours} neighbours of {dataset.n_items} items take "
            f"{need / 2**30:.1f} GiB",
            "raise it, or lower model.cooccurrence_neighbours",
        )
    counts = _Counts(n_rows, int(memory_bytes / PAIR_BYTES / 2))
    for shard in dataset.shards():
        events = _events(shard, shard.test_starts if with_validation else shard.train_lengths)
        if dataset.split_kind != "random":  # which permutes the events
            counts.add_pairs(*events, has_time=dataset.has_time)
        counts.add_users(*events[:2])
    matrices = counts.matrices(l2 if LINEAR_BYTES * n_rows**2 <= memory_bytes else None)
    return _merge([_strongest(matrix, neighbours) for matrix in matrices], n_rows, neighbours)


def save_neighbours(neighbours: Neighbours, path: Path) -> None:
    """Write neighbours as safetensors."""
    save_file({name: np.ascontiguousarray(part) for name, part in neighbours._asdict().items()}, path)


def load_neighbours(path: Path) -> Neighbours:
    """Neighbours of `save_neighbours`."""
    return Neighbours(**load_file(path))


def _events(shard: Shard, length: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """User, item and time of so many events from each user's first, in order; whether each is a target."""
    owner = np.repeat(np.arange(len(shard)), length)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
    where = shard.offsets[owner] + position
    is_target = shard.count_targets(where, where + 1) > 0
    return owner, np.asarray(shard.item_index[where]), np.asarray(shard.timestamp_s[where]), is_target


class _Counts:
    """Pairs within a window, transitions, and who interacted with what.

    most_pairs : of either kind; the weakest are dropped where there are more
    """

    def __init__(self, n_rows: int, most_pairs: int) -> None:
        self._shape, self._most_pairs = (n_rows, n_rows), most_pairs
        self.together = sp.csr_matrix(self._shape, dtype=np.float32)
        self.following = sp.csr_matrix(self._shape, dtype=np.float32)
        self.seen = sp.csr_matrix((0, n_rows), dtype=np.float32)  # 1: the user's latest item, 2: the next …

    def add_pairs(
        self,
        owner: np.ndarray,
        item: np.ndarray,
        time_s: np.ndarray,
        is_target: np.ndarray,
        *,
        has_time: bool,
    ) -> None:
        """Count pairs within a window and transitions."""
        for distance in range(1, WINDOW + 1):
            same = np.flatnonzero(owner[distance:] == owner[:-distance])
            first, second = item[same], item[same + distance]
            apart_s = time_s[same + distance] - time_s[same]
            weight = (np.exp(-apart_s / FADE_S) if has_time else np.ones(len(same))) / distance
            keep = first != second
            self.together = self._sum(self.together, first[keep], second[keep], weight[keep])
            is_next = (keep & (apart_s > 0) if has_time else keep) & is_target[same + distance]
            self.following = self._sum(self.following, first[is_next], second[is_next], weight[is_next])

    def add_users(self, owner: np.ndarray, item: np.ndarray) -> None:
        """Count who interacted with what."""
        _, row = np.unique(owner, return_inverse=True)
        pairs, back = np.unique(np.stack([row, item], 1)[::-1], axis=0, return_index=True)
        order = np.lexsort((back, pairs[:, 0]))  # of each user, the latest item first
        row = pairs[order, 0]
        rank = np.empty(len(pairs), np.float32)
        rank[order] = 1 + np.arange(len(pairs)) - np.searchsorted(row, row)
        shape = (int(row.max(initial=-1)) + 1, self._shape[0])
        self.seen = sp.vstack([self.seen, sp.csr_matrix((rank, pairs.T), shape=shape)], format="csr")

    def _sum(
        self, counts: sp.csr_matrix, first: np.ndarray, second: np.ndarray, weight: np.ndarray
    ) -> sp.csr_matrix:
        """Counts and further pairs; the weakest ones are dropped where there are too many."""
        counts = (
            counts + sp.csr_matrix((weight.astype(np.float32), (first, second)), shape=self._shape)
        ).tocsr()
        if counts.nnz > self._most_pairs:
            position = counts.nnz - self._most_pairs // 2
            least = np.partition(counts.data, position)[position]
            counts.data[counts.data < least] = 0.0
            counts.eliminate_zeros()
        return counts

    def matrices(self, l2: float | None) -> Iterator[sp.csr_matrix | np.ndarray]:
        """The matrices of `SOURCES`: row: item of the history, column: candidate.

        l2 : of the linear model; None: the cosine of the items' users in its place
        """
        together = (self.together + self.together.T).tocsr()
        norm = sp.diags(1.0 / np.sqrt(np.maximum(np.asarray(together.sum(1)).ravel(), 1e-9)))
        yield (norm @ together @ norm).tocsr()
        share = sp.diags(1.0 / (np.asarray(self.following.sum(1)).ravel() + SHRINKAGE))
        yield (share @ self.following).tocsr()
        yield (
            cosine_similarity(self._latest(), dense=False)
            if l2 is None
            else ease_weights(_ones(self.seen), l2)
        )

    def _latest(self) -> sp.csr_matrix:
        """Who interacted with what, of each user so many of the latest items that there are at most
        `MOST_USER_PAIRS` pairs.
        """
        size = np.diff(self.seen.indptr)
        low, high = 1, int(size.max(initial=1))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high)
                if (np.minimum(size, middle) ** 2.0).sum() <= MOST_USER_PAIRS
                else (low, middle - 1)
            )
        latest = self.seen.copy()
        latest.data[latest.data > low] = 0.0
        latest.eliminate_zeros()
        return _ones(latest)


def _ones(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """The matrix with 1 at its entries."""
    return sp.csr_matrix((np.ones_like(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)


def _strongest(matrix: sp.csr_matrix | np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and value of the highest positive values of each row, scaled so that a row's highest value
    is 1 on average.
    """
    if isinstance(matrix, np.ndarray):
        column = np.argpartition(-matrix, min(count, matrix.shape[1] - 1), axis=1)[:, :count]
        row = np.repeat(np.arange(len(matrix)), column.shape[1])
        value = np.take_along_axis(matrix, column, 1).ravel()
        column = column.ravel()
    else:
        entries = matrix.tocoo()
        order = np.lexsort((entries.col, -entries.data, entries.row))
        row, column, value = entries.row[order], entries.col[order], entries.data[order]
        is_strong = np.arange(len(row)) - np.searchsorted(row, row) < count
        row, column, value = row[is_strong], column[is_strong], value[is_strong]
    is_evidence = (value > 0) & (row > 0) & (column > 0)
    row, column, value = row[is_evidence], column[is_evidence], value[is_evidence]
    highest = np.zeros(matrix.shape[0], np.float64)
    np.maximum.at(highest, row, value)
    scale = highest[highest > 0].mean() if len(value) else 1.0
    return row.astype(np.int64), column.astype(np.int64), (value / scale).astype(np.float32)


def _merge(
    sources: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], n_rows: int, count: int
) -> Neighbours:
    """The `count` neighbours of each item that are strongest in any source."""
    keys, position = np.unique(
        np.concatenate([row * n_rows + column for row, column, _ in sources]), return_inverse=True
    )
    values = np.zeros((len(keys), len(sources)), np.float32)
    first = 0
    for number, (row, _, value) in enumerate(sources):
        values[position[first : first + len(row)], number] = value
        first += len(row)
    row, column = keys // n_rows, keys % n_rows
    order = np.lexsort((column, -values.max(1, initial=0.0), row))
    row, column, values = row[order], column[order], values[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    is_strong = rank < count
    item_VM = np.zeros((n_rows, count), np.int32)
    value_VMS = np.zeros((n_rows, count, len(sources)), np.float16)
    item_VM[row[is_strong], rank[is_strong]] = column[is_strong]
    value_VMS[row[is_strong], rank[is_strong]] = np.minimum(values[is_strong], 6e4)
    return Neighbours(item_VM, value_VMS)
