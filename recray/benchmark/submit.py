"""A submitted night beside a local one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from recray.errors import ClusterError
from recray.stages import Say
from recray.testing.cluster import Head

SUBMITTED_EPOCHS = 3  # of both nights: enough to be a night, few enough to be quick


def measure_submit(folder: Path, say: Say) -> dict[str, float]:
    """Seconds of the same night on the data that ships: by `recray nightly` on a local Ray, and by `recray submit nightly`
    on a cluster that runs already. Run in a checkout of recray."""
    overrides = ["--config", "jobs/configs/demo.yaml", f"train.epochs={SUBMITTED_EPOCHS}"]
    recray = [sys.executable, "-m", "recray.cli"]
    metrics: dict[str, float] = {}
    with Head(folder / "home") as head:
        for name, command, environment in (("local", "nightly", dict(os.environ)), ("submitted", "submit nightly", head.environment)):
            say(f"the night, {name}")
            begun = time.monotonic()
            words = [*recray, *command.split(), *overrides, f"storage.root={folder / name}"]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise ClusterError(f"the {name} night ended {done.returncode}: {done.stderr[-600:]}", "run it by hand to see why")
            metrics[f"{name}_s"] = round(time.monotonic() - begun, 1)
    metrics["overhead_s"] = round(metrics["submitted_s"] - metrics["local_s"], 1)
    say(f"local {metrics['local_s']} s, submitted {metrics['submitted_s']} s: {metrics['overhead_s']:+} s")
    return metrics
