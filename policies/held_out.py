"""Rewards of held-out users: how well what a model recommends under an action meets what they did next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recray.evaluation.metrics import per_user
from recray.evaluation.protocol import Question
from recray.inference import Predictor
from recray.inference.policy import controls, dials, observe, popularity_rank


class HeldOut:
    """`Rewards` from the questions of an evaluation: the metric of the k items that the predictor recommends.

    Parameters
    ----------
    actions : names of the controls, see `recray.inference.policy.dials`
    metric : `ndcg` or `mrr` (the reciprocal rank), at k
    """

    def __init__(self, predictor: Predictor, questions: Sequence[Question], actions: Sequence[str], *, metric: str = "ndcg", k: int = 10) -> None:
        self.predictor, self.questions, self.metric, self.k = predictor, list(questions), metric, k
        self.actions = tuple(actions)
        self._dials = dials(actions, predictor.model, predictor.event_types)
        counts = predictor.popularity.total()
        for question in self.questions:  # what they did next is not known yet
            np.subtract.at(counts, question.target, 1.0)
        rank = popularity_rank(counts)
        self.observation = np.stack([observe(q.history, q.now, rank, has_time=predictor.has_time) for q in self.questions])

    def __len__(self) -> int:
        return len(self.questions)

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Users at random; the cases are their places."""
        places = random.integers(0, len(self.questions), n)
        return self.observation[places], places

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        """The metric of each user, float64 [n]."""
        asked = [self.questions[place] for place in cases]
        turned = controls(action_NK, self._dials, self.predictor.model, self.predictor.event_types)
        answer = self.predictor.recommend(
            [question.history for question in asked],
            self.k,
            now=[question.now for question in asked],
            controls=turned,
            context=[question.context for question in asked],
        )
        return per_user(answer.item_index, [question.target for question in asked], self.k)[self.metric]
