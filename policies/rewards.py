"""Rewards of decisions: which users send requests, and what an action pays for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from policies.logs import LoggedDecisions
from recray.inference.modulation import log_density
from recray.inference.policy import OBSERVED


class Rewards(Protocol):
    """A source of requests and of their rewards.

    actions : names of the controls, K of them
    """

    @property
    def actions(self) -> tuple[str, ...]: ...

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, Any]:
        """Observations float32 [n, len(OBSERVED)] of requests, and the requests themselves ("cases",
        indexable by an array).
        """

    def pay(self, cases: Any, action_NK: np.ndarray) -> np.ndarray:
        """Mean reward of each request under an action, float64 [n]."""


@runtime_checkable
class DiversityRewards(Protocol):
    """Rewards of recommendation lists whose diversity can be measured."""

    def pay_with_diversity(self, cases: Any, action_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `pay`, and the diversity of each list as a share of the mean under action 0, float64 [n]
        each.
        """


@runtime_checkable
class BaselineRewards(Protocol):
    """Rewards that are also known under action 0. The difference has less variance than the reward."""

    def pay_baseline(self, cases: Any) -> np.ndarray:
        """Reward of each request under action 0, float64 [n]."""


class IndexedRewards(Rewards, Protocol):
    """Rewards of a fixed number of users, whose cases are their indices."""

    def __len__(self) -> int: ...


class DifferentiableRewards(Rewards, Protocol):
    """Rewards that have, themselves or by a surrogate, a gradient with respect to the action."""

    def value(self, cases: Any, action_NK: Tensor) -> Tensor:
        """As `pay`, or a surrogate of it, float64 [n]."""


@dataclass(frozen=True)
class SyntheticRewards:
    """Synthetic rewards with known best actions. Users differ in their best temperature, as a function of the
    observation.

    The mean reward of action a for a user with optimum b is `level + gain (exp(-((a - b) / width)²) - exp(-(b
    / width)²))`. Action 0 therefore pays `level` to everybody, and the oracle, who plays b, earns more.

    level : reward of action 0
    length, stale : where short histories end and stale ones begin (`log_length`, `log_days_since_last`)
    twin : the optimum is 0 for everybody
    drift : sign of all optima; -1 is a change of habits
    """

    level: float = 0.3
    gain: float = 0.3
    width: float = 0.6
    length: float = 3.2
    stale: float = 1.4
    twin: bool = False
    drift: float = 1.0
    actions: tuple[str, ...] = ("temperature",)

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Observations of users of every kind; the cases are the observations."""
        observation = np.zeros((n, len(OBSERVED)), np.float32)
        length = np.exp(random.normal(3.2, 1.0, n))
        observation[:, 0] = np.log1p(length)
        observation[:, 1] = np.log1p(length * random.beta(5, 2, n))
        observation[:, 2], observation[:, 3] = random.beta(2, 5, n), random.beta(5, 2, n)
        observation[:, 4:8] = random.gamma(2.0, 0.8, (n, 4))
        observation[:, 8:10] = np.sort(random.beta(1, 3, (n, 2)), 1)
        observation[:, 10:13] = random.beta(3, 2, (n, 3))
        observation[:, 13:16] = random.random((n, 3))
        hour = random.random(n) * 2 * np.pi
        observation[:, 16], observation[:, 17] = np.sin(hour), np.cos(hour)
        observation[:, 18] = random.random(n) < 2 / 7
        observation[:, 19:21] = random.normal(0, 1, (n, 2))
        observation[:, 21] = random.random(n) < 0.9
        observation[:, 19:21] *= observation[:, 21:22]
        return observation, observation

    def best(self, observation_ND: np.ndarray) -> np.ndarray:
        """The oracle's actions, float64 [n, K]: they depend on the length and the age of the history."""
        if self.twin:
            return np.zeros((len(observation_ND), len(self.actions)))
        x = observation_ND.astype(np.float64)
        short = np.tanh(1.2 * (self.length - x[:, 0]))
        stale = np.tanh(1.5 * (x[:, 4] - self.stale))
        action = self.drift * np.stack(
            [0.8 * short * (1 - 0.7 * (k % 2)) - 0.5 * stale * short**2 for k in range(len(self.actions))], 1
        )
        return np.clip(action, -1.0, 1.0)

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        return self.value(cases, torch.as_tensor(np.asarray(action_NK, np.float64))).numpy()

    def value(self, cases: np.ndarray, action_NK: Tensor) -> Tensor:
        """As `pay`, for torch, with a gradient."""
        best = torch.from_numpy(self.best(cases))
        near = torch.exp(-(((action_NK - best) / self.width) ** 2).mean(1))
        none = torch.exp(-((best / self.width) ** 2).mean(1))
        return self.level + self.gain * (near - none)


class DoublyRobustRewards:
    """Doubly robust estimates of what an action would have earned a logged request.

    For action a, q(x, a) + w (r - q(x, a_log)), where w is the density of the logged action around a,
    explored as the log did, over the logged one (Dudík, Langford and Li 2011; Kallus and Zhou 2018 smooth
    continuous actions by a kernel likewise). w is clipped at `max_weight`.

    model : q, of observations [n, D] and actions [n, K], fitted on other users than those of the log
    """

    def __init__(
        self,
        log: LoggedDecisions,
        actions: tuple[str, ...],
        model: Callable[[np.ndarray, np.ndarray], np.ndarray],
        max_weight: float = 20.0,
    ) -> None:
        self.log, self._actions, self.model, self.max_weight = log, actions, model, max_weight
        self._residual = log.reward - model(log.observation, log.action)

    @property
    def actions(self) -> tuple[str, ...]:
        return self._actions

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Decisions at random; the cases are their indices."""
        rows = random.integers(0, len(self.log), n)
        return self.log.observation[rows], rows

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        log, action = self.log, np.asarray(action_NK, np.float32)
        w = np.exp(log_density(log.action[cases], action, log.sigma[cases, None]) - log.log_density[cases])
        result: np.ndarray = (
            self.model(log.observation[cases], action)
            + np.minimum(w, self.max_weight) * self._residual[cases]
        )
        return result


def draw_clicks(reward: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Outcomes 0 or 1 whose mean is the reward, as in a log, float64 [n]."""
    return (random.random(len(reward)) < reward).astype(np.float64)
