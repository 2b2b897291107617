"""The queries of an evaluation: users of a part of the split, their histories, query times and targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recray.dataset.reader import Dataset, History, Shard

PROTOCOLS = ("with_repeats", "filter_seen")


@dataclass(frozen=True)
class EvaluationQuery:
    """A query for one user at time `now` (seconds). `context` holds the context codes [C] at that time."""

    shard: int
    row: int
    history: History
    target: np.ndarray
    now: int
    context: np.ndarray


class Ranker(Protocol):
    """The predictor or a baseline."""

    def __call__(self, queries: list[EvaluationQuery], k: int, /, *, filter_seen: bool) -> np.ndarray:
        """Item indices [len(queries), k]."""


class EvaluationQueries:
    """Queries for the users of `part` (validation or test) of a dataset, in the order of their indices.

    max_users : size of a fixed random sample; None for all
    """

    def __init__(self, dataset: Dataset, part: str, *, max_users: int | None = None, seed: int = 0) -> None:
        self.dataset, self.part = dataset, part
        first, last = (0, 1) if part == "validation" else (2, 3)
        positions = []
        for number, shard in enumerate(dataset.shards()):
            begin, end = shard.split[:, first], shard.split[:, last]
            has_target = shard.count_targets(shard.offsets[:-1] + begin, shard.offsets[:-1] + end) > 0
            rows = np.flatnonzero(has_target & (begin > 0) & shard.queried)
            if len(rows):
                positions.append(np.stack([np.full(len(rows), number), rows, begin[rows], end[rows]], 1))
        # columns: shard, row in it, first target and end of the targets in the user's events
        self.positions = np.concatenate(positions) if positions else np.zeros((0, 4), np.int64)
        if max_users is not None and len(self.positions) > max_users:
            sample = np.random.default_rng(seed).choice(len(self.positions), max_users, replace=False)
            self.positions = self.positions[np.sort(sample)]

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Iterator[list[EvaluationQuery]]:
        """Batches of this rank's share of the queries."""
        own_positions = self.positions[rank::world_size]
        for start in range(0, len(own_positions), size):
            yield [self._query(*map(int, position)) for position in own_positions[start : start + size]]

    def _is_at_cutoff(self) -> bool:
        return self.dataset.cut_s(self.part) is not None and self.dataset.query_time == "cutoff"

    def _query_time(self, target_s: int) -> int:
        """The cutoff, or the time of the target, so that no later event is visible."""
        cutoff_s = self.dataset.cut_s(self.part)
        return cutoff_s if cutoff_s is not None and self._is_at_cutoff() else target_s

    def _query(self, shard_number: int, row: int, first: int, last: int) -> EvaluationQuery:
        shard = self.dataset.shard(shard_number)
        now = self._query_time(int(shard.timestamp_s[shard.offsets[row] + first]))
        context = self._context(shard, int(shard.offsets[row]) + first)
        return EvaluationQuery(
            shard_number, row, shard.history_before(row, first), shard.targets(row, first, last), now, context
        )

    def _context(self, shard: Shard, event: int) -> np.ndarray:
        """Context of the target's event; unknown where users are queried at the cutoff."""
        names = self.dataset.context
        if self._is_at_cutoff():
            return np.zeros(len(names), np.int64)
        result: np.ndarray = shard.context_of(names, np.array([event]))[0]
        return result


def targets_of(query: EvaluationQuery, *, filter_seen: bool) -> np.ndarray:
    """Targets of a query; with `filter_seen` only unseen items."""
    return np.setdiff1d(query.target, query.history.item_index) if filter_seen else query.target
