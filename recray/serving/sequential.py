"""Sequential test whether users of one variant are affected more often than its share explains. It may be
checked continuously.
"""

from __future__ import annotations

import math

import numpy as np
import xxhash

DAY_S = 86_400
ODDS = (2.0, 4.0)  # alternatives: odds ratio that an affected user is the challenger's
FIRST_DAY = 0.9  # share of the level; later days share the rest
MOST_USERS = 20_000  # affected users of a day; by then a difference is detected


class ShareTest:
    """Counts affected users, for example those with a failed or slow response.

    Users are assigned to variants at random. With equal variants, an affected user is therefore the
    challenger's with probability `share`, also during an overload or with a slow store, which affect users of
    both. A user counts once a day, so that a frequent user does not decide. The evidence of a day is the
    likelihood ratio of the counts, averaged over `ODDS`. With equal variants it is a non-negative martingale
    of mean 1, so it reaches 1 / level with probability `level` at most, at any time (Ville's inequality;
    Ramdas et al., arXiv 2210.01948). Every day has its own evidence and its own level.

    share : probability that a user is the challenger's
    level : probability of a significant result at any time, on any day, with equal variants
    """

    def __init__(self, share: float, level: float) -> None:
        self.level = level
        q = np.array(ODDS) * share / (1 - share + np.array(ODDS) * share)
        self._gain = np.log(q / share), np.log((1 - q) / (1 - share))
        self._day = 0
        self._users: set[int] = set()
        self._evidence = np.zeros(len(ODDS))
        self._was_affected = False

    def add_response(self, user: str, day: int, *, is_challenger: bool, affected: bool) -> None:
        """Count a response, so many days after the start."""
        if affected and not self._was_affected:
            self.count_user(user, day, is_challenger=is_challenger)
        self._was_affected = affected

    def count_user(self, user: str, day: int, *, is_challenger: bool) -> None:
        """Count an affected user, so many days after the start; if the clock goes back, on the last day."""
        if day > self._day:
            self._day = day
            self._users.clear()
            self._evidence[:] = 0.0
        code = xxhash.xxh64_intdigest(user.encode("utf-8", "surrogatepass"))
        if code in self._users or len(self._users) >= MOST_USERS:
            return
        self._users.add(code)
        self._evidence += self._gain[0 if is_challenger else 1]

    @property
    def is_significant(self) -> bool:
        """Whether significantly more of today's affected users are the challenger's."""
        level = self.level * (
            FIRST_DAY if self._day == 0 else (1 - FIRST_DAY) * 6 / (math.pi * self._day) ** 2
        )
        top = float(self._evidence.max())
        return top + math.log(float(np.exp(self._evidence - top).mean())) >= -math.log(level)
