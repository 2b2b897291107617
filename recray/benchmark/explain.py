"""Whether explanations name what carried an answer: the events that they name are taken out of the history, and as many random ones.

The deletion test of Samek et al. (arXiv 1509.06321), for histories. Events of the item itself are left out of the second figure, since
the copy term makes these easy to name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recray.benchmark.data import trained
from recray.dataset.reader import History
from recray.evaluation.evaluate import test_questions
from recray.evaluation.metrics import bootstrap_means, interval
from recray.evaluation.protocol import Question
from recray.inference import Filters, Predictor
from recray.stages import Say
from recray.training.trainer import bundle_settings

NAMED = 3  # events taken out
ASKED = 400  # users
BATCH = 256


def measure_explain(folder: Path, data: str | None, overrides: list[str], say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """How much lower the first item's score is without the named events and without random ones, means over test users with intervals.

    `repeats`: any first item; `new_only`: the first item that the user has not met. data: as for `prepared`; None: what ships
    """
    settings, dataset, predictor, epochs = trained(data, folder, overrides, say)
    questions = [q for batch in test_questions(settings, dataset).batches(BATCH) for q in batch if len(q.history.item_index) > 2 * NAMED]
    random = np.random.default_rng(0)
    random.shuffle(questions)
    metrics: dict[str, Any] = {"epochs": epochs}
    for setting in ("repeats", "new_only"):
        drops = [_drops(predictor, question, random, new_only=setting == "new_only") for question in questions[:ASKED]]
        values = np.array(drops)
        means = bootstrap_means(values, settings.evaluate.bootstrap, settings.evaluate.seed)
        low, high = interval(means[:, 0] - means[:, 1], settings.evaluate.confidence)
        named, others = values.mean(0)
        found = {"users": len(values), "named": named, "random": others, "difference": named - others, "low": low, "high": high}
        found["named_lowers_more"] = float((values[:, 0] > values[:, 1]).mean())
        metrics[setting] = {name: round(float(value), 4) for name, value in found.items()}
        say(f"{setting}: {named:.3f} lower without the named events, {others:.3f} without random ones [{low:.3f}, {high:.3f}]")
    return bundle_settings(settings), metrics


def _drops(predictor: Predictor, question: Question, random: np.random.Generator, *, new_only: bool) -> tuple[float, float]:
    """How much lower the score of the first item is without the events that carried it most, and without random ones."""
    history = question.history.last(predictor.model.shape.history)
    asks: dict[str, Any] = {"now": question.now, "context": [question.context]}
    item = predictor.recommend([history], 1, filters=Filters(new_only=new_only), **asks).item_index[0]
    told = predictor.explain(history, item, now=question.now, context=question.context)
    named = told.position[np.argsort(-told.drop[0], kind="stable")[:NAMED]]
    others = random.choice(len(history.item_index), NAMED, replace=False)
    asked = [history, *(History(*(np.delete(values, places) for values in history)) for places in (named, others))]
    whole, less, less_at_random = predictor.score(asked, [item] * 3, now=question.now, context=[question.context] * 3)
    return float(whole[0] - less[0]), float(whole[0] - less_at_random[0])
