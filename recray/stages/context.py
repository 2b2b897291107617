"""Context, report and execution of the stages of a job.

A stage is a function of a context and its input that returns a `StageReport`. It is safe to repeat: its run
key names its output, and an output that exists is kept. `run_stage` times the stage, queues its report for
MLflow in the outbox, and makes the result. No stage needs MLflow.
"""

from __future__ import annotations

import datetime as dt
import importlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from recray.config import Settings
from recray.errors import RefusedError, TrackingError
from recray.storage import Storage

if TYPE_CHECKING:
    from recray.bundle import Bundle
    from recray.dataset.reader import Dataset
    from recray.inference.policy import Policy
    from recray.tracking.outbox import Entry, Outbox
    from recray.training.plan import TrainingPlan

AsOf = dt.datetime | None

MODULES = {
    "collect": "ingest",
    "prepare": "ingest",
    "train": "train",
    "evaluate": "evaluate",
    "promote": "promote",
    "tune": "policy",
    "adapt": "policy",
    "score": "score",
    "report": "evaluate",
}
"""Stage -> module of `recray.stages` with the function of that name. It is imported when the stage runs, so
that the process of a job that only prepares stays small.
"""

POSITION = {"train": 0, "evaluate": 1, "promote": 2, "tune": 3, "adapt": 3, "score": 4, "report": 5}
"""Order of the stages of one nightly run in MLflow."""


class ProgressLog(Protocol):
    """Takes a line for a person or a log; `fields` (stage, level) are for the log."""

    def __call__(self, message: str, **fields: Any) -> None: ...


@dataclass
class JobResult:
    """How a job ended. `status`: ok | skipped | refused | failed; `seconds` of wall time.

    `reason`: why promotion criteria refused, or which error ended the job. `warnings`: what a person should
    check although the job succeeded.
    """

    job: str
    status: str
    run_key: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"ok": 0, "skipped": 0, "refused": RefusedError.exit_code}.get(self.status, 1)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Record:
    """A stage's report to MLflow: `entry`, in the run of a bundle, at a moment (seconds since 1970)."""

    bundle: Bundle
    as_of_s: int
    entry: Entry


@dataclass(frozen=True)
class StageReport:
    """What a stage did. `is_new` is false where its whole output existed before."""

    run_key: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_new: bool = True
    reason: str = ""
    record: Record | None = None


@dataclass
class JobContext:
    """Settings, storage and outbox that the stages of one job share."""

    settings: Settings
    storage: Storage
    progress: ProgressLog
    warnings: list[str] = field(default_factory=list)
    _outbox: Outbox | None = None
    _plans: dict[str, TrainingPlan] = field(default_factory=dict)

    @property
    def outbox(self) -> Outbox:
        if self._outbox is None:
            from recray.tracking.outbox import Outbox
            from recray.tracking.runs import Tracking

            self._outbox = Outbox(self.storage, Tracking(self.settings.tracking, self.storage))
        return self._outbox

    def training_plan(self, dataset: Dataset) -> TrainingPlan:
        """The plan of a training on the dataset, computed once per job."""
        if dataset.key not in self._plans:
            from recray.training.plan import plan_training

            self._plans[dataset.key] = plan_training(self.settings, dataset)
        return self._plans[dataset.key]

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            self.progress(f"warning: {text}", level="warning")

    def warn_of_tracking(self, error: TrackingError) -> None:
        """Warn that MLflow is unavailable, and where its entries are queued."""
        self.warn(f"{error.message}; its entries are queued in {self.storage.outbox}")

    def deliver(self) -> None:
        """Send the queued entries to MLflow; warn where it is unavailable."""
        try:
            self.outbox.deliver()
        except TrackingError as error:
            self.warn_of_tracking(error)

    def relative(self, path: str) -> str:
        """A path relative to the workspace."""
        return path.removeprefix(f"{self.storage.root}/")


def run_stage(name: str, context: JobContext, *inputs: Any, **options: Any) -> JobResult:
    """Run a stage of `MODULES`, record its report, and return its result."""
    started = time.monotonic()
    module = importlib.import_module(f"recray.stages.{MODULES[name]}")
    stage: Callable[..., StageReport] = getattr(module, name)
    report = stage(context, *inputs, **options)
    if report.record is not None:
        bundle, as_of_s, entry = report.record.bundle, report.record.as_of_s, report.record.entry
        run: Entry = {
            "run_key": bundle.key,
            "run_name": name_run(bundle.as_of_s),
            "order": [as_of_s, POSITION[name]],
        }
        context.outbox.put(report.run_key, {**run, **entry})
        context.deliver()
    return JobResult(
        job=name,
        status="ok" if report.is_new else "skipped",
        run_key=report.run_key,
        outputs=report.outputs,
        metrics=report.metrics,
        seconds=round(time.monotonic() - started, 2),
        reason=report.reason,
        warnings=context.warnings,
    )


def load_usable_policy(context: JobContext, bundle: Bundle, name: str | None) -> Policy | None:
    """The policy of a run key. None, with a warning, for a policy that cannot decide; see
    `Policy.load_usable`.
    """
    from recray.inference.policy import Policy

    if name is None:
        return None
    settings = context.settings
    policy, reason = Policy.load_usable(
        context.storage.policy(name),
        bundle.digest,
        private=settings.privacy.enabled,
        bound=settings.policy.bound,
    )
    if reason:
        context.warn(f"policy {name} is not used, the unmodified model serves: {reason}")
    return policy


def name_run(as_of_s: int) -> str:
    """Name of the MLflow run of a bundle that was trained on events up to a moment."""
    return f"train {to_date(as_of_s)}"


def to_day(as_of_s: int) -> int:
    """Days since 1970: the step of a nightly run's metrics."""
    return as_of_s // 86_400


def to_date(as_of_s: int) -> str:
    """The UTC date of a moment."""
    return str(dt.datetime.fromtimestamp(as_of_s, dt.UTC).date())
