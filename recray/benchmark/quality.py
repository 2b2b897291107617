"""How well the model ranks, and how soon, over several seeds and beside a peer that trains to its own early stop."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recray.benchmark import peers
from recray.benchmark.data import prepared, write_for_peers
from recray.benchmark.train import peer_question, precision_of
from recray.dataset.reader import Dataset
from recray.errors import SettingsError
from recray.evaluation import metrics as m
from recray.evaluation.protocol import Question, Questions, wanted
from recray.inference import Filters, Predictor
from recray.model.device import device
from recray.model.recommender import Recommender
from recray.stages import Say
from recray.storage import key_of, sha256_file
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop

SEEDS = (0, 1, 2)
K = 10
BATCH = 256
PEER_BATCH_USERS = 64  # half of its default: as good in fewer epochs, and these are what costs its time
PEER_PATIENCE = 8
PACE_EPOCHS = 2
RESAMPLES, CONFIDENCE = 2000, 0.95


def measure_quality(folder: Path, data: str, against: str | None, overrides: list[str], say: Say, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """HR@10 and NDCG@10 of the test users, means over seeds; beside a peer the paired difference of NDCG and the time to the
    peer's validation NDCG, as CPU seconds of training and as seconds.

    Ranks of every user's test item, and NDCG over time, are written to `folder/keep`; so is what the peer answered, and an
    answer to the same question that lies in `out` is taken from there.
    """
    settings, dataset = prepared(data, folder / "root", overrides)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    half = settings.score.precision == "bfloat16"
    if half and settings.train.use_gpu:
        raise SettingsError("score.precision: bfloat16 is for CPUs, and this model is trained and asked on a GPU", "leave train.use_gpu out")
    keep = folder / "keep"
    keep.mkdir()
    chosen = bundle_settings(settings)
    questions = Questions(dataset, "test")
    asked = [question for batch in questions.batches(BATCH) for question in batch if len(wanted(question, new_only=True)) == 1]
    number = _numbers(dataset)
    users = [int(number[question.shard] + question.row) for question in asked]
    ranks, curves = {"user": np.array(users)}, []
    theirs = _peer(against, chosen, dataset, folder, threads, say, out) if against else None
    for seed in SEEDS:
        settings_of = {**chosen, "train": {**chosen["train"], "seed": seed}}
        curve, model, precision = _train(dataset, settings_of, say, seed)
        for name, halved in [(f"recray_{seed}", False), (f"bfloat16_{seed}", True)][: 1 + half]:
            ranks[name] = found = ranks_of(model, dataset, chosen, asked, half=halved)
            say(f"{name}: HR@10 {hr(found).mean():.4f}, NDCG@10 {ndcg(found).mean():.4f}")
        curves += [{"who": f"recray_{seed}", **line} for line in curve]
    ours = [ranks[f"recray_{seed}"] for seed in SEEDS]
    each = {"hr@10": [float(hr(r).mean()) for r in ours], "ndcg@10": [float(ndcg(r).mean()) for r in ours]}
    metrics: dict[str, Any] = {"users": len(asked), "items": dataset.n_items, "seeds": {name: _rounded(found) for name, found in each.items()}}
    metrics |= {name: round(float(np.mean(found)), 4) for name, found in each.items()} | {"train_precision": precision}
    if half:
        lists = [float(ndcg(ranks[f"bfloat16_{seed}"]).mean()) for seed in SEEDS]
        metrics |= {"ndcg@10_bfloat16": round(float(np.mean(lists)), 4), "bfloat16_over_float32": round(sum(lists) / sum(each["ndcg@10"]), 5)}
    if theirs is not None:
        ranks[str(against)] = np.array([theirs["ranks"].get(str(user), 0) for user in users])
        curves += [{"who": against, **line} for line in theirs["curve"]]
        metrics |= _beside(ours, ranks[str(against)], curves, str(against)) | {"peer_taken_from": theirs.get("taken_from")}
        alike = _selects_as_peers_do(chosen)
        metrics |= _time_to_peer(curves, str(against), theirs["pace"] if alike else None)
        if not alike:
            say(f"no time to {against}: it selects by one new item of each user, and these settings by something else")
        say(f"lead over {against} {metrics['ndcg_lead']:+.4f} [{metrics['ndcg_lead_low']:+.4f}, {metrics['ndcg_lead_high']:+.4f}]")
    pq.write_table(pa.table(ranks), keep / "ranks.parquet")
    pq.write_table(pa.Table.from_pylist(curves), keep / "curves.parquet")
    return chosen, metrics


def hr(ranks: np.ndarray) -> np.ndarray:
    """Whether one wanted item at these ranks (from 1; 0: nowhere) is among the first ten."""
    return ((ranks > 0) & (ranks <= K)).astype(float)


def ndcg(ranks: np.ndarray) -> np.ndarray:
    """NDCG@10 of one wanted item at these ranks."""
    return np.where(hr(ranks) > 0, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)


def _beside(ours: list[np.ndarray], theirs: np.ndarray, curves: list[dict[str, Any]], peer: str) -> dict[str, Any]:
    lead = np.mean([ndcg(ranks) for ranks in ours], 0) - ndcg(theirs)
    low, high = m.interval(m.bootstrap_means(lead[:, None], RESAMPLES, 0)[:, 0], CONFIDENCE)
    found = {"peer": peer, "peer_hr@10": round(float(hr(theirs).mean()), 4), "peer_ndcg@10": round(float(ndcg(theirs).mean()), 4)}
    found |= {"ndcg_lead": round(float(lead.mean()), 4), "ndcg_lead_low": round(low, 4), "ndcg_lead_high": round(high, 4)}
    return found


def _selects_as_peers_do(chosen: dict[str, Any]) -> bool:
    """Whether our validation NDCG means what the peers' does: of one new item for each user."""
    return bool(
        chosen["evaluate"]["primary_setting"] == "new_only"
        and chosen["train"]["select_by"] == "primary"
        and chosen["evaluate"]["k"][0] == K
        and chosen["split"]["kind"] == "leave_one_out"
    )


