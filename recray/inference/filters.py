"""Which items an answer may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Filters:
    """Which items may be answered. `new_only` leaves out the whole history; `allow` and `deny` hold item indices."""

    new_only: bool = False
    allow: np.ndarray | None = None
    deny: np.ndarray | None = None


ANY_ITEM = Filters()


class Barred:
    """What may not be answered to some histories, as places of the score matrix: row and item; and what nobody can meet yet.

    released_V : int64 [V], day since which each item can be met; None where that is not known
    day : int64 [rows], the day on which each is asked
    """

    def __init__(
        self, wanted: list[tuple[np.ndarray, Filters]], device: torch.device, released_V: Tensor | None = None, day: np.ndarray | None = None
    ) -> None:
        barred = [
            (row, items)
            for row, (history, filters) in enumerate(wanted)
            for items in (history if filters.new_only else None, filters.deny)
            if items is not None and len(items)
        ]
        rows = np.repeat([row for row, _ in barred], [len(items) for _, items in barred]).astype(np.int64)
        self._rows = torch.from_numpy(rows).to(device)
        items = np.concatenate([items for _, items in barred]) if barred else np.zeros(0)
        self._items = torch.from_numpy(items.astype(np.int64)).to(device)
        self._allowed = {row: torch.from_numpy(f.allow.astype(np.int64)).to(device) for row, (_, f) in enumerate(wanted) if f.allow is not None}

        self._released_V = self._day = None
        if released_V is not None and day is not None and int(released_V.max()) > day.min():
            self._released_V, self._day = released_V, torch.from_numpy(day).to(device)

    def apply(self, scores: Tensor, first: int) -> Tensor:
        """Scores [rows, n] of the items from `first` on, -inf where an item is barred."""
        if self._released_V is not None and self._day is not None:
            scores = scores.masked_fill(self._released_V[first : first + scores.shape[1]] > self._day[:, None], -torch.inf)
        inside = (self._items >= first) & (self._items < first + scores.shape[1])
        scores[self._rows[inside], self._items[inside] - first] = -torch.inf
        for row, items in self._allowed.items():
            keep = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            keep[items[(items >= first) & (items < first + scores.shape[1])] - first] = True
            scores[row, ~keep] = -torch.inf
        return scores
