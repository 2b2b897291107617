"""Baselines of a learned policy on the same requests: one action for all, a closed form, gradients, and
bandits.

Each is a function from observations [N, D] to actions [N, K].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import qmc

from policies.rewards import DifferentiableRewards, IndexedRewards, Rewards
from recray.inference.policy import OBSERVED, ObservationNormalizer

Act = Callable[[np.ndarray], np.ndarray]
GRID = (-1.0, -0.5, 0.0, 0.5, 1.0)  # candidate actions along each control


def repeat_action(action_K: np.ndarray) -> Act:
    """The same action for everybody."""
    return lambda observation: np.repeat(np.asarray(action_K, np.float32)[None], len(observation), 0)


def search_constant(rewards: Rewards, requests: int, *, seed: int = 0) -> Act:
    """The best single action by search: a Sobol sequence, then Powell's method from its best point, always on
    the same requests.
    """
    _, cases = rewards.draw(requests, np.random.default_rng(seed))
    K = len(rewards.actions)

    def loss(action: np.ndarray) -> float:
        return -float(rewards.pay(cases, np.repeat(np.clip(action, -1, 1)[None], requests, 0)).mean())

    candidates = np.concatenate([np.zeros((1, K)), qmc.scale(qmc.Sobol(K, seed=seed).random(16 * K), -1, 1)])
    first = min(candidates, key=loss)
    optimum = minimize(
        loss,
        first,
        method="Powell",
        bounds=[(-1, 1)] * K,
        options={"maxfev": 60 * K, "xtol": 0.01, "ftol": 1e-6},
    )
    return repeat_action(optimum.x if optimum.fun < loss(first) else first)


def fit_by_length(rewards: Rewards, requests: int, *, seed: int = 0) -> Act:
    """A function of the length of the history: clip(b + c (log(1 + n) - mean)) for each control, fitted by
    search.
    """
    observation, cases = rewards.draw(requests, np.random.default_rng(seed))
    column, K = OBSERVED.index("log_length"), len(rewards.actions)
    centre = float(observation[:, column].mean())

    def act(observation: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        x = observation[:, column, None] - centre
        return np.clip(coefficients[:K] + coefficients[K:] * x, -1, 1).astype(np.float32)

    def loss(coefficients: np.ndarray) -> float:
        return -float(rewards.pay(cases, act(observation, coefficients)).mean())

    candidates = np.concatenate(
        [np.zeros((1, 2 * K)), qmc.scale(qmc.Sobol(2 * K, seed=seed).random(32 * K), -1, 1)]
    )
    first = min(candidates, key=loss)
    optimum = minimize(
        loss,
        first,
        method="Powell",
        bounds=[(-1, 1)] * (2 * K),
        options={"maxfev": 120 * K, "xtol": 0.01, "ftol": 1e-6},
    )
    best = optimum.x if optimum.fun < loss(first) else first
    return lambda observation: act(observation, best)


class TabulatedRewards:
    """Rewards of a few candidate actions. Each action is evaluated once on every case and then looked up; for
    bandits.

    The cases of `rewards` are indices.
    """

    def __init__(self, rewards: IndexedRewards) -> None:
        self.rewards, self.actions = rewards, rewards.actions
        self._table: dict[bytes, np.ndarray] = {}

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.rewards.draw(n, random)

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        paid = np.zeros(len(cases))
        for action in np.unique(action_NK, axis=0):
            rows, all_cases = (action_NK == action).all(1), np.arange(len(self.rewards))
            if action.tobytes() not in self._table:
                self._table[action.tobytes()] = self.rewards.pay(
                    all_cases, np.repeat(action[None], len(all_cases), 0)
                )
            paid[rows] = self._table[action.tobytes()][cases[rows]]
        return paid


def fit_by_gradient(
    rewards: DifferentiableRewards,
    normalizer: ObservationNormalizer,
    *,
    hidden: int = 0,
    steps: int = 400,
    at_once: int = 256,
    seed: int = 0,
) -> Act:
    """Fitted by gradient descent: one action for all (`hidden` 0), or a network from the observation (a
    hyper-network of the attention).
    """
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    K, D = len(rewards.actions), len(OBSERVED)
    net: torch.nn.Module
    if hidden:
        layers = [torch.nn.Linear(a, b) for a, b in ((D, hidden), (hidden, hidden), (hidden, K))]
        net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    else:
        net = torch.nn.Linear(D, K)
        torch.nn.init.zeros_(net.weight)
        torch.nn.init.zeros_(net.bias)
        net.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(
        [parameter for parameter in net.parameters() if parameter.requires_grad], lr=3e-3 if hidden else 3e-2
    )

    for _ in range(steps):
        observation, cases = rewards.draw(at_once, random)
        action = net(torch.from_numpy(normalizer.normalise(observation))).clamp(-1, 1).double()
        loss = -rewards.value(cases, action).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        result: np.ndarray = net(torch.from_numpy(normalizer.normalise(observation))).clamp(-1, 1).numpy()
        return result

    return act


def fit_bandit(
    rewards: Rewards,
    normalizer: ObservationNormalizer,
    decisions: int,
    *,
    thompson: bool,
    at_once: int = 256,
    alpha: float = 0.5,
    noise: float = 0.05,
    seed: int = 0,
) -> Act:
    """A linear contextual bandit over discrete candidate actions, each along one control: LinUCB (Li et al.
    2010), or linear Thompson sampling (Agrawal and Goyal 2013). It learns from `decisions` decisions,
    `at_once` at a time, and then acts greedily.
    """
    random = np.random.default_rng(seed)
    K, D = len(rewards.actions), len(OBSERVED) + 1
    candidates = np.unique(
        np.concatenate([step * np.eye(K)[k][None] for k in range(K) for step in GRID]), axis=0
    )
    A = np.repeat(np.eye(D)[None], len(candidates), 0)
    b = np.zeros((len(candidates), D))

    def to_state(observation: np.ndarray) -> np.ndarray:
        return np.concatenate([normalizer.normalise(observation), np.ones((len(observation), 1))], 1).astype(
            np.float64
        )

    for _ in range(0, decisions, at_once):
        observation, cases = rewards.draw(at_once, random)
        x, inverse = to_state(observation), np.linalg.inv(A)
        theta = np.einsum("mij,mj->mi", inverse, b)
        if thompson:
            root = np.linalg.cholesky(inverse + 1e-12 * np.eye(D))
            drawn = theta + noise * np.einsum("mij,mj->mi", root, random.standard_normal(theta.shape))
            score = x @ drawn.T
        else:
            score = x @ theta.T + alpha * noise * np.sqrt(np.einsum("ni,mij,nj->nm", x, inverse, x))
        selected = score.argmax(1)
        paid = rewards.pay(cases, candidates[selected])
        for index in np.unique(selected):
            rows = selected == index
            A[index] += x[rows].T @ x[rows]
            b[index] += x[rows].T @ paid[rows]
    theta = np.einsum("mij,mj->mi", np.linalg.inv(A), b)

    def act(observation: np.ndarray) -> np.ndarray:
        result: np.ndarray = candidates[(to_state(observation) @ theta.T).argmax(1)].astype(np.float32)
        return result

    return act
