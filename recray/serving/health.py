"""Whether a challenger's responses fail, or take too long, compared with the champion's."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from recray.serving.sequential import ShareTest

ERRORS, ALONE, LATENCY = 0.025, 0.002, 0.005  # level of each test, over a whole experiment
FAILED = 0.01  # a challenger that fails by so much more of its responses, or less, stays
MOST_FAILED = 0.1  # of the challenger's responses, where the champion's would have been a nightly list
SLOWER = 1.5  # as does one whose quantiles are at most so many times the champion's
QUANTILES = (0.75, 0.95)
RECENT = 1000  # last responses of a variant
LEAST = 100  # responses of the champion, before latencies are compared
EVERY = 50  # responses of the champion, after which the limits are set anew


class ErrorTest:
    """Failed responses: of the model that did not respond in time or failed, and requests that were refused since too many waited.

    Where the champion has a nightly list for a request, its model is not asked, and there is nothing to compare with. There the challenger's
    failures are tested against `MOST_FAILED`: the first response to each user of a day.
    """

    def __init__(self, share: float) -> None:
        self._test, self._alone = ShareTest(share, ERRORS), ShareTest(MOST_FAILED, ALONE)
        self._recent = {True: Failures(), False: Failures()}
        self._recent_alone = Failures()

    def read(self, user: str, day: int, *, of_challenger: bool, failed: bool) -> None:
        """A response of a variant, where the other one would have asked its model too."""
        self._recent[of_challenger].append(failed)
        self._test.read(user, day, of_challenger=of_challenger, affected=failed)

    def read_alone(self, user: str, day: int, *, failed: bool) -> None:
        """A response of the challenger, where the champion would have had a nightly list."""
        self._recent_alone.append(failed)
        self._alone.count(user, day, of_challenger=failed)

    def reason(self) -> str | None:
        """What is wrong with the challenger, in words; None if nothing is."""
        champion = self._recent[False].share
        if self._test.is_significant and (share := self._recent[True].share) > champion + FAILED:
            return f"{share:.1%} of its responses failed, of the champion's {champion:.1%}"
        if self._alone.is_significant and (share := self._recent_alone.share) > max(MOST_FAILED, 2 * champion):
            return f"{share:.1%} of its responses failed where the champion has a nightly list, of the champion's own {champion:.1%}"
        return None


class Failures:
    """Which of the last responses failed."""

    def __init__(self) -> None:
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._failed = 0

    def append(self, failed: bool) -> None:
        if len(self._recent) == RECENT:
            self._failed -= self._recent[0]
        self._recent.append(failed)
        self._failed += failed

    @property
    def share(self) -> float:
        return self._failed / max(len(self._recent), 1)


class LatencyTest:
    """Slow responses: those above a quantile of the champion's recent ones, and those that failed.

    Were failures left out, an overload would leave the slow responses of the variant with the shorter queue alone.
    """

    def __init__(self, share: float) -> None:
        self._tests = [ShareTest(share, LATENCY / len(QUANTILES)) for _ in QUANTILES]
        self._recent: dict[bool, deque[float]] = {side: deque(maxlen=RECENT) for side in (True, False)}
        self._limits: list[float] | None = None
        self._waiting = LEAST

    def read(self, user: str, day: int, ms: float, *, of_challenger: bool) -> None:
        """A response of a variant, where the other one would have asked its model too; infinity for one that failed."""
        if self._limits is not None:
            for limit, test in zip(self._limits, self._tests, strict=True):
                test.read(user, day, of_challenger=of_challenger, affected=ms > limit)
        if math.isinf(ms):
            return
        self._recent[of_challenger].append(ms)
        self._waiting -= not of_challenger
        if not self._waiting:
            self._limits, self._waiting = np.quantile(np.array(self._recent[False]), QUANTILES).tolist(), EVERY

    def reason(self) -> str | None:
        """What is wrong with the challenger, in words; None if nothing is."""
        for quantile, test in zip(QUANTILES, self._tests, strict=True):
            if test.is_significant and self._recent[True]:
                challenger, champion = (float(np.quantile(np.array(self._recent[side]), quantile)) for side in (True, False))
                if challenger > SLOWER * champion:
                    return f"its {quantile:.0%} quantile of latency is {challenger:.0f} ms, the champion's {champion:.0f} ms"
        return None
