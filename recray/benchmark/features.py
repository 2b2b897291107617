"""The contribution of each feature column, and the ranking of cold items.

A tenth of the items, selected by a hash of their ids, is removed from all events before the test. A model of
ids alone, one with each column, and one with all columns are trained alike. They are evaluated on warm and on
cold targets of the test; the latter in the whole catalogue and among the cold items alone. The model of all
columns is evaluated with several values of `score.cold_item_boost` and `score.cold_item_share`, which shows
their cost for warm targets. The figures of the run are those of the largest share that costs the validation
users, whose targets are all warm, at most `BUDGET` of their NDCG. So the test targets have no influence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from recray.benchmark import Result
from recray.benchmark.data import NO_RULES, prepare_data
from recray.config import ScoreSettings, Settings
from recray.dataset.context import CLOCK
from recray.dataset.reader import Dataset
from recray.evaluation import metrics as m
from recray.evaluation.protocol import EvaluationQueries, EvaluationQuery, targets_of
from recray.inference import Filters, Predictor, Rules
from recray.stages import ProgressLog
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

CONFIGS = {"ml-1m": "video"}  # with features; the other benchmarks use another config
K = 10
BATCH = 256
ONE_IN = 10  # items become cold
ALONE: dict[str, float] = {}
PLACES = (  # what lets cold items into the lists
    ALONE,
    *({"cold_item_boost": boost} for boost in (3.0, 3.5, 4.0, 4.5)),
    *({"cold_item_share": share} for share in (0.25, 0.5, 0.75, 1.0)),
)
BUDGET = 0.02  # share of the validation NDCG that cold items may cost
RESAMPLES, CONFIDENCE = 2000, 0.95


def measure_features(
    folder: Path, data: str, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """By variant: HR@10 and NDCG@10 of warm targets, HR@10 of cold targets, and its ratio to chance with an
    interval over users.
    """
    config = CONFIGS.get(Path(data).name)
    settings, whole = prepare_data(data, folder / "whole", overrides, config)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    write_without_cold_items(whole, folder / "events.parquet")
    columns = {name: name for name in pq.read_schema(folder / "events.parquet").names}
    split = (
        []
        if whole.cut_s("test") is None
        else [f"split.{part}_from={_to_timestamp(whole.cut_s(part))}" for part in ("validation", "test")]
    )
    options = [
        *overrides,
        *NO_RULES,
        f"data.events={folder / 'events.parquet'}",
        f"data.columns={columns}",
        *split,
    ]
    options.append(f"data.context=[{', '.join(name for name in settings.data.context if name in CLOCK)}]")
    features = dict(settings.data.features)
    variants = {
        "ids": {},
        **{f"ids + {name}": {name: kind} for name, kind in features.items()},
        "all": features,
    }
    metrics: Result = {"items": whole.n_items, "variants": {}}
    for name, columns_used in variants.items():
        settings, dataset = prepare_data(
            data,
            folder / "root",
            [
                *options,
                f"data.features={columns_used}",
                *([] if columns_used else ["data.items=null", "data.available_from=null"]),
            ],
            config,
        )
        figures, by_place = _train_variant(
            dataset, training_settings(settings), PLACES if name == "all" else PLACES[:1]
        )
        metrics["variants"][name] = figures
        progress(f"{name}: " + ", ".join(f"{metric} {value}" for metric, value in figures.items()))

    metrics["cold_items"] = by_place
    best = metrics["variants"]["all"]
    metrics |= {
        f"{metric}_gain": round(best[metric] - metrics["variants"]["ids"][metric], 4)
        for metric in ("hr@10", "ndcg@10")
    }
    selected = [
        line
        for line in by_place
        if "cold_item_boost" not in line
        and line["validation_ndcg"] >= (1 - BUDGET) * by_place[0]["validation_ndcg"]
    ][-1]
    metrics |= {
        name: selected[name]
        for name in (
            "cold_item_share",
            "hr@10",
            "ndcg@10",
            "cold_hr@10",
            "cold_lift",
            "cold_lift_low",
            "cold_lift_high",
        )
        if name in selected
    }
    return bundle_settings(settings), metrics


def is_cold(item_id: Any) -> bool:
    """Whether an item is removed before the test."""
    return bool(xxhash.xxh64_intdigest(f"cold\0{item_id}".encode()) % ONE_IN == 0)


def write_without_cold_items(dataset: Dataset, path: Path) -> None:
    """Write the dataset's events without those of cold items before the test, in recray's own columns."""
    cold = np.array([False, *(is_cold(item) for item in dataset.items["item_id"].to_pylist())])
    clock = "timestamp" if dataset.clock == "timestamp" else "position"
    parts = []
    for shard in dataset.shards():
        owner = np.repeat(np.arange(len(shard)), np.diff(shard.offsets))
        position = np.arange(len(owner)) - shard.offsets[owner]
        keep = ~cold[shard.item_index] | (position >= shard.split[owner, 2])
        times = pa.array(shard.timestamp_s[keep])
        columns = {
            "user_id": shard.user_ids.take(pa.array(owner[keep])),
            "item_id": dataset.items["item_id"].combine_chunks().take(pa.array(shard.item_index[keep] - 1)),
            clock: times.cast(pa.timestamp("s")).cast(pa.timestamp("us")) if clock == "timestamp" else times,
            "event": pa.array(dataset.event_types).take(pa.array(shard.event_index[keep])),
            "value": pa.array(shard.value[keep]),
            "basket": pa.array(shard.basket[keep].astype(np.int64)),
        }
        parts.append(pa.table(columns))
    pq.write_table(pa.concat_tables(parts), path)


def _to_timestamp(time_s: int | None) -> str:
    return str(np.datetime64(int(time_s or 0), "s"))


def _train_variant(
    dataset: Dataset, settings: Settings, places: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Train a model to its early stop; its figures, and the figures with each of `PLACES`."""
    loop = build_loop(str(dataset.path), settings, torch.device("cpu"))
    epochs = [line["epoch"] for line in loop.run()]
    loop.finish()
    predictor = Predictor.of(loop.ema_model.eval(), dataset, settings.model.popularity_prior_days)
    predictor.cold_gaps = tuple(loop.progress.cold_gaps or ())
    cold = np.array([False, *(is_cold(item) for item in dataset.items["item_id"].to_pylist())])
    filter_seen = settings.evaluate.protocol == "filter_seen"
    validation = EvaluationQueries(
        dataset, "validation", max_users=settings.train.validation_users, seed=settings.split.seed
    )
    rows = []
    for place in places:
        figures = _evaluate(predictor, EvaluationQueries(dataset, "test"), cold, filter_seen, place)
        rows.append(
            figures
            | {"validation_ndcg": _evaluate(predictor, validation, cold, filter_seen, place)["ndcg@10"]}
        )
    ends = {"best_epoch": loop.progress.best_epoch, "epochs": int(epochs[-1])}
    return rows[0] | ends, [{**place} | row for place, row in zip(places, rows, strict=True)]


