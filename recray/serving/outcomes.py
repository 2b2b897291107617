"""Whether a challenger's outcomes are worth more or less than the champion's, by a bound that may be looked at all the time."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from scipy.special import ndtri

from recray.state.rewards import Credits, Rewards

LEAST_USERS = 100  # of the challenger, before outcomes are judged
WORSE, BETTER = 0.008, 0.05  # level of either, over a whole experiment
RHO = 0.1  # where the first bound is tightest: after about 2 log(1 / level) / RHO² users
PLANNED = 5_000  # responses of the challenger until which the second has to tell
ROUNDING = 1e-12  # of squares, in sums of doubles


class OutcomeTest:
    """Outcomes of both variants, and the anytime-valid bound of their difference.

    Users are assigned, so users are counted: each has the sum over its responses of the reward less the mean of all responses, over the
    probability of its variant, negative for the champion; their sum over all responses is the difference of the variants' means a response
    (Horvitz and Thompson, and the linearised ratio), whose spread knows nothing of how often users come. Two bounds of it may be looked at
    after every response, and the closer one counts: the asymptotic confidence sequence of Waudby-Smith et al. (arXiv 2103.06476, equation 4),
    which finds what is much worse early and has no end, and, for `PLANNED` responses of the challenger, one that the sum of all differences
    passes wrongly as often as twice its end does (the reflection principle of Brownian motion), which finds a tenth. Each has half of the
    level of one side. The variance is at least the one that equal variants would have, since one of few users may have none to show yet.
    """

    def __init__(self, share: float, rewards: Rewards) -> None:
        self.share = share
        self.users = {True: 0, False: 0}  # of the challenger, of the champion
        self._credits = Credits(rewards)
        self._users: dict[str, tuple[int, float]] = {}  # responses and rewards of each
        self._whose: dict[str, tuple[str, bool]] = {}  # by request: the user, and whether the challenger responded
        self._sums = {side: [0.0] * 5 for side in (True, False)}  # over a variant's users: responses n, rewards y, nn, ny, yy

    def add_response(self, request_id: str, user: str, items: list[Any], *, of_challenger: bool) -> None:
        if user not in self._users:
            self._users[user] = 0, 0.0
            self.users[of_challenger] += 1
        self._whose[request_id] = user, of_challenger
        early = self._credits.add_response(request_id, items)
        if len(self._whose) > (self._credits.limit or math.inf):
            del self._whose[next(iter(self._whose))]
        self._add(user, of_challenger, 1, early)

    def add_outcome(self, request_id: str, outcome: str, item_id: Any, value: float) -> None:
        reward = self._credits.add_outcome(request_id, outcome, item_id, value)
        if reward and request_id in self._whose:
            self._add(*self._whose[request_id], 0, reward)

    def _add(self, user: str, of_challenger: bool, responses: int, reward: float) -> None:
        n, y = self._users[user]
        self._users[user] = more_n, more_y = n + responses, y + reward
        sums = self._sums[of_challenger]
        sums[0] += responses
        sums[1] += reward
        sums[2] += more_n * more_n - n * n
        sums[3] += more_n * more_y - n * y
        sums[4] += more_y * more_y - y * y

    def difference(self, level: float) -> tuple[float, float]:
        """The challenger's mean reward a response less the champion's, and how far the truth may be from it.

        level : of either side of the bound being passed wrongly
        """
        n = sum(self.users.values())
        if not 0 < self.share < 1 or n < 2:
            return 0.0, math.inf
        responses, rewards, *_, squared = (sum(pair) for pair in zip(self._sums[True], self._sums[False], strict=True))
        middle = rewards / responses
        sums = {side: found[1] - middle * found[0] for side, found in self._sums.items()}
        squares = {side: found[4] - 2 * middle * found[3] + middle**2 * found[2] for side, found in self._sums.items()}
        p, q, often = self.share, 1.0 - self.share, responses / n
        mean = (sums[True] / p - sums[False] / q) / n
        seen = (squares[True] / p**2 + squares[False] / q**2) / n - mean * mean
        alike = (squares[True] + squares[False]) / n * (1 / p + 1 / q)
        variance = max(seen, alike, ROUNDING * squared / n * (1 / p + 1 / q))
        inside, planned = n * RHO * RHO + 1.0, PLANNED / p / often  # users by then, who come as often
        bound = math.sqrt(variance * 2.0 * inside / (n * n * RHO * RHO) * math.log(math.sqrt(inside) / level))
        if n <= planned:
            bound = min(bound, _upper_quantile(level / 4) * math.sqrt(variance * planned) / n)
        return float(mean / often), float(bound / often)

    def reason(self) -> str | None:
        """What is wrong with the challenger, in words; None if nothing is."""
        difference, bound = self.difference(WORSE)
        if self.users[True] >= LEAST_USERS and difference + bound < 0:
            return f"its outcomes are worth {difference:+.4f} a response compared with the champion's, at most {difference + bound:+.4f}"
        return None

    def is_better(self) -> bool:
        """Whether the challenger's outcomes are significantly better."""
        difference, bound = self.difference(BETTER)
        return self.users[True] >= LEAST_USERS and difference - bound > 0


@cache
def _upper_quantile(level: float) -> float:
    """Of the standard normal distribution."""
    return -float(ndtri(level))
