"""Deletion test of explanations (Samek et al., arXiv 1509.06321): the events that an explanation names are
removed from the history, and as many random ones.

The second figure leaves out events of the item itself, which the repeat-consumption head makes easy to name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recray.benchmark import Result
from recray.benchmark.data import train_model
from recray.dataset.reader import History
from recray.evaluation.evaluate import select_test_queries
from recray.evaluation.metrics import bootstrap_means, interval
from recray.evaluation.protocol import EvaluationQuery
from recray.inference import Filters, Predictor
from recray.inference.explain import explain
from recray.stages import ProgressLog
from recray.training.plan import bundle_settings

NAMED = 3  # removed events
USERS = 400
BATCH = 256


def measure_explain(
    folder: Path, data: str | None, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """The drop of the first item's score without the named events and without random ones, means over test
    users with intervals.

    `with_repeats`: any first item; `filter_seen`: the first unseen item.

    data : as for `prepare_data`; None: the shipped data
    """
    settings, dataset, predictor, epochs = train_model(data, folder, overrides, progress)
    queries = [
        query
        for batch in select_test_queries(settings, dataset).batches(BATCH)
        for query in batch
        if len(query.history.item_index) > 2 * NAMED
    ]
    random = np.random.default_rng(0)
    random.shuffle(queries)
    metrics: Result = {"epochs": epochs}
    for protocol in ("with_repeats", "filter_seen"):
        drops = [
            _measure_drops(predictor, query, random, filter_seen=protocol == "filter_seen")
            for query in queries[:USERS]
        ]
        values = np.array(drops)
        means = bootstrap_means(values, settings.evaluate.bootstrap, settings.evaluate.seed)
        low, high = interval(means[:, 0] - means[:, 1], settings.evaluate.confidence)
        named, at_random = values.mean(0)
        figures = {
            "users": len(values),
            "named": named,
            "random": at_random,
            "difference": named - at_random,
            "low": low,
            "high": high,
        }
        figures["named_lowers_more"] = float((values[:, 0] > values[:, 1]).mean())
        metrics[protocol] = {name: round(float(value), 4) for name, value in figures.items()}
        progress(
            f"{protocol}: {named:.3f} lower without the named events, {at_random:.3f} without random ones "
            f"[{low:.3f}, {high:.3f}]"
        )
    return bundle_settings(settings), metrics


def _measure_drops(
    predictor: Predictor, query: EvaluationQuery, random: np.random.Generator, *, filter_seen: bool
) -> tuple[float, float]:
    """The drop of the first item's score without the named events, and without random ones."""
    history = query.history.last(predictor.model.shape.history)
    filters = Filters(filter_seen=filter_seen)
    first = predictor.recommend([history], 1, now=query.now, filters=filters, context=[query.context])
    item = first.item_index[0]
    explanation = explain(predictor, history, item, now=query.now, context=query.context)
    named = explanation.position[np.argsort(-explanation.drop[0], kind="stable")[:NAMED]]
    at_random = random.choice(len(history.item_index), NAMED, replace=False)
    histories = [
        history,
        *(History(*(np.delete(values, positions) for values in history)) for positions in (named, at_random)),
    ]
    whole, without_named, without_random = predictor.score(
        histories, [item] * 3, now=query.now, context=[query.context] * 3
    )
    return float(whole[0] - without_named[0]), float(whole[0] - without_random[0])