def _evaluate(
    predictor: Predictor,
    queries: EvaluationQueries,
    cold: np.ndarray,
    filter_seen: bool,
    place: Mapping[str, float],
) -> dict[str, float]:
    """Figures of warm and of cold targets."""
    rules = Rules.from_settings(
        ScoreSettings(**place).rules(),
        queries.dataset,
        np.arange(len(cold)),
        predictor.cold_V,
        predictor.cold_gaps,
    )
    warm_hits, warm_ndcg, cold_hits, hits_among_cold, cold_counts, chance = [], [], [], [], [], []
    for batch in queries.batches(BATCH):
        lists = _recommend(predictor, batch, Filters(filter_seen=filter_seen), rules)
        cold_lists = _recommend(
            predictor, batch, Filters(filter_seen=filter_seen, allow=np.flatnonzero(cold)), rules
        )
        cold_counts += cold[lists].sum(1).tolist()
        for row, query in enumerate(batch):
            targets = targets_of(query, filter_seen=filter_seen)
            warm_targets, cold_targets = targets[~cold[targets]], targets[cold[targets]]
            if len(warm_targets):
                metrics = m.per_user(lists[row : row + 1], [warm_targets], K)
                warm_hits.append(metrics["hr"][0])
                warm_ndcg.append(metrics["ndcg"][0])
            if len(cold_targets):
                free = predictor.n_items - (len(np.unique(query.history.item_index)) if filter_seen else 0)
                chance.append(1.0 - (1.0 - K / free) ** len(cold_targets))
                cold_hits.append(m.per_user(lists[row : row + 1], [cold_targets], K)["hr"][0])
                hits_among_cold.append(m.per_user(cold_lists[row : row + 1], [cold_targets], K)["hr"][0])
    means = {
        "hr@10": warm_hits,
        "ndcg@10": warm_ndcg,
        "cold_hr@10": cold_hits,
        "cold_hr@10_among_cold": hits_among_cold,
        "cold_places": cold_counts,
    }
    result: dict[str, float] = {
        name: round(float(np.mean(values)), 4) for name, values in means.items() if values
    }
    if cold_hits:
        drawn = m.bootstrap_means(np.array([cold_hits, chance]).T, RESAMPLES, 0)
        low, high = m.interval(drawn[:, 0] / drawn[:, 1], CONFIDENCE)
        result |= {
            "cold_lift": round(float(np.mean(cold_hits) / np.mean(chance)), 2),
            "cold_lift_low": round(low, 2),
            "cold_lift_high": round(high, 2),
        }
    return result | {"warm_users": len(warm_hits), "cold_users": len(cold_hits)}


def _recommend(
    predictor: Predictor, batch: list[EvaluationQuery], filters: Filters, rules: Rules | None
) -> np.ndarray:
    return predictor.recommend(
        [query.history for query in batch],
        K,
        now=[query.now for query in batch],
        filters=filters,
        rules=rules,
        context=[query.context for query in batch],
    ).item_index
