"""Requests as an environment of gymnasium: each episode is one decision, many at once."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from policies.rewards import Compared, Rewards, Varied
from recray.inference.policy import OBSERVED, Frozen

RISE = 1.0  # of the price, a step, times what is lacking


class Decisions(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` requests at once: the observation is normalised by `frozen`, the action is clipped to [-1, 1], one step pays and ends.

    Rewards that are `Compared` pay what an action brings more than action 0 for the same request, which has a fraction of the variance.

    penalty : times the squared length of an action is taken from its reward, so that what gains nothing stays at 0
    floor : how varied lists have to be on the average (see `Varied`): what they lack is paid for at a price that grows until they are
        (a Lagrange multiplier by dual ascent); None: nothing is asked
    price : where that begins
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self, rewards: Rewards, frozen: Frozen, num_envs: int, *, penalty: float = 0.0, floor: float | None = None, price: float = 0.0, seed: int = 0
    ) -> None:
        self.num_envs, self.rewards, self.frozen, self.penalty = num_envs, rewards, frozen, penalty
        self.single_observation_space = gymnasium.spaces.Box(-5.0, 5.0, (len(OBSERVED),), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (len(rewards.actions),), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.floor = floor if isinstance(rewards, Varied) else None
        self.price = price
        self._random = np.random.default_rng(seed)
        self._cases: Any = None
        self._seen = np.zeros((num_envs, len(OBSERVED)), np.float32)
        self._over = True

    def _paid(self, action: np.ndarray) -> np.ndarray:
        paid = self._priced(action)
        return paid - self.rewards.nothing(self._cases) if isinstance(self.rewards, Compared) else paid

    def _priced(self, action: np.ndarray) -> np.ndarray:
        if self.floor is None or not isinstance(self.rewards, Varied):
            return self.rewards.pay(self._cases, action)
        reward, varied = self.rewards.outcome(self._cases, action)
        lacking = self.floor - varied
        self.price = max(0.0, self.price + RISE * float(lacking.mean()))
        return reward - self.price * lacking

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Other requests. `seed` is not heard: RLlib says the same one before every batch, which would be of the same requests then."""
        observation, self._cases = self.rewards.draw(self.num_envs, self._random)
        self._seen, self._over = self.frozen.normalise(observation), False
        return self._seen, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        never = np.zeros(self.num_envs, bool)
        if self._over:
            return self.reset()[0], np.zeros(self.num_envs, np.float32), never, never, {}
        action = np.clip(actions, -1.0, 1.0)
        reward = self._paid(action) - self.penalty * (action**2).sum(1)
        self._over = True
        return self._seen, reward.astype(np.float32), ~never, never, {}
