"""Rewards of holdout users: the ranking metric of what a model recommends under an action, on the users' next
interactions.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recray.evaluation.metrics import per_user
from recray.evaluation.protocol import EvaluationQuery
from recray.inference import Filters, Predictor, Rules
from recray.inference.modulation import Slot, find_slots, to_controls
from recray.inference.policy import observe, rank_popularity
from recray.model.controls import Controls

STATELESS_SHARE = 0.2  # of the users: their state is treated as unknown
DIVERSITY_USERS = 512  # users whose lists give the mean diversity


class HoldoutRewards:
    """`Rewards` from evaluation queries: the metric of the k items that the predictor recommends.

    Parameters
    ----------
    actions : names of the controls, see `recray.inference.modulation.find_slots`
    metric : `ndcg` or `mrr` (the reciprocal rank), at k
    filter_seen : recommend no item that the user interacted with
    listed_filter_seen : so do the nightly lists, whose state is observed
    rules : of all lists
    bound : effect of an action of one, as a share of the maximum
    """

    def __init__(
        self,
        predictor: Predictor,
        queries: Sequence[EvaluationQuery],
        actions: Sequence[str],
        *,
        metric: str = "ndcg",
        k: int = 10,
        filter_seen: bool = False,
        listed_filter_seen: bool = False,
        rules: Rules | None = None,
        bound: float = 1.0,
    ) -> None:
        self.predictor, self.queries, self.metric, self.k, self.rules = (
            predictor,
            list(queries),
            metric,
            k,
            rules,
        )
        self.filters = Filters(filter_seen=filter_seen)
        predictor.model.requires_grad_(False)  # `value` has a gradient by the action alone
        self.actions, self._slots = tuple(actions), _find_slots(actions, bound, predictor)

        counts = predictor.counts()
        if predictor.model.offset_V is None:
            for query in self.queries:  # the targets are in the future
                np.subtract.at(counts, query.target, 1.0)
        rank, states = rank_popularity(counts), self._read_states(Filters(filter_seen=listed_filter_seen))
        self.observation = np.stack(
            [
                observe(query.history, query.now, rank, has_time=predictor.catalogue.has_time, state=state)
                for query, state in zip(self.queries, states, strict=True)
            ]
        )

    def __len__(self) -> int:
        return len(self.queries)

    def _read_states(self, filters: Filters) -> np.ndarray:
        """The state of each user in a nightly run [n, 2]. For a share of them it is NaN, as for users who
        arrive between two runs.
        """
        histories, now = [query.history for query in self.queries], [query.now for query in self.queries]
        states = self.predictor.recommend(
            histories, 2, now=now, filters=filters, rules=self.rules, controls=Controls(), with_state=True
        ).state
        assert states is not None
        states[np.random.default_rng(0).random(len(states)) < STATELESS_SHARE] = np.nan
        return states

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Users at random; the cases are their indices."""
        rows = random.integers(0, len(self.queries), n)
        return self.observation[rows], rows

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        """The metric of each user, float64 [n]."""
        return self.score_lists(cases, self.recommend(cases, action_NK))

    def value(self, cases: np.ndarray, action_NK: Tensor) -> Tensor:
        """A differentiable surrogate of the metric: the log-probability of the targets, float64 [n]."""
        queries = [self.queries[row] for row in cases]
        log_probability = self.predictor.log_probability(
            [query.history for query in queries],
            [query.target for query in queries],
            now=[query.now for query in queries],
            controls=to_controls(
                action_NK, self._slots, self.predictor.model, self.predictor.vocabulary.event_types
            ),
            context=[query.context for query in queries],
        )
        return log_probability.double()

    def pay_baseline(self, cases: np.ndarray) -> np.ndarray:
        """The metric of each user under action 0, float64 [n]."""
        result: np.ndarray = self._baseline[cases]
        return result

    @cached_property
    def _baseline(self) -> np.ndarray:
        rows = np.arange(len(self))
        return self.pay(rows, np.zeros((len(rows), len(self.actions))))

    def score_lists(self, cases: np.ndarray, item_NK: np.ndarray) -> np.ndarray:
        """The metric of lists [n, k], float64 [n]."""
        return per_user(item_NK, [self.queries[row].target for row in cases], self.k)[self.metric]

    def recommend(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        """The k items that each user is recommended under an action, indices [n, k]."""
        queries = [self.queries[row] for row in cases]
        ranked = self.predictor.recommend(
            [query.history for query in queries],
            self.k,
            now=[query.now for query in queries],
            filters=self.filters,
            rules=self.rules,
            controls=to_controls(
                action_NK, self._slots, self.predictor.model, self.predictor.vocabulary.event_types
            ),
            context=[query.context for query in queries],
        )
        return ranked.item_index

    def pay_with_diversity(self, cases: np.ndarray, action_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The metric of each user, and the diversity of the list as a share of the mean under action 0."""
        items = self.recommend(cases, action_NK)
        return self.score_lists(cases, items), self.diversity(items) / self._mean_diversity

    @cached_property
    def _mean_diversity(self) -> float:
        rows = np.arange(min(len(self), DIVERSITY_USERS))
        return max(
            float(self.diversity(self.recommend(rows, np.zeros((len(rows), len(self.actions))))).mean()), 1e-9
        )

    def with_controls(self, actions: Sequence[str], bound: float) -> HoldoutRewards:
        """The same users with other controls."""
        rewards = copy(self)
        rewards.actions, rewards._slots = tuple(actions), _find_slots(actions, bound, self.predictor)
        return rewards

    def relative_diversity(self, item_NK: np.ndarray, baseline_NK: np.ndarray) -> float:
        """Mean diversity of lists, as a share of that of the trained model's lists."""
        return float(self.diversity(item_NK).mean()) / max(float(self.diversity(baseline_NK).mean()), 1e-9)

    def diversity(self, item_NK: np.ndarray) -> np.ndarray:
        """One less the mean cosine similarity of the pairs of items of each list, float64 [n]; 1 for a list
        of one item.
        """
        if item_NK.shape[1] < 2:
            return np.ones(len(item_NK))
        vectors = torch.nn.functional.normalize(
            self.predictor.encoder.table_VD[torch.from_numpy(item_NK)], dim=2
        ).double()
        total = vectors.sum(1).square().sum(1)
        return (1 - (total - self.k) / (self.k * (self.k - 1))).numpy()


def _find_slots(actions: Sequence[str], bound: float, predictor: Predictor) -> list[Slot]:
    """The slots of the controls, scaled by the bound."""
    return [
        slot._replace(scale=bound * slot.scale)
        for slot in find_slots(actions, predictor.model, predictor.vocabulary.event_types)
    ]
