"""What each part of the model is worth: the same data, a training a variant, each with one part changed.

Every variant is asked for the same test users in both settings and held against the default, paired by user. One seed each, and the
intervals are over users alone: other seeds differ by about as much. Each is also asked with its attention's logits doubled and halved,
which a policy will want to do (sharper and blunter attention; with pointwise attention more and less of it).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recray.benchmark.data import NO_RULES, prepared
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation.evaluate import Judge, test_questions
from recray.evaluation.protocol import Question, Ranker
from recray.inference import Filters, Predictor
from recray.model.controls import Controls
from recray.stages import Say
from recray.training.loop import Loop
from recray.training.trainer import bundle_settings
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
    "no copy term": ["model.repeat=false", "model.repeat_by_item=false"],
    "copy term for all items alike": ["model.repeat=true", "model.repeat_by_item=false"],
    "copy term by item": ["model.repeat=true", "model.repeat_by_item=true"],
    "no popularity prior": ["model.prior_days=0"],
    "no item features": ["data.features={}", *NO_RULES],
    "full softmax": ["train.loss=softmax"],
    "sampled softmax": ["train.loss=sampled"],
    "gbce": ["train.loss=gbce"],
    "temperature jitter .2": ["train.temperature_jitter=0.2"],
    "no temperature jitter": ["train.temperature_jitter=0"],
    "trained in float32": ["train.precision=float32"],
    "trained in bfloat16": ["train.precision=bfloat16"],
}
TURNS = {"sharper": -math.log(2.0), "blunter": math.log(2.0)}  # log temperatures


def measure_ablations(folder: Path, data: str | None, overrides: list[str], say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """By variant and setting: NDCG, what the default is ahead by with its interval, and NDCG at half and at double temperature.

    A variant that is the default on these data is left out, and said to be. `epoch_s` are seconds with the validation.

    data : as for `prepared`; None: the data that ships, as the demo has them
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    metrics: dict[str, Any] = {"variants": {}}
    reference: dict[str, np.ndarray] = {}
    default: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for name, changed in VARIANTS.items():
        settings, dataset = prepared(data, folder / "root", [*overrides, *changed])
        chosen = bundle_settings(settings)
        loop = build_loop(str(dataset.path), chosen, torch.device("cpu"))
        facts = _facts(loop, chosen)
        if facts == default:
            say(f"{name}: left out, it is the default here")
            continue
        found, ndcg = _variant(loop, settings, dataset, reference)
        if name == DEFAULT:
            reference, config, default = ndcg, chosen, facts
            metrics |= {"users": len(ndcg["repeats"]), "items": dataset.n_items}
            metrics |= {f"{setting}_ndcg": found[setting]["ndcg"] for setting in ndcg}
        metrics["variants"][name] = {"changed": changed, **found}
        told = "; ".join(f"{setting} " + ", ".join(f"{what} {value}" for what, value in found[setting].items()) for setting in ndcg)
        say(f"{name}: {told}; {found['epochs']} epochs of {found['epoch_s']} s")
    return config, metrics


def _facts(loop: Loop, chosen: dict[str, Any]) -> dict[str, Any]:
    """What a training consists of, as far as the variants change it."""
    features = loop.model.items.names
    prior_days = chosen["model"]["prior_days"] if loop.model.shape.prior else 0
    parts = loop.model.shape.to_dict() | {"features": features, "prior_days": prior_days}
    return parts | {"loss": loop.criterion.loss, "half": loop.criterion.half, "jitter": chosen["train"]["temperature_jitter"]}


def _variant(loop: Loop, settings: Settings, dataset: Dataset, reference: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train to the early stop, and ask; NDCG of each user by setting."""
    seconds = [line["seconds"] for line in loop.run()]
    loop.average.load_state_dict(loop.best)
    predictor = Predictor.of(loop.average.eval(), dataset, settings.model.prior_days)
    judge = Judge(settings, dataset, test_questions(settings, dataset))
    judged = judge.run(_ranker(predictor, 0.0), reference)
    turned = {name: judge.run(_ranker(predictor, turn), {}) for name, turn in TURNS.items()}
    headline = f"ndcg@{settings.evaluate.k[0]}"
    found: dict[str, Any] = {"epochs": len(seconds), "best_epoch": loop.progress.best_epoch, "epoch_s": round(float(np.mean(seconds)), 1)}
    found["validation_ndcg"] = round(loop.progress.best_ndcg, 4)
    asked = {setting: judged[setting] for setting in judged if headline in judged[setting][0]}  # the others have no test user
    for setting, (row, _) in asked.items():
        leads = {key.removeprefix("model_"): round(row[key], 4) for key in ("model_lead", "model_lead_low", "model_lead_high") if key in row}
        by_turn = {name: round(rows[setting][0][headline], 4) for name, rows in turned.items()}
        found[setting] = {"ndcg": round(row[headline], 4)} | leads | by_turn
    return found, {setting: ndcg for setting, (_, ndcg) in asked.items()}


def _ranker(predictor: Predictor, log_temperature: float) -> Ranker:
    heads = predictor.model.shape.heads

    def rank(questions: list[Question], k: int, *, new_only: bool) -> np.ndarray:
        controls = Controls(log_temperature=torch.full((len(questions), heads), log_temperature)) if log_temperature else None
        asks: dict[str, Any] = {"now": [q.now for q in questions], "context": [q.context for q in questions], "controls": controls}
        return predictor.recommend([q.history for q in questions], k, filters=Filters(new_only=new_only), **asks).item_index

    return rank
