"""`recray adapt --follow`: adapts the policy whenever enough outcomes are complete, until it is stopped.

All its state is in the workspace, so a restarted follower resumes. Serving does not depend on it: the
previous policy decides until another one passes its criteria.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from recray.config import Settings
from recray.errors import RecrayError, RefusedError
from recray.stages import JobResult, ProgressLog
from recray.storage import Storage, lease, read_json, write_json

if TYPE_CHECKING:
    from recray.inference.policy import PolicyAbout

CHECKS_PER_WINDOW = 6  # in an attribution window
MIN_WAIT_S, MAX_WAIT_S = 2.0, 60.0  # between two checks


@dataclass
class FollowerStatus:
    """Status of a follower, as written to `follow.json`. Ages and times in seconds.

    rounds, promoted, refusals : policies that were learned, those that passed the criteria, and rounds that
        were refused or failed
    outcome_age_s : age of the newest decision whose outcomes were learned from
    over_trained, …_low, …_high : estimated reward of a decision by the last policy minus that of the trained
        model
    """

    started_s: float
    looked_s: float = 0.0
    rounds: int = 0
    promoted: int = 0
    refusals: int = 0
    outcome_age_s: float | None = None
    policy: str = ""
    over_trained: float | None = None
    over_trained_low: float | None = None
    over_trained_high: float | None = None
    reason: str = ""

    def metrics(self) -> dict[str, float]:
        """The fields that are finite numbers."""
        return {
            name: value
            for name, value in asdict(self).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }


def run_follow(settings: Settings, adapt: Callable[[], JobResult], progress: ProgressLog) -> JobResult:
    """Adapt whenever `policy.round_decisions` more decisions have complete outcomes, until interrupted.

    adapt : one round, skipped if there are too few decisions

    Raises RefusedError where another follower runs in the workspace.
    """
    storage, started = Storage(settings.root()), time.monotonic()
    status, wait = FollowerStatus(time.time()), threading.Event()
    every_s = min(max(settings.policy.attribution_window_s / CHECKS_PER_WINDOW, MIN_WAIT_S), MAX_WAIT_S)
    with lease.hold_exclusively(storage.root, "adapt --follow"):
        progress(
            f"following {storage.root}: a check every {every_s:g} s, a round for every "
            f"{settings.policy.round_decisions} decisions that explored"
        )
        try:
            while True:
                _run_round(storage, adapt, status, progress)
                wait.wait(every_s)
        except KeyboardInterrupt:
            progress(f"stopped; the last policy stays in use: {status.policy or 'none'}")
    return JobResult(
        "adapt",
        "ok",
        status.policy,
        {"follow": str(storage.follow)},
        status.metrics(),
        round(time.monotonic() - started, 2),
    )


def _run_round(
    storage: Storage, adapt: Callable[[], JobResult], status: FollowerStatus, progress: ProgressLog
) -> None:
    """Run one round and write the status. An error is logged and does not end the follower."""
    try:
        result = adapt()
    except RecrayError as error:
        status.refusals += 1
        _log_change(status, error.message, progress, "info" if isinstance(error, RefusedError) else "warning")
    except Exception as error:  # later outcomes may be usable again
        status.refusals += 1
        _log_change(status, f"unexpected {type(error).__name__}: {error}", progress, "warning")
    else:
        if result.status != "skipped" and (storage.policy(result.run_key) / "policy.json").exists():
            about = read_json(storage.policy(result.run_key) / "policy.json")["about"]
            _count_round(status, about, result)
            if result.reason:
                _log_change(status, result.reason, progress, "info")
            else:
                status.reason = ""
    status.looked_s = time.time()
    write_json(storage.follow, asdict(status))


def _count_round(status: FollowerStatus, about: PolicyAbout, result: JobResult) -> None:
    status.rounds += 1
    status.promoted += bool(about["promoted"]) and not result.reason
    status.refusals += bool(result.reason)
    status.outcome_age_s, status.policy = round(time.time() - about["newest_s"], 1), result.run_key
    status.over_trained, status.over_trained_low, status.over_trained_high = (
        about["figures"].get(f"over_trained{end}") for end in ("", "_low", "_high")
    )


def _log_change(status: FollowerStatus, reason: str, progress: ProgressLog, level: str) -> None:
    """Log a reason unless the previous check had the same."""
    if reason != status.reason:
        status.reason = reason
        progress(f"no new policy: {reason}", level=level)
