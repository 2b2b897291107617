"""A challenger on trial: whom it answers, and when it has failed.

Users are drawn by a hash of the challenger and the user, so that one keeps to a side for the whole trial and the next trial draws anew.
A trial ends by itself where the challenger's answers fail or take too long, as each replica sees its own, or where its outcomes are
worse for sure, as the log has them all. Nothing but `ended` decides; the flip is `recray.promotion.end_trial`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xxhash
from scipy.special import ndtri

from recray.state.log import Entry

SEEN = 500  # last answers of a side
LEAST = 50  # answers before anything is judged
LEAST_FAILED = 5
FAILED = 0.02  # more failures than the champion's, share of answers
SLOWER = 3.0  # times the champion's 95th percentile
LEAST_USERS = 100  # of the challenger, before outcomes are judged
ALPHA = 0.05  # of ending, and as much of winning, by outcomes, over the whole trial; half of each for each of two bounds
RHO = 0.1  # where the first is tightest: after about 2 log(1 / ALPHA) / RHO² users
PLANNED = 5_000  # answers of the challenger until which the second has to tell
SECOND = float(ndtri(1.0 - ALPHA / 4))  # standard errors at the end of the plan
REMEMBERED = 200_000  # decisions that outcomes may still come for


def answers(user: str, challenger: str, share: float) -> bool:
    """Whether a challenger answers a user at this share."""
    return float(xxhash.xxh64_intdigest(f"{challenger}\0{user}".encode())) / 2.0**64 < share


@dataclass
class Side:
    """What one replica saw of its champion's or challenger's answers by the model: seconds, and whether they failed."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SEEN))
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=SEEN))

    def saw(self, seconds: float, *, failed: bool) -> None:
        self.seconds.append(seconds)
        self.failed.append(failed)

    @property
    def failures(self) -> float:
        return sum(self.failed) / max(len(self.failed), 1)

    @property
    def p95_s(self) -> float:
        return float(np.quantile(np.array(self.seconds), 0.95)) if self.seconds else 0.0


@dataclass
class Trial:
    """The trial of a challenger (its run key) at a share of the users, or as a shadow, whose answers nobody sees.

    since_s : when it began; decisions of before are of another trial
    counted : whose outcomes it is judged by
    """

    challenger: str
    share: float
    shadow: bool
    since_s: float = 0.0
    counted: Callable[[str], bool] = lambda user: True
    champion_side: Side = field(default_factory=Side)
    challenger_side: Side = field(default_factory=Side)
    outcomes: Outcomes = field(init=False)

    def __post_init__(self) -> None:
        self.outcomes = Outcomes(self.challenger, self.share, self.since_s, self.counted)

    def answers(self, user: str | None) -> bool:
        """Whether the challenger answers this user."""
        return user is not None and not self.shadow and answers(user, self.challenger, self.share)

    def ended(self) -> str | None:
        """Why the trial has to end; None if it may go on."""
        mine, theirs = self.challenger_side, self.champion_side
        if len(mine.failed) >= LEAST and sum(mine.failed) >= LEAST_FAILED and mine.failures > theirs.failures + FAILED:
            return f"{mine.failures:.0%} of its answers failed, of the champion's {theirs.failures:.0%}"
        if len(mine.seconds) >= LEAST and len(theirs.seconds) >= LEAST and mine.p95_s > SLOWER * theirs.p95_s:
            return f"its 95th percentile is {1000 * mine.p95_s:.0f} ms, the champion's {1000 * theirs.p95_s:.0f} ms"
        difference, bound = self.outcomes.difference()
        if self.outcomes.users[True] >= LEAST_USERS and difference + bound < 0:
            return f"its outcomes are worth {difference:+.4f} an answer against the champion's, at most {difference + bound:+.4f}"
        return None

    def won(self) -> bool:
        """Whether the challenger's outcomes are better for sure."""
        difference, bound = self.outcomes.difference()
        return self.outcomes.users[True] >= LEAST_USERS and difference - bound > 0


