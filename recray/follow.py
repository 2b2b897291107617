"""`recray adapt --follow`: a round whenever enough outcomes are ripe, until it is told to stop.

All that it knows is in the workspace, so one that was killed goes on where it was, and what is served does not depend on it: the policy of
before decides until another one passes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from recray import lease
from recray.config import Settings
from recray.errors import RecrayError, RefusedError
from recray.stages import JobResult, Say
from recray.storage import Storage, read_json, write_json

FILE = "follow.json"
LOOKS = 6  # in an attribution window
LEAST_S, MOST_S = 2.0, 60.0  # between two looks


@dataclass
class Followed:
    """What a follower did, as `follow.json` has it. Ages and moments in seconds.

    rounds, promoted, refusals : policies that were made, those that the gate let pass, and rounds that were refused or failed
    outcome_age_s : of the newest decision whose outcomes were learned from
    over_trained, …_low, …_high : what the last policy is worth a decision, compared with the trained model, by the gate
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
        """The figures that are known."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int | float) and math.isfinite(value)}


def run_follow(settings: Settings, adapt: Callable[[], JobResult], say: Say) -> JobResult:
    """Adapt whenever `policy.round_decisions` more are ripe. Ends well when it is interrupted.

    adapt : one round, skipped where too few are ripe
    Raises RefusedError where another follower runs in the workspace.
    """
    storage, started = Storage(settings.root()), time.monotonic()
    done, wait = Followed(time.time()), threading.Event()
    every_s = min(max(settings.policy.attribution_window_s / LOOKS, LEAST_S), MOST_S)
    with lease.only_one(storage.root, "adapt --follow"):
        say(f"following {storage.root}: a look every {every_s:g} s, a round for every {settings.policy.round_decisions} decisions that explored")
        try:
            while True:
                _look(storage, adapt, done, say)
                wait.wait(every_s)
        except KeyboardInterrupt:
            say(f"stopped; the policy of before goes on deciding: {done.policy or 'none'}")
    return JobResult("adapt", "ok", done.policy, {"follow": str(storage.root / FILE)}, done.metrics(), round(time.monotonic() - started, 2))


def _look(storage: Storage, adapt: Callable[[], JobResult], done: Followed, say: Say) -> None:
    """One round, if it is time for one; whatever it ends with, the next look comes."""
    try:
        result = adapt()
    except RecrayError as error:
        done.refusals += 1
        _say_once(done, error.what, say, "info" if isinstance(error, RefusedError) else "warning")
    except Exception as error:  # whatever it is, what ripens next may be learned from
        done.refusals += 1
        _say_once(done, f"unexpected {type(error).__name__}: {error}", say, "warning")
    else:
        if result.status != "skipped" and (storage.policy(result.run_key) / "policy.json").exists():
            about = read_json(storage.policy(result.run_key) / "policy.json")["about"]
            _count(done, about, result)
            if result.reason:
                _say_once(done, result.reason, say, "info")
            else:
                done.reason = ""
    done.looked_s = time.time()
    write_json(storage.root / FILE, asdict(done))


def _count(done: Followed, about: dict[str, Any], result: JobResult) -> None:
    done.rounds += 1
    done.promoted += bool(about["promoted"]) and not result.reason
    done.refusals += bool(result.reason)
    done.outcome_age_s, done.policy = round(time.time() - about["newest_s"], 1), result.run_key
    done.over_trained, done.over_trained_low, done.over_trained_high = (about["figures"].get(f"over_trained{end}") for end in ("", "_low", "_high"))


def _say_once(done: Followed, reason: str, say: Say, level: str) -> None:
    """Log what is not the same as at the look before."""
    if reason != done.reason:
        done.reason = reason
        say(f"no other policy: {reason}", level=level)
