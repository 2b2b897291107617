"""Models of the baseline library RecTools, on a file of events: SASRec, HSTU, and SASRec of its fast path.
Runs in the library's environment, which has no recray: python rectools_models_peer.py REQUEST.

The request has `events` (Parquet: user, item, order, time, part), the shape of the network, `model` (sasrec,
hstu or fast), and `lists`, the file for the results. A model trains until the NDCG of the validation users
has not grown for `patience` epochs, or for `seconds_at_most`. Then the weights of the best epoch rank the
items for every user with a test event. The file has users [U], and `with_repeats` and `filter_seen`, the
first items of each list [U, K], 0 where a list is shorter. The result is one JSON line.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import torch
from rectools import Columns
from rectools.fast_transformers import FlatSASRecNet
from rectools.models import HSTUModel, SASRecModel
from rectools_peer import TEST, TRAIN, VALIDATION, build_dataset, model_options

if TYPE_CHECKING:  # the library's environment has no recray
    from recray.benchmark.peers import LibraryLine, LibraryRequest

K = 10
BATCH = 256
EMPTY = 0  # item of a place that a list does not fill


class Ranker(Protocol):
    """A model that is trained by the epoch.

    recommend : items [U, K] of users, with their histories and the time of the list
    """

    def fit_epoch(self) -> None: ...

    def recommend(self, histories: pd.DataFrame, now: pd.Series, *, filter_seen: bool) -> np.ndarray: ...

    @property
    def network(self) -> torch.nn.Module: ...


class Fitted:
    """SASRec or HSTU, trained by the library's own trainer."""

    def __init__(self, request: LibraryRequest, events: pd.DataFrame) -> None:
        kind = {"sasrec": SASRecModel, "hstu": HSTUModel}[request["model"]]
        has_time = request["has_time"]
        options: dict[str, Any] = {"relative_time_attention": has_time} if kind is HSTUModel else {}
        self._asks_time = kind is HSTUModel and has_time
        self._model = kind(**model_options(request, []), **options)
        self._trained = build_dataset(events, request["has_time"])
        self._has_time = has_time

    @property
    def network(self) -> torch.nn.Module:
        network: torch.nn.Module = self._model.torch_model
        return network

    def fit_epoch(self) -> None:
        self._model.fit_partial(self._trained, min_epochs=1, max_epochs=1)

    def recommend(self, histories: pd.DataFrame, now: pd.Series, *, filter_seen: bool) -> np.ndarray:
        context = None
        if self._asks_time:
            context = pd.DataFrame(
                {Columns.User: now.index, Columns.Datetime: pd.to_datetime(now.to_numpy(), unit="s")}
            )
        lists = self._model.recommend(
            now.index.to_numpy(),
            build_dataset(histories, self._has_time),
            k=K,
            filter_viewed=filter_seen,
            on_unsupported_targets="ignore",
            context=context,
        )
        items = np.full((len(now), K), EMPTY, np.int64)
        row = pd.Series(np.arange(len(now)), index=now.index)[lists[Columns.User]].to_numpy()
        items[row, lists[Columns.Rank].to_numpy() - 1] = lists[Columns.Item]
        return items


class Fast:
    """SASRec of the library's fast path, in a plain loop: Adam, cross-entropy over all items at every real
    position.
    """

    def __init__(self, request: LibraryRequest, events: pd.DataFrame) -> None:
        self._history, self._batch_users = request["history"], request["batch_users"]
        self._items = np.sort(events["item"].unique())  # those that it can rank
        self._network = FlatSASRecNet(
            len(self._items),
            request["dim"],
            request["blocks"],
            request["heads"],
            request["history"],
            request["dropout"],
        )
        sequences = self._to_sequences(events, self._history + 1)[0]
        is_trained = (sequences > 0).sum(1) > 1
        self._x, self._y = sequences[is_trained, :-1], sequences[is_trained, 1:]
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=request["learning_rate"])

    @property
    def network(self) -> torch.nn.Module:
        network: torch.nn.Module = self._network
        return network

    def _to_sequences(self, events: pd.DataFrame, length: int) -> tuple[torch.Tensor, np.ndarray]:
        """Item numbers int64 [U, length] on the right, 0 before, and the user of each row."""
        number = np.searchsorted(self._items, events["item"])
        is_known = self._items[np.minimum(number, len(self._items) - 1)] == events["item"]
        known = events[is_known].sort_values(["user", "order"])
        number = number[is_known.to_numpy()][np.lexsort((events[is_known].order, events[is_known].user))] + 1
        users, row = np.unique(known.user, return_inverse=True)
        from_end = known.groupby("user").cumcount(ascending=False).to_numpy()
        sequences = np.zeros((len(users), length), np.int64)
        recent = from_end < length
        sequences[row[recent], length - 1 - from_end[recent]] = number[recent]
        return torch.from_numpy(sequences), users

    def fit_epoch(self) -> None:
        self._network.train()
        for rows in torch.split(torch.randperm(len(self._x)), self._batch_users):
            x, y = self._x[rows], self._y[rows]
            is_real = x > 0
            # logits at real positions only: with padding an epoch takes several times as long
            logits = self._network.encode(x)[is_real] @ self._network.all_item_embeddings().T
            loss = torch.nn.functional.cross_entropy(logits, y[is_real] - 1)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    @torch.no_grad()
    def recommend(self, histories: pd.DataFrame, now: pd.Series, *, filter_seen: bool) -> np.ndarray:
        self._network.eval()
        sequences, users = self._to_sequences(histories[histories.user.isin(now.index)], self._history)
        whole = histories[histories["item"].isin(self._items)].groupby("user")["item"].agg(list)
        row_of_user = pd.Series(np.arange(len(now)), index=now.index)
        items = np.full((len(now), K), EMPTY, np.int64)
        embeddings = self._network.all_item_embeddings()
        for first in range(0, len(users), BATCH):
            part = users[first : first + BATCH]
            scores = self._network.encode_last(sequences[first : first + BATCH]) @ embeddings.T
            if filter_seen:
                for row, user in enumerate(part):
                    scores[row, np.searchsorted(self._items, whole[user])] = -torch.inf
            top = scores.topk(min(K, scores.shape[1]), 1)
            best_items = np.where(top.values.isfinite(), self._items[top.indices], EMPTY)
            items[row_of_user[part].to_numpy(), : best_items.shape[1]] = best_items
        return items


