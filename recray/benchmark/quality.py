"""Ranking quality and training time of the model over several seeds, compared with a baseline library that
trains to its own early stop.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recray.benchmark import Result, peers
from recray.benchmark.data import count_users, prepare_data, write_events
from recray.benchmark.train import make_request, precision_of
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import SettingsError
from recray.evaluation import metrics as m
from recray.evaluation.protocol import EvaluationQueries, EvaluationQuery, targets_of
from recray.inference import Filters, Predictor
from recray.model.device import device
from recray.model.network import Network
from recray.stages import ProgressLog
from recray.storage import key_of, sha256_file
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

SEEDS = (0, 1, 2)
K = 10
BATCH = 256
LIBRARY_BATCH_USERS = 64  # half of its default: as good in fewer epochs, which take the time
LIBRARY_PATIENCE = 8
PACE_EPOCHS = 2
RESAMPLES, CONFIDENCE = 2000, 0.95

Clock = Literal["seconds", "cpu_seconds"]
CLOCKS: tuple[Clock, ...] = ("seconds", "cpu_seconds")


class Line(peers.LibraryLine, total=False):
    """A line of a learning curve, by the clocks of the libraries: without the time of validation."""

    steps: int
    loss: float


class NamedLine(Line):
    """A line of the curve of `who`: a library, or `recray_` and the seed."""

    who: str


class TrainedLibrary(peers.LibraryResponse):
    """The response of a library that trained to its early stop.

    pace : factor of its seconds, by clock, that converts them to the current speed of this machine
    taken_from : name of the file that it was read from; None: the library ran
    """

    pace: dict[Clock, float]
    taken_from: str | None


def measure_quality(
    folder: Path, data: str, against: str | None, overrides: list[str], progress: ProgressLog, out: Path
) -> tuple[Mapping[str, Any], Result]:
    """HR@10 and NDCG@10 of the test users, means over seeds. With a baseline library also the paired
    difference of NDCG, and the time to the library's validation NDCG in CPU seconds and in seconds.

    Ranks of every user's test item, and NDCG over time, are written to `folder/keep`, as is the library's
    result. A result of the same request in `out` is reused.
    """
    settings, dataset = prepare_data(data, folder / "root", overrides)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    half = settings.score.precision == "bfloat16"
    if half and settings.train.use_gpu:
        raise SettingsError(
            "score.precision: bfloat16 is for CPUs, and this model is trained and evaluated on a GPU",
            "leave train.use_gpu out",
        )
    keep = folder / "keep"
    keep.mkdir()
    settings = training_settings(settings)
    queries = [
        query
        for batch in EvaluationQueries(dataset, "test").batches(BATCH)
        for query in batch
        if len(targets_of(query, filter_seen=True)) == 1
    ]
    first_number = count_users(dataset)
    users = [int(first_number[query.shard] + query.row) for query in queries]

    ranks = {"user": np.array(users)}
    curves: list[NamedLine] = []
    library_result = (
        _train_library(against, settings, dataset, folder, threads, progress, out) if against else None
    )
    for seed in SEEDS:
        curve, model, precision = _train(dataset, settings.replace("train", seed=seed), progress, seed)
        for name, is_bfloat16 in [(f"recray_{seed}", False), (f"bfloat16_{seed}", True)][: 1 + half]:
            ranks[name] = ranks_of(model, dataset, settings, queries, half=is_bfloat16)
            progress(f"{name}: HR@10 {hr(ranks[name]).mean():.4f}, NDCG@10 {ndcg(ranks[name]).mean():.4f}")
        curves += [{"who": f"recray_{seed}", **line} for line in curve]

    own_ranks = [ranks[f"recray_{seed}"] for seed in SEEDS]
    by_metric = {
        "hr@10": [float(hr(values).mean()) for values in own_ranks],
        "ndcg@10": [float(ndcg(values).mean()) for values in own_ranks],
    }
    metrics: Result = {
        "users": len(queries),
        "items": dataset.n_items,
        "seeds": {name: _round(values) for name, values in by_metric.items()},
    }
    metrics |= {name: round(float(np.mean(values)), 4) for name, values in by_metric.items()} | {
        "train_precision": precision
    }
    if half:
        bfloat16_ndcg = [float(ndcg(ranks[f"bfloat16_{seed}"]).mean()) for seed in SEEDS]
        metrics |= {
            "ndcg@10_bfloat16": round(float(np.mean(bfloat16_ndcg)), 4),
            "bfloat16_over_float32": round(sum(bfloat16_ndcg) / sum(by_metric["ndcg@10"]), 5),
        }
    if against and library_result is not None:
        ranks[against] = np.array([library_result["ranks"].get(str(user), 0) for user in users])
        curves += [
            {
                "who": against,
                "epoch": line["epoch"],
                "seconds": line["seconds"],
                "cpu_seconds": line["cpu_seconds"],
                "validation_ndcg": line["validation_ndcg"],
            }
            for line in library_result["curve"]
        ]
        metrics |= compare_ndcg(own_ranks, ranks[against], against) | {
            "peer_taken_from": library_result["taken_from"]
        }
        is_comparable = selects_as_libraries_do(settings)
        metrics |= time_to_library_ndcg(curves, against, library_result["pace"] if is_comparable else None)
        if not is_comparable:
            progress(
                f"no time to {against}: it selects epochs by one unseen item of each user, and these "
                "settings do not"
            )
        progress(
            f"NDCG@10 difference to {against} {metrics['ndcg_lead']:+.4f} [{metrics['ndcg_lead_low']:+.4f}, "
            f"{metrics['ndcg_lead_high']:+.4f}]"
        )

    pq.write_table(pa.table(ranks), keep / "ranks.parquet")
    pq.write_table(pa.Table.from_pylist(curves), keep / "curves.parquet")
    return bundle_settings(settings), metrics


def hr(ranks: np.ndarray) -> np.ndarray:
    """Whether a target at these ranks (from 1; 0: not ranked) is in the top 10."""
    return ((ranks > 0) & (ranks <= K)).astype(float)


def ndcg(ranks: np.ndarray) -> np.ndarray:
    """NDCG@10 of a single target at these ranks."""
    return np.where(hr(ranks) > 0, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)


def compare_ndcg(own_ranks: list[np.ndarray], library_ranks: np.ndarray, library: str) -> Result:
    """The library's figures, and the paired difference of NDCG with its interval."""
    difference = np.mean([ndcg(ranks) for ranks in own_ranks], 0) - ndcg(library_ranks)
    low, high = m.interval(m.bootstrap_means(difference[:, None], RESAMPLES, 0)[:, 0], CONFIDENCE)
    return {
        "peer": library,
        "peer_hr@10": round(float(hr(library_ranks).mean()), 4),
        "peer_ndcg@10": round(float(ndcg(library_ranks).mean()), 4),
        "ndcg_lead": round(float(difference.mean()), 4),
        "ndcg_lead_low": round(low, 4),
        "ndcg_lead_high": round(high, 4),
    }


