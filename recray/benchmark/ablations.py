"""What each part of the model is worth: the same data, a training a variant, each with one thing changed.

Every variant is asked for the same test users in both settings and held against the default, paired by user; one seed each, so a
difference within its interval says nothing. Each is also asked with attention made sharper and blunter than it was trained, which a
policy will want to do.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recray.benchmark.data import prepared
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation.evaluate import Judge, test_questions
from recray.evaluation.protocol import SETTINGS, Question, Ranker
from recray.inference import Filters, Predictor
from recray.model.controls import Controls
from recray.stages import Say
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop

DEFAULT = "default"
VARIANTS: dict[str, list[str]] = {
    DEFAULT: [],
    "preset sasrec": ["model.preset=sasrec"],
    "preset hstu": ["model.preset=hstu"],
    "cosine scores": ["model.scores=cosine"],
    "relative position bias": ["model.relative=true"],
    "no learned positions": ["model.positions=false"],
    "no time bias": ["model.time_bias=false"],
    "no copy term": ["model.repeat=false"],
    "copy term by item": ["model.repeat_by_item=true"],
    "no popularity prior": ["model.prior_days=0"],
    "no item features": ["data.features={}"],
    "sampled softmax": ["train.loss=sampled"],
    "gbce": ["train.loss=gbce"],
    "temperature jitter .2": ["train.temperature_jitter=0.2"],
    "trained in float32": ["train.precision=float32"],
}
TURNS = {"sharper": -math.log(2.0), "blunter": math.log(2.0)}  # log temperatures: half and double


def measure_ablations(folder: Path, data: str | None, overrides: list[str], say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """By variant and setting: NDCG, what the default is ahead by with its interval, and NDCG at half and at double temperature.

    data : as for `prepared`; None: the data that ships, as the demo has them
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    metrics: dict[str, Any] = {"variants": {}}
    reference: dict[str, np.ndarray] = {}
    chosen: dict[str, Any] = {}
    for name, changed in VARIANTS.items():
        settings, dataset = prepared(data, folder / "root", [*overrides, *changed])
        found, ndcg = _variant(settings, dataset, reference)
        if name == DEFAULT:
            reference, chosen = ndcg, bundle_settings(settings)
            metrics |= {"users": len(ndcg["repeats"]), "items": dataset.n_items}
            metrics |= {f"{setting}_ndcg": found[setting]["ndcg"] for setting in SETTINGS}
        metrics["variants"][name] = found
        told = "; ".join(f"{setting} " + ", ".join(f"{what} {value}" for what, value in found[setting].items()) for setting in SETTINGS)
        say(f"{name}: {told}; {found['epochs']} epochs of {found['epoch_s']} s")
    return chosen, metrics


def _variant(settings: Settings, dataset: Dataset, reference: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train to the early stop, and ask; NDCG of each user by setting."""
    chosen = bundle_settings(settings)
    loop = build_loop(str(dataset.path), chosen, torch.device("cpu"))
    started = time.monotonic()
    epochs = len(list(loop.run()))
    seconds = time.monotonic() - started
    loop.average.load_state_dict(loop.best)
    predictor = Predictor.of(loop.average.eval(), dataset, chosen["model"]["prior_days"])
    judge = Judge(settings, dataset, test_questions(settings, dataset))
    judged = judge.run(_ranker(predictor, 0.0), reference)
    turned = {name: judge.run(_ranker(predictor, turn), {}) for name, turn in TURNS.items()}
    headline = f"ndcg@{settings.evaluate.k[0]}"
    found: dict[str, Any] = {"epochs": epochs, "best_epoch": loop.progress.best_epoch, "epoch_s": round(seconds / epochs, 1)}
    found["validation_ndcg"] = round(loop.progress.best_ndcg, 4)
    for setting, (row, _) in judged.items():
        leads = {key.removeprefix("model_"): round(row[key], 4) for key in ("model_lead", "model_lead_low", "model_lead_high") if key in row}
        by_turn = {name: round(rows[setting][0][headline], 4) for name, rows in turned.items()}
        found[setting] = {"ndcg": round(row[headline], 4)} | leads | by_turn
    return found, {setting: ndcg for setting, (_, ndcg) in judged.items()}


def _ranker(predictor: Predictor, log_temperature: float) -> Ranker:
    heads = predictor.model.shape.heads

    def rank(questions: list[Question], k: int, *, new_only: bool) -> np.ndarray:
        controls = Controls(log_temperature=torch.full((len(questions), heads), log_temperature)) if log_temperature else None
        asks: dict[str, Any] = {"now": [q.now for q in questions], "context": [q.context for q in questions], "controls": controls}
        return predictor.recommend([q.history for q in questions], k, filters=Filters(new_only=new_only), **asks).item_index

    return rank
