"""SASRec of RecTools on a file of events. Runs in the peer's environment, which has no recray: python rectools_peer.py QUESTION.

The question names `events` (Parquet: user, item, order, part), the shape of the network and what is asked: `epochs` to train
and time, `recommend` top 10 for all users and time it. The answer is one JSON line.
"""

import json
import sys
import time
import warnings
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

K = 10


class Clock(Callback):  # type: ignore[misc]
    """Seconds of each epoch, for all copies that are made of it."""

    seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self._begun = time.monotonic()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(time.monotonic() - self._begun)


def main(question: dict[str, Any]) -> dict[str, Any]:
    """Train, then recommend; what was asked for."""
    torch.set_num_threads(question["threads"])
    torch.manual_seed(question["seed"])
    events = pd.read_parquet(question["events"])
    train = events[events.part == 0]
    frame = pd.DataFrame({Columns.User: train.user, Columns.Item: train["item"], Columns.Weight: 1.0})
    frame[Columns.Datetime] = pd.Timestamp("2000-01-01") + pd.to_timedelta(train.order, unit="s")
    dataset = Dataset.construct(frame)
    clock = Clock()

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=question["epochs"],
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
        epochs=question["epochs"],
        recommend_torch_device="cpu",
        get_trainer_func=trainer,
    )
    model.fit(dataset)
    answer: dict[str, Any] = {"epoch_s": clock.seconds}
    if question.get("recommend"):
        users = train.user.unique()
        times = []
        for _ in range(question["recommend"]):
            begun = time.monotonic()
            model.recommend(users, dataset, k=K, filter_viewed=True)
            times.append(time.monotonic() - begun)
        answer |= {"users": len(users), "recommend_s": times}
    return answer


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