def selects_as_libraries_do(settings: Settings) -> bool:
    """Whether the validation NDCG is that of the libraries: of one unseen item for each user."""
    return bool(
        settings.evaluate.protocol == "filter_seen"
        and settings.train.select_by == "protocol"
        and settings.evaluate.k[0] == K
        and settings.split.kind == "leave_one_out"
    )


def time_to_library_ndcg(curves: list[NamedLine], library: str, pace: dict[Clock, float] | None) -> Result:
    """Seconds to the library's best validation NDCG, and their ratio to the library's.

    pace : factor of the library's seconds, by clock, that converts them to the current speed of this machine;
        None: no ratio
    """
    best = max((line for line in curves if line["who"] == library), key=lambda line: line["validation_ndcg"])
    times: Result = {
        "peer_validation_ndcg": round(best["validation_ndcg"], 4),
        "peer_epochs": best["epoch"],
        "peer_pace": pace,
    }
    for clock in CLOCKS:
        reached: list[Any] = []
        for seed in SEEDS:
            as_good = [
                line
                for line in curves
                if line["who"] == f"recray_{seed}" and line["validation_ndcg"] >= best["validation_ndcg"]
            ]
            reached.append(round(as_good[0][clock], 1) if as_good else None)
        times[f"{clock}_to_peer"], times[f"peer_{clock}"] = reached, round(best[clock], 1)
        ratio = (
            None
            if pace is None or None in reached
            else round(sum(reached) / len(reached) / (pace[clock] * best[clock]), 4)
        )
        times["time_to_peer_ratio" if clock == "seconds" else "cpu_time_to_peer_ratio"] = ratio
    return times


