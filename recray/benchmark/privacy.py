"""The cost of privacy: a private step compared with a plain one on the same batch, and its memory for a large
catalogue.

Each figure comes from its own process, so the peak memory is that of the work alone; plain and private
alternate.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from recray.benchmark import Result
from recray.benchmark.catalogue import RandomUsers, peak_bytes
from recray.benchmark.checkouts import compare_checkouts, environment_of
from recray.errors import TrainingError
from recray.model.losses import Criterion, Targets
from recray.model.network import Network
from recray.model.shape import PRESETS, Batch, Shape
from recray.privacy.engine import PrivateStep
from recray.stages import ProgressLog
from recray.training.loop import Loop, LoopSettings
from recray.training.private import physical_users

USERS, ITEMS, DIM, HISTORY = 1024, 3706, 64, 50
LARGE_USERS, LARGE_ITEMS, LARGE_BOUND = 256, 100_000, 4e9
STEPS, ROUNDS = 6, 3


def measure_privacy(folder: Path, progress: ProgressLog) -> Result:
    """`dp_step_time_ratio` and `dp_step_memory_ratio`: private over plain, seconds of a step and bytes above
    those of the idle process; `dp_large_memory_ratio`: peak bytes of a step with 100,000 items over 4 GB.
    """
    by_kind: dict[str, list[dict[str, float]]] = {"plain": [], "private": []}
    for number in range(ROUNDS):
        for kind in ("plain", "private") if number % 2 == 0 else ("private", "plain"):
            run = _run_step(kind, USERS, ITEMS)
            by_kind[kind].append(run)
            progress(f"{kind}: {run['seconds']:.2f} s a step, {run['bytes'] / 1e6:.0f} MB")

    medians = {
        kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for kind, runs in by_kind.items()
    }
    large = _run_step("private", LARGE_USERS, LARGE_ITEMS)
    progress(
        f"{LARGE_ITEMS:,} items: {large['seconds']:.1f} s a step, peak {large['peak_bytes'] / 1e9:.2f} GB"
    )
    metrics: Result = {
        f"{kind}_{name}": round(value, 4)
        for kind, values in medians.items()
        for name, value in values.items()
    }
    metrics["dp_step_time_ratio"] = round(medians["private"]["seconds"] / medians["plain"]["seconds"], 3)
    metrics["dp_step_memory_ratio"] = round(medians["private"]["bytes"] / medians["plain"]["bytes"], 3)
    metrics["dp_large_peak_bytes"] = large["peak_bytes"]
    metrics["dp_large_memory_ratio"] = round(large["peak_bytes"] / LARGE_BOUND, 3)
    progress(
        f"a private step takes {metrics['dp_step_time_ratio']} times the time, "
        f"{metrics['dp_step_memory_ratio']} times the memory"
    )
    return metrics


def measure_against(folder: Path, other: Path, progress: ProgressLog) -> dict[str, float]:
    """Seconds of a private step here and in another checkout, alternating. Raises SettingsError for a folder
    that is not a checkout.
    """
    return compare_checkouts(
        other,
        "privacy",
        ROUNDS,
        lambda checkout: {"": _run_step("private", USERS, ITEMS, checkout)["seconds"]},
        "s a step",
        progress,
    )


def _run_step(kind: str, users: int, items: int, checkout: Path | None = None) -> dict[str, float]:
    environment = os.environ if checkout is None else environment_of(checkout)
    command = [sys.executable, "-m", "recray.benchmark.privacy", kind, str(users), str(items)]
    process = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if process.returncode:
        raise TrainingError(
            f"a {kind} step of {users} users failed: {process.stderr.strip()[-600:]}",
            "check the free memory of this machine",
        )
    result: dict[str, float] = json.loads(process.stdout)
    return result


def _build_model(items: int) -> Network:
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = Shape(
        event_types=1, dim=DIM, history=HISTORY, time_bias=False, repeat=False, prior=False, **PRESETS["dp"]
    )
    return Network(shape, np.arange(items + 1) > 0, {})


def _time_plain(users: int, items: int) -> list[float]:
    share = torch.full((items + 1,), 1.0 / items).index_fill(0, torch.tensor([0]), 0.0)
    settings = LoopSettings(
        epochs=1, patience=1, learning_rate=1e-3, warmup_steps=1, weight_decay=0.0, seed=0
    )
    batches = RandomUsers(users, items, HISTORY, STEPS)
    loop = Loop(
        _build_model(items).train(),
        batches,
        lambda model, rank, world_size: (0.0, 1.0),
        Criterion("softmax", share),
        settings,
    )
    seconds = []
    for batch, targets, count in batches.epoch(0):
        started = time.monotonic()
        loop.train_step(batch, targets, count)
        seconds.append(time.monotonic() - started)
    return seconds


def _time_private(users: int, items: int) -> list[float]:
    model = _build_model(items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    step = PrivateStep(model, optimizer, clipping_norm=1.0, noise_multiplier=1.0, expected_users=users)
    seconds = []
    for batch, targets, _ in RandomUsers(users, items, HISTORY, STEPS).epoch(0):
        started = time.monotonic()
        step.step(_split_batch(batch, targets, physical_users(items, HISTORY, DIM * model.shape.blocks)))
        seconds.append(time.monotonic() - started)
    return seconds


def _split_batch(batch: Batch, targets: Targets, size: int) -> Iterator[tuple[Batch, Targets]]:
    """A batch with a query at every position, in physical batches."""
    for first in range(0, len(batch.item_BT), size):
        rows = slice(first, first + size)
        is_inside = (batch.user_N >= first) & (batch.user_N < first + size)
        histories = {
            name: getattr(batch, name)[rows]
            for name in ("item_BT", "event_BT", "value_BT", "time_BT", "now_BT")
        }
        queries = {name: getattr(batch, name)[is_inside] for name in ("position_N", "day_N", "context_NC")}
        part = batch._replace(**histories, **queries, user_N=batch.user_N[is_inside] - first)
        yield part, Targets(torch.arange(int(is_inside.sum()) + 1), targets.item[is_inside])


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    kind, users, items = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _build_model(items)
    idle = _resident_bytes()
    steps = {"plain": _time_plain, "private": _time_private}[kind](users, items)
    print(
        json.dumps(
            {
                "seconds": statistics.median(steps[1:]),
                "bytes": peak_bytes() - idle,
                "peak_bytes": peak_bytes(),
            }
        )
    )
