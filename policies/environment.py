"""Requests as a vectorized gymnasium environment. Each episode is one decision."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from policies.rewards import BaselineRewards, DiversityRewards, Rewards
from recray.inference.policy import OBSERVED, ObservationNormalizer

PRICE_STEP = 1.0  # increase of the price in a step, times the missing diversity


class DecisionEnvironment(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` requests at once. The observation is normalised by `normalizer`, the action is clipped to
    [-1, 1]. One step pays the reward and ends the episode.

    `BaselineRewards` pay the difference to action 0 for the same request, which has much less variance.

    penalty : this times the squared length of the action is subtracted from the reward, so that an action
        without a gain stays at 0
    min_diversity : required mean diversity of the lists (see `DiversityRewards`); missing diversity is
        charged at a price that rises until the mean is reached (a Lagrange multiplier by dual ascent);
        None: not required
    price : initial price
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        rewards: Rewards,
        normalizer: ObservationNormalizer,
        num_envs: int,
        *,
        penalty: float = 0.0,
        min_diversity: float | None = None,
        price: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.num_envs, self.rewards, self.normalizer, self.penalty = num_envs, rewards, normalizer, penalty
        self.single_observation_space = gymnasium.spaces.Box(-5.0, 5.0, (len(OBSERVED),), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (len(rewards.actions),), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.min_diversity = min_diversity if isinstance(rewards, DiversityRewards) else None
        self.price = price
        self._random = np.random.default_rng(seed)
        self._cases: Any = None
        self._observation = np.zeros((num_envs, len(OBSERVED)), np.float32)
        self._over = True

    def _pay(self, action: np.ndarray) -> np.ndarray:
        paid = self._pay_less_price(action)
        if isinstance(self.rewards, BaselineRewards):
            result: np.ndarray = paid - self.rewards.pay_baseline(self._cases)
            return result
        return paid

    def _pay_less_price(self, action: np.ndarray) -> np.ndarray:
        """The rewards, less the price of missing diversity; updates the price."""
        if self.min_diversity is None or not isinstance(self.rewards, DiversityRewards):
            return self.rewards.pay(self._cases, action)
        reward, diversity = self.rewards.pay_with_diversity(self._cases, action)
        missing = self.min_diversity - diversity
        self.price = max(0.0, self.price + PRICE_STEP * float(missing.mean()))
        return reward - self.price * missing

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw new requests. `seed` is ignored: RLlib passes the same seed before every batch, which would
        repeat the same requests.
        """
        observation, self._cases = self.rewards.draw(self.num_envs, self._random)
        self._observation, self._over = self.normalizer.normalise(observation), False
        return self._observation, {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        never = np.zeros(self.num_envs, bool)
        if self._over:
            return self.reset()[0], np.zeros(self.num_envs, np.float32), never, never, {}
        action = np.clip(actions, -1.0, 1.0)
        reward = self._pay(action) - self.penalty * (action**2).sum(1)
        self._over = True
        return self._observation, reward.astype(np.float32), ~never, never, {}
