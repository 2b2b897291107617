"""What calibration and item-to-item evidence add to a trained network."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recray.benchmark import Result
from recray.benchmark.data import prepare_data
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation.evaluate import select_test_queries
from recray.evaluation.metrics import bootstrap_means, interval, per_user
from recray.evaluation.protocol import PROTOCOLS, EvaluationQueries, targets_of
from recray.inference import Filters, Predictor
from recray.model.network import Network
from recray.stages import ProgressLog
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

SEEDS = 3
BATCH = 256
VARIANTS = ("plain", "calibrated", "evidence")


def measure_evidence(
    folder: Path, data: str | None, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """NDCG by variant, protocol and seed, and the paired differences, by user, of the means over the seeds.

    Each of `SEEDS` trainings is evaluated as it is (plain), after calibration (calibrated), and after
    calibration with item-to-item evidence (evidence): the weights are the same.

    data : as for `prepare_data`; None: the shipped data, with the demo's settings
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings, dataset = prepare_data(data, folder / "root", [*overrides, "model.cooccurrence=true"])
    queries = select_test_queries(settings, dataset)
    ndcg: dict[str, list[dict[str, np.ndarray]]] = {variant: [] for variant in VARIANTS}
    facts = []
    for seed in range(SEEDS):
        seeded = training_settings(settings).replace("train", seed=seed)
        started = time.perf_counter()
        loop = build_loop(dataset, seeded, torch.device("cpu"))
        epochs = len(list(loop.run()))
        trained_s, best = time.perf_counter() - started, loop.best
        loop.ema_model.load_state_dict(best)
        ndcg["plain"].append(_ndcg(loop.ema_model, settings, dataset, queries))

        started = time.perf_counter()
        model = loop.finish()
        fact: Result = {"epochs": epochs, "train_s": round(trained_s, 1)}
        fact |= {"finish_s": round(time.perf_counter() - started, 1), "factors": loop.progress.factors}
        facts.append(fact)
        ndcg["evidence"].append(_ndcg(model, settings, dataset, queries))
        calibrated = _calibrate_alone(best, seeded, dataset)
        ndcg["calibrated"].append(_ndcg(calibrated, settings, dataset, queries))
        line = {
            variant: {protocol: round(float(values.mean()), 4) for protocol, values in each[-1].items()}
            for variant, each in ndcg.items()
        }
        progress(f"seed {seed}: {json.dumps(line)}")

    mean = {
        variant: {protocol: np.mean([one[protocol] for one in each], 0) for protocol in PROTOCOLS}
        for variant, each in ndcg.items()
    }
    metrics: Result = {"users": len(mean["plain"]["with_repeats"]), "items": dataset.n_items, "seeds": facts}
    metrics["ndcg"] = {
        variant: {protocol: [round(float(one[protocol].mean()), 5) for one in each] for protocol in PROTOCOLS}
        for variant, each in ndcg.items()
    }
    metrics["differences"] = {
        f"{variant} - {other}": {
            protocol: _difference(mean[variant][protocol] - mean[other][protocol], settings)
            for protocol in PROTOCOLS
        }
        for variant, other in (("calibrated", "plain"), ("evidence", "plain"), ("evidence", "calibrated"))
    }
    progress(json.dumps(metrics["differences"]))
    return bundle_settings(settings), metrics


def _calibrate_alone(best: Mapping[str, Tensor], settings: Settings, dataset: Dataset) -> Network:
    """The same weights, calibrated without item-to-item evidence."""
    loop = build_loop(dataset, settings.replace("model", cooccurrence=False), torch.device("cpu"))
    loop.best = {name: tensor for name, tensor in best.items() if not name.startswith("cooccurrence.")}
    return loop.finish()


def _ndcg(
    model: Network, settings: Settings, dataset: Dataset, queries: EvaluationQueries
) -> dict[str, np.ndarray]:
    """NDCG of each user with a target, by protocol."""
    predictor = Predictor.of(model.eval(), dataset, settings.model.popularity_prior_days)
    k = settings.evaluate.k[0]
    values: dict[str, list[np.ndarray]] = {protocol: [] for protocol in PROTOCOLS}
    for batch in queries.batches(BATCH):
        for protocol in PROTOCOLS:
            filter_seen = protocol == "filter_seen"
            with_targets = [query for query in batch if len(targets_of(query, filter_seen=filter_seen))]
            if not with_targets:
                continue
            lists = predictor.recommend(
                [query.history for query in with_targets],
                k,
                now=[query.now for query in with_targets],
                filters=Filters(filter_seen=filter_seen),
                context=[query.context for query in with_targets],
            ).item_index
            targets = [targets_of(query, filter_seen=filter_seen) for query in with_targets]
            values[protocol].append(per_user(lists, targets, k)["ndcg"])
    return {protocol: np.concatenate(each) for protocol, each in values.items()}


def _difference(values: np.ndarray, settings: Settings) -> list[float]:
    """Mean and bounds of its confidence interval."""
    options = settings.evaluate
    samples = bootstrap_means(values[:, None], options.bootstrap, options.seed)[:, 0]
    return [round(float(number), 5) for number in (values.mean(), *interval(samples, options.confidence))]
