"""Scaling: seconds of a training epoch by events, and of scoring all users by users, at four sizes, with a
plot.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recray.benchmark import Result
from recray.benchmark.score import scorer
from recray.config import load_settings
from recray.report.plots import plot_growth
from recray.stages import ProgressLog
from recray.testing.published import prepare_here
from recray.testing.synthetic import SyntheticShop
from recray.training.plan import training_settings
from recray.training.worker import build_loop

USERS = (12_500, 25_000, 50_000, 100_000)
ITEMS, EVENTS_PER_USER = 5_000, 20.0
ROUNDS = 2  # the faster one counts, since other work on the machine only adds time


def measure_scale(folder: Path, progress: ProgressLog) -> Result:
    """Seconds at each size; `train_exponent`, `score_exponent`: slope of log seconds over log size, 1 for a
    linear cost.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    trained, scored = [], []
    for users in USERS:
        user_folder = folder / str(users)
        SyntheticShop(users=users, items=ITEMS, events_per_user=EVENTS_PER_USER).write(user_folder)
        settings = load_settings(
            None, [f"data.events=[{user_folder / 'events'}]", f"storage.root={user_folder / 'root'}"]
        )
        dataset = prepare_here(settings)
        loop = build_loop(str(dataset.path), training_settings(settings), torch.device("cpu"))
        trained.append((dataset.n_events, _time_fastest(lambda epoch, loop=loop: loop.train_epoch(epoch))))
        with scorer(user_folder, settings, dataset, loop.best) as score:
            scored.append((dataset.n_users, _time_fastest(lambda _, score=score: score())))
        progress(
            f"{users:,} users: {dataset.n_events:,} events trained in {trained[-1][1]:.1f} s, all users "
            f"scored in {scored[-1][1]:.1f} s"
        )
    keep = folder / "keep"
    keep.mkdir()
    (keep / "svg").write_text(plot_growth(trained, scored))
    metrics: Result = {"train": trained, "score": scored}
    metrics |= {"train_exponent": fit_exponent(trained), "score_exponent": fit_exponent(scored)}
    progress(
        f"training time grows as events^{metrics['train_exponent']}, scoring time as "
        f"users^{metrics['score_exponent']}"
    )
    return metrics


def _time_fastest(run: Any) -> float:
    seconds = []
    for number in range(ROUNDS):
        started = time.monotonic()
        run(number)
        seconds.append(time.monotonic() - started)
    return round(min(seconds), 3)


def fit_exponent(points: list[tuple[int, float]]) -> float:
    """Slope of the least-squares line through (log size, log seconds)."""
    size, seconds = np.log(np.array(points, float)).T
    return round(float(np.polyfit(size, seconds, 1)[0]), 3)
