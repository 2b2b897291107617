"""SASRec of the baseline library RecTools, on a file of events. Runs in the library's environment, which has
no recray: python rectools_peer.py REQUEST.

The request has `events` (Parquet: user, item, order, part), the shape of the network, and the work: `epochs`
to train and time, and `recommend` rounds of the top 10 for all users to time. Or, with `patience`: training
until the NDCG of `validation_users` has not grown for so many epochs, and the rank of every user's test item.
That takes hours, so the state is saved in the folder `keep` after each epoch, and the same request resumes
from it. `epochs_at_most` ends the curve early. The result is one JSON line.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

if TYPE_CHECKING:  # the library's environment has no recray
    from recray.benchmark.peers import LibraryLine, LibraryRequest

K = 10
TRAIN, VALIDATION, TEST = 0, 1, 2
RANKED_USERS = 500  # whose whole catalogue is ranked at once

State = dict[str, torch.Tensor]
"""Weights of a network, or moments of its optimizer, by name."""


class Clock(Callback):  # type: ignore[misc]
    """Seconds of each epoch, shared by all copies of the callback."""

    seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(time.monotonic() - self._started)


def main(request: LibraryRequest) -> Mapping[str, Any]:
    """Train, and return what the request asks for."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    events = pd.read_parquet(request["events"])
    model, clock = _build_model(request)
    if "patience" in request:
        return _train_to_early_stop(model, events, request)
    dataset = build_dataset(events[events.part == TRAIN])
    model.fit(dataset)
    response = {"epoch_s": clock.seconds}
    if request.get("recommend"):
        users = events.user[events.part == TRAIN].unique()
        times = []
        for _ in range(request["recommend"]):
            started = time.monotonic()
            model.recommend(users, dataset, k=K, filter_viewed=True)
            times.append(time.monotonic() - started)
        return {**response, "users": len(users), "recommend_s": times}
    return response


def build_dataset(events: pd.DataFrame, has_time: bool = False) -> Dataset:
    """The library's data set of events, by their times, or by their order alone."""
    frame = pd.DataFrame({Columns.User: events.user, Columns.Item: events["item"], Columns.Weight: 1.0})
    seconds = events.time if has_time else events.order
    frame[Columns.Datetime] = pd.Timestamp(0 if has_time else "2000-01-01") + pd.to_timedelta(
        seconds, unit="s"
    )
    return Dataset.construct(frame)


