"""Which items a recommendation list may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recray.dataset.popularity import DAY_S, UNKNOWN_DAY, Popularity
from recray.dataset.reader import History

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SeenRule:
    """Which events make an item a seen one.

    events : their types; empty: all
    days : how long before the query time; None: however long
    """

    events: tuple[str, ...] = ()
    days: float | None = None

    @classmethod
    def from_settings(cls, seen: Mapping[str, Any] | None) -> SeenRule:
        """The rule of `ScoreSettings.seen`."""
        return cls() if seen is None else cls(tuple(seen["events"]), seen["days"])

    def find_problem(self, event_types: Sequence[str], *, has_time: bool) -> tuple[str, str] | None:
        """Why data cannot have this rule (a type of events that they lack, or days without times) and the
        fix; None: they can.
        """
        if unknown := sorted(set(self.events) - set(event_types)):
            names = ", ".join(map(repr, unknown))
            return f"seen_events: no event type {names}", f"known: {', '.join(event_types)}"
        if self.days is not None and not has_time:
            return "seen_days: the data have no times", "leave it out"
        return None

    def to_filters(
        self,
        event_types: Sequence[str],
        now_s: int,
        allow: np.ndarray | None = None,
        deny: np.ndarray | None = None,
    ) -> Filters:
        """The seen-item filter by this rule, and other filters.

        event_types : names in the order of `History.event_index`
        """
        events = [number for number, name in enumerate(event_types) if name in self.events]
        return Filters(
            filter_seen=True,
            seen_events=np.array(events, np.int64) if self.events else None,
            seen_since_s=None if self.days is None else int(now_s - self.days * DAY_S),
            allow=allow,
            deny=deny,
        )


ALL_EVENTS = SeenRule()


@dataclass(frozen=True)
class Filters:
    """Which items a request may get.

    filter_seen : leave out the items of the history
    allow, deny : item indices
    seen_events : types of events whose items are left out, indices; None: all
    seen_since_s : from which second on; None: all
    """

    filter_seen: bool = False
    allow: np.ndarray | None = None
    deny: np.ndarray | None = None
    seen_events: np.ndarray | None = None
    seen_since_s: int | None = None

    def excluded_items(self, history: History) -> np.ndarray:
        """Items that a user with this history may not get, int64 [n]. Items may occur twice; 0 stands for
        unknown items.
        """
        seen = self._seen_items(history) if self.filter_seen else None
        parts = [items for items in (seen, self.deny) if items is not None]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def _seen_items(self, history: History) -> np.ndarray:
        items = np.asarray(history.item_index)
        if self.seen_events is not None:
            items = np.where(np.isin(history.event_index, self.seen_events), items, 0)
        if self.seen_since_s is not None:
            items = np.where(np.asarray(history.timestamp_s) >= self.seen_since_s, items, 0)
        return items

    def is_allowed(self, item_index: np.ndarray, history: History) -> np.ndarray:
        """Which of these items a user with this history may get, bool [n]."""
        allowed = np.ones(len(item_index), bool) if self.allow is None else np.isin(item_index, self.allow)
        return allowed & ~np.isin(item_index, self.excluded_items(history))


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

    requests : the history and the filters of each row
    availability : items by the day from which they are available; None where that is unknown
    day : int64 [rows], the day of each query
    """

    def __init__(
        self,
        requests: list[tuple[History, Filters]],
        device: torch.device,
        availability: AvailabilityFilter | None = None,
        day: np.ndarray | None = None,
    ) -> None:
        excluded = [
            (row, filters.excluded_items(history))
            for row, (history, filters) in enumerate(requests)
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
