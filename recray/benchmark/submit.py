"""Overhead of a submitted nightly run over a local one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from recray.errors import ClusterError
from recray.stages import ProgressLog
from recray.testing.cluster import Head

EPOCHS = 3  # of both runs


def measure_submit(folder: Path, progress: ProgressLog) -> dict[str, float]:
    """Seconds of the same nightly run on the shipped data: by `recray nightly` on a local Ray, and by `recray
    submit nightly` on a running cluster. Run in a checkout of recray.
    """
    overrides = ["--config", "jobs/configs/demo.yaml", f"train.epochs={EPOCHS}"]
    recray = [sys.executable, "-m", "recray.cli"]
    metrics: dict[str, float] = {}
    with Head(folder / "home") as head:
        for name, command, environment in (
            ("local", "nightly", dict(os.environ)),
            ("submitted", "submit nightly", head.environment),
        ):
            progress(f"nightly run, {name}")
            started = time.monotonic()
            arguments = [*recray, *command.split(), *overrides, f"storage.root={folder / name}"]
            process = subprocess.run(arguments, env=environment, capture_output=True, text=True)
            if process.returncode:
                raise ClusterError(
                    f"the {name} nightly run ended with exit code {process.returncode}: "
                    f"{process.stderr[-600:]}",
                    "run it manually to see why",
                )
            metrics[f"{name}_s"] = round(time.monotonic() - started, 1)
    metrics["overhead_s"] = round(metrics["submitted_s"] - metrics["local_s"], 1)
    progress(
        f"local {metrics['local_s']} s, submitted {metrics['submitted_s']} s: {metrics['overhead_s']:+} s"
    )
    return metrics
