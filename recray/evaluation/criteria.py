"""The promotion criteria: checks that decide whether a bundle may replace the champion, each with its reason.

The champion is evaluated again on the same test users, so both bundles are measured on the same queries.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow.compute as pc

from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation import metrics as m
from recray.evaluation.evaluate import (
    MODEL,
    Evaluator,
    Row,
    Table,
    count_public_popularity,
    read_ndcg,
    select_test_queries,
    to_ranker,
)
from recray.evaluation.protocol import EvaluationQueries
from recray.inference import Predictor
from recray.inference.policy import CheckRecord
from recray.storage import manifest_digest

# share of a bundle's items that the dataset must have; the same shop has nearly all, another next to none
MIN_SHARED = 0.1
TOLERANCE = 1e-5  # difference of single and batch inference, as a share of the scale of scores


@dataclass(frozen=True)
class Check:
    """One criterion, whether it passed, and the reason."""

    name: str
    passed: bool
    text: str

    def to_record(self) -> CheckRecord:
        """As JSON values."""
        return {"name": self.name, "passed": self.passed, "text": self.text}


class Comparison(TypedDict, total=False):
    """A challenger compared with the champion on the same test users; empty if they were not compared.

    champion : the champion's row of the evaluation
    difference, low, high : the challenger's mean NDCG minus the champion's, and its confidence interval
    """

    champion: Row
    difference: float
    low: float
    high: float
    users: int


def check_promotion(
    settings: Settings,
    dataset: Dataset,
    challenger: Bundle,
    champion: Bundle | None,
    table: Table,
    evaluation: Path,
    training_data: Path,
) -> tuple[list[Check], Comparison]:
    """The checks of a challenger, and its comparison with the champion.

    table, evaluation : the challenger's evaluation on `dataset`, and its folder
    training_data : folder of the dataset that the challenger was trained on, which may not exist any more
    """
    checks = [check_same_data(dataset, challenger, training_data)]
    if not checks[0].passed:
        return checks, {}

    checks.append(check_leakage(dataset, challenger))
    rows = table[settings.evaluate.protocol]
    checks += [check_baseline(name, rows, settings.evaluate.k[0]) for name in settings.promotion.must_beat]

    comparison: Comparison = {}
    predictor = Predictor.load(challenger.path, dataset=dataset)
    if champion is not None:
        check, comparison = check_champion(
            settings,
            dataset,
            champion,
            read_ndcg(evaluation, settings.evaluate.protocol),
            count_public_popularity(predictor, dataset),
        )
        checks.append(check)
    checks.append(check_consistency(settings, dataset, predictor))
    return checks, comparison


def check_same_data(dataset: Dataset, bundle: Bundle, training_data: Path) -> Check:
    """Whether a bundle belongs to this data, by the digest of its dataset (if that still exists) and by the
    items that they share.
    """
    name = "same data"
    if training_data.exists() and manifest_digest(training_data) != bundle.manifest["dataset_digest"]:
        return Check(
            name,
            False,
            f"bundle {bundle.key} says it was trained on dataset {training_data.name}, but that one here has "
            "another digest",
        )
    item_ids, dataset_ids = bundle.item_ids, dataset.items["item_id"]
    if item_ids.type != dataset_ids.type:
        return Check(
            name,
            False,
            f"bundle {bundle.key} was trained on another dataset: its item_id is {item_ids.type}, "
            f"here it is {dataset_ids.type}",
        )
    shared = int(pc.sum(pc.is_in(item_ids, value_set=dataset_ids.combine_chunks())).as_py() or 0)
    text = f"the dataset has {shared} of the {len(item_ids)} items of bundle {bundle.key}"
    if shared < MIN_SHARED * len(item_ids):
        return Check(name, False, f"{text}: it was trained on another dataset")
    return Check(name, True, text)


def check_baseline(baseline: str, rows: dict[str, Row], k: int) -> Check:
    """Whether the model's NDCG is above a baseline's."""
    name = f"beats {baseline}"
    model_row, baseline_row = rows[MODEL], rows[baseline]
    if "skipped" in model_row or "skipped" in baseline_row:
        reason = model_row.get("skipped") or baseline_row["skipped"]
        return Check(
            name, False, f"cannot be compared with {baseline}: {reason}; remove it from promotion.must_beat"
        )
    text = f"NDCG@{k} {model_row[f'ndcg@{k}']:.4f}, {baseline} {baseline_row[f'ndcg@{k}']:.4f}"
    return Check(name, baseline_row["model_lead"] > 0, text)


def check_champion(
    settings: Settings,
    dataset: Dataset,
    champion: Bundle,
    ndcg: np.ndarray,
    public_popularity_V: np.ndarray | None = None,
) -> tuple[Check, Comparison]:
    """Whether the confidence interval of the paired NDCG difference to the champion lies above
    -promotion.margin.

    ndcg : of the challenger [U]
    public_popularity_V : see `count_public_popularity`
    """
    name = "not worse than the champion"
    reason = explain_incomparable(dataset, champion)
    if reason:
        return Check(name, True, f"not compared with champion {champion.key}, which {reason}"), {}

    options, protocol = settings.evaluate, settings.evaluate.protocol
    evaluator = Evaluator(settings, dataset, select_test_queries(settings, dataset), public_popularity_V)
    ranker = to_ranker(Predictor.load(champion.path, dataset=dataset), dataset)
    row, champion_ndcg = evaluator.run(ranker, {})[protocol]
    if not len(champion_ndcg):
        return Check(name, False, f"no test user has a target under protocol {protocol}"), {}

    difference = ndcg - champion_ndcg
    low, high = m.interval(
        m.bootstrap_means(difference[:, None], options.bootstrap, options.seed)[:, 0], options.confidence
    )
    margin = settings.promotion.margin
    comparison: Comparison = {
        "champion": row,
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "users": len(champion_ndcg),
    }
    text = (
        f"NDCG@{options.k[0]} {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}] against champion "
        f"{champion.key} on {len(champion_ndcg)} test users; the interval must lie above -{margin:g}"
    )
    return Check(name, low > -margin, text), comparison


def explain_incomparable(dataset: Dataset, bundle: Bundle) -> str | None:
    """Why a bundle cannot be evaluated on these test users (it may have learned from their targets); None if
    it can.
    """
    if bundle.manifest["dataset_digest"] == dataset.digest:
        return None
    if dataset.split_kind == "random" or bundle.manifest.get("split_kind") != dataset.split_kind:
        return "may have been trained on these test targets, under another split"
    cutoff_s = dataset.cut_s("test") or dataset.as_of_s
    if bundle.manifest.get("trained_until_s", bundle.as_of_s) > cutoff_s:
        return "was trained on events after the test cutoff"
    return None


def check_leakage(dataset: Dataset, bundle: Bundle) -> Check:
    """Whether no test target was in training: the bundle and the training events of the dataset end before
    the test cutoff.
    """
    name = "leakage check"
    if reason := explain_incomparable(dataset, bundle):
        return Check(name, False, f"bundle {bundle.key} {reason}")
    cutoff_s = dataset.cut_s("test")
    if cutoff_s is None:
        return Check(name, True, f"no test target was in the training of bundle {bundle.key}")

    late = sum(shard.count_split_violations(cutoff_s)[0] for shard in dataset.shards())
    cutoff = dt.datetime.fromtimestamp(cutoff_s, dt.UTC).isoformat(sep=" ", timespec="minutes")
    return Check(
        name,
        late == 0,
        f"{late or 'no'} training event of bundle {bundle.key} is at or after the test cutoff "
        f"{cutoff.removesuffix('+00:00')}",
    )


def check_consistency(settings: Settings, dataset: Dataset, predictor: Predictor) -> Check:
    """Whether single and batch inference agree: scores within 1e-5 of their scale, and the same items except
    for ties.
    """
    allowed = TOLERANCE * predictor.model.scale
    name = "consistency check"
    queries = EvaluationQueries(
        dataset, "test", max_users=settings.promotion.consistency_users, seed=settings.evaluate.seed
    )
    translation = predictor.vocabulary.translation(dataset)
    k, worst, users = settings.score.k, 0.0, 0
    for batch in queries.batches(settings.score.batch_users):
        histories = [translation.history(query.history) for query in batch]
        together = predictor.recommend(histories, k, now=[query.now for query in batch])
        for row, query in enumerate(batch):
            single = predictor.recommend([histories[row]], k, now=query.now)
            scores, batch_scores = single.scores[0], together.scores[row]
            is_filled = np.isfinite(scores)
            differs = single.item_index[0] != together.item_index[row]
            if (is_filled != np.isfinite(batch_scores)).any() or not _are_ties(
                batch_scores, differs, 2 * allowed
            ):
                return Check(name, False, f"user {users}: single and batch inference give other items")
            gaps = np.abs(scores[is_filled] - batch_scores[is_filled])
            worst, users = max(worst, float(gaps.max(initial=0.0))), users + 1
    text = (
        f"scores of {users} users in single and batch inference differ by at most {worst:.1e} "
        f"(allowed {allowed:.0e})"
    )
    return Check(name, worst <= allowed, text)


def _are_ties(scores: np.ndarray, differs: np.ndarray, tolerance: float) -> bool:
    """Whether every position that differs has a neighbour of nearly the same score (within `tolerance`).

    The last position may tie with an item that was cut off.
    """
    for position in np.flatnonzero(differs):
        is_near = np.abs(scores - scores[position]) <= tolerance
        if is_near.sum() < 2 and position != len(scores) - 1:
            return False
    return True
