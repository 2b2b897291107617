"""Ablations: the contribution of each part of the model. Each variant is a training with one part changed.

All variants run on the same test users under both protocols and are compared with the default, paired by
user. Each has one seed, and the intervals are over users alone; other seeds differ by about as much. Each
variant also runs with its attention's logits doubled and halved, as a policy may do (sharper and blunter
attention; with pointwise attention more and less of it).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recray.benchmark import Result
from recray.benchmark.data import NO_RULES, prepare_data
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation.evaluate import Evaluator, select_test_queries
from recray.evaluation.protocol import EvaluationQuery, Ranker
from recray.inference import Filters, Predictor
from recray.model.controls import Controls
from recray.stages import ProgressLog
from recray.training.loop import Loop
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

DEFAULT = "default"
VARIANTS: dict[str, list[str]] = {
    DEFAULT: [],
    "preset sasrec": ["model.preset=sasrec"],
    "preset hstu": ["model.preset=hstu"],
    "cosine scores": ["model.scores=cosine"],
    "dot product scores": ["model.scores=dot"],
    "relative position bias": ["model.relative=true"],
    "no learned positions": ["model.positions=false"],
    "no ages of events": ["model.time_bias=false"],
    "no copy term": ["model.repeat_consumption=false", "model.repeat_by_item=false"],
    "copy term for all items alike": ["model.repeat_consumption=true", "model.repeat_by_item=false"],
    "copy term by item": ["model.repeat_consumption=true", "model.repeat_by_item=true"],
    "no popularity prior": ["model.popularity_prior_days=0"],
    "no item features": ["data.features={}", *NO_RULES],
    "full softmax": ["train.loss=softmax"],
    "sampled softmax": ["train.loss=sampled"],
    "gbce": ["train.loss=gbce"],
    "temperature jitter .2": ["train.temperature_jitter=0.2"],
    "no temperature jitter": ["train.temperature_jitter=0"],
    "trained in float32": ["train.precision=float32"],
    "trained in bfloat16": ["train.precision=bfloat16"],
}
TEMPERATURES = {"sharper": -math.log(2.0), "blunter": math.log(2.0)}  # log temperatures


def measure_ablations(
    folder: Path, data: str | None, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """By variant and protocol: NDCG, the default's paired difference with its interval, and NDCG at half and
    at double temperature.

    A variant that equals the default on these data is skipped. `epoch_s` includes the validation.

    data : as for `prepare_data`; None: the shipped data, with the demo's settings
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    metrics: Result = {"variants": {}}
    reference: dict[str, np.ndarray] = {}
    default: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}
    for name, changed in VARIANTS.items():
        settings, dataset = prepare_data(data, folder / "root", [*overrides, *changed])
        variant_settings = training_settings(settings)
        loop = build_loop(str(dataset.path), variant_settings, torch.device("cpu"))
        facts = _facts(loop, variant_settings)
        if facts == default:
            progress(f"{name}: skipped, it equals the default here")
            continue
        figures, ndcg = _train_variant(loop, settings, dataset, reference)
        if name == DEFAULT:
            reference, config, default = ndcg, bundle_settings(settings), facts
            metrics |= {"users": len(ndcg["with_repeats"]), "items": dataset.n_items}
            metrics |= {f"{protocol}_ndcg": figures[protocol]["ndcg"] for protocol in ndcg}
        metrics["variants"][name] = {"changed": changed, **figures}
        summary = "; ".join(
            f"{protocol} " + ", ".join(f"{metric} {value}" for metric, value in figures[protocol].items())
            for protocol in ndcg
        )
        progress(f"{name}: {summary}; {figures['epochs']} epochs of {figures['epoch_s']} s")
    return config, metrics


def _facts(loop: Loop, settings: Settings) -> Mapping[str, Any]:
    """The parts of a training that the variants change."""
    features = loop.model.items.names
    popularity_prior_days = settings.model.popularity_prior_days if loop.model.shape.prior else 0
    facts = loop.model.shape.to_dict() | {
        "features": features,
        "popularity_prior_days": popularity_prior_days,
    }
    return facts | {
        "loss": loop.criterion.loss,
        "half": loop.criterion.half,
        "jitter": settings.train.temperature_jitter,
    }


def _train_variant(
    loop: Loop, settings: Settings, dataset: Dataset, reference: dict[str, np.ndarray]
) -> tuple[Result, dict[str, np.ndarray]]:
    """Train to the early stop and evaluate; the figures, and NDCG of each user by protocol."""
    seconds = [line["seconds"] for line in loop.run()]
    loop.finish()
    predictor = Predictor.of(loop.ema_model.eval(), dataset, settings.model.popularity_prior_days)
    evaluator = Evaluator(settings, dataset, select_test_queries(settings, dataset))
    rows = evaluator.run(_to_ranker(predictor, 0.0), reference)
    modulated = {
        name: evaluator.run(_to_ranker(predictor, log_temperature), {})
        for name, log_temperature in TEMPERATURES.items()
    }
    headline = f"ndcg@{settings.evaluate.k[0]}"

    figures: Result = {
        "epochs": len(seconds),
        "best_epoch": loop.progress.best_epoch,
        "epoch_s": round(float(np.mean(seconds)), 1),
    }
    figures["validation_ndcg"] = round(loop.progress.best_ndcg, 4)
    # a protocol without test users has no headline
    measured = {protocol: rows[protocol] for protocol in rows if headline in rows[protocol][0]}
    for protocol, (row, _) in measured.items():
        leads = {
            key.removeprefix("model_"): round(row[key], 4)
            for key in ("model_lead", "model_lead_low", "model_lead_high")
            if key in row
        }
        by_temperature = {
            name: round(other_rows[protocol][0][headline], 4) for name, other_rows in modulated.items()
        }
        figures[protocol] = {"ndcg": round(row[headline], 4)} | leads | by_temperature
    return figures, {protocol: ndcg for protocol, (_, ndcg) in measured.items()}


def _to_ranker(predictor: Predictor, log_temperature: float) -> Ranker:
    heads = predictor.model.shape.heads

    def rank(queries: list[EvaluationQuery], k: int, *, filter_seen: bool) -> np.ndarray:
        controls = (
            Controls(log_temperature=torch.full((len(queries), heads), log_temperature))
            if log_temperature
            else None
        )
        return predictor.recommend(
            [query.history for query in queries],
            k,
            now=[query.now for query in queries],
            filters=Filters(filter_seen=filter_seen),
            context=[query.context for query in queries],
            controls=controls,
        ).item_index

    return rank
