"""Which items a recommendation list may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from recray.dataset.popularity import UNKNOWN_DAY, Popularity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Filters:
    """Which items a request may get. `filter_seen` leaves out the whole history; `allow` and `deny` hold item
    indices.
    """

    filter_seen: bool = False
    allow: np.ndarray | None = None
    deny: np.ndarray | None = None

    def excluded_items(self, seen: np.ndarray) -> np.ndarray:
        """Items that a user with these seen items may not get, int64 [n]. Items may occur twice; 0 stands for
        unknown items.
        """
        parts = [items for items in (seen if self.filter_seen else None, self.deny) if items is not None]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def is_allowed(self, item_index: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Which of these items a user with these seen items may get, bool [n]."""
        allowed = np.ones(len(item_index), bool) if self.allow is None else np.isin(item_index, self.allow)
        return allowed & ~np.isin(item_index, self.excluded_items(seen))


ANY_ITEM = Filters()


@dataclass(frozen=True)
class AvailabilityFilter:
    """Items [n] and the day from which each is available, int64 [n], latest first. `minus_days` holds the
    negative days, ascending, for look-up.
    """

    minus_days: np.ndarray
    items: Tensor
    days: Tensor

    @classmethod
    def from_days(
        cls, available_day: np.ndarray, popularity: Popularity, device: torch.device
    ) -> AvailabilityFilter:
        """From days [V]. An item is available from its first interaction, even if its day is later."""
        first_day = available_day.astype(np.int64)
        np.minimum.at(first_day, popularity.item_index, popularity.day)
        items = np.flatnonzero(first_day > UNKNOWN_DAY)
        items = items[np.argsort(-first_day[items], kind="stable")]
        return cls(
            -first_day[items],
            torch.from_numpy(items).to(device),
            torch.from_numpy(first_day[items]).to(device),
        )

    def select_unavailable(self, day: int) -> AvailabilityFilter:
        """The items that become available only after this day."""
        count = int(np.searchsorted(self.minus_days, -day))
        return AvailabilityFilter(self.minus_days[:count], self.items[:count], self.days[:count])


class ExcludedItems:
    """Cells of a score matrix (row and item) that must not be served.

    requests : the seen items and the filters of each row
    availability : items by the day from which they are available; None where that is unknown
    day : int64 [rows], the day of each query
    """

    def __init__(
        self,
        requests: list[tuple[np.ndarray, Filters]],
        device: torch.device,
        availability: AvailabilityFilter | None = None,
        day: np.ndarray | None = None,
    ) -> None:
        excluded = [
            (row, filters.excluded_items(seen))
            for row, (seen, filters) in enumerate(requests)
            if filters.filter_seen or filters.deny is not None
        ]
        rows = np.repeat([row for row, _ in excluded], [len(items) for _, items in excluded]).astype(np.int64)
        self._rows = torch.from_numpy(rows).to(device)
        items = np.concatenate([items for _, items in excluded]) if excluded else np.zeros(0)
        self._items = torch.from_numpy(items.astype(np.int64)).to(device)
        self._allowed = {
            row: torch.from_numpy(filters.allow.astype(np.int64)).to(device)
            for row, (_, filters) in enumerate(requests)
            if filters.allow is not None
        }

        self._unavailable = self._day = None
        if availability is not None and day is not None:
            unavailable = availability.select_unavailable(int(day.min()))
            if len(unavailable.days):
                self._unavailable, self._day = unavailable, torch.from_numpy(day).to(device)

    def apply(self, scores: Tensor, first: int) -> Tensor:
        """Scores [rows, n] of the items from `first` on, with -inf for excluded items."""
        stop = first + scores.shape[1]
        if self._unavailable is not None and self._day is not None:
            in_block = (self._unavailable.items >= first) & (self._unavailable.items < stop)
            columns, days = self._unavailable.items[in_block] - first, self._unavailable.days[in_block]
            scores[:, columns] = scores[:, columns].masked_fill(days > self._day[:, None], -torch.inf)

        in_block = (self._items >= first) & (self._items < stop)
        scores[self._rows[in_block], self._items[in_block] - first] = -torch.inf

        for row, items in self._allowed.items():
            keep = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            keep[items[(items >= first) & (items < stop)] - first] = True
            scores[row, ~keep] = -torch.inf
        return scores
