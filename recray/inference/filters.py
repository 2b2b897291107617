"""Which items an answer may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from recray.dataset.popularity import NEVER_SAID, Popularity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Filters:
    """Which items may be answered. `new_only` leaves out the whole history; `allow` and `deny` hold item indices."""

    new_only: bool = False
    allow: np.ndarray | None = None
    deny: np.ndarray | None = None

    def barred(self, seen: np.ndarray) -> np.ndarray:
        """Items that may not be shown to somebody with this history, int64 [n]; some twice, and 0 for those that are not known."""
        parts = [items for items in (seen if self.new_only else None, self.deny) if items is not None]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def shows(self, item_index: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Which of some items may be shown to somebody with this history, bool [n]."""
        allowed = np.ones(len(item_index), bool) if self.allow is None else np.isin(item_index, self.allow)
        shown: np.ndarray = allowed & ~np.isin(item_index, self.barred(seen))
        return shown


ANY_ITEM = Filters()


@dataclass(frozen=True)
class Later:
    """Items [n] and the day since which each can be met, int64 [n], latest first; `minus_days` are the days where they are looked up."""

    minus_days: np.ndarray
    items: Tensor
    days: Tensor

    @classmethod
    def of(cls, released_day: np.ndarray, popularity: Popularity, device: torch.device) -> Later:
        """Of days [V]; an item that was met before is there since then, whatever is said of it."""
        found = released_day.astype(np.int64)
        np.minimum.at(found, popularity.item_index, popularity.day)
        items = np.flatnonzero(found > NEVER_SAID)
        items = items[np.argsort(-found[items], kind="stable")]
        return cls(-found[items], torch.from_numpy(items).to(device), torch.from_numpy(found[items]).to(device))

    def than(self, day: int) -> Later:
        """Those that can be met later than on a day."""
        count = int(np.searchsorted(self.minus_days, -day))
        return Later(self.minus_days[:count], self.items[:count], self.days[:count])


class Barred:
    """What may not be answered to some histories, as places of the score matrix: row and item; and what nobody can meet yet.

    later : items by the day since which they can be met; None where that is not known
    day : int64 [rows], the day on which each is asked
    """

    def __init__(
        self, wanted: list[tuple[np.ndarray, Filters]], device: torch.device, later: Later | None = None, day: np.ndarray | None = None
    ) -> None:
        barred = [(row, filters.barred(history)) for row, (history, filters) in enumerate(wanted) if filters.new_only or filters.deny is not None]
        rows = np.repeat([row for row, _ in barred], [len(items) for _, items in barred]).astype(np.int64)
        self._rows = torch.from_numpy(rows).to(device)
        items = np.concatenate([items for _, items in barred]) if barred else np.zeros(0)
        self._items = torch.from_numpy(items.astype(np.int64)).to(device)
        self._allowed = {row: torch.from_numpy(f.allow.astype(np.int64)).to(device) for row, (_, f) in enumerate(wanted) if f.allow is not None}

        self._later = self._day = None
        if later is not None and day is not None and len((later := later.than(int(day.min()))).days):
            self._later, self._day = later, torch.from_numpy(day).to(device)

    def apply(self, scores: Tensor, first: int) -> Tensor:
        """Scores [rows, n] of the items from `first` on, -inf where an item is barred."""
        if self._later is not None and self._day is not None:
            here = (self._later.items >= first) & (self._later.items < first + scores.shape[1])
            columns, days = self._later.items[here] - first, self._later.days[here]
            scores[:, columns] = scores[:, columns].masked_fill(days > self._day[:, None], -torch.inf)
        inside = (self._items >= first) & (self._items < first + scores.shape[1])
        scores[self._rows[inside], self._items[inside] - first] = -torch.inf
        for row, items in self._allowed.items():
            keep = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            keep[items[(items >= first) & (items < first + scores.shape[1])] - first] = True
            scores[row, ~keep] = -torch.inf
        return scores
