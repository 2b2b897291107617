"""Users scored per second, top 10 of everything that is new to them, beside a peer's `recommend`."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recray.benchmark import peers
from recray.benchmark.data import prepared, write_for_peers
from recray.benchmark.train import SAME, peer_question
from recray.bundle import write_bundle
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.model.device import device
from recray.scoring.score import ScoreBucket
from recray.stages import Say
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop, shape_of

ROUNDS, PEER_ROUNDS = 5, 2
K = 10


def measure_score(folder: Path, data: str, against: str | None, overrides: list[str], say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """Half of our rounds over all users, the peer's, the other half of ours: medians of each, and their ratio.

    Ours is what the actors of the nightly job do, from mapped histories to written parts, each in a process with its share of the threads.
    What the weights are does not matter, so they are those of the start.
    """
    settings, dataset = prepared(data, folder / "root", [*SAME, *overrides])
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    chosen = bundle_settings(settings)
    weights = build_loop(str(dataset.path), chosen, torch.device("cpu")).best
    seconds: list[float] = []
    actors = min(settings.score.actors, dataset.n_shards)
    metrics: dict[str, Any] = {"users": dataset.n_users, "actors": actors, "precision": settings.score.precision}
    with scorer(folder, settings, dataset, weights) as score:

        def rounds() -> None:
            for _ in range(ROUNDS):
                begun = time.monotonic()
                score()
                seconds.append(time.monotonic() - begun)
                say(f"recray: {dataset.n_users / seconds[-1]:.0f} users/s")

        rounds()
        if against:
            write_for_peers(dataset, folder / "events.parquet")
            question = peer_question(chosen, folder, threads) | {"epochs": 1, "batches": 1, "recommend": PEER_ROUNDS}
            answer = peers.ask(against, question, folder, say)
            theirs = [answer["users"] / s for s in answer["recommend_s"]]
            say(f"{against}: {', '.join(f'{rate:.0f}' for rate in theirs)} users/s")
            rounds()
            metrics |= {"peer": against, "peer_users_per_s": round(statistics.median(theirs), 1)}
    rate = statistics.median(dataset.n_users / s for s in seconds)
    metrics["users_per_s"] = round(rate, 1)
    if against:
        metrics["users_per_s_ratio"] = round(rate / statistics.median(theirs), 2)
        say(f"{metrics['users_per_s_ratio']} times the peer's users a second")
    return chosen, metrics


@contextmanager
def scorer(folder: Path, settings: Settings, dataset: Dataset, state: dict[str, torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Scores all users with the weights `state`, as the actors of the nightly job do, and writes the parts below `folder`.

    Raises SettingsError where they ask for a GPU and there is none.
    """
    chosen = bundle_settings(settings)
    shape = shape_of(chosen["model"], dataset)
    rest = {"features": chosen["data"]["features"], "prior_days": chosen["model"]["prior_days"], "settings": chosen, "metrics": {}}
    bundle = write_bundle(folder / "bundle", "benchmark", dataset=dataset, shape=shape, state=state, **rest)
    parts = folder / "parts"
    parts.mkdir()
    options = settings.score
    device("score.gpus_per_actor", gpu=options.gpus_per_actor > 0)
    actors = min(options.actors, dataset.n_shards)
    arguments = {
        "bundle": str(bundle.path),
        "policy": None,
        "dataset": str(dataset.path),
        "folder": str(parts),
        "k": K,
        "new_only": True,
        "rules": options.rules(),
        "batch_users": options.batch_users,
        "threads": max(torch.get_num_threads() // actors, 1),
        "precision": options.precision,
        "gpu": options.gpus_per_actor > 0,
    }
    with ProcessPoolExecutor(actors, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(arguments,)) as pool:
        yield lambda: list(pool.map(_score, range(dataset.n_shards))).clear()


_actor: ScoreBucket | None = None  # of a process that scores


def _begin(arguments: dict[str, Any]) -> None:
    global _actor
    _actor = ScoreBucket(**arguments)


def _score(bucket: int) -> None:
    assert _actor is not None
    _actor({"item": bucket})
