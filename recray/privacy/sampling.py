"""Poisson sampling of users: each is in a step with the same probability, independently of the others.

Every rank draws its own users from new system randomness. A step may have no user.
"""

from __future__ import annotations

import numpy as np

from recray.privacy.noise import uniform


class PoissonUsers:
    """Draws from users rank, rank + world_size, rank + 2 world_size, … of `users`, step by step.

    Parameters
    ----------
    rate : probability of each user to be in a step
    entropy : seed of the generator; None: system randomness, which privacy requires
    """

    def __init__(
        self, users: int, rate: float, *, rank: int = 0, world_size: int = 1, entropy: int | None = None
    ) -> None:
        self.own_users = np.arange(rank, users, world_size)
        self.rate = rate
        self._draw = uniform if entropy is None else np.random.default_rng(entropy).random

    def draw(self) -> np.ndarray:
        """Users of the next step, int64 in ascending order; may be empty."""
        return self.own_users[self._draw(len(self.own_users)) < self.rate]
