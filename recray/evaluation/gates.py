"""The gate: may this bundle take the place of the champion? Each check says in words what it found.

The champion is scored again on tonight's users, so both are measured by the same questions.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation import metrics as m
from recray.evaluation.evaluate import MODEL, Judge, Table, model_ranker, read_ndcg, test_questions, told_popularity
from recray.evaluation.protocol import Questions
from recray.inference import Predictor
from recray.storage import manifest_digest

MIN_SHARED = 0.1  # a bundle of the same shop knows nearly all of tonight's items, one of another shop next to none
PARITY = 1e-5


@dataclass(frozen=True)
class Check:
    """One question of the gate, its answer, and why in words."""

    name: str
    passed: bool
    text: str


def decide(
    settings: Settings, dataset: Dataset, challenger: Bundle, champion: Bundle | None, table: Table, evaluation: Path, known: Path
) -> tuple[list[Check], dict[str, Any]]:
    """The checks of a challenger, and the figures of its comparison with the champion (empty where there was none).

    `table` and the folder `evaluation` hold the challenger's evaluation on `dataset`; `known` is the folder of the dataset
    that the challenger was trained on, which may be gone.
    """
    checks = [of_this_data(dataset, challenger, known)]
    if not checks[0].passed:
        return checks, {}
    checks.append(no_leak(dataset, challenger))
    setting = settings.evaluate.primary_setting
    checks += [beats(name, table[setting], settings.evaluate.k[0]) for name in settings.gates.must_beat]
    comparison: dict[str, Any] = {}
    predictor = Predictor.load(challenger.path, dataset=dataset)
    if champion is not None:
        check, comparison = against(settings, dataset, champion, read_ndcg(evaluation, setting), told_popularity(predictor, dataset))
        checks.append(check)
    checks.append(parity(settings, dataset, predictor))
    return checks, comparison


def of_this_data(dataset: Dataset, bundle: Bundle, known: Path) -> Check:
    """Whether a bundle belongs to this data: the digest of its dataset, where that is still there, and the items that they share."""
    name = "same data"
    if known.exists() and manifest_digest(known) != bundle.manifest["dataset_digest"]:
        return Check(name, False, f"bundle {bundle.key} says it was trained on dataset {known.name}, but that one here has another digest")
    mine = bundle.item_ids
    if mine.type != dataset.items["item_id"].type:
        return Check(
            name,
            False,
            f"bundle {bundle.key} was trained on another dataset: its item_id is {mine.type}, tonight's is {dataset.items['item_id'].type}",
        )
    shared = int(pc.sum(pc.is_in(mine, value_set=dataset.items["item_id"].combine_chunks())).as_py() or 0)
    text = f"tonight's data knows {shared} of the {len(mine)} items of bundle {bundle.key}"
    if shared < MIN_SHARED * len(mine):
        return Check(name, False, f"{text}: it was trained on another dataset")
    return Check(name, True, text)


def beats(baseline: str, rows: dict[str, Any], k: int) -> Check:
    """Whether the model's NDCG is above a baseline's."""
    name = f"beats {baseline}"
    mine, theirs = rows[MODEL], rows[baseline]
    if "skipped" in mine or "skipped" in theirs:
        why = mine.get("skipped") or theirs["skipped"]
        return Check(name, False, f"cannot be compared with {baseline}: {why}; take it out of gates.must_beat")
    text = f"NDCG@{k} {mine[f'ndcg@{k}']:.4f} against {theirs[f'ndcg@{k}']:.4f} of {baseline}"
    return Check(name, theirs["model_lead"] > 0, text)


def against(
    settings: Settings, dataset: Dataset, champion: Bundle, ndcg: np.ndarray, told_V: np.ndarray | None = None
) -> tuple[Check, dict[str, Any]]:
    """Whether the interval of the paired NDCG difference to the champion lies above -gates.margin. `ndcg` [U] is the challenger's, and
    `told_V` what may be told of popularity beside it."""
    name = "level with the champion"
    why = incomparable(dataset, champion)
    if why:
        return Check(name, True, f"not compared with champion {champion.key}, which {why}"), {}
    options, setting = settings.evaluate, settings.evaluate.primary_setting
    judge = Judge(settings, dataset, test_questions(settings, dataset), told_V)
    row, theirs = judge.run(model_ranker(Predictor.load(champion.path, dataset=dataset), dataset), {})[setting]
    if not len(theirs):
        return Check(name, False, f"no test user has a target in the setting {setting}"), {}
    difference = ndcg - theirs
    low, high = m.interval(m.bootstrap_means(difference[:, None], options.bootstrap, options.seed)[:, 0], options.confidence)
    margin = settings.gates.margin
    comparison = {"champion": row, "difference": float(difference.mean()), "low": low, "high": high, "users": len(theirs)}
    text = (
        f"NDCG@{options.k[0]} {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}] against champion {champion.key} "
        f"on {len(theirs)} users of tonight; the interval must lie above -{margin:g}"
    )
    return Check(name, low > -margin, text), comparison


def incomparable(dataset: Dataset, bundle: Bundle) -> str | None:
    """Why a bundle cannot be measured on tonight's test users (it may have learned from their targets); None if it can."""
    if bundle.manifest["dataset_digest"] == dataset.digest:
        return None
    if dataset.split_kind == "random" or bundle.manifest.get("split_kind") != dataset.split_kind:
        return "may have been trained on tonight's targets, under another split"
    cut = dataset.cut_s("test") or dataset.as_of_s
    if bundle.manifest.get("trained_until_s", bundle.as_of_s) > cut:
        return "was trained beyond tonight's test cut"
    return None


