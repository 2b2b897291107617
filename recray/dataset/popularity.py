"""How often each item was met on each day: the dated popularity behind the prior and the popular lists.

Promises that a question about a moment never sees an event of that moment's day or later.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY_S = 86_400
FRESHNESS_BUCKETS = 20
CELLS = 1 << 22  # days x items at once
NEVER_SAID = -1_000_000  # in the place of a day that is not known, long before all others


def freshness(day: int | np.ndarray, released_day: np.ndarray) -> np.ndarray:
    """Bucket of each item's age on a day, int64 [n] in [0, FRESHNESS_BUCKETS): 0 not known, 1 not yet released, then 2 for the day
    itself and half powers of two of 1 + days. `day` may be any array that broadcasts with `released_day` [n]."""
    age = day - released_day
    found = 2 + np.floor(2.0 * np.log2(1.0 + np.maximum(age, 0))).astype(np.int64)
    found = np.where(age < 0, 1, np.minimum(found, FRESHNESS_BUCKETS - 1))
    return np.where(released_day <= NEVER_SAID, 0, found)


def dated(
    day_P: np.ndarray, popularity: Popularity, prior_days: int, released_day: np.ndarray | None, among: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What is known of the items on each day: the prior log(1 + events of the `prior_days` days before), float32, and the bucket of
    freshness, uint8, [P, n_items + 1] each; [P, 1] where there is none (no days, no releases).

    among : item indices, ascending and distinct, that alone are answered; None: all
    """
    n_items = popularity.n_items + 1 if among is None else len(among)
    prior = np.zeros((len(day_P), n_items if prior_days else 1), np.float32)
    fresh = np.zeros((len(day_P), 1 if released_day is None else n_items), np.uint8)
    step = max(CELLS // n_items, 1)
    for some in (slice(first, first + step) for first in range(0, len(day_P), step)):
        if prior_days:
            np.log1p(popularity.windows(day_P[some], prior_days, among), out=prior[some])
        if released_day is not None:
            fresh[some] = freshness(day_P[some, None], released_day if among is None else released_day[among])
    return prior, fresh


class Popularity:
    """Sparse daily counts.

    Parameters
    ----------
    day, item_index, count : int arrays [n], sorted by (day, item_index)
        Days since 1970-01-01 UTC; 0 throughout where no time is known.
    n_items : int
        Items in the vocabulary, padding not counted.
    """

    def __init__(self, day: np.ndarray, item_index: np.ndarray, count: np.ndarray, n_items: int) -> None:
        self.day, self.item_index, self.count, self.n_items = day, item_index, count, n_items

    @classmethod
    def count_events(cls, item_index: np.ndarray, timestamp_s: np.ndarray | None, n_items: int) -> Popularity:
        """Counts of the events [n]; `timestamp_s` None where no time is known."""
        day = np.zeros(len(item_index), np.int64) if timestamp_s is None else timestamp_s // DAY_S
        return cls._merge(day, item_index, np.ones(len(item_index), np.int64), n_items)

    def __add__(self, other: Popularity) -> Popularity:
        day, item_index, count = (np.concatenate(pair) for pair in zip(self._arrays(), other._arrays(), strict=True))
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
        """Events of each item in the `days` complete days before the day of `now_s`, float32 [n_items + 1]."""
        found: np.ndarray = self.windows(np.array([now_s // DAY_S]), days)[0]
        return found

    def windows(self, day_P: np.ndarray, days: int, among: np.ndarray | None = None) -> np.ndarray:
        """Events of each item in the `days` complete days before each day, float32 [P, n_items + 1].

        All days are answered from one pass over the counts, summed up between the days at which a window begins or ends.

        among : item indices, ascending and distinct, that alone are counted and answered, [P, len(among)]; None: all
        """
        n = self.n_items + 1 if among is None else len(among)
        edge = np.unique(np.concatenate([day_P - days, day_P]))
        bounds = np.searchsorted(self.day, edge)
        inside = slice(bounds[0], bounds[-1]) if len(edge) else slice(0)
        row, item_index, count = np.repeat(np.arange(1, len(edge)), np.diff(bounds)), self.item_index[inside], self.count[inside]
        if among is not None:
            place = np.full(self.n_items + 1, -1)
            place[among] = np.arange(n)
            item_index = place[item_index]
            known = item_index >= 0
            row, item_index, count = row[known], item_index[known], count[known]
        before = np.bincount(row * n + item_index, weights=count, minlength=len(edge) * n).reshape(len(edge), n)
        np.cumsum(before, axis=0, out=before)
        found: np.ndarray = (before[np.searchsorted(edge, day_P)] - before[np.searchsorted(edge, day_P - days)]).astype(np.float32)
        return found

    def popular(self, now_s: int | None, days: int) -> np.ndarray:
        """What to show to somebody unknown: recent counts, with all counts before that day to break ties [n_items + 1].

        Where there is no complete day before (a log of one day), all that is counted.
        """
        total = self.total() if now_s is None else self.window(now_s, now_s // DAY_S + 1)
        if now_s is None or not total.any():
            return self.total()
        found: np.ndarray = self.window(now_s, days) + total / (total.sum() + 1.0)
        return found

    def remap(self, to: np.ndarray, n_items: int) -> Popularity:
        """The same counts in another vocabulary: `to` [self.n_items + 1] holds new indices, 0 drops the item."""
        item_index = to[self.item_index]
        keep = item_index > 0
        return self._merge(self.day[keep], item_index[keep], self.count[keep], n_items)

    def save(self, path: Path) -> None:
        pq.write_table(pa.table({"day": self.day, "item_index": self.item_index, "count": self.count}), path)

    @classmethod
    def load(cls, path: Path, n_items: int) -> Popularity:
        table = pq.read_table(path)
        day, item_index, count = (table[name].to_numpy() for name in ("day", "item_index", "count"))
        return cls(day, item_index, count, n_items)
