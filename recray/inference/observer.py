"""What a policy observes of the requests to one model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recray.dataset.reader import History
from recray.inference.policy import observe, rank_popularity
from recray.inference.predictor import Predictor


class Observer:
    """Observations of histories in a predictor's indices."""

    def __init__(self, predictor: Predictor) -> None:
        self._rank_V, self._has_time = rank_popularity(predictor.counts()), predictor.catalogue.has_time

    def observe(self, history: History, now: int, state: np.ndarray | None = None) -> np.ndarray:
        """Observation of a request, float32 [len(OBSERVED)].

        state : [2] of `Recommendations.state`, as the last nightly run computed it
        """
        return observe(history, now, self._rank_V, has_time=self._has_time, state=state)

    def observe_all(self, histories: Sequence[History], now: int, states: np.ndarray) -> np.ndarray:
        """As `observe`, float32 [N, len(OBSERVED)]. states : [N, 2]"""
        pairs = zip(histories, states, strict=True)
        return np.stack([self.observe(history, now, state) for history, state in pairs])
