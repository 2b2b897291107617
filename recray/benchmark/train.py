"""Seconds of a training epoch, beside a peer with the same positions, width, blocks, heads, history and loss."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from recray.benchmark import peers
from recray.benchmark.data import prepared, write_for_peers
from recray.model.device import device
from recray.stages import Say
from recray.training.loop import Loop
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop

EPOCHS, PEER_EPOCHS = 3, 2
SAME = ["train.windows=last", "train.loss=softmax"]  # the peer learns from the last window of each user, over all items
PEER_BATCH_USERS = 128  # its default


def measure_train(folder: Path, data: str, against: str | None, overrides: list[str], say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """Half of our epochs, the peer's, the other half of ours: medians of each, and their ratio. A batch holds as many positions as the peer's."""
    settings, dataset = prepared(data, folder / "root", [*SAME, *overrides])
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    chosen = bundle_settings(settings)
    where = device("train.use_gpu", gpu=settings.train.use_gpu)
    loop = build_loop(str(dataset.path), chosen, where)
    sizes = [(int(batch.item_BT.count_nonzero()), len(batch.item_BT)) for batch, _, _ in loop.batches.epoch(0)]
    positions = sum(real for real, _ in sizes)
    if not any(override.startswith("train.batch_positions=") for override in overrides):
        chosen["train"]["batch_positions"] = round(PEER_BATCH_USERS * positions / sum(users for _, users in sizes))
        loop = build_loop(str(dataset.path), chosen, where)
    say(f"{dataset.n_users} users, {dataset.n_items} items; {positions} positions an epoch, {loop.batches.padding():.1%} padding")
    seconds: list[float] = []

    def epochs(first: int) -> None:
        for epoch in range(first, first + EPOCHS):
            begun = time.monotonic()
            loop.train_epoch(epoch)
            seconds.append(time.monotonic() - begun)
            say(f"recray: epoch in {seconds[-1]:.2f} s")

    epochs(0)
    metrics: dict[str, Any] = {"positions": positions, "padding": round(loop.batches.padding(), 4), "precision": precision_of(loop)}
    if against:
        write_for_peers(dataset, folder / "events.parquet")
        question = peer_question(chosen, folder, threads) | {"epochs": PEER_EPOCHS}
        theirs = peers.ask(against, question, folder, say)["epoch_s"]
        say(f"{against}: epochs in {', '.join(f'{s:.1f}' for s in theirs)} s")
        epochs(EPOCHS)
        metrics |= {"peer_epoch_s": round(statistics.median(theirs), 2), "peer": against}
        metrics["epoch_ratio"] = round(statistics.median(seconds) / statistics.median(theirs), 4)
        say(f"epoch ratio {metrics['epoch_ratio']}: 1/{1 / metrics['epoch_ratio']:.1f}")
    metrics |= {"epoch_s": round(statistics.median(seconds), 3), "first_epoch_s": round(seconds[0], 2)}
    return chosen, metrics


def precision_of(loop: Loop) -> str:
    """Of the products of a training: what `train.precision` auto came to here. The peers' is float32."""
    return "bfloat16" if loop.criterion.half else "float32"


def peer_question(chosen: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """What a peer is told of the network."""
    model, train = chosen["model"], chosen["train"]
    shape = {name: model[name] for name in ("dim", "blocks", "heads", "history", "dropout")}
    rest = {"learning_rate": train["learning_rate"], "seed": train["seed"], "batch_users": PEER_BATCH_USERS}
    return {"events": str(folder / "events.parquet"), "threads": threads, **shape, **rest}
