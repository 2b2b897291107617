"""Tests of a challenger's error rate and latency, compared with the champion's."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from recray.serving.sequential import ShareTest

ERROR_LEVEL, UNPAIRED_ERROR_LEVEL, LATENCY_LEVEL = (
    0.025,
    0.002,
    0.005,
)  # level of each test, over a whole experiment
FAILED = 0.01  # tolerated difference of the error rates
MOST_FAILED = 0.1  # tolerated error rate where the champion serves batch recommendations
SLOWER = 1.5  # tolerated ratio of the latency quantiles
QUANTILES = (0.75, 0.95)
RECENT = 1000  # last responses of a variant
LEAST = 100  # responses of the champion before latencies are compared
EVERY = 50  # responses of the champion after which the limits are updated


class ErrorTest:
    """Test of failed responses: the model failed or timed out, or its full queue refused the request.

    Where the champion serves batch recommendations, its model does not run, and there is no pair to compare.
    There the challenger's failures are tested against `MOST_FAILED`, with the first response to each user of
    a day.
    """

    def __init__(self, share: float) -> None:
        self._test, self._unpaired_test = (
            ShareTest(share, ERROR_LEVEL),
            ShareTest(MOST_FAILED, UNPAIRED_ERROR_LEVEL),
        )
        self._recent = {True: Failures(), False: Failures()}
        self._recent_unpaired = Failures()

    def add_response(self, user: str, day: int, *, is_challenger: bool, failed: bool) -> None:
        """Count a response of a variant where the other one would have run its model too."""
        self._recent[is_challenger].append(failed)
        self._test.add_response(user, day, is_challenger=is_challenger, affected=failed)

    def add_unpaired_response(self, user: str, day: int, *, failed: bool) -> None:
        """Count a response of the challenger where the champion would have served batch recommendations."""
        self._recent_unpaired.append(failed)
        self._unpaired_test.count_user(user, day, is_challenger=failed)

    def find_failure(self) -> str | None:
        """Why the challenger fails the test, as text; None if it passes."""
        champion = self._recent[False].share
        if self._test.is_significant and (share := self._recent[True].share) > champion + FAILED:
            return f"{share:.1%} of its responses failed, of the champion's {champion:.1%}"
        if self._unpaired_test.is_significant and (share := self._recent_unpaired.share) > max(
            MOST_FAILED, 2 * champion
        ):
            return (
                f"{share:.1%} of its responses failed where the champion serves batch recommendations, of "
                f"the champion's own {champion:.1%}"
            )
        return None


class Failures:
    """Failures among the last responses."""

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
        """Error rate of the last responses."""
        return self._failed / max(len(self._recent), 1)


class LatencyTest:
    """Test of slow responses: those above a quantile of the champion's recent ones, and failed ones.

    Failures count because an overload would otherwise leave only the slow responses of the variant with the
    shorter queue.
    """

    def __init__(self, share: float) -> None:
        self._tests = [ShareTest(share, LATENCY_LEVEL / len(QUANTILES)) for _ in QUANTILES]
        self._recent: dict[bool, deque[float]] = {
            is_challenger: deque(maxlen=RECENT) for is_challenger in (True, False)
        }
        self._limits: list[float] | None = None
        self._countdown = LEAST  # responses of the champion until the limits are updated

    def add_response(self, user: str, day: int, ms: float, *, is_challenger: bool) -> None:
        """Count a response where the other variant would have run its model too; infinite `ms`: it failed."""
        if self._limits is not None:
            for limit, test in zip(self._limits, self._tests, strict=True):
                test.add_response(user, day, is_challenger=is_challenger, affected=ms > limit)
        if math.isinf(ms):
            return
        self._recent[is_challenger].append(ms)
        self._countdown -= not is_challenger
        if not self._countdown:
            self._limits, self._countdown = (
                np.quantile(np.array(self._recent[False]), QUANTILES).tolist(),
                EVERY,
            )

    def find_failure(self) -> str | None:
        """Why the challenger fails the test, as text; None if it passes."""
        for quantile, test in zip(QUANTILES, self._tests, strict=True):
            if test.is_significant and self._recent[True]:
                challenger, champion = (
                    float(np.quantile(np.array(self._recent[is_challenger]), quantile))
                    for is_challenger in (True, False)
                )
                if challenger > SLOWER * champion:
                    return (
                        f"its {quantile:.0%} quantile of latency is {challenger:.0f} ms, the champion's "
                        f"{champion:.0f} ms"
                    )
        return None
