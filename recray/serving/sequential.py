"""Evidence that users of one variant are affected more often than its share of the users explains, valid however often it is looked at."""

from __future__ import annotations

import math

import numpy as np
import xxhash

DAY_S = 86_400
ODDS = (2.0, 4.0)  # alternatives: how many times likelier it is that an affected user is the challenger's
FIRST_DAY = 0.9  # of the level; the days after it share the rest
MOST_USERS = 20_000  # affected users of a day; a difference that shows by then was found


class ShareTest:
    """Counts affected users: those with a failed response, say, or with a slow one.

    Users are assigned to variants at random. Where the variants are alike, an affected user is therefore the challenger's with probability
    `share`, whatever else goes on at that moment: an overload, or a store that is slow, affects users of both. A user counts once a day, so
    that one who comes often decides nothing. The evidence of a day is the likelihood ratio of the counts, averaged over `ODDS`. It is a
    non-negative martingale of mean 1 where the variants are alike, so that it reaches 1 / level with probability `level` at most, at any time
    (Ville's inequality; Ramdas et al., arXiv 2210.01948). Every day has evidence of its own, and a level of its own.

    share : probability that a user is the challenger's
    level : of being significant at any time, on any day, where variants are alike
    """

    def __init__(self, share: float, level: float) -> None:
        self.level = level
        q = np.array(ODDS) * share / (1 - share + np.array(ODDS) * share)
        self._gain = np.log(q / share), np.log((1 - q) / (1 - share))
        self._day = 0
        self._users: set[int] = set()
        self._evidence = np.zeros(len(ODDS))
        self._was_affected = False

    def read(self, user: str, day: int, *, of_challenger: bool, affected: bool) -> None:
        """A response, so many days after the beginning."""
        if affected and not self._was_affected:
            self.count(user, day, of_challenger=of_challenger)
        self._was_affected = affected

    def count(self, user: str, day: int, *, of_challenger: bool) -> None:
        """A user was affected, so many days after the beginning; a clock that went back counts as the last day."""
        if day > self._day:
            self._day = day
            self._users.clear()
            self._evidence[:] = 0.0
        code = xxhash.xxh64_intdigest(user.encode("utf-8", "surrogatepass"))
        if code in self._users or len(self._users) >= MOST_USERS:
            return
        self._users.add(code)
        self._evidence += self._gain[0 if of_challenger else 1]

    @property
    def is_significant(self) -> bool:
        """Whether more of today's affected users are the challenger's than chance explains."""
        level = self.level * (FIRST_DAY if self._day == 0 else (1 - FIRST_DAY) * 6 / (math.pi * self._day) ** 2)
        top = float(self._evidence.max())
        return top + math.log(float(np.exp(self._evidence - top).mean())) >= -math.log(level)
