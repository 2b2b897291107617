"""SASRec of RecTools on a file of events. Runs in the peer's environment, which has no recray: python rectools_peer.py QUESTION.

The question names `events` (Parquet: user, item, order, part), the shape of the network, and what is asked for: `epochs` to
train and time, `recommend` rounds of top 10 for all users to time; or, with `patience`, training until the NDCG of
`validation_users` did not grow for so many epochs, then the rank of every user's test item. That takes hours, so the folder
`keep` holds where it stands after each epoch, and the same question goes on from there; `epochs_at_most` asks for the beginning of the
curve alone. The answer is one JSON line.
"""

import copy
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

K = 10
TRAIN, VALIDATION, TEST = 0, 1, 2
RANKED_USERS = 500  # whose whole catalogue is ranked at once


class Clock(Callback):  # type: ignore[misc]
    """Seconds of each epoch, for all copies that are made of it."""

    seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self._begun = time.monotonic()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(time.monotonic() - self._begun)


def main(question: dict[str, Any]) -> dict[str, Any]:
    """What was asked for."""
    torch.set_num_threads(question["threads"])
    torch.manual_seed(question["seed"])
    events = pd.read_parquet(question["events"])
    model, clock = _model(question)
    if "patience" in question:
        return _until_it_stops(model, events, question)
    dataset = _dataset(events[events.part == TRAIN])
    model.fit(dataset)
    answer: dict[str, Any] = {"epoch_s": clock.seconds}
    if question.get("recommend"):
        users = events.user[events.part == TRAIN].unique()
        times = []
        for _ in range(question["recommend"]):
            begun = time.monotonic()
            model.recommend(users, dataset, k=K, filter_viewed=True)
            times.append(time.monotonic() - begun)
        answer |= {"users": len(users), "recommend_s": times}
    return answer


def _dataset(events: pd.DataFrame) -> Dataset:
    frame = pd.DataFrame({Columns.User: events.user, Columns.Item: events["item"], Columns.Weight: 1.0})
    frame[Columns.Datetime] = pd.Timestamp("2000-01-01") + pd.to_timedelta(events.order, unit="s")
    return Dataset.construct(frame)


def _model(question: dict[str, Any]) -> tuple[SASRecModel, Clock]:
    clock = Clock()

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=question.get("epochs", 1),
            limit_train_batches=question.get("batches"),
            callbacks=[clock],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    model = SASRecModel(
        n_factors=question["dim"],
        n_blocks=question["blocks"],
        n_heads=question["heads"],
        session_max_len=question["history"],
        dropout_rate=question["dropout"],
        loss="softmax",
        lr=question["learning_rate"],
        batch_size=question["batch_users"],
        epochs=question.get("epochs", 1),
        recommend_torch_device="cpu",
        get_trainer_func=trainer,
    )
    return model, clock


def _until_it_stops(model: SASRecModel, events: pd.DataFrame, question: dict[str, Any]) -> dict[str, Any]:
    """Epoch by epoch with an early stop; the curve (epoch, seconds and CPU seconds of training so far, NDCG) and the ranks."""
    trained = _dataset(events[events.part == TRAIN])
    users = np.array(question["validation_users"])
    kept = Path(question["keep"]) / "state.npz"
    curve: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    if kept.exists():
        curve, best = _restore(model, trained, kept)
    most = question.get("epochs_at_most", math.inf)
    while len(curve) - _best_epoch(curve) < question["patience"] and len(curve) < most:
        epoch = len(curve) + 1
        torch.manual_seed(question["seed"] * 10_000 + epoch)
        wall, cpu = time.monotonic(), time.process_time()
        model.fit_partial(trained, min_epochs=1, max_epochs=1)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        ndcg = _ndcg(model, trained, events[events.part == VALIDATION], users)
        before = curve[-1] if curve else {"seconds": 0.0, "cpu_seconds": 0.0}
        line = {"epoch": epoch, "seconds": before["seconds"] + wall, "cpu_seconds": before["cpu_seconds"] + cpu, "validation_ndcg": ndcg}
        curve.append(line)
        if _best_epoch(curve) == epoch:
            best = copy.deepcopy(model.torch_model.state_dict())
        _save(model, curve, best, kept)
        print(json.dumps(line), file=sys.stderr, flush=True)
    if len(curve) >= most:
        return {"curve": curve}
    model.torch_model.load_state_dict(best)
    ranks = _ranks(model, _dataset(events[events.part < TEST]), events[events.part == TEST])
    return {"curve": curve, "best_epoch": _best_epoch(curve), "ranks": ranks}


