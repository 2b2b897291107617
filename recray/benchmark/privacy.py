"""What privacy costs: a private step beside a plain one on the same batch, and the memory of one over a large catalogue.

Each figure comes from a process of its own, so that its peak memory is that of the work; plain and private take turns.
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
from typing import Any

import numpy as np
import torch

from recray.benchmark.catalogue import RandomUsers, peak_bytes
from recray.benchmark.checkouts import beside, environment_of
from recray.errors import TrainingError
from recray.model.losses import Criterion, Targets
from recray.model.recommender import Recommender
from recray.model.shape import PRESETS, Batch, Shape
from recray.privacy.engine import PrivateStep
from recray.stages import Say
from recray.training.loop import Loop, LoopSettings
from recray.training.private import physical_users

USERS, ITEMS, DIM, HISTORY = 1024, 3706, 64, 50
LARGE_USERS, LARGE_ITEMS, LARGE_BOUND = 256, 100_000, 4e9
STEPS, ROUNDS = 6, 3


def measure_privacy(folder: Path, say: Say) -> dict[str, Any]:
    """`dp_step_time_ratio` and `dp_step_memory_ratio`: private over plain, seconds of a step and bytes beyond what the idle
    process holds; `dp_large_memory_ratio`: peak bytes of a step over 100,000 items against 4 GB."""
    found: dict[str, list[dict[str, float]]] = {"plain": [], "private": []}
    for turn in range(ROUNDS):
        for what in ("plain", "private") if turn % 2 == 0 else ("private", "plain"):
            found[what].append(_apart(what, USERS, ITEMS))
            say(f"{what}: {found[what][-1]['seconds']:.2f} s a step, {found[what][-1]['bytes'] / 1e6:.0f} MB")
    middle = {what: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for what, runs in found.items()}
    large = _apart("private", LARGE_USERS, LARGE_ITEMS)
    say(f"{LARGE_ITEMS:,} items: {large['seconds']:.1f} s a step, peak {large['peak_bytes'] / 1e9:.2f} GB")
    metrics: dict[str, Any] = {f"{what}_{name}": round(value, 4) for what, values in middle.items() for name, value in values.items()}
    metrics["dp_step_time_ratio"] = round(middle["private"]["seconds"] / middle["plain"]["seconds"], 3)
    metrics["dp_step_memory_ratio"] = round(middle["private"]["bytes"] / middle["plain"]["bytes"], 3)
    metrics["dp_large_peak_bytes"] = large["peak_bytes"]
    metrics["dp_large_memory_ratio"] = round(large["peak_bytes"] / LARGE_BOUND, 3)
    say(f"a private step takes {metrics['dp_step_time_ratio']} times the time, {metrics['dp_step_memory_ratio']} times the memory")
    return metrics


def measure_against(folder: Path, other: Path, say: Say) -> dict[str, float]:
    """Seconds of a private step here and in another checkout, in turns. Raises SettingsError for a folder that is no checkout."""
    return beside(other, "privacy", ROUNDS, lambda checkout: {"": _apart("private", USERS, ITEMS, checkout)["seconds"]}, "s a step", say)


def _apart(what: str, users: int, items: int, checkout: Path | None = None) -> dict[str, float]:
    environment = os.environ if checkout is None else environment_of(checkout)
    command = [sys.executable, "-m", "recray.benchmark.privacy", what, str(users), str(items)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise TrainingError(f"a {what} step of {users} users failed: {done.stderr.strip()[-600:]}", "is there memory for it?")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _model(items: int) -> Recommender:
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = Shape(event_types=1, dim=DIM, history=HISTORY, time_bias=False, repeat=False, prior=False, **PRESETS["dp"])
    return Recommender(shape, np.arange(items + 1) > 0, {})


def _plain(users: int, items: int) -> list[float]:
    share = torch.full((items + 1,), 1.0 / items).index_fill(0, torch.tensor([0]), 0.0)
    settings = LoopSettings(epochs=1, patience=1, learning_rate=1e-3, warmup_steps=1, weight_decay=0.0, seed=0)
    batches = RandomUsers(users, items, HISTORY, STEPS)
    loop = Loop(_model(items).train(), batches, lambda model, rank, world: (0.0, 1.0), Criterion("softmax", share), settings)
    seconds = []
    for batch, targets, count in batches.epoch(0):
        begun = time.monotonic()
        loop.train_step(batch, targets, count)
        seconds.append(time.monotonic() - begun)
    return seconds


def _private(users: int, items: int) -> list[float]:
    model = _model(items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    step = PrivateStep(model, optimizer, clipping_norm=1.0, noise_multiplier=1.0, expected_users=users)
    seconds = []
    for batch, targets, _ in RandomUsers(users, items, HISTORY, STEPS).epoch(0):
        begun = time.monotonic()
        step.step(_pieces(batch, targets, physical_users(items, HISTORY, DIM * model.shape.blocks)))
        seconds.append(time.monotonic() - begun)
    return seconds


def _pieces(batch: Batch, targets: Targets, size: int) -> Iterator[tuple[Batch, Targets]]:
    """A batch in which every position is asked, in physical batches."""
    for first in range(0, len(batch.item_BT), size):
        rows = slice(first, first + size)
        mine = (batch.user_N >= first) & (batch.user_N < first + size)
        histories = {name: getattr(batch, name)[rows] for name in ("item_BT", "event_BT", "value_BT", "time_BT", "now_BT")}
        queries = {name: getattr(batch, name)[mine] for name in ("position_N", "day_N", "context_NC")}
        part = batch._replace(**histories, **queries, user_N=batch.user_N[mine] - first)
        yield part, Targets(torch.arange(int(mine.sum()) + 1), targets.item[mine])


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    what, users, items = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _model(items)
    idle = _resident_bytes()
    steps = {"plain": _plain, "private": _private}[what](users, items)
    print(json.dumps({"seconds": statistics.median(steps[1:]), "bytes": peak_bytes() - idle, "peak_bytes": peak_bytes()}))