def no_leak(dataset: Dataset, bundle: Bundle) -> Check:
    """Whether a bundle learned nothing that tonight's test asks: it ends before the cut, and so do the training events of the dataset."""
    name = "leakage check"
    if why := incomparable(dataset, bundle):
        return Check(name, False, f"bundle {bundle.key} {why}")
    cut = dataset.cut_s("test")
    if cut is None:
        return Check(name, True, f"no test target was in the training of bundle {bundle.key}")
    late = sum(shard.leaks(cut)[0] for shard in dataset.shards())
    moment = dt.datetime.fromtimestamp(cut, dt.UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00")
    return Check(name, late == 0, f"{late or 'no'} training event of bundle {bundle.key} is of {moment} or later, when the test begins")


def parity(settings: Settings, dataset: Dataset, predictor: Predictor) -> Check:
    """Whether users get the same answer alone as in a batch: scores within 1e-5 of their scale, items the same but for ties."""
    allowed = PARITY * predictor.model.scale
    questions = Questions(dataset, "test", max_users=settings.gates.parity_users, seed=settings.evaluate.seed)
    translation = predictor.translation(dataset)
    k, worst, users = settings.score.k, 0.0, 0
    for batch in questions.batches(settings.score.batch_users):
        histories = [translation.history(question.history) for question in batch]
        together = predictor.recommend(histories, k, now=[question.now for question in batch])
        for row, question in enumerate(batch):
            alone = predictor.recommend([histories[row]], k, now=question.now)
            found = np.isfinite(alone.scores[0]) & np.isfinite(together.scores[row])
            gaps = np.abs(alone.scores[0] - together.scores[row])[found]
            swapped = alone.item_index[0] != together.item_index[row]
            if (np.isfinite(alone.scores[0]) != np.isfinite(together.scores[row])).any() or not _ties(together.scores[row], swapped, 2 * allowed):
                return Check("parity", False, f"user {users}: other items alone than in a batch")
            worst, users = max(worst, float(gaps.max(initial=0.0))), users + 1
    text = f"answers of {users} users alone and in a batch differ by at most {worst:.1e} (allowed {allowed:.0e})"
    return Check("parity", worst <= allowed, text)


def _ties(scores: np.ndarray, swapped: np.ndarray, near_by: float) -> bool:
    """Whether every swapped place has a neighbour of nearly the same score (within `near_by`); the last place may tie with what was cut off."""
    for place in np.flatnonzero(swapped):
        near = np.abs(scores - scores[place]) <= near_by
        if near.sum() < 2 and place != len(scores) - 1:
            return False
    return True