def _build_trainer(request: LibraryRequest, callbacks: list[Callback]) -> Callable[[], Trainer]:
    """A function that returns the library's trainer: on the CPU, silent, without files."""
    return lambda: Trainer(
        max_epochs=request.get("epochs", 1),
        limit_train_batches=request.get("batches"),
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _build_model(request: LibraryRequest) -> tuple[SASRecModel, Clock]:
    clock = Clock()
    model = SASRecModel(epochs=request.get("epochs", 1), **model_options(request, [clock]))
    return model, clock


def model_options(request: LibraryRequest, callbacks: list[Callback]) -> dict[str, Any]:
    """The arguments of a model of the library: the shape of the network, and its trainer."""
    return {
        "n_factors": request["dim"],
        "n_blocks": request["blocks"],
        "n_heads": request["heads"],
        "session_max_len": request["history"],
        "dropout_rate": request["dropout"],
        "loss": "softmax",
        "lr": request["learning_rate"],
        "batch_size": request["batch_users"],
        "recommend_torch_device": "cpu",
        "get_trainer_func": _build_trainer(request, callbacks),
    }


def _train_to_early_stop(
    model: SASRecModel, events: pd.DataFrame, request: LibraryRequest
) -> Mapping[str, Any]:
    """Train by epoch with an early stop; the curve (epoch, seconds and CPU seconds of training so far, NDCG)
    and the ranks.
    """
    trained = build_dataset(events[events.part == TRAIN])
    users = np.array(request["validation_users"])
    state_file = Path(request["keep"]) / "state.npz"
    curve: list[LibraryLine] = []
    best: State = {}
    if state_file.exists():
        curve, best = _restore(model, trained, state_file)
    max_epochs = request.get("epochs_at_most", math.inf)
    while len(curve) - _best_epoch(curve) < request["patience"] and len(curve) < max_epochs:
        epoch = len(curve) + 1
        torch.manual_seed(request["seed"] * 10_000 + epoch)
        wall, cpu = time.monotonic(), time.process_time()
        model.fit_partial(trained, min_epochs=1, max_epochs=1)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        ndcg = _measure_ndcg(model, trained, events[events.part == VALIDATION], users)
        line: LibraryLine = {
            "epoch": epoch,
            "seconds": wall + (curve[-1]["seconds"] if curve else 0.0),
            "cpu_seconds": cpu + (curve[-1]["cpu_seconds"] if curve else 0.0),
            "validation_ndcg": ndcg,
        }
        curve.append(line)
        if _best_epoch(curve) == epoch:
            best = copy.deepcopy(model.torch_model.state_dict())
        _save(model, curve, best, state_file)
        print(json.dumps(line), file=sys.stderr, flush=True)
    if len(curve) >= max_epochs:
        return {"curve": curve}
    model.torch_model.load_state_dict(best)
    ranks = _rank_targets(model, build_dataset(events[events.part < TEST]), events[events.part == TEST])
    return {"curve": curve, "best_epoch": _best_epoch(curve), "ranks": ranks}


def _best_epoch(curve: list[LibraryLine]) -> int:
    return max(curve, key=lambda line: line["validation_ndcg"])["epoch"] if curve else 0


def _save(model: SASRecModel, curve: list[LibraryLine], best: State, path: Path) -> None:
    """Save weights, best weights, the optimizer's moments and the curve as arrays."""
    arrays: dict[str, Any] = {"curve": np.frombuffer(json.dumps(curve).encode(), np.uint8)}
    moments = {
        f"{i}/{name}": value
        for i, state in model.lightning_model.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    for group, tensors in (("weights", model.torch_model.state_dict()), ("best", best), ("moments", moments)):
        arrays |= {f"{group}/{name}": tensor.numpy() for name, tensor in tensors.items()}
    scratch = path.with_name("new.npz")
    np.savez(scratch, **arrays)
    os.replace(scratch, path)


def _restore(model: SASRecModel, trained: Dataset, path: Path) -> tuple[list[LibraryLine], State]:
    """Restore a saved model to its state after `fit_partial`; the curve and the best weights."""
    with np.load(path, allow_pickle=False) as arrays:
        groups: dict[str, State] = {"weights": {}, "best": {}, "moments": {}}
        for name in arrays.files:
            group, _, rest = name.partition("/")
            if rest:
                groups[group][rest] = torch.from_numpy(arrays[name])
        curve = json.loads(arrays["curve"].tobytes())
    model._build_model_from_dataset(trained)
    model.fit_trainer = copy.deepcopy(model._trainer)
    model.is_fitted = model.lightning_model.is_fitted = True
    model.torch_model.load_state_dict(groups["weights"])
    optimizer = model.lightning_model.configure_optimizers()
    moments: dict[int, State] = {}
    for name, value in groups["moments"].items():
        moments.setdefault(int(name.split("/")[0]), {})[name.split("/")[1]] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return curve, groups["best"]


def _measure_ndcg(model: SASRecModel, dataset: Dataset, targets: pd.DataFrame, users: np.ndarray) -> float:
    """Mean NDCG@10 of users with one target each."""
    lists = model.recommend(users, dataset, k=K, filter_viewed=True)
    hits = lists.merge(targets, left_on=[Columns.User, Columns.Item], right_on=["user", "item"])
    return float((1.0 / np.log2(1.0 + hits[Columns.Rank])).sum() / len(users))


def _rank_targets(model: SASRecModel, dataset: Dataset, targets: pd.DataFrame) -> dict[int, int]:
    """Rank from 1 of each user's target among the unseen items of the whole catalogue; 0 for a target that is
    not ranked.
    """
    ranks = dict.fromkeys(targets.user.tolist(), 0)
    for first in range(0, len(targets), RANKED_USERS):
        part = targets[first : first + RANKED_USERS]
        lists = model.recommend(part.user.to_numpy(), dataset, k=dataset.item_id_map.size, filter_viewed=True)
        hits = lists.merge(part, left_on=[Columns.User, Columns.Item], right_on=["user", "item"])
        ranks |= dict(zip(hits[Columns.User].tolist(), hits[Columns.Rank].tolist(), strict=True))
    return ranks


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