def _train(
    dataset: Dataset, settings: Settings, progress: ProgressLog, seed: int
) -> tuple[list[Line], Network, str]:
    """Train to the early stop; the learning curve with its clocks (without validation), the model, and the
    precision of its products.
    """
    loop = build_loop(str(dataset.path), settings, device("train.use_gpu", gpu=settings.train.use_gpu))
    validation_s, validate = {"wall": 0.0, "cpu": 0.0}, loop.validate

    def validate_timed(*arguments: Any) -> tuple[float, float]:
        wall, cpu = time.monotonic(), time.process_time()
        result = validate(*arguments)
        validation_s["wall"] += time.monotonic() - wall
        validation_s["cpu"] += time.process_time() - cpu
        return result

    loop.validate = validate_timed
    curve: list[Line] = []
    wall, cpu = time.monotonic(), time.process_time()
    for epoch_line in loop.run():
        line: Line = {
            **epoch_line,
            "seconds": time.monotonic() - wall - validation_s["wall"],
            "cpu_seconds": time.process_time() - cpu - validation_s["cpu"],
        }
        curve.append(line)
        progress(
            f"seed {seed}, epoch {line['epoch']}: {line['seconds']:.0f} s, loss {line['loss']:.4f}, "
            f"validation NDCG@10 {line['validation_ndcg']:.4f}"
        )
    loop.finish()
    progress(f"seed {seed}: epoch {loop.progress.best_epoch} of {loop.progress.epoch}")
    return curve, loop.ema_model.eval(), precision_of(loop)


def ranks_of(
    model: Network,
    dataset: Dataset,
    settings: Settings,
    queries: list[EvaluationQuery],
    *,
    half: bool = False,
) -> np.ndarray:
    """Rank from 1 of each query's target among the unseen items.

    half : compute in bfloat16
    """
    predictor = Predictor.of(model, dataset, settings.model.popularity_prior_days, bfloat16=half)
    ranks = []
    for first in range(0, len(queries), BATCH):
        batch = queries[first : first + BATCH]
        ranked = predictor.recommend(
            [query.history for query in batch],
            dataset.n_items,
            now=[query.now for query in batch],
            filters=Filters(filter_seen=True),
            context=[query.context for query in batch],
        )
        ranks += [
            1 + int(np.flatnonzero(ranked.item_index[row] == targets_of(query, filter_seen=True)[0])[0])
            for row, query in enumerate(batch)
        ]
    return np.array(ranks)


def _train_library(
    library: str,
    settings: Settings,
    dataset: Dataset,
    folder: Path,
    threads: int,
    progress: ProgressLog,
    out: Path,
) -> TrainedLibrary:
    """Train a baseline library to its own early stop; an interrupted run with the same request is resumed.

    A result in `out` is reused. Its `pace` is the current duration of the first epochs divided by the
    recorded one.
    """
    events = folder / "events.parquet"
    write_events(dataset, events)
    first_number = count_users(dataset)
    validation = EvaluationQueries(
        dataset, "validation", max_users=settings.train.validation_users, seed=settings.split.seed
    )
    users = [int(first_number[shard] + row) for shard, row, _, _ in validation.positions]
    request: peers.LibraryRequest = {
        **make_request(settings, folder, threads),
        "batch_users": LIBRARY_BATCH_USERS,
        "patience": LIBRARY_PATIENCE,
        "validation_users": users,
    }
    key_fields = {name: value for name, value in request.items() if name not in ("events", "threads")}
    key = key_of(library, peers.PINS[peers.ENVIRONMENTS[library]], key_fields, sha256_file(events))
    for file in sorted(out.glob(f"*.{library}-{key}.json")):
        progress(f"{library} result reused: {file}")
        result: peers.LibraryResponse = json.loads(file.read_text())
        first_epochs: peers.LibraryRequest = {**request, "keep": str(folder), "epochs_at_most": PACE_EPOCHS}
        current = peers.run_library(library, first_epochs, folder, progress)["curve"]
        recorded = result["curve"][len(current) - 1]
        pace = {clock: round(current[-1][clock] / recorded[clock], 4) for clock in CLOCKS}
        progress(f"{library}: its first epochs take {pace['seconds']:.2f} times the recorded seconds")
        return {**result, "taken_from": file.name, "pace": pace}
    keep = peers.cache() / "runs" / key
    keep.mkdir(parents=True, exist_ok=True)
    progress(f"{library} trains to its early stop; its state is saved in {keep}")
    result = peers.run_library(library, {**request, "keep": str(keep)}, folder, progress)
    (folder / "keep" / f"{library}-{key}.json").write_text(json.dumps(result) + "\n")
    return {**result, "taken_from": None, "pace": {"seconds": 1.0, "cpu_seconds": 1.0}}


def _round(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
