"""SASRec of RecTools on a file of events. Runs in the peer's environment, which has no recray: python rectools_peer.py QUESTION.

The question names `events` (Parquet: user, item, order, part), the shape of the network, and what is asked for: `epochs` to
train and time, `recommend` rounds of top 10 for all users to time; or, with `patience`, training until the NDCG of
`validation_users` did not grow for so many epochs, then the rank of every user's test item. That takes hours, so the folder
`keep` holds where it stands after each epoch, and the same question goes on from there. The answer is one JSON line.
"""

import copy
import json
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
    kept = Path(question["keep"]) / "state.pt"
    state: dict[str, Any] = {"curve": [], "best": -1.0, "best_epoch": 0}
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        _restore(model, trained, state)
    while len(state["curve"]) - state["best_epoch"] < question["patience"]:
        epoch = len(state["curve"]) + 1
        torch.manual_seed(question["seed"] * 10_000 + epoch)
        wall, cpu = time.monotonic(), time.process_time()
        model.fit_partial(trained, min_epochs=1, max_epochs=1)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        ndcg = _ndcg(model, trained, events[events.part == VALIDATION], users)
        before = state["curve"][-1] if state["curve"] else {"seconds": 0.0, "cpu_seconds": 0.0}
        line = {"epoch": epoch, "seconds": before["seconds"] + wall, "cpu_seconds": before["cpu_seconds"] + cpu, "validation_ndcg": ndcg}
        state["curve"].append(line)
        if ndcg > state["best"]:
            state |= {"best": ndcg, "best_epoch": epoch, "best_weights": copy.deepcopy(model.torch_model.state_dict())}
        state |= {"weights": model.torch_model.state_dict(), "optimizer": model.lightning_model.optimizer.state_dict()}
        torch.save(state, kept.with_suffix(".new"))
        os.replace(kept.with_suffix(".new"), kept)
        print(json.dumps(line), file=sys.stderr, flush=True)
    model.torch_model.load_state_dict(state["best_weights"])
    ranks = _ranks(model, _dataset(events[events.part < TEST]), events[events.part == TEST])
    return {"curve": state["curve"], "best_epoch": state["best_epoch"], "ranks": ranks}


def _restore(model: SASRecModel, trained: Dataset, state: dict[str, Any]) -> None:
    """Put a model where the state was saved; as `fit_partial` would have left it."""
    model._build_model_from_dataset(trained)
    model.fit_trainer = copy.deepcopy(model._trainer)
    model.is_fitted = model.lightning_model.is_fitted = True
    model.torch_model.load_state_dict(state["weights"])
    model.lightning_model.configure_optimizers().load_state_dict(state["optimizer"])


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
