"""What a learned policy has to be better than, on the same requests: no action, one action for all, rules, and bandits.

Each is a function from observations [N, D] to actions [N, K].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import qmc

from policies.rewards import Differentiable, Listed, Rewards
from recray.inference.policy import OBSERVED, Frozen

Act = Callable[[np.ndarray], np.ndarray]
GRID = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of a discrete arm along each control


def constant(action_K: np.ndarray) -> Act:
    """The same action for everybody."""
    return lambda observation: np.repeat(np.asarray(action_K, np.float32)[None], len(observation), 0)


def best_global(rewards: Rewards, requests: int, *, seed: int = 0) -> Act:
    """The best single action, by search: a Sobol sequence, then Powell's method from its best, always on the same requests."""
    _, cases = rewards.draw(requests, np.random.default_rng(seed))
    K = len(rewards.actions)

    def loss(action: np.ndarray) -> float:
        return -float(rewards.pay(cases, np.repeat(np.clip(action, -1, 1)[None], requests, 0)).mean())

    tried = np.concatenate([np.zeros((1, K)), qmc.scale(qmc.Sobol(K, seed=seed).random(16 * K), -1, 1)])
    first = min(tried, key=loss)
    found = minimize(loss, first, method="Powell", bounds=[(-1, 1)] * K, options={"maxfev": 60 * K, "xtol": 0.01, "ftol": 1e-6})
    return constant(found.x if found.fun < loss(first) else first)


def by_length(rewards: Rewards, requests: int, *, seed: int = 0) -> Act:
    """A closed form in the length of the history: clip(b + c (log(1 + n) - mean)) for each control, fitted by search."""
    observation, cases = rewards.draw(requests, np.random.default_rng(seed))
    column, K = OBSERVED.index("log_length"), len(rewards.actions)
    centre = float(observation[:, column].mean())

    def act(observation: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        x = observation[:, column, None] - centre
        return np.clip(chosen[:K] + chosen[K:] * x, -1, 1).astype(np.float32)

    def loss(chosen: np.ndarray) -> float:
        return -float(rewards.pay(cases, act(observation, chosen)).mean())

    tried = np.concatenate([np.zeros((1, 2 * K)), qmc.scale(qmc.Sobol(2 * K, seed=seed).random(32 * K), -1, 1)])
    first = min(tried, key=loss)
    found = minimize(loss, first, method="Powell", bounds=[(-1, 1)] * (2 * K), options={"maxfev": 120 * K, "xtol": 0.01, "ftol": 1e-6})
    best = found.x if found.fun < loss(first) else first
    return lambda observation: act(observation, best)


class Tabled:
    """Rewards whose few actions are each tried on every case once, and then looked up; for bandits over arms.

    The cases of `rewards` are places below its length.
    """

    def __init__(self, rewards: Listed) -> None:
        self.rewards, self.actions = rewards, rewards.actions
        self._paid: dict[bytes, np.ndarray] = {}

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.rewards.draw(n, random)

    def pay(self, cases: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
        found = np.zeros(len(cases))
        for action in np.unique(action_NK, axis=0):
            mine, everybody = (action_NK == action).all(1), np.arange(len(self.rewards))
            if action.tobytes() not in self._paid:
                self._paid[action.tobytes()] = self.rewards.pay(everybody, np.repeat(action[None], len(everybody), 0))
            found[mine] = self._paid[action.tobytes()][cases[mine]]
        return found


def by_gradient(rewards: Differentiable, frozen: Frozen, *, hidden: int = 0, steps: int = 400, at_once: int = 256, seed: int = 0) -> Act:
    """What gradients find: one action for all (`hidden` 0), or a network from the observation (a hyper-network of the attention)."""
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
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3 if hidden else 3e-2)
    for _ in range(steps):
        observation, cases = rewards.draw(at_once, random)
        action = net(torch.from_numpy(frozen.normalise(observation))).clamp(-1, 1).double()
        loss = -rewards.value(cases, action).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        found: np.ndarray = net(torch.from_numpy(frozen.normalise(observation))).clamp(-1, 1).numpy()
        return found

    return act


def bandit(
    rewards: Rewards, frozen: Frozen, decisions: int, *, thompson: bool, at_once: int = 256, alpha: float = 0.5, noise: float = 0.05, seed: int = 0
) -> Act:
    """A linear contextual bandit over discrete arms, each along one control: LinUCB (Li et al. 2010), or linear Thompson sampling
    (Agrawal and Goyal 2013). It learns by deciding, so many requests at once, and is then played greedily."""
    random = np.random.default_rng(seed)
    K, D = len(rewards.actions), len(OBSERVED) + 1
    arms = np.unique(np.concatenate([step * np.eye(K)[k][None] for k in range(K) for step in GRID]), axis=0)
    A = np.repeat(np.eye(D)[None], len(arms), 0)
    b = np.zeros((len(arms), D))

    def state(observation: np.ndarray) -> np.ndarray:
        return np.concatenate([frozen.normalise(observation), np.ones((len(observation), 1))], 1).astype(np.float64)

    for _ in range(0, decisions, at_once):
        observation, cases = rewards.draw(at_once, random)
        x, inverse = state(observation), np.linalg.inv(A)
        theta = np.einsum("mij,mj->mi", inverse, b)
        if thompson:
            root = np.linalg.cholesky(inverse + 1e-12 * np.eye(D))
            drawn = theta + noise * np.einsum("mij,mj->mi", root, random.standard_normal(theta.shape))
            score = x @ drawn.T
        else:
            score = x @ theta.T + alpha * noise * np.sqrt(np.einsum("ni,mij,nj->nm", x, inverse, x))
        chosen = score.argmax(1)
        paid = rewards.pay(cases, arms[chosen])
        for arm in np.unique(chosen):
            mine = chosen == arm
            A[arm] += x[mine].T @ x[mine]
            b[arm] += x[mine].T @ paid[mine]
    theta = np.einsum("mij,mj->mi", np.linalg.inv(A), b)

    def act(observation: np.ndarray) -> np.ndarray:
        found: np.ndarray = arms[(state(observation) @ theta.T).argmax(1)].astype(np.float32)
        return found

    return act