def main(request: LibraryRequest) -> dict[str, Any]:
    """Train, write the lists, and return the learning curve and what it took."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    events = pd.read_parquet(request["events"])
    train = events[events.part == TRAIN]
    model: Ranker = (Fast if request["model"] == "fast" else Fitted)(request, train)

    validation = events[(events.part == VALIDATION) & events.user.isin(request["validation_users"])]
    curve: list[LibraryLine] = []
    best: dict[str, torch.Tensor] = {}
    seconds = cpu_seconds = 0.0
    while len(curve) - best_epoch(curve) < request["patience"] and seconds < request["seconds_at_most"]:
        torch.manual_seed(request["seed"] * 10_000 + len(curve))
        wall, cpu = time.monotonic(), time.process_time()
        model.fit_epoch()
        seconds += time.monotonic() - wall
        cpu_seconds += time.process_time() - cpu
        line: LibraryLine = {
            "epoch": len(curve) + 1,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "validation_ndcg": validate(model, events, validation, filter_seen=request["filter_seen"]),
        }
        curve.append(line)
        if best_epoch(curve) == len(curve):
            best = copy.deepcopy(model.network.state_dict())
        print(json.dumps(line), file=sys.stderr, flush=True)
    model.network.load_state_dict(best)

    histories, now = split_histories(events, events[events.part == TEST])
    started = time.monotonic()
    filtered = model.recommend(histories, now, filter_seen=True)
    recommend_s = time.monotonic() - started
    np.savez(
        request["lists"],
        users=now.index.to_numpy(),
        filter_seen=filtered,
        with_repeats=model.recommend(histories, now, filter_seen=False),
    )
    return {
        "curve": curve,
        "best_epoch": best_epoch(curve),
        "recommend_s": [recommend_s],
        "users": len(now),
        "peak_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> float:
    """Peak resident memory of this process since its program was loaded."""
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(peak[1]) / 1024 if peak else 0.0


def best_epoch(curve: list[LibraryLine]) -> int:
    """The epoch with the highest validation NDCG; 0 before the first."""
    return max(curve, key=lambda line: line["validation_ndcg"])["epoch"] if curve else 0


def split_histories(events: pd.DataFrame, targets: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """The events before the first target of each user, and its time by user."""
    first = targets.groupby("user").agg(order=("order", "min"), time=("time", "min"))
    of_users = events[events.user.isin(first.index)]
    before = of_users[of_users.order.to_numpy() < first.order[of_users.user].to_numpy()]
    return before, first.time[before.user.unique()].sort_index()


def validate(model: Ranker, events: pd.DataFrame, targets: pd.DataFrame, *, filter_seen: bool) -> float:
    """Mean NDCG of the users who have a target."""
    histories, now = split_histories(events, targets)
    items = model.recommend(histories, now, filter_seen=filter_seen)
    seen = histories.groupby("user")["item"].agg(set)
    targets_of_user = targets.groupby("user")["item"].agg(set)
    discount = 1.0 / np.log2(np.arange(2, K + 2))
    values = []
    for row, user in enumerate(now.index):
        relevant = targets_of_user[user] - seen[user] if filter_seen else targets_of_user[user]
        if relevant:
            hits = np.isin(items[row], list(relevant))
            values.append((hits * discount).sum() / discount[: min(len(relevant), K)].sum())
    return float(np.mean(values)) if values else 0.0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
