"""Ranking quality, time and memory beside every baseline: those of the evaluation, two that look at the last
item alone, and models of RecTools, trained in an environment of their own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recray.benchmark import MODELS, Result, peers
from recray.benchmark.catalogue import peak_bytes
from recray.benchmark.data import count_users, prepare_data, write_events
from recray.benchmark.train import make_request
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation.baselines import fit_baselines, fit_last_item_baselines
from recray.evaluation.evaluate import BATCH, Evaluator, Row, select_test_queries, to_ranker
from recray.evaluation.metrics import bootstrap_means, interval
from recray.evaluation.protocol import PROTOCOLS, EvaluationQueries, EvaluationQuery, Ranker, targets_of
from recray.inference import Predictor
from recray.stages import ProgressLog
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

SEEDS = 3
LIBRARY_PATIENCE = 5
LIBRARY_BATCH_USERS = 64  # half of its default: as good in fewer epochs, which take the time
LIBRARY_S = 1800.0  # of training: an epoch that ends later is the last one, and no further seed begins
OWN = "recray"


class Evaluated(NamedTuple):
    """A ranker's row and the NDCG of each user, by protocol; and what it took."""

    rows: dict[str, Row]
    ndcg: dict[str, np.ndarray]
    cost: dict[str, float]


class Timed:
    """A ranker that counts its users and their seconds."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker, self.users, self.seconds = ranker, 0, 0.0

    def __call__(self, queries: list[EvaluationQuery], k: int, /, *, filter_seen: bool) -> np.ndarray:
        started = time.perf_counter()
        lists = self._ranker(queries, k, filter_seen=filter_seen)
        self.seconds += time.perf_counter() - started
        self.users += len(queries)
        return lists


class StoredLists:
    """The lists that a library made, as a ranker. Users without one get the most popular items.

    lists : `users`, numbers as in `write_events`, and by protocol items [U, K]
    """

    def __init__(
        self, lists: Mapping[str, np.ndarray], first_number: np.ndarray, popular: np.ndarray
    ) -> None:
        self._lists, self._first_number, self._popular = lists, first_number, popular

    def __call__(self, queries: list[EvaluationQuery], k: int, /, *, filter_seen: bool) -> np.ndarray:
        users = self._lists["users"]
        items = self._lists["filter_seen" if filter_seen else "with_repeats"]
        number = np.array([self._first_number[query.shard] + query.row for query in queries])
        position = np.minimum(np.searchsorted(users, number), len(users) - 1)
        result = items[position, :k].copy()
        for row in np.flatnonzero((users[position] != number) | ~result.any(1)):
            seen = set(queries[row].history.item_index.tolist()) if filter_seen else set()
            result[row] = [item for item in self._popular if item not in seen][: result.shape[1]]
        return result


def measure_baselines(
    folder: Path, data: str, models: Sequence[str], overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """By ranker and protocol: NDCG and hit rate, the mean over its seeds, and the difference of recray's mean
    to it with a confidence interval over users; seconds and CPU seconds of training, peak memory, and users a
    second.

    Every seed of recray trains in a process of its own. The NDCG of each user is written to `folder/keep`.

    models : of `MODELS`. One whose training takes long has fewer seeds, see `LIBRARY_S`
    """
    settings, dataset = prepare_data(data, folder / "root", overrides)
    settings = training_settings(settings)
    queries = select_test_queries(settings, dataset)
    runs: dict[str, list[Evaluated]] = {OWN: []}
    for seed in range(SEEDS):
        runs[OWN].append(_in_a_process(_train_own, settings.replace("train", seed=seed), dataset.path))
        progress(_line(OWN, runs[OWN][-1]))

    for name, ranker in _fit_baselines(settings, dataset, queries):
        runs[name] = [_evaluate(ranker, settings, dataset, queries)]
        progress(_line(name, runs[name][-1]))
    if models:
        write_events(dataset, folder / "events.parquet", with_time=True)
    for name in models:
        runs[name] = []
        for evaluated in _train_library(name, settings, dataset, queries, folder, progress):
            runs[name].append(evaluated)
            progress(_line(name, evaluated))

    means = {
        name: {protocol: np.mean([run.ndcg[protocol] for run in each], 0) for protocol in PROTOCOLS}
        for name, each in runs.items()
    }
    _write_users(dataset, queries, means, folder)
    metrics: Result = {"items": dataset.n_items, "users": len(queries), "rankers": {}}
    for name, each in runs.items():
        line = _summarize(each, settings)
        if name != OWN:
            line["lead"] = {
                protocol: _difference(means[OWN][protocol] - means[name][protocol], settings)
                for protocol in PROTOCOLS
                if name != "personal frequency" or protocol == "with_repeats"
            }
        metrics["rankers"][name] = line
        if name != OWN:
            progress(f"{OWN} minus {name}: {json.dumps(line['lead'])}")
    return bundle_settings(settings), metrics


def _in_a_process(function: Any, *arguments: Any) -> Any:
    """The result of a function that ran in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _train_own(settings: Settings, path: Path) -> Evaluated:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dataset = Dataset.open(path)
    loop = build_loop(dataset, settings, torch.device("cpu"))
    wall, cpu = time.perf_counter(), time.process_time()
    epochs = len(list(loop.run()))
    model = loop.finish()
    cost = {
        "train_s": time.perf_counter() - wall,
        "train_cpu_s": time.process_time() - cpu,
        "epochs": epochs,
        "peak_memory_mb": peak_bytes() / 2**20,
    }
    predictor = Predictor.of(model.eval(), dataset, settings.model.popularity_prior_days)
    queries = select_test_queries(settings, dataset)
    evaluated = _evaluate(to_ranker(predictor, dataset), settings, dataset, queries)
    return evaluated._replace(cost=evaluated.cost | cost)