def _best_epoch(curve: list[dict[str, Any]]) -> int:
    return max(curve, key=lambda line: line["validation_ndcg"])["epoch"] if curve else 0


def _save(model: SASRecModel, curve: list[dict[str, Any]], best: dict[str, Any], path: Path) -> None:
    """Weights, best weights, the optimiser's moments and the curve as arrays."""
    arrays: dict[str, Any] = {"curve": np.frombuffer(json.dumps(curve).encode(), np.uint8)}
    moments = {f"{i}/{name}": value for i, state in model.lightning_model.optimizer.state_dict()["state"].items() for name, value in state.items()}
    for what, tensors in (("weights", model.torch_model.state_dict()), ("best", best), ("moments", moments)):
        arrays |= {f"{what}/{name}": tensor.numpy() for name, tensor in tensors.items()}
    scratch = path.with_name("new.npz")
    np.savez(scratch, **arrays)
    os.replace(scratch, path)


def _restore(model: SASRecModel, trained: Dataset, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Put a model where it was saved, as `fit_partial` would have left it; the curve and the best weights."""
    with np.load(path, allow_pickle=False) as arrays:
        found: dict[str, dict[str, Any]] = {"weights": {}, "best": {}, "moments": {}}
        for name in arrays.files:
            what, _, rest = name.partition("/")
            if rest:
                found[what][rest] = torch.from_numpy(arrays[name])
        curve = json.loads(arrays["curve"].tobytes())
    model._build_model_from_dataset(trained)
    model.fit_trainer = copy.deepcopy(model._trainer)
    model.is_fitted = model.lightning_model.is_fitted = True
    model.torch_model.load_state_dict(found["weights"])
    optimizer = model.lightning_model.configure_optimizers()
    moments: dict[int, dict[str, Any]] = {}
    for name, value in found["moments"].items():
        moments.setdefault(int(name.split("/")[0]), {})[name.split("/")[1]] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return curve, found["best"]


def _ndcg(model: SASRecModel, dataset: Dataset, wanted: pd.DataFrame, users: np.ndarray) -> float:
    """Mean NDCG@10 of users with one wanted item each."""
    lists = model.recommend(users, dataset, k=K, filter_viewed=True)
    found = lists.merge(wanted, left_on=[Columns.User, Columns.Item], right_on=["user", "item"])
    return float((1.0 / np.log2(1.0 + found[Columns.Rank])).sum() / len(users))


def _ranks(model: SASRecModel, dataset: Dataset, wanted: pd.DataFrame) -> dict[int, int]:
    """Rank from 1 of each user's wanted item in the whole catalogue without what the user met; 0 for one that is not ranked."""
    ranks = dict.fromkeys(wanted.user.tolist(), 0)
    for first in range(0, len(wanted), RANKED_USERS):
        part = wanted[first : first + RANKED_USERS]
        lists = model.recommend(part.user.to_numpy(), dataset, k=dataset.item_id_map.size, filter_viewed=True)
        found = lists.merge(part, left_on=[Columns.User, Columns.Item], right_on=["user", "item"])
        ranks |= dict(zip(found[Columns.User].tolist(), found[Columns.Rank].tolist(), strict=True))
    return ranks


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
