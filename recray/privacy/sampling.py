"""Poisson sampling of users: each is in a step with the same chance, whatever the others are.

Every rank draws for users of its own, from fresh randomness of the system. Steps without a user are steps too.
"""

from __future__ import annotations

import numpy as np

from recray.privacy.noise import uniform


class PoissonUsers:
    """Users rank, rank + world, rank + 2 world, … of `users`, drawn for one step after the other.

    Parameters
    ----------
    rate : chance of each user to be in a step
    entropy : seeds the generator; None: the system's randomness, as privacy needs it
    """

    def __init__(self, users: int, rate: float, *, rank: int = 0, world: int = 1, entropy: int | None = None) -> None:
        self.mine = np.arange(rank, users, world)
        self.rate = rate
        self._draw = uniform if entropy is None else np.random.default_rng(entropy).random

    def draw(self) -> np.ndarray:
        """Users of the next step, ascending, int64; there may be none."""
        found: np.ndarray = self.mine[self._draw(len(self.mine)) < self.rate]
        return found
