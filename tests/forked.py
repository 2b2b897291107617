"""Jobs in forks of one process that has imported what they need: each is a process of its own, and begins in
a moment.

`FORKS.Process(target=run_job, …)` does what `python -m jobs.<job>` does, but for the four seconds of imports.
Ray reads some of its environment when it is imported (whether a token is asked for), so the process begins
with that of the cluster: `begin_forks`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

NEEDED = (
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "ray.data",
    "ray.train.torch",
    "recray.cli",
    "recray.report.page",
    "recray.pipeline.nightly",
    "recray.pipeline.operate",
    "recray.prepare.prepare",
    "recray.evaluation.promotion",
    "recray.snapshot.score",
    "recray.tracking.outbox",
    "recray.training.trainer",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(list(NEEDED))


def begin_forks(environment: Mapping[str, str]) -> None:
    """Start the process that jobs are forks of, with an environment; nothing happens if it runs already."""
    with mock.patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()


def run_job(job: str, arguments: Sequence[str], environment: dict[str, str], out: Path, log: Path) -> None:
    """Run a job as its launcher in `jobs/` does, standard output and standard error into files."""
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (log, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    from recray.cli import job_main

    sys.argv = [f"jobs.{job}", *arguments]
    sys.exit(job_main(job))


if (
    __name__ == "__main__"
):  # once in a new environment, so that not each process of the first tests compiles what it imports
    for name in NEEDED:
        importlib.import_module(name)
