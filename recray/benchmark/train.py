"""Seconds of a training epoch, compared with a baseline library with the same tokens, width, blocks, heads,
history and loss.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recray.benchmark import Result, peers
from recray.benchmark.data import prepare_data, write_events
from recray.config import Settings
from recray.model.device import device
from recray.stages import ProgressLog
from recray.training.loop import Loop
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

EPOCHS, LIBRARY_EPOCHS = 3, 2
# the library learns from the last sequence of each user, over all items
SAME = ["train.sequences=last", "train.loss=softmax"]
LIBRARY_BATCH_USERS = 128  # its default


def measure_train(
    folder: Path, data: str, against: str | None, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """Half of recray's epochs, the library's, the other half of recray's: medians of each, and their ratio. A
    batch has as many tokens as the library's.
    """
    settings, dataset = prepare_data(data, folder / "root", [*SAME, *overrides])
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    settings = training_settings(settings)
    target_device = device("train.use_gpu", gpu=settings.train.use_gpu)
    loop = build_loop(str(dataset.path), settings, target_device)
    sizes = [
        (int(batch.item_BT.count_nonzero()), len(batch.item_BT)) for batch, _, _ in loop.batches.epoch(0)
    ]
    tokens = sum(real for real, _ in sizes)
    if not any(override.startswith("train.batch_tokens=") for override in overrides):
        batch_tokens = round(LIBRARY_BATCH_USERS * tokens / sum(users for _, users in sizes))
        settings = settings.replace("train", batch_tokens=batch_tokens)
        loop = build_loop(str(dataset.path), settings, target_device)
    progress(
        f"{dataset.n_users} users, {dataset.n_items} items; {tokens} tokens an epoch, "
        f"{loop.batches.padding():.1%} padding"
    )
    seconds: list[float] = []

    def run_epochs(first: int) -> None:
        for epoch in range(first, first + EPOCHS):
            started = time.monotonic()
            loop.train_epoch(epoch)
            seconds.append(time.monotonic() - started)
            progress(f"recray: epoch in {seconds[-1]:.2f} s")

    run_epochs(0)
    metrics: Result = {
        "positions": tokens,
        "padding": round(loop.batches.padding(), 4),
        "precision": precision_of(loop),
    }
    if against:
        write_events(dataset, folder / "events.parquet")
        request: peers.LibraryRequest = {**make_request(settings, folder, threads), "epochs": LIBRARY_EPOCHS}
        library_s = peers.run_library(against, request, folder, progress)["epoch_s"]
        progress(f"{against}: epochs in {', '.join(f'{epoch_s:.1f}' for epoch_s in library_s)} s")
        run_epochs(EPOCHS)
        metrics |= {"peer_epoch_s": round(statistics.median(library_s), 2), "peer": against}
        metrics["epoch_ratio"] = round(statistics.median(seconds) / statistics.median(library_s), 4)
        progress(f"epoch ratio {metrics['epoch_ratio']}: 1/{1 / metrics['epoch_ratio']:.1f}")
    metrics |= {"epoch_s": round(statistics.median(seconds), 3), "first_epoch_s": round(seconds[0], 2)}
    return bundle_settings(settings), metrics


def precision_of(loop: Loop) -> str:
    """Precision of a training's products, also for `train.precision` auto. The libraries use float32."""
    return "bfloat16" if loop.criterion.half else "float32"


def make_request(settings: Settings, folder: Path, threads: int) -> peers.LibraryRequest:
    """The request to a baseline library: events, threads and the shape of the network."""
    model, train = settings.model, settings.train
    return {
        "events": str(folder / "events.parquet"),
        "threads": threads,
        "dim": model.dim,
        "blocks": model.blocks,
        "heads": model.heads,
        "history": model.history,
        "dropout": model.dropout,
        "learning_rate": train.learning_rate,
        "seed": train.seed,
        "batch_users": LIBRARY_BATCH_USERS,
    }
