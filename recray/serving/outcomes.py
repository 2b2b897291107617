"""Test of a challenger's rewards against the champion's, by a bound that may be checked continuously."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from scipy.special import ndtri

from recray.events.rewards import Credits, Rewards

LEAST_USERS = 100  # of the challenger, before outcomes are tested
LOSS_LEVEL, GAIN_LEVEL = 0.008, 0.05  # levels, over a whole experiment
RHO = 0.1  # makes the first bound tightest after about 2 log(1 / level) / RHO² users
PLANNED = 5_000  # responses of the challenger for which the second bound is planned
ROUNDING = 1e-12  # relative error of sums of squares


class OutcomeTest:
    """Outcomes of both variants, and an anytime-valid bound of the difference of their rewards.

    Users are assigned, so the unit is the user: the sum, over the user's responses, of the reward less the
    mean of all responses, divided by the probability of the variant; negative for the champion. The sum over
    users, divided by the number of responses, estimates the difference of the variants' mean reward per
    response (Horvitz and Thompson, with the linearised ratio). Its variance accounts for frequent users.

    Two bounds may be checked after every response, and the tighter one counts. The asymptotic confidence
    sequence of Waudby-Smith et al. (arXiv 2103.06476, equation 4) detects large losses early and has no end.
    The second one covers `PLANNED` responses of the challenger, by the reflection principle of Brownian
    motion, and detects a loss of a tenth. Each has half of the level of one side. The variance is at least
    that of equal variants, because a variant with few users may show none yet.
    """

    def __init__(self, share: float, rewards: Rewards) -> None:
        self.share = share
        self.users = {True: 0, False: 0}  # of the challenger, of the champion
        self._credits = Credits(rewards)
        self._users: dict[str, tuple[int, float]] = {}  # responses and rewards of each
        # by request: the user, and whether the challenger responded
        self._responses: dict[str, tuple[str, bool]] = {}
        # over a variant's users: responses n, rewards y, nn, ny, yy
        self._sums = {is_challenger: [0.0] * 5 for is_challenger in (True, False)}

    def add_response(self, request_id: str, user: str, items: list[Any], *, is_challenger: bool) -> None:
        """Count a response with its items."""
        if user not in self._users:
            self._users[user] = 0, 0.0
            self.users[is_challenger] += 1
        self._responses[request_id] = user, is_challenger
        reward = self._credits.add_response(request_id, items)  # of outcomes that came before
        if len(self._responses) > (self._credits.limit or math.inf):
            del self._responses[next(iter(self._responses))]
        self._add(user, is_challenger, 1, reward)

    def add_outcome(self, request_id: str, outcome: str, item_id: Any, value: float) -> None:
        """Count an outcome of a response."""
        reward = self._credits.add_outcome(request_id, outcome, item_id, value)
        if reward and request_id in self._responses:
            self._add(*self._responses[request_id], 0, reward)

    def _add(self, user: str, is_challenger: bool, responses: int, reward: float) -> None:
        n, y = self._users[user]
        self._users[user] = new_n, new_y = n + responses, y + reward
        sums = self._sums[is_challenger]
        sums[0] += responses
        sums[1] += reward
        sums[2] += new_n * new_n - n * n
        sums[3] += new_n * new_y - n * y
        sums[4] += new_y * new_y - y * y

    def estimate_difference(self, level: float) -> tuple[float, float]:
        """The challenger's mean reward per response less the champion's, and half the width of its interval.

        level : error probability of each side
        """
        n = sum(self.users.values())
        if not 0 < self.share < 1 or n < 2:
            return 0.0, math.inf
        responses, rewards, *_, squared = (
            sum(pair) for pair in zip(self._sums[True], self._sums[False], strict=True)
        )
        mean_reward = rewards / responses
        sums = {variant: totals[1] - mean_reward * totals[0] for variant, totals in self._sums.items()}
        squares = {
            variant: totals[4] - 2 * mean_reward * totals[3] + mean_reward**2 * totals[2]
            for variant, totals in self._sums.items()
        }

        p, q, frequency = self.share, 1.0 - self.share, responses / n
        mean = (sums[True] / p - sums[False] / q) / n
        observed = (squares[True] / p**2 + squares[False] / q**2) / n - mean * mean
        equal = (squares[True] + squares[False]) / n * (1 / p + 1 / q)
        variance = max(observed, equal, ROUNDING * squared / n * (1 / p + 1 / q))

        inside, planned = n * RHO * RHO + 1.0, PLANNED / p / frequency  # users at the same frequency
        bound = math.sqrt(variance * 2.0 * inside / (n * n * RHO * RHO) * math.log(math.sqrt(inside) / level))
        if n <= planned:
            bound = min(bound, _upper_quantile(level / 4) * math.sqrt(variance * planned) / n)
        return float(mean / frequency), float(bound / frequency)

    def find_failure(self) -> str | None:
        """Why the challenger fails the test, as text; None if it passes."""
        difference, bound = self.estimate_difference(LOSS_LEVEL)
        if self.users[True] >= LEAST_USERS and difference + bound < 0:
            return (
                f"its outcomes are worth {difference:+.4f} a response compared with the champion's, at "
                f"most {difference + bound:+.4f}"
            )
        return None

    def is_better(self) -> bool:
        """Whether the challenger's outcomes are significantly better."""
        difference, bound = self.estimate_difference(GAIN_LEVEL)
        return self.users[True] >= LEAST_USERS and difference - bound > 0


@cache
def _upper_quantile(level: float) -> float:
    """Upper quantile of the standard normal distribution."""
    return -float(ndtri(level))