class Outcomes:
    """Outcomes of both sides, read from the log, and the anytime-valid bound of their difference.

    Users are drawn, so users are counted: each has the sum over its answers of outcomes less the mean of all answers, over the probability of
    its side, negative for the champion; their sum over all answers is the difference of the sides' means an answer (Horvitz and Thompson, and
    the linearised ratio), whose spread knows nothing of how often users come. Two bounds of it may be looked at after every answer, and the
    closer one counts: the asymptotic confidence sequence of Waudby-Smith et al. (arXiv 2103.06476, equation 4), which finds what is much worse
    early and has no end, and, for `PLANNED` answers of the challenger, one that the sum of all differences passes wrongly as often as twice its
    end does (the reflection principle of Brownian motion), which finds a tenth. Together they are passed wrongly on a given side, in the whole
    trial, with probability `ALPHA` at most. The variance is at least the one that equal sides would have, since a side of few users may have
    none to show yet.
    """

    def __init__(self, challenger: str, share: float, since_s: float = 0.0, counted: Callable[[str], bool] = lambda user: True) -> None:
        self.challenger, self.share, self.since_s, self.counted = challenger, share, since_s, counted
        self.users = {True: 0, False: 0}  # of the challenger, of the champion
        self._users: dict[str, tuple[int, float]] = {}  # answers and outcomes of each
        self._whose: dict[str, tuple[str, bool]] = {}  # by request: the user, and whether the challenger answered
        self._early: set[str] = set()
        self._sums = {side: np.zeros(5) for side in (True, False)}  # over a side's users: answers n, outcomes y, nn, ny, yy

    def read(self, entry: Entry) -> None:
        """Take in an entry of the log."""
        body = entry.body
        if entry.kind == "decision" and entry.user is not None and (body.get("trial"), body.get("share")) == (self.challenger, self.share):
            if body["arm"] not in ("challenger", "champion") or entry.at_s < self.since_s or not self.counted(entry.user):
                return
            mine = body["arm"] == "challenger"
            if entry.user not in self._users:
                self._users[entry.user] = 0, 0.0
                self.users[mine] += 1
            self._add(entry.user, mine, 1, 0.0)
            self._whose[entry.key] = (entry.user, mine)
            if len(self._whose) > REMEMBERED:
                del self._whose[next(iter(self._whose))]
        elif entry.kind in ("outcome", "set_aside") and body["request_id"] in self._whose and entry.key not in self._early:
            if entry.kind == "set_aside":  # by a replica that did not know its decision yet; it may be told again
                self._early.add(entry.key)
            self._add(*self._whose[body["request_id"]], 0, float(body["value"]))

    def _add(self, user: str, mine: bool, answers: int, value: float) -> None:
        n, y = self._users[user]
        self._users[user] = n + answers, y + value
        self._sums[mine] += _products(n + answers, y + value) - _products(n, y)

    def difference(self) -> tuple[float, float]:
        """The challenger's mean outcome an answer less the champion's, and how far the truth may be from it."""
        n = sum(self.users.values())
        if not 0 < self.share < 1 or n < 2:
            return 0.0, math.inf
        answers, outcomes = (self._sums[True] + self._sums[False])[:2]
        middle = outcomes / answers
        sums = {side: found[1] - middle * found[0] for side, found in self._sums.items()}
        squares = {side: found[4] - 2 * middle * found[3] + middle**2 * found[2] for side, found in self._sums.items()}
        p, q, often = self.share, 1.0 - self.share, answers / n
        mean = (sums[True] / p - sums[False] / q) / n
        seen = (squares[True] / p**2 + squares[False] / q**2) / n - mean * mean
        alike = (squares[True] + squares[False]) / n * (1 / p + 1 / q)
        variance = max(seen, alike)
        inside, planned = n * RHO * RHO + 1.0, PLANNED / p / often  # users by then, who come as often
        bound = math.sqrt(variance * 2.0 * inside / (n * n * RHO * RHO) * math.log(math.sqrt(inside) / ALPHA))
        if n <= planned:
            bound = min(bound, SECOND * math.sqrt(variance * planned) / n)
        return float(mean / often), float(bound / often)


def _products(n: int, y: float) -> np.ndarray:
    return np.array([n, y, n * n, n * y, y * y])
