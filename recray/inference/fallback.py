"""The popularity fallback: the recommendation list for a history without a known item."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from recray.dataset.popularity import DAY_S
from recray.inference.inputs import evict_oldest
from recray.inference.vocabulary import Catalogue

if TYPE_CHECKING:
    from torch import Tensor

    from recray.inference.rules import Rules

WINDOW_DAYS = 7  # whose interactions make an item popular


class PopularityFallback:
    """Scores items by how often users interacted with them.

    log_counts : the model's own noised log counts [n_items + 1], which a private training has; None: the
        counts of the catalogue
    """

    def __init__(self, catalogue: Catalogue, log_counts: Tensor | None, device: torch.device) -> None:
        self._popularity, self._has_time = catalogue.popularity, catalogue.has_time
        self._log_counts, self._device = log_counts, device
        self._scores: dict[int, Tensor] = {}

    def counts(self) -> np.ndarray:
        """Interactions with each item, float64 [n_items + 1]; noised where the training was private."""
        own = self._log_counts
        return self._popularity.total() if own is None else own.double().exp().cpu().numpy()

    def score_block(self, moments: np.ndarray, items: slice, rules: Rules | None) -> Tensor:
        """Scores [rows, n] of a block of items at moments [rows] (seconds), with the boosts of the rules."""
        scores = torch.stack([self._scores_at(int(moment))[items] for moment in moments])
        if rules is None:
            return scores
        first = items.start
        if self._log_counts is None:
            return rules.adjust_counts(scores, first)
        return rules.add_boosts(scores, first)

    def _scores_at(self, now_s: int) -> Tensor:
        own = self._log_counts
        day = now_s // DAY_S if self._has_time and own is None else 0
        if day not in self._scores:
            evict_oldest(self._scores)
            if own is None:
                scores = self._popularity.fallback_counts(now_s if self._has_time else None, WINDOW_DAYS)
            else:
                scores = own.cpu().numpy().copy()
            scores[0] = -np.inf
            self._scores[day] = torch.from_numpy(scores).to(self._device)
        return self._scores[day]
