"""What the stages of a job share: the work they are given, the result they return, and how MLflow is told."""

from __future__ import annotations

import datetime as dt
import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from recray.config import Settings
from recray.errors import RefusedError, TrackingError
from recray.storage import Storage

if TYPE_CHECKING:
    from recray.bundle import Bundle
    from recray.inference.policy import Policy
    from recray.tracking.outbox import Entry, Outbox

AsOf = dt.datetime | None


class Say(Protocol):
    """Takes what a person or a log is told; `fields` (stage, level) are for the log."""

    def __call__(self, message: str, **fields: Any) -> None: ...


@dataclass
class JobResult:
    """How a job ended. `status`: ok | skipped | refused | failed; `seconds` of wall time.

    `reason` says why a gate refused or an error ended the job; `warnings` name what a person should look at although
    the job ended well.
    """

    job: str
    status: str
    run_key: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"ok": 0, "skipped": 0, "refused": RefusedError.exit_code}.get(self.status, 1)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Work:
    """What the stages of one job share."""

    settings: Settings
    storage: Storage
    say: Say
    warnings: list[str] = field(default_factory=list)
    _outbox: Outbox | None = None

    @property
    def outbox(self) -> Outbox:
        if self._outbox is None:
            from recray.tracking.outbox import Outbox
            from recray.tracking.runs import Tracking

            self._outbox = Outbox(self.storage, Tracking(self.settings.tracking, self.storage))
        return self._outbox

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"warning: {text}", level="warning")


def tell(work: Work, key: str, bundle: Bundle, stage: int, as_of_s: int, entry: Entry) -> None:
    """Spool what the job `key` has to tell of a bundle's run, and try to deliver it."""
    named = {"run_key": bundle.key, "run_name": run_name(bundle.as_of_s), "order": [as_of_s, stage]}
    work.outbox.put(key, {**named, **entry})
    deliver(work)


def deliver(work: Work) -> None:
    """Tell MLflow what is pending; if it cannot be told, a warning."""
    try:
        work.outbox.deliver()
    except TrackingError as error:
        work.warn(f"{error.what}; what it is to be told is spooled in {work.storage.outbox}")


def sound_policy(work: Work, bundle: Bundle, name: str | None) -> Policy | None:
    """The policy of that run key; a warning and None for one that does not decide, see `Policy.sound`."""
    from recray.inference.policy import Policy

    if name is None:
        return None
    settings = work.settings
    found, why = Policy.sound(work.storage.policy(name), bundle.digest, private=settings.privacy.enabled, bound=settings.policy.bound)
    if why:
        work.warn(f"policy {name} does not decide, the trained model does as it is: {why}")
    return found


def result_of(job: str, skipped: bool, key: str, outputs: dict[str, str], metrics: dict[str, Any], started: float, work: Work) -> JobResult:
    """The result of a stage or a job that began at `started` (time.monotonic)."""
    status, seconds = "skipped" if skipped else "ok", round(time.monotonic() - started, 2)
    return JobResult(job, status, key, outputs, metrics, seconds, warnings=work.warnings)


def under(work: Work, path: str) -> str:
    """A path relative to the root."""
    return path.removeprefix(f"{work.storage.root}/")


def run_name(as_of_s: int) -> str:
    """Of the MLflow run of a bundle that was trained on events up to a moment."""
    return f"train {date_of(as_of_s)}"


def day_of(as_of_s: int) -> int:
    """Days since 1970: the step of a night's metrics."""
    return as_of_s // 86_400


def date_of(as_of_s: int) -> str:
    """The UTC date of a moment."""
    return str(dt.datetime.fromtimestamp(as_of_s, dt.UTC).date())