def _time_to_peer(curves: list[dict[str, Any]], peer: str, pace: dict[str, float] | None) -> dict[str, Any]:
    """Seconds to the peer's best validation NDCG, over its own.

    pace : what the peer's seconds, by clock, are to be multiplied by, so that they are those of this machine and hour; None: no ratio
    """
    best = max((line for line in curves if line["who"] == peer), key=lambda line: line["validation_ndcg"])
    found: dict[str, Any] = {"peer_validation_ndcg": round(best["validation_ndcg"], 4), "peer_epochs": best["epoch"], "peer_pace": pace}
    for clock in ("seconds", "cpu_seconds"):
        reached: list[Any] = []
        for seed in SEEDS:
            mine = [line for line in curves if line["who"] == f"recray_{seed}" and line["validation_ndcg"] >= best["validation_ndcg"]]
            reached.append(round(mine[0][clock], 1) if mine else None)
        found[f"{clock}_to_peer"], found[f"peer_{clock}"] = reached, round(best[clock], 1)
        ratio = None if pace is None or None in reached else round(sum(reached) / len(reached) / (pace[clock] * best[clock]), 4)
        found["time_to_peer_ratio" if clock == "seconds" else "cpu_time_to_peer_ratio"] = ratio
    return found


def _train(dataset: Dataset, chosen: dict[str, Any], say: Say, seed: int) -> tuple[list[dict[str, float]], Recommender, str]:
    """Train to the early stop; the learning curve with its clocks (validation left out), the model, and what its products were computed in."""
    loop = build_loop(str(dataset.path), chosen, device("train.use_gpu", gpu=chosen["train"]["use_gpu"]))
    spent, validate = {"wall": 0.0, "cpu": 0.0}, loop.validate

    def timed(*arguments: Any) -> tuple[float, float]:
        wall, cpu = time.monotonic(), time.process_time()
        found = validate(*arguments)
        spent["wall"] += time.monotonic() - wall
        spent["cpu"] += time.process_time() - cpu
        return found

    loop.validate = timed
    curve = []
    wall, cpu = time.monotonic(), time.process_time()
    for line in loop.run():
        line["seconds"] = time.monotonic() - wall - spent["wall"]
        line["cpu_seconds"] = time.process_time() - cpu - spent["cpu"]
        curve.append(line)
        say(f"seed {seed}, epoch {line['epoch']}: {line['seconds']:.0f} s, loss {line['loss']:.4f}, validation NDCG@10 {line['validation_ndcg']:.4f}")
    loop.average.load_state_dict(loop.best)
    say(f"seed {seed}: epoch {loop.progress.best_epoch} of {loop.progress.epoch}")
    return curve, loop.average.eval(), precision_of(loop)


