"""Attention modulation of a request: by its controls, by the policy, or by exploration around the policy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from recray.dataset.reader import History
from recray.errors import RequestError, SettingsError
from recray.inference.modulation import explore, find_slots
from recray.serving.query import Query
from recray.serving.state import ServingState


@dataclass(frozen=True)
class Exploration:
    """How a response explores.

    sigma : standard deviation around the decision
    actions, bound : controls and their bound, where no policy defines them
    """

    sigma: float
    actions: tuple[str, ...]
    bound: float
    random: np.random.Generator


class DecisionBody(TypedDict):
    """A `Decision` as JSON, in the body of an impression."""

    policy: str
    actions: list[str]
    observation: list[float]
    mean: list[float]
    action: list[float]
    log_density: float | None
    sigma: float
    bound: float


@dataclass(frozen=True)
class Decision:
    """A policy's observation and decision, for the event store.

    observation : [D]
    mean, action : [K]
    log_density : of the action; None without exploration
    sigma : of the exploration
    bound : effect of an action of 1, as a share of a control's range
    """

    policy: str
    actions: tuple[str, ...]
    observation: np.ndarray
    mean: np.ndarray
    action: np.ndarray
    log_density: float | None
    sigma: float
    bound: float

    def to_controls(self) -> dict[str, float]:
        """Value of each attention control, by name."""
        return dict(zip(self.actions, (self.bound * float(value) for value in self.action), strict=True))

    def to_body(self) -> DecisionBody:
        """As JSON values. Numbers keep all digits, so that the density can be computed again."""
        return {
            "policy": self.policy,
            "actions": list(self.actions),
            "observation": [float(value) for value in self.observation],
            "mean": [float(value) for value in self.mean],
            "action": [float(value) for value in self.action],
            "log_density": self.log_density,
            "sigma": self.sigma,
            "bound": self.bound,
        }


@dataclass(frozen=True)
class Modulation:
    """Attention controls by name, and the decision of policy or exploration behind them."""

    controls: Mapping[str, float] = field(default_factory=dict)
    decision: Decision | None = None


UNMODULATED = Modulation()


def choose_modulation(
    query: Query, state: ServingState, history: History, now_s: int, exploration: Exploration | None
) -> Modulation:
    """The controls of the query, or else those of a decision. Raises RequestError for a control that the
    model does not have.
    """
    if query.controls is not None:
        try:
            find_slots(list(query.controls), state.predictor.model, state.predictor.vocabulary.event_types)
        except SettingsError as error:
            raise RequestError(error.message.replace("policy.actions", "controls"), error.fix) from None
        return Modulation(query.controls)
    decision = _decide(query, state, history, now_s, exploration)
    return UNMODULATED if decision is None else Modulation(decision.to_controls(), decision)


def _decide(
    query: Query, state: ServingState, history: History, now_s: int, exploration: Exploration | None
) -> Decision | None:
    policy = state.policy_network
    if exploration is not None and not can_explore(state, exploration):
        exploration = None
    if state.is_stale or not is_ranked_by_model(state, history):
        return None
    source = exploration if policy is None else policy
    if source is None:
        return None
    observation = state.observer.observe(history, now_s, read_run_observation(query, state))
    mean = np.zeros(len(source.actions), np.float32) if policy is None else policy.act(observation[None])[0]
    action, log_density, sigma = mean, None, 0.0
    if exploration is not None:
        sigma = exploration.sigma
        drawn, density = explore(mean[None], sigma, exploration.random)
        action, log_density = drawn[0], float(density[0])
    return Decision(
        state.policy or "", source.actions, observation, mean, action, log_density, sigma, source.bound
    )


def is_ranked_by_model(state: ServingState, history: History) -> bool:
    """Whether the model ranks for a history, not the popularity fallback."""
    return not state.predictor.popular_only and bool((history.item_index > 0).any())


def can_explore(state: ServingState, exploration: Exploration) -> bool:
    """Whether there are controls to explore: the policy's, or those of `exploration`. A control that the
    model does not have is logged once.
    """
    if state.is_stale:
        return False
    if state.policy is not None:
        return True
    actions = exploration.actions
    if actions not in state.explorable:
        try:
            find_slots(actions, state.predictor.model, state.predictor.vocabulary.event_types)
            state.explorable[actions] = True
        except SettingsError as error:
            state.explorable[actions] = False
            logging.getLogger("ray.serve").error(
                "bundle %s explores nothing: %s; %s", state.bundle, error.message, error.fix
            )
    return state.explorable[actions]


def read_run_observation(query: Query, state: ServingState) -> np.ndarray | None:
    """Attention entropy and score margin of the nightly run, float32 [2]; None unless they are of this bundle
    and of the stored history.
    """
    if (
        query.user_id is None
        or query.history is not None
        or state.snapshot.manifest["bundle_digest"] != state.bundle_digest
    ):
        return None
    try:
        scored = state.snapshot.find(query.user_id)
    except Exception:  # `look_up_list` reports unreadable lists
        return None
    return None if scored is None or scored.state is None else np.array(scored.state, np.float32)
