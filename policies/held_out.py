"""Rewards of held-out users: how well what a model recommends under an action meets what they did next."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recray.evaluation.metrics import per_user
from recray.evaluation.protocol import Question
from recray.inference import Filters, Predictor, Rules
from recray.inference.modulation import Slot, find_slots, to_controls
from recray.inference.policy import observe, popularity_rank
from recray.model.controls import Controls

STATELESS = 0.2  # of the users, no state is known
USUAL = 512  # users whose lists say how varied lists are


class HeldOut:
    """`Rewards` from the questions of an evaluation: the metric of the k items that the predictor recommends.

    Parameters
    ----------
    actions : names of the controls, see `recray.inference.policy.dials`
    metric : `ndcg` or `mrr` (the reciprocal rank), at k
    new_only : recommend nothing that the user already met
    listed_new_only : the nightly lists, whose state is observed, do so
    rules : of all lists
    bound : what an action of one turns, as a share of what it can
    """

    def __init__(
        self,
        predictor: Predictor,
        questions: Sequence[Question],
        actions: Sequence[str],
        *,
        metric: str = "ndcg",
        k: int = 10,
        new_only: bool = False,
        listed_new_only: bool = False,
        rules: Rules | None = None,
        bound: float = 1.0,
    ) -> None:
        self.predictor, self.questions, self.metric, self.k, self.rules = predictor, list(questions), metric, k, rules
        self.filters = Filters(new_only=new_only)
        predictor.model.requires_grad_(False)  # `value` has a gradient by the action alone
        self.actions, self._dials = tuple(actions), _bounded(actions, bound, predictor)
        counts = predictor.counts()
        if predictor.model.offset_V is None:
            for question in self.questions:  # what they did next is not known yet
                np.subtract.at(counts, question.target, 1.0)
        rank, states = popularity_rank(counts), self._states(Filters(new_only=listed_new_only))
        self.observation = np.stack(
            [observe(q.history, q.now, rank, has_time=predictor.has_time, state=state) for q, state in zip(self.questions, states, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.questions)

    def _states(self, filters: Filters) -> np.ndarray:
        """What a nightly run sees of each user [n, 2]; for a share of them nothing, as for who comes between two nights."""
        histories, now = [q.history for q in self.questions], [q.now for q in self.questions]
        found = self.predictor.recommend(histories, 2, now=now, filters=filters, rules=self.rules, controls=Controls(), watched=True).state
        assert found is not None
        found[np.random.default_rng(0).random(len(found)) < STATELESS] = np.nan
        return found

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Users at random; the cases are their places."""
        places = random.integers(0, len(self.questions), n)
        return self.observation[places], places

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        """The metric of each user, float64 [n]."""
        return self.worth(cases, self.lists(cases, action_NK))

    def value(self, cases: np.ndarray, action_NK: Tensor) -> Tensor:
        """What stands in for the metric where a gradient is wanted: how likely the model takes what they did next to be, float64 [n]."""
        asked = [self.questions[place] for place in cases]
        found = self.predictor.log_probability(
            [question.history for question in asked],
            [question.target for question in asked],
            now=[question.now for question in asked],
            controls=to_controls(action_NK, self._dials, self.predictor.model, self.predictor.event_types),
            context=[question.context for question in asked],
        )
        return found.double()

    def nothing(self, cases: np.ndarray) -> np.ndarray:
        """The metric of each user under action 0, float64 [n]."""
        found: np.ndarray = self._none[cases]
        return found

    @cached_property
    def _none(self) -> np.ndarray:
        places = np.arange(len(self))
        return self.pay(places, np.zeros((len(places), len(self.actions))))

    def worth(self, cases: np.ndarray, item_NK: np.ndarray) -> np.ndarray:
        """The metric of lists."""
        return per_user(item_NK, [self.questions[place].target for place in cases], self.k)[self.metric]

    def lists(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        """The k items that each user is recommended under an action, indices [n, k]."""
        asked = [self.questions[place] for place in cases]
        answer = self.predictor.recommend(
            [question.history for question in asked],
            self.k,
            now=[question.now for question in asked],
            filters=self.filters,
            rules=self.rules,
            controls=to_controls(action_NK, self._dials, self.predictor.model, self.predictor.event_types),
            context=[question.context for question in asked],
        )
        return answer.item_index

    def outcome(self, cases: np.ndarray, action_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The metric of each user, and how varied the list is as a share of the mean under action 0."""
        found = self.lists(cases, action_NK)
        return self.worth(cases, found), self.diversity(found) / self._usual

    @cached_property
    def _usual(self) -> float:
        places = np.arange(min(len(self), USUAL))
        return max(float(self.diversity(self.lists(places, np.zeros((len(places), len(self.actions))))).mean()), 1e-9)

    def turning(self, actions: Sequence[str], bound: float) -> HeldOut:
        """The same users, of other controls."""
        found = copy(self)
        found.actions, found._dials = tuple(actions), _bounded(actions, bound, self.predictor)
        return found

    def variety(self, mine_NK: np.ndarray, none_NK: np.ndarray) -> float:
        """How varied lists are, as a share of what the trained model's are, on the average."""
        return float(self.diversity(mine_NK).mean()) / max(float(self.diversity(none_NK).mean()), 1e-9)

    def diversity(self, item_NK: np.ndarray) -> np.ndarray:
        """How unlike each other the items of each list are: one less the mean cosine of its pairs, float64 [n]; 1 where there is one alone."""
        if item_NK.shape[1] < 2:
            return np.ones(len(item_NK))
        vectors = torch.nn.functional.normalize(self.predictor.vectors[torch.from_numpy(item_NK)], dim=2).double()
        total = vectors.sum(1).square().sum(1)
        found: np.ndarray = (1 - (total - self.k) / (self.k * (self.k - 1))).numpy()
        return found


def _bounded(actions: Sequence[str], bound: float, predictor: Predictor) -> list[Slot]:
    return [slot._replace(scale=bound * slot.scale) for slot in find_slots(actions, predictor.model, predictor.event_types)]
