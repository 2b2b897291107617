"""Users scored per second, top 10 unseen items, compared with a baseline library's `recommend`."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recray.benchmark import Result, peers
from recray.benchmark.data import prepare_data, write_events
from recray.benchmark.train import SAME, make_request
from recray.bundle import write_bundle
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.model.device import device
from recray.snapshot.score import BucketScorer
from recray.stages import ProgressLog
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop, shape_of

ROUNDS, LIBRARY_ROUNDS = 5, 2
K = 10


def measure_score(
    folder: Path, data: str, against: str | None, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """Half of recray's rounds over all users, the library's, the other half of recray's: medians of each, and
    their ratio.

    A round of recray is the work of the nightly run's actors, from mapped histories to written parts, each in
    a process with its share of the threads. The weights are the initial ones, since they do not matter.
    """
    settings, dataset = prepare_data(data, folder / "root", [*SAME, *overrides])
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    settings = training_settings(settings)
    weights = build_loop(str(dataset.path), settings, torch.device("cpu")).best
    seconds: list[float] = []
    actors = min(settings.score.actors, dataset.n_shards)
    metrics: Result = {"users": dataset.n_users, "actors": actors, "precision": settings.score.precision}
    with scorer(folder, settings, dataset, weights) as score:

        def run_rounds() -> None:
            for _ in range(ROUNDS):
                started = time.monotonic()
                score()
                seconds.append(time.monotonic() - started)
                progress(f"recray: {dataset.n_users / seconds[-1]:.0f} users/s")

        run_rounds()
        if against:
            write_events(dataset, folder / "events.parquet")
            request: peers.LibraryRequest = {
                **make_request(settings, folder, threads),
                "epochs": 1,
                "batches": 1,
                "recommend": LIBRARY_ROUNDS,
            }
            response = peers.run_library(against, request, folder, progress)
            library_rates = [response["users"] / elapsed_s for elapsed_s in response["recommend_s"]]
            progress(f"{against}: {', '.join(f'{rate:.0f}' for rate in library_rates)} users/s")
            run_rounds()
            metrics |= {"peer": against, "peer_users_per_s": round(statistics.median(library_rates), 1)}
    rate = statistics.median(dataset.n_users / elapsed_s for elapsed_s in seconds)
    metrics["users_per_s"] = round(rate, 1)
    if against:
        metrics["users_per_s_ratio"] = round(rate / statistics.median(library_rates), 2)
        progress(f"{metrics['users_per_s_ratio']} times the library's users a second")
    return bundle_settings(settings), metrics


@contextmanager
def scorer(
    folder: Path, settings: Settings, dataset: Dataset, state: dict[str, torch.Tensor]
) -> Iterator[Callable[[], None]]:
    """A function that scores all users with the weights `state`, as the nightly run's actors do, and writes
    the parts below `folder`.

    Raises SettingsError if the settings require a GPU and there is none.
    """
    shape = shape_of(settings.model, dataset)
    bundle = write_bundle(
        folder / "bundle",
        "benchmark",
        dataset=dataset,
        shape=shape,
        state=state,
        settings=bundle_settings(settings),
        metrics={},
    )
    parts = folder / "parts"
    parts.mkdir()
    options = settings.score
    device("score.gpus_per_actor", gpu=options.gpus_per_actor > 0)
    actors = min(options.actors, dataset.n_shards)
    create = partial(
        BucketScorer,
        bundle=str(bundle.path),
        policy=None,
        dataset=str(dataset.path),
        folder=str(parts),
        k=K,
        filter_seen=True,
        rules=options.rules(),
        batch_users=options.batch_users,
        threads=max(torch.get_num_threads() // actors, 1),
        precision=options.precision,
        gpu=options.gpus_per_actor > 0,
    )
    with ProcessPoolExecutor(
        actors, multiprocessing.get_context("spawn"), initializer=_create_actor, initargs=(create,)
    ) as pool:
        yield lambda: list(pool.map(_score, range(dataset.n_shards))).clear()


_actor: BucketScorer | None = None  # of a scoring process


def _create_actor(create: Callable[[], BucketScorer]) -> None:
    global _actor
    _actor = create()


def _score(bucket: int) -> None:
    assert _actor is not None
    _actor({"item": bucket})
