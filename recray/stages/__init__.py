"""The stages of a nightly run: what each reads, the run key of its result, and its report to MLflow."""

from recray.stages.context import (
    AsOf,
    JobContext,
    JobResult,
    ProgressLog,
    StageReport,
    load_usable_policy,
    run_stage,
    to_date,
    to_day,
)

__all__ = [
    "AsOf",
    "JobContext",
    "JobResult",
    "ProgressLog",
    "StageReport",
    "to_date",
    "to_day",
    "run_stage",
    "load_usable_policy",
]
