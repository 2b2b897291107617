"""What each feature column is worth, and how items are ranked that training never saw.

A tenth of the items, drawn by a hash of their ids, is taken out of all that comes before the test. A model of ids alone, one with
each column, and one with all of them are trained alike and asked for the targets of the test: those that training saw and
those that it did not, the latter in the whole catalogue and among the unseen alone. The model of all columns is asked again with
each turn of the dial `score.unseen`, which shows what unseen items cost the seen ones. The figures of the run are those of the
last turn that costs the validation users, whose targets are all seen, at most `BUDGET` of their NDCG: no target of the test has a say in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from recray.benchmark.data import NO_RULES, prepared
from recray.config import ScoreSettings
from recray.dataset.context import CLOCK
from recray.dataset.reader import Dataset
from recray.evaluation import metrics as m
from recray.evaluation.protocol import Question, Questions, wanted
from recray.inference import Filters, Predictor, Rules
from recray.stages import Say
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop

CONFIGS = {"ml-1m": "video"}  # where the config with features is another than that of the other benchmarks
K = 10
BATCH = 256
ONE_IN = 10  # items that are held out
DIAL = (0.0, 3.0, 3.5, 4.0, 4.5)  # of score.unseen
BUDGET = 0.05  # share of the validation NDCG that unseen items may cost
RESAMPLES, CONFIDENCE = 2000, 0.95


def measure_features(folder: Path, data: str, overrides: list[str], say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """By variant: HR@10 and NDCG@10 of targets that training saw, HR@10 of the others (cold), and that over chance, with its interval over users."""
    config = CONFIGS.get(Path(data).name)
    settings, whole = prepared(data, folder / "whole", overrides, config)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    _hold_out(whole, folder / "events.parquet")
    columns = {name: name for name in pq.read_schema(folder / "events.parquet").names}
    split = [] if whole.cut_s("test") is None else [f"split.{part}_from={_moment(whole.cut_s(part))}" for part in ("validation", "test")]
    kept = [*overrides, *NO_RULES, f"data.events={folder / 'events.parquet'}", f"data.columns={columns}", *split]
    kept.append(f"data.context=[{', '.join(name for name in settings.data.context if name in CLOCK)}]")
    features = dict(settings.data.features)
    variants = {"ids": {}, **{f"ids + {name}": {name: kind} for name, kind in features.items()}, "all": features}
    metrics: dict[str, Any] = {"items": whole.n_items, "variants": {}}
    for name, chosen in variants.items():
        settings, dataset = prepared(
            data, folder / "root", [*kept, f"data.features={chosen}", *([] if chosen else ["data.items=null", "data.released=null"])], config
        )
        found, dial = _variant(dataset, bundle_settings(settings), DIAL if name == "all" else DIAL[:1])
        metrics["variants"][name] = found
        say(f"{name}: " + ", ".join(f"{what} {value}" for what, value in found.items()))
    metrics["unseen_dial"] = dial
    best = metrics["variants"]["all"]
    metrics |= {f"{what}_gain": round(best[what] - metrics["variants"]["ids"][what], 4) for what in ("hr@10", "ndcg@10")}
    chosen_turn = [line for line in dial if line["validation_ndcg"] >= (1 - BUDGET) * dial[0]["validation_ndcg"]][-1]
    metrics |= {
        name: chosen_turn[name]
        for name in ("unseen", "hr@10", "ndcg@10", "cold_hr@10", "cold_lift", "cold_lift_low", "cold_lift_high")
        if name in chosen_turn
    }
    return bundle_settings(settings), metrics


def is_cold(item_id: Any) -> bool:
    """Whether an item is held out."""
    return bool(xxhash.xxh64_intdigest(f"cold\0{item_id}".encode()) % ONE_IN == 0)


def _hold_out(dataset: Dataset, path: Path) -> None:
    """The dataset's events without those of held-out items that come before the test, in recray's own columns."""
    cold = np.array([False, *(is_cold(item) for item in dataset.items["item_id"].to_pylist())])
    clock = "timestamp" if dataset.clock == "timestamp" else "position"
    parts = []
    for shard in dataset.shards():
        owner = np.repeat(np.arange(len(shard)), np.diff(shard.offsets))
        place = np.arange(len(owner)) - shard.offsets[owner]
        keep = ~cold[shard.item_index] | (place >= shard.split[owner, 2])
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


def _moment(time_s: int | None) -> str:
    return str(np.datetime64(int(time_s or 0), "s"))


def _variant(dataset: Dataset, chosen: dict[str, Any], dial: tuple[float, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train one model to its early stop, and ask it; then at each turn of the dial."""
    loop = build_loop(str(dataset.path), chosen, torch.device("cpu"))
    epochs = [line["epoch"] for line in loop.run()]
    loop.average.load_state_dict(loop.best)
    predictor = Predictor.of(loop.average.eval(), dataset, chosen["model"]["prior_days"])
    cold = np.array([False, *(is_cold(item) for item in dataset.items["item_id"].to_pylist())])
    new_only = chosen["evaluate"]["primary_setting"] == "new_only"
    known = Questions(dataset, "validation", max_users=chosen["train"]["validation_users"], seed=chosen["split"]["seed"])
    answers = []
    for turn in dial:
        found = _answers(predictor, Questions(dataset, "test"), cold, new_only, turn)
        answers.append(found | {"validation_ndcg": _answers(predictor, known, cold, new_only, turn)["ndcg@10"]})
    ends = {"best_epoch": loop.progress.best_epoch, "epochs": int(epochs[-1])}
    return answers[0] | ends, [{"unseen": turn} | answer for turn, answer in zip(dial, answers, strict=True)]