def _fit_baselines(
    settings: Settings, dataset: Dataset, queries: EvaluationQueries
) -> Iterator[tuple[str, Ranker]]:
    options = settings.evaluate
    fitted = fit_baselines(dataset, queries, ease_max_items=options.ease_max_items, ease_l2=options.ease_l2)
    for name, ranker in fitted:
        if not isinstance(ranker, str):
            yield name, ranker
    yield from fit_last_item_baselines(dataset, queries)


def _train_library(
    name: str,
    settings: Settings,
    dataset: Dataset,
    queries: EvaluationQueries,
    folder: Path,
    progress: ProgressLog,
) -> Iterator[Evaluated]:
    """Each seed of a library's model, as long as `LIBRARY_S` is not over; at least one."""
    first_number = count_users(dataset)
    validation = EvaluationQueries(
        dataset, "validation", max_users=settings.train.validation_users, seed=settings.split.seed
    )
    popular = np.argsort(-dataset.popularity.total(), kind="stable")
    popular = popular[popular > 0]
    lists_file = folder / "lists.npz"
    seconds = 0.0
    for seed in range(SEEDS):
        if seconds >= LIBRARY_S:
            return
        request: peers.LibraryRequest = {
            **make_request(settings, folder, len(os.sched_getaffinity(0))),
            "seed": seed,
            "model": MODELS[name],
            "batch_users": LIBRARY_BATCH_USERS,
            "patience": LIBRARY_PATIENCE,
            "validation_users": [int(first_number[shard] + row) for shard, row, _, _ in validation.positions],
            "seconds_at_most": LIBRARY_S - seconds,
            "has_time": dataset.has_time,
            "filter_seen": settings.evaluate.protocol == "filter_seen",
            "lists": str(lists_file),
        }
        response = peers.run_library("rectools_models", request, folder, progress)
        last = response["curve"][-1]
        seconds += last["seconds"]
        with np.load(lists_file) as lists:
            ranker = StoredLists(dict(lists), first_number, popular)
        evaluated = _evaluate(ranker, settings, dataset, queries)
        yield evaluated._replace(
            cost={
                "users_per_s": response["users"] / response["recommend_s"][0],
                "train_s": last["seconds"],
                "train_cpu_s": last["cpu_seconds"],
                "epochs": last["epoch"],
                "stopped_early": float(last["epoch"] - response["best_epoch"] >= LIBRARY_PATIENCE),
                "peak_memory_mb": response["peak_memory_mb"],
            }
        )


def _evaluate(ranker: Ranker, settings: Settings, dataset: Dataset, queries: EvaluationQueries) -> Evaluated:
    timed = Timed(ranker)
    results = Evaluator(settings, dataset, queries).run(timed, {})
    return Evaluated(
        {protocol: row for protocol, (row, _) in results.items()},
        {protocol: ndcg for protocol, (_, ndcg) in results.items()},
        {"users_per_s": timed.users / max(timed.seconds, 1e-9)},
    )


def _summarize(runs: Sequence[Evaluated], settings: Settings) -> Result:
    """Means over the seeds, and the NDCG of each."""
    k = settings.evaluate.k[0]
    line: Result = {"seeds": len(runs)}
    for protocol in PROTOCOLS:
        rows = [run.rows[protocol] for run in runs]
        if "skipped" in rows[0]:
            continue
        line[protocol] = {
            metric: round(float(np.mean([row[metric] for row in rows])), 5)
            for metric in (f"ndcg@{k}", f"hr@{k}", f"coverage@{k}")
        }
        line[protocol]["of_seeds"] = [round(row[f"ndcg@{k}"], 5) for row in rows]
    names = runs[0].cost
    return line | {name: round(float(np.mean([run.cost[name] for run in runs])), 1) for name in names}


def _difference(values: np.ndarray, settings: Settings) -> list[float]:
    """Mean and bounds of its confidence interval."""
    if not len(values):
        return []
    options = settings.evaluate
    samples = bootstrap_means(values[:, None], options.bootstrap, options.seed)[:, 0]
    return [round(float(number), 5) for number in (values.mean(), *interval(samples, options.confidence))]


def _write_users(
    dataset: Dataset, queries: EvaluationQueries, means: Mapping[str, Mapping[str, np.ndarray]], folder: Path
) -> None:
    """NDCG of each user by ranker, Parquet, a file for each protocol."""
    (folder / "keep").mkdir()
    user_ids: dict[str, list[Any]] = {protocol: [] for protocol in PROTOCOLS}
    for query in (query for batch in queries.batches(BATCH) for query in batch):
        for protocol in PROTOCOLS:
            if len(targets_of(query, filter_seen=protocol == "filter_seen")):
                user_ids[protocol].append(dataset.shard(query.shard).user_ids[query.row].as_py())
    for protocol, ids in user_ids.items():
        columns = {name: by_protocol[protocol] for name, by_protocol in means.items()}
        pq.write_table(pa.table({"user_id": ids, **columns}), folder / "keep" / f"{protocol}.parquet")


def _line(name: str, evaluated: Evaluated) -> str:
    figures = {
        protocol: round(row["ndcg@10"], 4) for protocol, row in evaluated.rows.items() if "ndcg@10" in row
    }
    cost = {key: round(value, 1) for key, value in evaluated.cost.items()}
    return f"{name}: NDCG@10 {json.dumps(figures)}; {json.dumps(cost)}"
