"""Memory and time of a large catalogue: a training step of 128 users, and the top 100 of all items for
10,000 users.

Each figure comes from its own process, so the peak memory is that of the work alone. Events have no times,
so there is no popularity prior and no age bias.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from recray.benchmark import Result
from recray.dataset.popularity import Popularity
from recray.dataset.reader import History
from recray.errors import TrainingError
from recray.inference import Catalogue, Predictor, Vocabulary
from recray.model.losses import Criterion, Targets
from recray.model.network import Network
from recray.model.shape import Batch, Shape
from recray.stages import ProgressLog
from recray.training.loop import Loop, LoopSettings

SIZES = (100_000, 1_000_000)
DIM, HISTORY = 64, 50
STEP_USERS, STEPS = 128, 5
TOP_USERS, TOP_K, TOP_BATCH = 10_000, 100, 1024
STEP_BOUND, TOP_BOUND = 4e9, 3e9


def measure_catalogue(folder: Path, progress: ProgressLog) -> Result:
    """Peak bytes and seconds at each size; `top_item_ratio`: seconds an item at the largest size divided by
    those at the smallest.
    """
    metrics: Result = {}
    for items in SIZES:
        for part in ("step", "top"):
            process = subprocess.run(
                [sys.executable, "-m", __name__, part, str(items)], capture_output=True, text=True
            )
            if process.returncode:
                raise TrainingError(
                    f"{part} of {items} items failed: {process.stderr.strip()[-600:]}",
                    "check the free memory of this machine",
                )
            figures = json.loads(process.stdout)
            progress(
                f"{items:,} items, {part}: peak {figures['peak_bytes'] / 1e9:.2f} GB, "
                f"{figures['seconds']:.2f} s"
            )
            metrics |= {f"{part}_{items}_{name}": value for name, value in figures.items()}
    small, large = SIZES[0], SIZES[-1]
    ratio = metrics[f"top_{large}_seconds"] / large / (metrics[f"top_{small}_seconds"] / small)
    metrics["top_item_ratio"] = round(ratio, 3)
    metrics["step_memory_ratio"] = round(metrics[f"step_{large}_peak_bytes"] / STEP_BOUND, 3)
    metrics["top_memory_ratio"] = round(metrics[f"top_{large}_peak_bytes"] / TOP_BOUND, 3)
    progress(f"top {TOP_K}: the cost of an item is {ratio:.2f} times that in the small catalogue")
    return metrics


def _build_model(items: int) -> Network:
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = Shape(event_types=1, dim=DIM, history=HISTORY, time_bias=False, prior=False)
    return Network(shape, np.arange(items + 1) > 0, {})


class RandomUsers:
    """Batches of `users` with random histories, with a query at every position."""

    def __init__(self, users: int, items: int, history: int, steps: int) -> None:
        self.users, self.items, self.history, self.steps = users, items, history, steps

    def epoch(self, epoch: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Batch, Targets, int]]:
        """`steps` batches."""
        random = torch.Generator().manual_seed(epoch)
        user, position = (
            torch.arange(self.users).repeat_interleave(self.history),
            torch.arange(self.history).repeat(self.users),
        )
        zeros = torch.zeros(self.users, self.history, dtype=torch.int64)
        unknown = torch.zeros(len(user), 0, dtype=torch.int64)
        for _ in range(self.steps):
            item = torch.randint(1, self.items + 1, (self.users, self.history + 1), generator=random)
            targets = Targets(torch.arange(len(user) + 1), item[:, 1:].flatten())
            histories = (item[:, :-1], zeros, zeros.float(), zeros, zeros)
            yield (
                Batch(
                    *histories,
                    user,
                    position,
                    torch.zeros(1, 1),
                    torch.zeros(1, 1),
                    torch.zeros_like(user),
                    unknown,
                ),
                targets,
                len(user),
            )

    def padding(self, epoch: int = 0) -> float:
        """Share of padding: none."""
        return 0.0


def _time_step(items: int) -> float:
    """Mean seconds of a training step."""
    model = _build_model(items)
    criterion = Criterion("auto", torch.full((items + 1,), 1.0 / items).index_fill(0, torch.tensor([0]), 0.0))
    settings = LoopSettings(
        epochs=1, patience=1, learning_rate=1e-3, warmup_steps=1, weight_decay=0.0, seed=0, ema_decay=0.99
    )
    loop = Loop(
        model,
        RandomUsers(STEP_USERS, items, HISTORY, STEPS),
        lambda model, rank, world_size: (0.0, 1.0),
        criterion,
        settings,
    )
    started = time.monotonic()
    loop.train_epoch(0)
    return (time.monotonic() - started) / STEPS


def _time_ranking(items: int) -> float:
    """Seconds to rank for all users."""
    no_events = Popularity.count_events(np.zeros(0, np.int64), None, items)
    predictor = Predictor(
        _build_model(items),
        Catalogue(Vocabulary(pa.array(np.arange(items)), ["interaction"]), no_events, has_time=False),
        popularity_prior_days=0,
    )
    random = np.random.default_rng(0)
    histories = []
    for _ in range(TOP_USERS):
        events = np.arange(random.integers(1, HISTORY + 1))
        histories.append(
            History(
                random.integers(1, items + 1, len(events)),
                events * 0,
                events,
                np.ones(len(events), np.float32),
            )
        )
    started = time.monotonic()
    for first in range(0, TOP_USERS, TOP_BATCH):
        predictor.recommend(histories[first : first + TOP_BATCH], TOP_K, now=0)
    return time.monotonic() - started


def peak_bytes() -> int:
    """Peak resident memory of this process since its program was loaded, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    seconds = {"step": _time_step, "top": _time_ranking}[sys.argv[1]](int(sys.argv[2]))
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))
