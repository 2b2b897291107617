"""What decisions are worth: the users who ask, and what an action for one of them pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from policies.logs import Logged
from recray.inference.modulation import log_density
from recray.inference.policy import OBSERVED


class Rewards(Protocol):
    """A source of requests and of what came of them.

    actions : names of the controls, K of them
    """

    @property
    def actions(self) -> tuple[str, ...]: ...

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, Any]:
        """Observations float32 [n, len(OBSERVED)] of requests, and the requests themselves (indexable by an array)."""

    def pay(self, cases: Any, action_NK: np.ndarray) -> np.ndarray:
        """Mean reward of each request under an action, float64 [n]."""


@runtime_checkable
class Varied(Protocol):
    """Rewards of lists, whose items may be more or less alike."""

    def outcome(self, cases: Any, action_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `pay`, and how varied each list is as a share of what lists under action 0 are on the average, float64 [n] each."""


@runtime_checkable
class Compared(Protocol):
    """Rewards of requests that were answered under action 0 too: what differs says more of an action than what it paid."""

    def nothing(self, cases: Any) -> np.ndarray:
        """What each request pays under action 0, float64 [n]."""


class Listed(Rewards, Protocol):
    """One of a certain number of users, whose cases are their places."""

    def __len__(self) -> int: ...


class Differentiable(Rewards, Protocol):
    """One whose reward, or a stand-in for it, has a gradient by the action."""

    def value(self, cases: Any, action_NK: Tensor) -> Tensor:
        """As `pay`, or what stands in for it, float64 [n]."""


@dataclass(frozen=True)
class Planted:
    """A world whose best actions are known: users differ in the temperature that suits them, as far as what is observed says.

    The mean reward of action a for a user with optimum b is `level + lead (exp(-((a - b) / width)²) - exp(-(b / width)²))`, so that action 0
    is worth `level` to everybody and the oracle, who plays b, more. `twin`: the optimum is 0 for everybody. `drift`: the sign of all
    optima, as after a change of habits.

    level : reward of action 0
    length, stale : where short histories end and stale ones begin (`log_length`, `log_days_since_last`)
    """

    level: float = 0.3
    lead: float = 0.3
    width: float = 0.6
    length: float = 3.2
    stale: float = 1.4
    twin: bool = False
    drift: float = 1.0
    actions: tuple[str, ...] = ("temperature",)

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Observations of users of every kind; the cases are the observations."""
        found = np.zeros((n, len(OBSERVED)), np.float32)
        length = np.exp(random.normal(3.2, 1.0, n))
        found[:, 0], found[:, 1] = np.log1p(length), np.log1p(length * random.beta(5, 2, n))
        found[:, 2], found[:, 3] = random.beta(2, 5, n), random.beta(5, 2, n)
        found[:, 4:8] = random.gamma(2.0, 0.8, (n, 4))
        found[:, 8:10] = np.sort(random.beta(1, 3, (n, 2)), 1)
        found[:, 10:13] = random.beta(3, 2, (n, 3))
        found[:, 13:16] = random.random((n, 3))
        hour = random.random(n) * 2 * np.pi
        found[:, 16], found[:, 17], found[:, 18] = np.sin(hour), np.cos(hour), random.random(n) < 2 / 7
        found[:, 19:21] = random.normal(0, 1, (n, 2))
        found[:, 21] = random.random(n) < 0.9
        found[:, 19:21] *= found[:, 21:22]
        return found, found

    def best(self, observation_ND: np.ndarray) -> np.ndarray:
        """The oracle's actions, float64 [n, K]: short and long histories differ, and so do the fresh and the stale."""
        if self.twin:
            return np.zeros((len(observation_ND), len(self.actions)))
        x = observation_ND.astype(np.float64)
        short = np.tanh(1.2 * (self.length - x[:, 0]))
        stale = np.tanh(1.5 * (x[:, 4] - self.stale))
        found = self.drift * np.stack([0.8 * short * (1 - 0.7 * (k % 2)) - 0.5 * stale * short**2 for k in range(len(self.actions))], 1)
        return np.clip(found, -1.0, 1.0)

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        return self.value(cases, torch.as_tensor(np.asarray(action_NK, np.float64))).numpy()

    def value(self, cases: np.ndarray, action_NK: Tensor) -> Tensor:
        """As `pay`, for torch, so that a gradient can be had."""
        best = torch.from_numpy(self.best(cases))
        near = torch.exp(-(((action_NK - best) / self.width) ** 2).mean(1))
        none = torch.exp(-((best / self.width) ** 2).mean(1))
        found: Tensor = self.level + self.lead * (near - none)
        return found


class Outcomes:
    """Logged decisions, paid by propensity: the doubly robust estimate of what an action would have earned a logged request.

    For action a, q(x, a) + w (r - q(x, a_log)), where w is the density of the logged action around a, explored as the log did, over the
    logged one (Dudík, Langford and Li 2011; Kallus and Zhou 2018 smooth continuous actions by a kernel likewise). w is cut off at `most`.

    model : q, of observations [n, D] and actions [n, K], learned on other users than those who are paid
    """

    def __init__(self, log: Logged, actions: tuple[str, ...], model: Callable[[np.ndarray, np.ndarray], np.ndarray], most: float = 20.0) -> None:
        self.log, self._actions, self.model, self.most = log, actions, model, most
        self._residual = log.reward - model(log.observation, log.action)

    @property
    def actions(self) -> tuple[str, ...]:
        return self._actions

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Decisions at random; the cases are their places."""
        places = random.integers(0, len(self.log), n)
        return self.log.observation[places], places

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        log, action = self.log, np.asarray(action_NK, np.float32)
        w = np.exp(log_density(log.action[cases], action, log.sigma[cases, None]) - log.log_density[cases])
        found: np.ndarray = self.model(log.observation[cases], action) + np.minimum(w, self.most) * self._residual[cases]
        return found


def clicks(reward: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Outcomes 0 or 1 whose mean is the reward, as a log has them, float64 [n]."""
    return (random.random(len(reward)) < reward).astype(np.float64)
