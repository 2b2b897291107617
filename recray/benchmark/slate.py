"""Ranking of displayed items: the AUC of clicked over other items within an impression, on MIND's layout.

`interactions.parquet` has a row for each displayed item (impression_id, user_id, timestamp, item_id, event
click or impression), `sessions.parquet` the clicks before each impression (impression_id, history),
`items.parquet` the features of some items. Queries are the impressions of the last fifth, each with its
history and time. The model learns from the histories and from earlier clicks, never from displayed items
without a click. Most items have no text here, so this measures the ranking of a slate, not of content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from recray.benchmark import Result
from recray.benchmark.data import NO_RULES, find_data, prepare_data
from recray.config import Settings
from recray.dataset.context import encode_request
from recray.dataset.reader import Dataset, History
from recray.errors import DataError
from recray.evaluation import metrics as m
from recray.inference import Predictor
from recray.stages import ProgressLog
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

TEST_SHARE = 0.2
STEP_S = 3600  # between the clicks of a history, which have no times
BATCH = 128
RESAMPLES, CONFIDENCE = 1000, 0.95


def measure_slate(
    folder: Path, data: str, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """Mean AUC over impressions, its interval, and the AUC of click counts before the test."""
    data_folder = find_data(data)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shown, sessions, cutoff_s = _read(data_folder)
    _write(data_folder, folder, shown, sessions)
    options = [
        f"data.events={folder / 'events.parquet'}",
        f"data.items={folder / 'items.parquet'}",
        "data.available_from=null",
        "data.context=[hour]",
        *NO_RULES,
    ]
    options += [
        "data.features={title: text, category: categorical}",
        f"split.test_from={pd.Timestamp(cutoff_s, unit='s')}",
        *overrides,
    ]
    settings, dataset = prepare_data(data, folder / "root", options, "news")
    loop = build_loop(str(dataset.path), training_settings(settings), torch.device("cpu"))
    for line in loop.run():
        progress(
            f"epoch {line['epoch']}: loss {line['loss']:.4f}, validation NDCG@10 "
            f"{line['validation_ndcg']:.4f}"
        )
    loop.finish()
    test = shown[shown.second >= cutoff_s]
    scores = _score_impressions(loop.ema_model.eval(), dataset, settings, test, sessions)
    counts = shown[(shown.second < cutoff_s) & shown.clicked].item_id.value_counts()
    popular = [
        counts.reindex(slate.item_id).fillna(0).to_numpy()
        for _, slate in test.groupby("impression_id", sort=True)
    ]
    clicked = [slate.clicked.to_numpy() for _, slate in test.groupby("impression_id", sort=True)]
    aucs = np.array(
        [
            (auc(model_scores, is_clicked), auc(popularity, is_clicked))
            for model_scores, popularity, is_clicked in zip(scores, popular, clicked, strict=True)
            if is_clicked.any() and not is_clicked.all()
        ]
    )
    low, high = m.interval(m.bootstrap_means(aucs[:, :1], RESAMPLES, 0)[:, 0], CONFIDENCE)
    metrics = {
        "impressions": len(aucs),
        "auc": aucs[:, 0].mean(),
        "auc_low": low,
        "auc_high": high,
        "popular_auc": aucs[:, 1].mean(),
    }
    return bundle_settings(settings), {name: round(float(value), 4) for name, value in metrics.items()}


def auc(scores: np.ndarray, clicked: np.ndarray) -> float:
    """Probability that a clicked item ranks above one that is not, ties count half (Mann and Whitney 1947).
    There must be items of both kinds.
    """
    ranks = rankdata(scores)
    hits = int(clicked.sum())
    return float((ranks[clicked].sum() - hits * (hits + 1) / 2) / (hits * (len(scores) - hits)))


def _read(data_folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Displayed items, sessions, and the cutoff in seconds, after which impressions are queries."""
    try:
        shown = pd.read_parquet(
            data_folder / "interactions.parquet",
            columns=["impression_id", "user_id", "item_id", "timestamp", "event"],
        )
        sessions = pd.read_parquet(
            data_folder / "sessions.parquet", columns=["impression_id", "user_id", "timestamp", "history"]
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{data_folder} does not have the layout of MIND: {error}",
            "benchmark slate reads interactions, sessions and items .parquet",
        ) from None
    for table in (shown, sessions):
        table["second"] = table.timestamp.astype("datetime64[s]").astype("int64")
    shown["clicked"] = shown.event == "click"
    return shown, sessions, int(sessions.second.quantile(1 - TEST_SHARE))


def _write(data_folder: Path, folder: Path, shown: pd.DataFrame, sessions: pd.DataFrame) -> None:
    """Write all items and the events, which are each user's first history and all clicks; training ends at
    the cutoff.
    """
    first = sessions.loc[sessions.groupby("user_id").second.idxmin()]
    past = (
        first.assign(begin=first.second - STEP_S * (first.history.map(len) + 1))
        .explode("history")
        .dropna(subset="history")
    )
    past["second"] = past.begin + STEP_S * past.groupby("user_id").cumcount()
    clicks = shown[shown.clicked]
    events = pd.concat(
        [
            past.rename(columns={"history": "item_id"})[["user_id", "item_id", "second"]],
            clicks[["user_id", "item_id", "second"]],
        ]
    )
    events["timestamp"] = pd.to_datetime(events.second, unit="s")
    events[["user_id", "item_id", "timestamp"]].to_parquet(folder / "events.parquet", index=False)
    described = pd.read_parquet(
        data_folder / "items.parquet", columns=["item_id", "title", "category"]
    ).drop_duplicates("item_id")
    all_items = pd.DataFrame(
        {"item_id": pd.unique(pd.concat([events.item_id, shown.item_id, described.item_id]))}
    )
    all_items.merge(described.astype({"category": "string"}), on="item_id", how="left").to_parquet(
        folder / "items.parquet", index=False
    )


def _score_impressions(
    model: Any, dataset: Dataset, settings: Settings, test: pd.DataFrame, sessions: pd.DataFrame
) -> list[np.ndarray]:
    """Scores of the items of each impression, in the order of the impressions."""
    predictor = Predictor.of(model, dataset, settings.model.popularity_prior_days)
    before = sessions.set_index("impression_id").history
    slates = list(test.groupby("impression_id", sort=True))
    scores: list[np.ndarray] = []
    for start in range(0, len(slates), BATCH):
        histories, candidates, moments = [], [], []
        for number, slate in slates[start : start + BATCH]:
            second = int(slate.second.iloc[0])
            items = predictor.vocabulary.index_of(list(before.loc[number]))
            times = second - STEP_S * np.arange(len(items), 0, -1)
            histories.append(
                History(items, np.zeros(len(items), np.int64), times, np.ones(len(items), np.float32))
            )
            candidates.append(predictor.vocabulary.index_of(slate.item_id.tolist()))
            moments.append(second)
        contexts = [encode_request(dataset.context, {}, second) for second in moments]
        scores += predictor.score(histories, candidates, now=moments, context=contexts)
    return scores
