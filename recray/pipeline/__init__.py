"""The jobs that people run, by name: `run("nightly", settings, as_of)`.

A job that writes holds the lease of its workspace, so that one job runs at a time. A job of `STAGE_JOBS` is
one stage; the others are functions of the modules here. A module is imported when its job runs.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import MissingArtifactError, RecrayError
from recray.prepare import prepare as preparation
from recray.stages import AsOf, JobContext, JobResult, ProgressLog, run_stage
from recray.storage import Storage, lease, to_storage_error

STAGE_JOBS = ("collect", "prepare", "train", "evaluate", "tune", "score", "report")
"""Jobs that consist of one stage."""

JOBS = {
    "validate": "validate",
    "nightly": "nightly",
    "search": "search",
    "promote": "operate",
    "rollback": "operate",
    "canary": "operate",
    "serve_rollback": "operate",
    "adapt": "operate",
    "forget": "users",
    "export": "users",
}
"""Job -> module of `recray.pipeline` with the function of that name."""


def discard(message: str, **fields: Any) -> None:
    """The default of `progress`: drops the line."""


def run(
    name: str, settings: Settings, as_of: AsOf = None, progress: ProgressLog = discard, **options: Any
) -> JobResult:
    """Run a job.

    name : of `STAGE_JOBS` or `JOBS`
    as_of : read nothing after this moment; None: read everything
    progress : takes lines for a person or a log
    options : of the job's function

    Raises subclasses of RecrayError; each names the problem and the fix.
    """
    if name in JOBS:
        job = getattr(importlib.import_module(f"recray.pipeline.{JOBS[name]}"), name)
        result: JobResult = job(settings, as_of, progress, **options)
        return result
    with hold_workspace(name, settings, progress) as context:
        if name == "collect":
            return run_stage(name, context)
        if name == "prepare":
            return run_stage(name, context, as_of, preparation.find_input(settings))
        return run_stage(name, context, open_dataset(settings, as_of), **options)


@contextlib.contextmanager
def hold_workspace(job: str, settings: Settings, progress: ProgressLog) -> Iterator[JobContext]:
    """Hold the workspace's lease during a job. Raises RefusedError, or StorageError if it is not writable."""
    root = settings.root()
    with lease.hold(root, job, settings.storage.lease_s) as held:
        progress(f"{job} in {root}, attempt {held.attempt}", level="debug", attempt=held.attempt)
        try:
            yield JobContext(settings, Storage(root), progress)
        except Exception as error:
            held.check()  # an attempt that was fenced off reports that, not its own error
            cause = None if isinstance(error, RecrayError) else to_storage_error(error, root)
            if cause is None:
                raise
            raise cause from error


def open_dataset(settings: Settings, as_of: AsOf) -> Dataset:
    """The dataset that `recray prepare` wrote with these settings. Raises MissingArtifactError."""
    key = preparation.prepare_key(settings, as_of)
    try:
        return Dataset.open(Storage(settings.root()).dataset(key), verify=True)
    except MissingArtifactError as error:
        raise MissingArtifactError(
            error.message, "run `recray prepare` with the same settings first, or `recray nightly`"
        ) from None
