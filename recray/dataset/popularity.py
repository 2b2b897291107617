"""Events of each item on each day: the dated counts behind the popularity prior and the popularity
fallback.

A query at a time never counts events of that day or later.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY_S = 86_400
FRESHNESS_BUCKETS = 20
CELLS = 1 << 22  # days x items per step
UNKNOWN_DAY = -1_000_000  # long before all other days


def freshness_bucket(day: int | np.ndarray, available_day: np.ndarray) -> np.ndarray:
    """Bucket of each item's age on a day, int64 [n] in [0, FRESHNESS_BUCKETS): 0 unknown, 1 not yet
    available, then 2 for the first day and half powers of two of 1 + days. `day` may be any array that
    broadcasts with `available_day` [n].
    """
    age = day - available_day
    bucket = 2 + np.floor(2.0 * np.log2(1.0 + np.maximum(age, 0))).astype(np.int64)
    bucket = np.where(age < 0, 1, np.minimum(bucket, FRESHNESS_BUCKETS - 1))
    return np.where(available_day <= UNKNOWN_DAY, 0, bucket)


def dated_popularity(
    day_P: np.ndarray,
    popularity: Popularity,
    popularity_prior_days: int,
    available_day: np.ndarray | None,
    items: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that depend on the day: the popularity prior log(1 + events of the `popularity_prior_days` days
    before), float32, and the freshness bucket, uint8, [P, n_items + 1] each; [P, 1] without prior days or
    release dates.

    items : item indices to compute, ascending and distinct; None: all
    """
    n_items = popularity.n_items + 1 if items is None else len(items)
    prior = np.zeros((len(day_P), n_items if popularity_prior_days else 1), np.float32)
    freshness = np.zeros((len(day_P), 1 if available_day is None else n_items), np.uint8)
    step = max(CELLS // n_items, 1)
    for rows in (slice(first, first + step) for first in range(0, len(day_P), step)):
        if popularity_prior_days:
            np.log1p(popularity.windows(day_P[rows], popularity_prior_days, items), out=prior[rows])
        if available_day is not None:
            freshness[rows] = freshness_bucket(
                day_P[rows, None], available_day if items is None else available_day[items]
            )
    return prior, freshness


class Popularity:
    """Sparse daily counts.

    Parameters
    ----------
    day, item_index, count : int arrays [n], sorted by (day, item_index)
        Days since 1970-01-01 UTC; all 0 if times are unknown.
    n_items : int
        Items in the vocabulary, without padding.
    """

    def __init__(self, day: np.ndarray, item_index: np.ndarray, count: np.ndarray, n_items: int) -> None:
        self.day, self.item_index, self.count, self.n_items = day, item_index, count, n_items

    @classmethod
    def count_events(cls, item_index: np.ndarray, timestamp_s: np.ndarray | None, n_items: int) -> Popularity:
        """Counts of the events [n]; `timestamp_s` None if times are unknown."""
        day = np.zeros(len(item_index), np.int64) if timestamp_s is None else timestamp_s // DAY_S
        return cls._merge(day, item_index, np.ones(len(item_index), np.int64), n_items)

    def __add__(self, other: Popularity) -> Popularity:
        day, item_index, count = (
            np.concatenate(pair) for pair in zip(self._arrays(), other._arrays(), strict=True)
        )
        return self._merge(day, item_index, count, self.n_items)

    @classmethod
    def _merge(cls, day: np.ndarray, item_index: np.ndarray, count: np.ndarray, n_items: int) -> Popularity:
        key, inverse = np.unique(day.astype(np.int64) * (n_items + 1) + item_index, return_inverse=True)
        total = np.bincount(inverse, weights=count, minlength=len(key)).astype(np.int64)
        return cls(key // (n_items + 1), key % (n_items + 1), total, n_items)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.day, self.item_index, self.count

    def total(self) -> np.ndarray:
        """Events of each item, float32 [n_items + 1]; index 0 is padding."""
        return np.bincount(self.item_index, weights=self.count, minlength=self.n_items + 1).astype(np.float32)

    def window(self, now_s: int, days: int) -> np.ndarray:
        """Events of each item in the `days` complete days before the day of `now_s`, float32 [n_items +
        1].
        """
        result: np.ndarray = self.windows(np.array([now_s // DAY_S]), days)[0]
        return result

    def windows(self, day_P: np.ndarray, days: int, items: np.ndarray | None = None) -> np.ndarray:
        """Events of each item in the `days` complete days before each day, float32 [P, n_items + 1].

        One pass over the counts serves all days: cumulative sums at the days where a window begins or ends.

        items : item indices to count, ascending and distinct, [P, len(items)]; None: all
        """
        n = self.n_items + 1 if items is None else len(items)
        edges = np.unique(np.concatenate([day_P - days, day_P]))
        bounds = np.searchsorted(self.day, edges)
        inside = slice(bounds[0], bounds[-1]) if len(edges) else slice(0)
        row, item_index, count = (
            np.repeat(np.arange(1, len(edges)), np.diff(bounds)),
            self.item_index[inside],
            self.count[inside],
        )
        if items is not None:
            position = np.full(self.n_items + 1, -1)
            position[items] = np.arange(n)
            item_index = position[item_index]
            is_counted = item_index >= 0
            row, item_index, count = row[is_counted], item_index[is_counted], count[is_counted]
        cumulative = np.bincount(row * n + item_index, weights=count, minlength=len(edges) * n).reshape(
            len(edges), n
        )
        np.cumsum(cumulative, axis=0, out=cumulative)
        return (
            cumulative[np.searchsorted(edges, day_P)] - cumulative[np.searchsorted(edges, day_P - days)]
        ).astype(np.float32)

    def fallback_counts(self, now_s: int | None, days: int) -> np.ndarray:
        """Counts for the popularity fallback: recent events, with all events before that day to break ties,
        [n_items + 1].

        If there is no complete day before (a log of one day), all events count.
        """
        total = self.total() if now_s is None else self.window(now_s, now_s // DAY_S + 1)
        if now_s is None or not total.any():
            return self.total()
        result: np.ndarray = self.window(now_s, days) + total / (total.sum() + 1.0)
        return result

    def remap(self, new_index: np.ndarray, n_items: int) -> Popularity:
        """The same counts in another vocabulary: `new_index` [self.n_items + 1] maps the indices, 0 drops the
        item.
        """
        item_index = new_index[self.item_index]
        keep = item_index > 0
        return self._merge(self.day[keep], item_index[keep], self.count[keep], n_items)

    def save(self, path: Path) -> None:
        pq.write_table(pa.table({"day": self.day, "item_index": self.item_index, "count": self.count}), path)

    @classmethod
    def load(cls, path: Path, n_items: int) -> Popularity:
        table = pq.read_table(path)
        day, item_index, count = (table[name].to_numpy() for name in ("day", "item_index", "count"))
        return cls(day, item_index, count, n_items)
