"""Training batches: sequences of user histories, with a query for the next basket at the end of each basket.

Every draw is a function of (seed, epoch). The epoch's number is therefore the sampler's whole state, and any
process can repeat the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from recray.dataset.popularity import DAY_S, dated_popularity
from recray.dataset.reader import Dataset, Shard
from recray.model.losses import Targets
from recray.model.shape import Batch

POOL_BATCHES = 64  # batches sorted by length together; a higher number pads less and shuffles less


@dataclass(frozen=True)
class Sequences:
    """Chunks of training histories, each of one user.

    Sequence i consists of the events start[i]:stop[i] (flat) of shard[i]. `limit[i]` is the end of that
    user's training events; targets lie before it.
    """

    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    limit: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: np.ndarray | slice) -> Sequences:
        return Sequences(self.shard[rows], self.start[rows], self.stop[rows], self.limit[rows])


class TrainingBatches:
    """Length-bucketed global batches of one dataset.

    Parameters
    ----------
    history : maximal length of a sequence
    batch_tokens : tokens (events) of a global batch, padding included
    sequences : "all" splits long histories at a random phase, "last" keeps only the last sequence
    popularity_prior_days : days of the popularity prior, 0 for none
    target_baskets : next baskets that a query predicts, equally weighted (the dense all-action loss of
        PinnerFormer, arXiv 2205.04507, counted in baskets)
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        history: int,
        batch_tokens: int,
        sequences: str,
        popularity_prior_days: int,
        seed: int,
        target_baskets: int = 1,
    ) -> None:
        self.dataset, self.history, self.batch_tokens = dataset, history, batch_tokens
        self.sequences, self.seed, self.target_baskets = sequences, seed, target_baskets
        self.popularity_prior_days = popularity_prior_days if dataset.has_time else 0
        self.released_day = dataset.released_day
        self.users = [_input_ranges(shard, shard.train_lengths) for shard in dataset.shards()]

    def epoch(self, epoch: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Batch, Targets, int]]:
        """This rank's part of each global batch: (batch, targets, queries in the global batch).

        The parts of all ranks form the same global batch for every `world_size`. A part may have no queries.
        """
        random = np.random.default_rng([self.seed, epoch])
        sequences = self._draw(random)
        for rows in self._pack(sequences, random):
            whole = sequences[rows]
            total = sum(len(self._queries(sequence)[0]) for sequence in self._by_shard(whole))
            if total:
                batch, targets = self.collate(whole[slice(rank, None, world_size)])
                yield batch, targets, total

    def item_share(self) -> np.ndarray:
        """Share of each item in the training targets, float32 [n_items + 1]; padding 0."""
        counts = np.zeros(self.dataset.n_items + 1)
        for shard in self.dataset.shards():
            counts += np.bincount(shard.trained_item_index(targets=True), minlength=len(counts))
        result: np.ndarray = (counts / max(counts.sum(), 1.0)).astype(np.float32)
        return result

    def padding(self, epoch: int = 0) -> float:
        """Share of padded positions in an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        sequences = self._draw(random)
        length = sequences.stop - sequences.start
        used = sum(len(rows) * int(length[rows].max()) for rows in self._pack(sequences, random))
        return 1.0 - float(length.sum()) / max(used, 1)

    def _draw(self, random: np.random.Generator) -> Sequences:
        if self.sequences == "last":
            return self.last_sequences()
        parts = []
        for number, (start, stop, limit) in enumerate(self.users):
            # split at start + phase, start + phase + history, …; short histories stay whole
            length = stop - start
            phase = np.where(
                length > self.history, random.integers(1, self.history + 1, len(start)), self.history
            )
            pieces = 1 + np.maximum(-(-(length - phase) // self.history), 0)
            owner = np.repeat(np.arange(len(start)), pieces)
            piece = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            first = np.where(
                piece == 0, start[owner], start[owner] + phase[owner] + (piece - 1) * self.history
            )
            last = np.minimum(start[owner] + phase[owner] + piece * self.history, stop[owner])
            parts.append((number, first, last, limit[owner]))
        return Sequences(*_concatenate(parts))

    def _pack(self, sequences: Sequences, random: np.random.Generator) -> list[np.ndarray]:
        length = sequences.stop - sequences.start
        order = random.permutation(len(sequences))
        pool = max(int(POOL_BATCHES * self.batch_tokens / max(length.mean(), 1)), 1) if len(order) else 1
        batches = []
        for first in range(0, len(order), pool):
            rows = order[first : first + pool]
            rows = rows[np.argsort(-length[rows], kind="stable")]
            first_row = 0
            while first_row < len(rows):
                size = max(self.batch_tokens // int(length[rows[first_row]]), 1)
                batches.append(rows[first_row : first_row + size])
                first_row += size
        return [batches[i] for i in random.permutation(len(batches))]

    def _by_shard(self, sequences: Sequences) -> list[tuple[Shard, Sequences]]:
        return [
            (self.dataset.shard(int(sequences.shard[rows[0]])), sequences[rows])
            for rows in _rows_by_shard(sequences)
        ]

    def _queries(self, part: tuple[Shard, Sequences]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each query: its row in the part, its event (flat), and the end of its next baskets (those with a
        target).
        """
        shard, sequences = part
        starts = shard.basket_starts
        first = np.searchsorted(starts, sequences.start, side="right")
        last = np.searchsorted(starts, sequences.stop, side="right")
        count = last - first
        row = np.repeat(np.arange(len(sequences)), count)
        basket = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        if shard.target_rule is None:
            last = np.minimum(basket + self.target_baskets, len(starts) - 1)
            return row, starts[basket] - 1, np.minimum(starts[last], sequences.limit[row])
        own = np.flatnonzero(shard.count_targets(starts[:-1], starts[1:]))  # baskets with a target
        last = np.searchsorted(own, basket) + self.target_baskets - 1
        ends = np.append(starts[own + 1], starts[-1])
        end = np.minimum(ends[np.minimum(last, len(own))], sequences.limit[row])
        is_query = shard.count_targets(starts[basket], end) > 0
        return row[is_query], starts[basket][is_query] - 1, end[is_query]

    def last_sequences(self, *, holdout: bool = False) -> Sequences:
        """The last sequence of each training user, one row per user.

        holdout : of each holdout user instead, cut as for a training user
        """
        users = _holdout_ranges(self.dataset) if holdout else self.users
        parts = [
            (number, np.maximum(start, stop - self.history), stop, limit)
            for number, (start, stop, limit) in enumerate(users)
        ]
        return Sequences(*_concatenate(parts))

    def collate(self, sequences: Sequences) -> tuple[Batch, Targets]:
        """A batch with one sequence per row, and the targets of its queries."""
        T = max(int((sequences.stop - sequences.start).max(initial=1)), 1)
        item, event = np.zeros((len(sequences), T), np.int64), np.zeros((len(sequences), T), np.int64)
        time, now = np.zeros((len(sequences), T), np.int64), np.zeros((len(sequences), T), np.int64)
        value = np.zeros((len(sequences), T), np.float32)
        user, position, context, targets, sizes, weights = [], [], [], [], [], []

        for rows, part in zip(_rows_by_shard(sequences), self._by_shard(sequences), strict=True):
            shard, own = part
            where = own.start[:, None] + np.arange(T)
            is_real = where < own.stop[:, None]
            where = np.where(is_real, where, own.start[:, None])
            item[rows] = np.where(is_real, shard.item_index[where], 0)
            event[rows] = shard.event_index[where]
            value[rows] = shard.value[where]
            time[rows] = shard.timestamp_s[where]
            now[rows] = shard.timestamp_s[_next_time(shard, where)]
            row, last, end = self._queries(part)
            now[rows[row], last - own.start[row]] = shard.timestamp_s[last + 1]
            user.append(rows[row])
            position.append(last - own.start[row])
            context.append(shard.context_of(self.dataset.context, last + 1))
            sizes.append(shard.count_targets(last + 1, end))
            if shard.target_rule is None:
                targets.append(_ranges(shard.item_index, last + 1, end))
            else:
                before = shard.targets_before
                event_t = _ranges(shard.target_positions, before[last + 1], before[end])
                targets.append(shard.item_index[event_t])
                weights.append(shard.target_rule.weigh(shard.event_index[event_t], shard.value[event_t]))

        user_N, position_N = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (user, position))
        sizes_N = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        day_P, day_N = np.unique(now[user_N, position_N] // DAY_S, return_inverse=True)
        context_NC = (
            np.concatenate(context) if context else np.zeros((0, len(self.dataset.context)), np.int64)
        )
        arrays = (item, event, value, time, now, user_N, position_N, day_P, day_P, day_N, context_NC)
        batch = Batch._make((*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays), None))
        offsets = np.concatenate([[0], np.cumsum(sizes_N)])
        target_items = np.concatenate(targets) if targets else np.zeros(0, np.int64)
        weight = torch.from_numpy(np.concatenate(weights)) if weights else None
        item_t = torch.from_numpy(target_items.astype(np.int64))
        return batch, Targets(torch.from_numpy(offsets), item_t, weight)

    def dated(self, day_P: np.ndarray, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Popularity prior float32 and bucket of freshness uint8 per day, [P, items] each.

        [P, 1] where the data have none.

        among : item indices, ascending; None: all items
        """
        if among is not None or not len(day_P):
            return self._on(day_P, among)
        prior, fresh = zip(*(self._rows(int(day)) for day in day_P), strict=True)
        return np.concatenate(prior), np.concatenate(fresh)

    # the cache lives as long as the training run; rows of all items are read only where items are few
    @lru_cache(maxsize=512)  # noqa: B019
    def _rows(self, day: int) -> tuple[np.ndarray, np.ndarray]:
        return self._on(np.array([day]), None)

    def _on(self, day_P: np.ndarray, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return dated_popularity(
            day_P, self.dataset.popularity, self.popularity_prior_days, self.released_day, among
        )


def users_learned(dataset: Dataset) -> int:
    """Number of training users with a history and a target."""
    return sum(len(_input_ranges(shard, shard.train_lengths)[0]) for shard in dataset.shards())


def users_estimated(dataset: Dataset) -> tuple[int, int]:
    """Estimated number of training users, and of those with a history and a target.

    Both are estimated from the holdout users alone, whom a hash selects.
    """
    share: float = dataset.manifest["settings"]["split"]["holdout_users"]
    trained_users = sum(
        int((shard.queried & (shard.split[:, _learned_until(dataset)] > 0)).sum())
        for shard in dataset.shards()
    )
    learned = sum(len(start) for start, *_ in _holdout_ranges(dataset))
    return round(trained_users * (1 - share) / share), round(learned * (1 - share) / share)


def _learned_until(dataset: Dataset) -> int:
    """Column of a shard's split that ends the training events of users outside the holdout."""
    return 3 if dataset.split_kind == "leave_one_out" else 2


def _holdout_ranges(dataset: Dataset) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Input ranges of the holdout users, cut as for training users."""
    end = _learned_until(dataset)
    return [
        _input_ranges(shard, np.where(shard.queried, shard.split[:, end], 0)) for shard in dataset.shards()
    ]


def _concatenate(parts: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Shard number, start, stop and limit of the sequences of all shards."""
    shard = np.concatenate([np.full(len(part[1]), part[0]) for part in parts])
    return [shard, *(np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))]


