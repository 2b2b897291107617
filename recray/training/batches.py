"""What the model learns from: windows of histories, asked at the end of each basket what the next basket holds.

Every draw is a function of (seed, epoch), so an epoch can be repeated anywhere: its number is the sampler's whole state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from recray.dataset.popularity import DAY_S, dated
from recray.dataset.reader import Dataset, Shard
from recray.model.losses import Targets
from recray.model.shape import Batch

POOL_BATCHES = 64  # batches that are sorted by length together; more pads less and shuffles less


@dataclass(frozen=True)
class Windows:
    """Pieces of training histories: window i is the events start[i]:stop[i] of shard[i] (flat), all of one user.

    `limit[i]` is where that user's training events end; targets lie before it.
    """

    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    limit: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, chosen: np.ndarray | slice) -> Windows:
        return Windows(self.shard[chosen], self.start[chosen], self.stop[chosen], self.limit[chosen])


class TrainingBatches:
    """Length-bucketed global batches of one dataset.

    Parameters
    ----------
    history : longest window
    batch_positions : positions of a global batch, padding included
    windows : "all" cuts long histories into windows at a random phase, "last" keeps the last window
    prior_days : days of the popularity prior, 0 for none
    horizon : next baskets that a query must answer, all alike (the dense loss over all future actions of PinnerFormer,
        arXiv 2205.04507, counted in baskets)
    """

    def __init__(self, dataset: Dataset, *, history: int, batch_positions: int, windows: str, prior_days: int, seed: int, horizon: int = 1) -> None:
        self.dataset, self.history, self.batch_positions = dataset, history, batch_positions
        self.windows, self.prior_days, self.seed, self.horizon = windows, prior_days if dataset.has_time else 0, seed, horizon
        self.released_day = dataset.released_day
        self.users = [_input_ranges(shard, shard.learned) for shard in dataset.shards()]

    def epoch(self, epoch: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, Targets, int]]:
        """This rank's part of each global batch: (batch, targets, queries in the global batch).

        The parts of all ranks together are the global batch, whatever `world` is; a part may be empty of queries.
        """
        random = np.random.default_rng([self.seed, epoch])
        windows = self._draw(random)
        for chosen in self._pack(windows, random):
            whole = windows[chosen]
            total = sum(len(self._queries(window)[0]) for window in self._by_shard(whole))
            if total:
                batch, targets = self.collate(whole[slice(rank, None, world)])
                yield batch, targets, total

    def item_share(self) -> np.ndarray:
        """Share of each item in the training events, float32 [n_items + 1]; padding 0."""
        counts = np.zeros(self.dataset.n_items + 1)
        for shard in self.dataset.shards():
            counts += np.bincount(shard.trained_item_index(), minlength=len(counts))
        found: np.ndarray = (counts / max(counts.sum(), 1.0)).astype(np.float32)
        return found

    def padding(self, epoch: int = 0) -> float:
        """Share of padded positions in an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        windows = self._draw(random)
        length = windows.stop - windows.start
        used = sum(len(chosen) * int(length[chosen].max()) for chosen in self._pack(windows, random))
        return 1.0 - float(length.sum()) / max(used, 1)

    def _draw(self, random: np.random.Generator) -> Windows:
        if self.windows == "last":
            return self.last_windows()
        parts = []
        for number, (start, stop, limit) in enumerate(self.users):
            # cut points start + phase, start + phase + history, …; short histories stay whole
            length = stop - start
            phase = np.where(length > self.history, random.integers(1, self.history + 1, len(start)), self.history)
            pieces = 1 + np.maximum(-(-(length - phase) // self.history), 0)
            owner = np.repeat(np.arange(len(start)), pieces)
            piece = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            first = np.where(piece == 0, start[owner], start[owner] + phase[owner] + (piece - 1) * self.history)
            last = np.minimum(start[owner] + phase[owner] + piece * self.history, stop[owner])
            parts.append((number, first, last, limit[owner]))
        return Windows(*_joined(parts))

    def _pack(self, windows: Windows, random: np.random.Generator) -> list[np.ndarray]:
        length = windows.stop - windows.start
        order = random.permutation(len(windows))
        pool = max(int(POOL_BATCHES * self.batch_positions / max(length.mean(), 1)), 1) if len(order) else 1
        batches = []
        for first in range(0, len(order), pool):
            chosen = order[first : first + pool]
            chosen = chosen[np.argsort(-length[chosen], kind="stable")]
            here = 0
            while here < len(chosen):
                size = max(self.batch_positions // int(length[chosen[here]]), 1)
                batches.append(chosen[here : here + size])
                here += size
        return [batches[i] for i in random.permutation(len(batches))]

    def _by_shard(self, windows: Windows) -> list[tuple[Shard, Windows]]:
        return [(self.dataset.shard(int(windows.shard[rows[0]])), windows[rows]) for rows in _rows_by_shard(windows)]

    def _queries(self, part: tuple[Shard, Windows]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row in the part, event (flat) and end of the next baskets of each query."""
        shard, windows = part
        starts = shard.basket_starts
        first = np.searchsorted(starts, windows.start, side="right")
        last = np.searchsorted(starts, windows.stop, side="right")
        count = last - first
        row = np.repeat(np.arange(len(windows)), count)
        basket = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        last = np.minimum(basket + self.horizon, len(starts) - 1)
        return row, starts[basket] - 1, np.minimum(starts[last], windows.limit[row])

    def last_windows(self, *, held_out: bool = False) -> Windows:
        """The last window of each user who is learned from, a row a user; or of those who are held out, as if they were not."""
        users = _held_out_ranges(self.dataset) if held_out else self.users
        parts = [(number, np.maximum(start, stop - self.history), stop, limit) for number, (start, stop, limit) in enumerate(users)]
        return Windows(*_joined(parts))

    def collate(self, windows: Windows) -> tuple[Batch, Targets]:
        """A batch of windows, a row each, and what its queries should have answered."""
        T = max(int((windows.stop - windows.start).max(initial=1)), 1)
        item, event = np.zeros((len(windows), T), np.int64), np.zeros((len(windows), T), np.int64)
        time, now = np.zeros((len(windows), T), np.int64), np.zeros((len(windows), T), np.int64)
        value = np.zeros((len(windows), T), np.float32)
        user, position, context, targets, sizes = [], [], [], [], []
        for rows, part in zip(_rows_by_shard(windows), self._by_shard(windows), strict=True):
            shard, mine = part
            where = mine.start[:, None] + np.arange(T)
            real = where < mine.stop[:, None]
            where = np.where(real, where, mine.start[:, None])
            item[rows] = np.where(real, shard.item_index[where], 0)
            event[rows] = shard.event_index[where]
            value[rows] = shard.value[where]
            time[rows] = shard.timestamp_s[where]
            now[rows] = shard.timestamp_s[_next_time(shard, where)]
            row, last, end = self._queries(part)
            now[rows[row], last - mine.start[row]] = shard.timestamp_s[last + 1]
            user.append(rows[row])
            position.append(last - mine.start[row])
            context.append(shard.context_of(self.dataset.context, last + 1))
            sizes.append(end - last - 1)
            targets.append(_ranges(shard.item_index, last + 1, end))
        user_N, position_N = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (user, position))
        sizes_N = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        day_P, day_N = np.unique(now[user_N, position_N] // DAY_S, return_inverse=True)
        context_NC = np.concatenate(context) if context else np.zeros((0, len(self.dataset.context)), np.int64)
        arrays = (item, event, value, time, now, user_N, position_N, day_P, day_P, day_N, context_NC)
        batch = Batch._make((*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays), None))
        offsets = np.concatenate([[0], np.cumsum(sizes_N)])
        wanted = np.concatenate(targets) if targets else np.zeros(0, np.int64)
        return batch, Targets(torch.from_numpy(offsets), torch.from_numpy(wanted.astype(np.int64)))

    def dated(self, day_P: np.ndarray, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """On each day the popularity prior float32 and the bucket of freshness uint8 of the items `among` (ascending; None: all),
        [P, items] each; [P, 1] where the data have none."""
        if among is not None or not len(day_P):
            return self._on(day_P, among)
        prior, fresh = zip(*(self._rows(int(day)) for day in day_P), strict=True)
        return np.concatenate(prior), np.concatenate(fresh)

    @lru_cache(maxsize=512)  # noqa: B019 - lives as long as the training run; all items: where they are few
    def _rows(self, day: int) -> tuple[np.ndarray, np.ndarray]:
        return self._on(np.array([day]), None)

    def _on(self, day_P: np.ndarray, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return dated(day_P, self.dataset.popularity, self.prior_days, self.released_day, among)


def users_learned(dataset: Dataset) -> int:
    """How many users have something to learn from: a history and a target."""
    return sum(len(_input_ranges(shard, shard.learned)[0]) for shard in dataset.shards())


def users_estimated(dataset: Dataset) -> tuple[int, int]:
    """About how many users there are to learn from, and how many of them have something to be learned (a history and a target), told by those who
    are held out alone: a hash says who is."""
    share: float = dataset.manifest["settings"]["split"]["held_out"]
    there = sum(int((shard.asked & (shard.split[:, _learned_until(dataset)] > 0)).sum()) for shard in dataset.shards())
    learned = sum(len(start) for start, *_ in _held_out_ranges(dataset))
    return round(there * (1 - share) / share), round(learned * (1 - share) / share)


def _learned_until(dataset: Dataset) -> int:
    """The column of a shard's split up to which those are learned who are not asked."""
    return 3 if dataset.split_kind == "leave_one_out" else 2


def _held_out_ranges(dataset: Dataset) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ranges of the users who are held out, as far as the others are learned."""
    end = _learned_until(dataset)
    return [_input_ranges(shard, np.where(shard.asked, shard.split[:, end], 0)) for shard in dataset.shards()]


def _joined(parts: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Number of the shard, first, last and limit of the windows of all shards."""
    shard = np.concatenate([np.full(len(part[1]), part[0]) for part in parts])
    return [shard, *(np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))]


def _input_ranges(shard: Shard, learned: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat start and stop of each user's inputs, and the end of its `learned` events; users without a target are dropped.

    The last training basket is a target only: nothing that follows it may be learned.
    """
    start = shard.offsets[:-1]
    limit = start + learned
    last = np.maximum(limit - 1, start)
    stop = shard.basket_starts[np.searchsorted(shard.basket_starts, last, side="right") - 1]
    keep = (limit > start) & (stop > start)
    return start[keep], stop[keep], limit[keep]


def _next_time(shard: Shard, where: np.ndarray) -> np.ndarray:
    """Flat index of the first event of a later time for each event, or the event itself at the very end."""
    starts = shard.time_starts
    following = starts[np.minimum(np.searchsorted(starts, where, side="right"), len(starts) - 1)]
    return np.where(following < len(shard.item_index), following, where)


def _rows_by_shard(windows: Windows) -> list[np.ndarray]:
    return [np.flatnonzero(windows.shard == number) for number in np.unique(windows.shard)]


def _ranges(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """values[first[i]:last[i]] for all i, one after the other."""
    size = last - first
    where = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size) + np.repeat(first, size)
    found: np.ndarray = values[where]
    return found