def ranks_of(model: Recommender, dataset: Dataset, chosen: dict[str, Any], asked: list[Question], *, half: bool = False) -> np.ndarray:
    """Rank from 1 of the wanted item of each question among all that the user did not meet."""
    predictor = Predictor.of(model, dataset, chosen["model"]["prior_days"], half=half)
    ranks = []
    for first in range(0, len(asked), BATCH):
        batch = asked[first : first + BATCH]
        asks: dict[str, Any] = {"now": [q.now for q in batch], "context": [q.context for q in batch], "filters": Filters(new_only=True)}
        answer = predictor.recommend([q.history for q in batch], dataset.n_items, **asks)
        ranks += [1 + int(np.flatnonzero(answer.item_index[row] == wanted(q, new_only=True)[0])[0]) for row, q in enumerate(batch)]
    return np.array(ranks)


def _peer(peer: str, chosen: dict[str, Any], dataset: Dataset, folder: Path, threads: int, say: Say, out: Path) -> dict[str, Any]:
    """Train a peer to its own early stop. It goes on where an earlier run with the same question was stopped.

    An answer that lies in `out` comes with its `pace`: what its first epochs take now, over what they took then.
    """
    events = folder / "events.parquet"
    write_for_peers(dataset, events)
    number = _numbers(dataset)
    validation = Questions(dataset, "validation", max_users=chosen["train"]["validation_users"], seed=chosen["split"]["seed"])
    users = [int(number[shard] + row) for shard, row, _, _ in validation.places]
    question = peer_question(chosen, folder, threads) | {"batch_users": PEER_BATCH_USERS, "patience": PEER_PATIENCE, "validation_users": users}
    asked = {name: value for name, value in question.items() if name not in ("events", "threads")}
    key = key_of(peer, peers.PINS[peers.HOME[peer]], asked, sha256_file(events))
    for answered in sorted(out.glob(f"*.{peer}-{key}.json")):
        say(f"{peer} has trained to its early stop before: {answered}")
        found: dict[str, Any] = json.loads(answered.read_text())
        now = peers.ask(peer, question | {"keep": str(folder), "epochs_at_most": PACE_EPOCHS}, folder, say)["curve"]
        then = found["curve"][len(now) - 1]
        pace = {clock: round(now[-1][clock] / then[clock], 4) for clock in ("seconds", "cpu_seconds")}
        say(f"{peer}: its first epochs take {pace['seconds']:.2f} of the seconds that they took then")
        return found | {"taken_from": answered.name, "pace": pace}
    keep = peers.cache() / "runs" / key
    keep.mkdir(parents=True, exist_ok=True)
    say(f"{peer} trains to its early stop; where it stands is kept in {keep}")
    found = peers.ask(peer, question | {"keep": str(keep)}, folder, say)
    (folder / "keep" / f"{peer}-{key}.json").write_text(json.dumps(found) + "\n")
    return found | {"pace": {"seconds": 1.0, "cpu_seconds": 1.0}}


def _numbers(dataset: Dataset) -> np.ndarray:
    """Number of the first user of each shard, as `write_for_peers` counts them."""
    return np.concatenate([[0], np.cumsum([len(shard) for shard in dataset.shards()])])


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