def _answers(predictor: Predictor, questions: Questions, cold: np.ndarray, new_only: bool, turn: float) -> dict[str, Any]:
    rules = Rules.declared(ScoreSettings(unseen=turn).rules(), questions.dataset, np.arange(len(cold)), predictor.unseen)
    warm_hits, warm_ndcg, cold_hits, among, places, chance = [], [], [], [], [], []
    for batch in questions.batches(BATCH):
        lists = _ask(predictor, batch, Filters(new_only=new_only), rules)
        unseen = _ask(predictor, batch, Filters(new_only=new_only, allow=np.flatnonzero(cold)), rules)
        places += cold[lists].sum(1).tolist()
        for row, question in enumerate(batch):
            targets = wanted(question, new_only=new_only)
            known, unknown = targets[~cold[targets]], targets[cold[targets]]
            if len(known):
                found = m.per_user(lists[row : row + 1], [known], K)
                warm_hits.append(found["hr"][0])
                warm_ndcg.append(found["ndcg"][0])
            if len(unknown):
                free = predictor.n_items - (len(np.unique(question.history.item_index)) if new_only else 0)
                chance.append(1.0 - (1.0 - K / free) ** len(unknown))
                cold_hits.append(m.per_user(lists[row : row + 1], [unknown], K)["hr"][0])
                among.append(m.per_user(unseen[row : row + 1], [unknown], K)["hr"][0])
    means = {"hr@10": warm_hits, "ndcg@10": warm_ndcg, "cold_hr@10": cold_hits, "cold_hr@10_among_cold": among, "cold_places": places}
    result: dict[str, Any] = {name: round(float(np.mean(values)), 4) for name, values in means.items() if values}
    if cold_hits:
        drawn = m.bootstrap_means(np.array([cold_hits, chance]).T, RESAMPLES, 0)
        low, high = m.interval(drawn[:, 0] / drawn[:, 1], CONFIDENCE)
        result |= {
            "cold_lift": round(float(np.mean(cold_hits) / np.mean(chance)), 2),
            "cold_lift_low": round(low, 2),
            "cold_lift_high": round(high, 2),
        }
    return result | {"warm_users": len(warm_hits), "cold_users": len(cold_hits)}


def _ask(predictor: Predictor, batch: list[Question], filters: Filters, rules: Rules | None) -> np.ndarray:
    asks: dict[str, Any] = {"now": [q.now for q in batch], "context": [q.context for q in batch], "filters": filters, "rules": rules}
    return predictor.recommend([q.history for q in batch], K, **asks).item_index