def _input_ranges(shard: Shard, learned: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat start and stop of each user's inputs, and the end of its `learned` events.

    Users without a target are dropped. The last training basket is only a target, because no later event may
    be learned.
    """
    start = shard.offsets[:-1]
    limit = start + learned
    last = np.maximum(limit - 1, start)
    stop = shard.basket_starts[np.searchsorted(shard.basket_starts, last, side="right") - 1]
    keep = (limit > start) & (stop > start)
    if shard.target_rule is not None and len(shard.basket_starts) > 1:
        first = shard.basket_starts[
            np.searchsorted(shard.basket_starts, start, side="right").clip(max=len(shard.basket_starts) - 1)
        ]
        keep &= shard.count_targets(first, limit) > 0
    return start[keep], stop[keep], limit[keep]


def _next_time(shard: Shard, where: np.ndarray) -> np.ndarray:
    """Flat index of the first event at a later time for each event; the last ones point to themselves."""
    starts = shard.time_starts
    following = starts[np.minimum(np.searchsorted(starts, where, side="right"), len(starts) - 1)]
    return np.where(following < len(shard.item_index), following, where)


def _rows_by_shard(sequences: Sequences) -> list[np.ndarray]:
    return [np.flatnonzero(sequences.shard == number) for number in np.unique(sequences.shard)]


def _ranges(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """values[first[i]:last[i]] for all i, concatenated."""
    size = last - first
    where = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size) + np.repeat(first, size)
    result: np.ndarray = values[where]
    return result
