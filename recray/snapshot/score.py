"""The score stage: actors that hold the predictor score one bucket of users a task, then the snapshot is
written as an immutable artifact and published.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
import torch

from recray.bundle import Bundle
from recray.cluster import require_resources, suppress_lines, unwrap_errors
from recray.config import ScoreSettings, Settings
from recray.config.formats import RESULTS_SINCE
from recray.config.sections import RuleSettings, SeenSettings
from recray.dataset.reader import Dataset, History
from recray.inference import Predictor, Recommendations, Rules
from recray.inference.filters import ANY_ITEM, SeenRule
from recray.inference.memory import keep_freed_memory
from recray.inference.observer import Observer
from recray.inference.policy import Policy
from recray.model.device import device
from recray.snapshot.writer import KIND, publish, snapshot_path, write_part
from recray.storage import Manifest, Storage, immutable_directory, is_complete, key_of, open_immutable

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class ScoringModel:
    """What scores the users: a bundle, optionally with a policy (its run key), or its popularity fallback
    alone.
    """

    bundle: Bundle
    policy: str | None = None
    popular_only: bool = False


class BucketArguments(TypedDict):
    """Arguments of a `BucketScorer`, but for those of its process (`threads`, `gpu`).

    bundle, policy, dataset : their folders; policy None: the unmodified model
    popular_only : only the popularity fallback scores
    folder : of the parts that are written
    k, filter_seen, seen, rules, batch_users, precision : as in `ScoreSettings`
    private : the bundle was trained privately, so summaries cover holdout users only
    """

    bundle: str
    policy: str | None
    popular_only: bool
    dataset: str
    folder: str
    k: int
    filter_seen: bool
    seen: SeenSettings | None
    rules: RuleSettings
    batch_users: int
    precision: str
    private: bool


class BucketSummary(TypedDict):
    """Figures of a bucket.

    users : of the bucket
    popular_users : users who got the popularity fallback
    top_items : indices of the items at the first 10 positions of any list, int64, each once; 0 for no item
    scored, best : users with a list of the model, and the `QUANTILES` of their best scores, float64; zeros
        without such a user

    Those of a private bundle cover holdout users only, apart from `users`.
    """

    users: int
    popular_users: int
    top_items: np.ndarray
    scored: int
    best: np.ndarray


SnapshotFigures = TypedDict(
    "SnapshotFigures",
    {"users": int, "popular_users": int, "coverage@10": float, "best_score_quantiles": dict[str, float]},
)
"""Figures of a snapshot, which its manifest has too. `best_score_quantiles`: by quantile, of the best scores
of the model's lists; empty without such a list.
"""


def score_key(settings: Settings, dataset: Dataset, model: ScoringModel) -> str:
    """Run key of score."""
    variant = "popular only" if model.popular_only else model.policy
    return key_of(
        "score",
        settings.key_settings("score"),
        dataset.key,
        dataset.digest,
        model.bundle.digest,
        variant,
        dataset.as_of_s,
        RESULTS_SINCE,
    )


def score(settings: Settings, key: str, dataset: Dataset, model: ScoringModel) -> tuple[Path, Manifest, bool]:
    """Score every user, with the mean action of the policy if there is one; seal and publish the snapshot.
    Needs a Ray session.

    Returns its path, its manifest, and whether the publication changed. Raises RefusedError if a newer
    snapshot is published.
    """
    return write_snapshot(
        Storage(settings.root()), key, dataset, model, settings.score, partial(score_on_ray_data, settings)
    )


def write_snapshot(
    storage: Storage,
    key: str,
    dataset: Dataset,
    model: ScoringModel,
    options: ScoreSettings,
    score_buckets: BucketScoring,
) -> tuple[Path, Manifest, bool]:
    """As `score`, with a function that scores the buckets."""
    path = snapshot_path(storage, dataset.as_of_s, key)
    bundle, policy = model.bundle, model.policy
    if not is_complete(path, KIND, key):
        fields: dict[str, Any] = {
            "as_of_s": dataset.as_of_s,
            "bundle": storage.bundle(bundle.key).relative_to(storage.root).as_posix(),
            "bundle_digest": bundle.digest,
            "policy": policy,
            "popular_only": model.popular_only,
            "dataset": storage.dataset(dataset.key).relative_to(storage.root).as_posix(),
            "dataset_digest": dataset.digest,
            "user_type": str(dataset.user_type),
            "buckets": dataset.n_shards,
            "k": options.k,
            "filter_seen": options.filter_seen,
            "rules": options.rules(),
            "precision": options.precision,
        }
        if (seen := options.seen()) is not None:
            fields["seen"] = seen
        with immutable_directory(path, KIND, key, fields) as folder:
            arguments: BucketArguments = {
                "bundle": str(bundle.path),
                "policy": None if policy is None else str(storage.policy(policy)),
                "popular_only": model.popular_only,
                "dataset": str(dataset.path),
                "folder": str(folder),
                "k": options.k,
                "filter_seen": options.filter_seen,
                "seen": seen,
                "rules": options.rules(),
                "batch_users": options.batch_users,
                "precision": options.precision,
                "private": bool(bundle.privacy["differential_privacy"]),
            }
            summaries = score_buckets(arguments, dataset.n_shards)
            n_items = len(bundle.item_ids) + len(bundle.cold_items(dataset))
            fields.update(_summarize(summaries, n_items))
    manifest = open_immutable(path, KIND, verify=False)
    return path, manifest, publish(storage, path, manifest)


BucketScoring = Callable[[BucketArguments, int], list[BucketSummary]]
"""Results of a `BucketScorer` with these arguments (and `threads`, `gpu`) for each bucket below a count, in
any order and any process.
"""


def score_on_ray_data(settings: Settings, arguments: BucketArguments, buckets: int) -> list[BucketSummary]:
    """Score the buckets by actors of Ray Data; what each reports of its bucket."""
    import ray

    options = settings.score
    actors = min(options.actors, buckets)
    require_resources(
        actors * options.cpus_per_actor, actors * options.gpus_per_actor, "score", settings.train.timeout_s
    )
    # Ray Data passes the actors' arguments through the object store; Ray warns about each that may restart
    with unwrap_errors(), suppress_lines("BucketScorer", "constructor arguments in the object store"):
        results = ray.data.from_items(list(range(buckets)), override_num_blocks=buckets).map(
            BucketScorer,  # type: ignore[arg-type]
            fn_constructor_kwargs={
                **arguments,
                "threads": max(1, len(os.sched_getaffinity(0)) // actors),
                "gpu": options.gpus_per_actor > 0,
            },
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=options.cpus_per_actor,
            num_gpus=options.gpus_per_actor or None,
            ray_remote_args_fn=lambda: {
                "max_restarts": options.max_failures,
                "max_task_retries": options.max_failures,
            },
        )
        return cast(list[BucketSummary], results.take_all())


class BucketScorer:
    """Actor that scores one bucket (= dataset shard) a call and writes its part.

    Its summaries cover all users; those of a private bundle only the holdout users.
    """

    def __init__(
        self,
        *,
        bundle: str,
        policy: str | None,
        popular_only: bool = False,
        dataset: str,
        folder: str,
        k: int,
        filter_seen: bool,
        rules: RuleSettings,
        batch_users: int,
        threads: int,
        seen: SeenSettings | None = None,
        precision: str = "float32",
        private: bool = False,
        gpu: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.dataset = Dataset.open(dataset)
        scoring_device = device("score.gpus_per_actor", gpu=gpu)
        opened_bundle = Bundle.open(bundle)
        self.policy = None if policy is None else Policy.load(Path(policy), opened_bundle.digest)
        self.predictor = Predictor.load(
            opened_bundle,
            dataset=self.dataset,
            device=scoring_device,
            popular_only=popular_only,
            bfloat16=precision == "bfloat16",
        )
        self.observer = None if self.policy is None else Observer(self.predictor)
        self.translation = self.predictor.vocabulary.translation(self.dataset)
        self.private = private
        self.folder, self.k, self.batch_users = Path(folder), k, batch_users
        self.filters = ANY_ITEM
        if filter_seen:
            rule = SeenRule.from_settings(seen)
            self.filters = rule.to_filters(self.predictor.vocabulary.event_types, self.dataset.now_s)
        self.rules = Rules.from_settings(
            rules, self.dataset, self.translation.to_bundle, self.predictor.cold_V, self.predictor.cold_gaps
        )

    def __call__(self, row: Mapping[str, int]) -> BucketSummary:
        bucket = int(row["item"])
        shard = self.dataset.shard(bucket)
        items: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        states: list[np.ndarray] = [np.zeros((0, 2), np.float32)]
        sources: list[str] = []
        for start in range(0, len(shard), self.batch_users):
            users = range(start, min(start + self.batch_users, len(shard)))
            lists, state = self._recommend([self.translation.history(shard.history(user)) for user in users])
            items.append(lists.item_index)
            scores.append(lists.scores)
            states.append(state)
            sources += lists.source

        shape = (0, min(self.k, self.predictor.n_items))
        item_index = np.concatenate(items) if items else np.zeros(shape, np.int64)
        score_values = np.concatenate(scores) if scores else np.zeros(shape, np.float32)
        is_filled = item_index > 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(is_filled.sum(1))]), pa.int32())
        item_ids = self.predictor.vocabulary.item_ids.take(pa.array(item_index[is_filled] - 1))
        write_part(
            self.folder,
            bucket,
            shard.user_ids,
            item_ids,
            offsets,
            pa.array(score_values[is_filled]),
            sources,
            np.concatenate(states),
        )

        is_reported = shard.queried if self.private else np.ones(len(shard), bool)
        by_model = np.array([source == "model" for source in sources], bool)
        best = score_values[by_model & is_reported, 0] if len(by_model) else np.zeros(0)
        best = best[np.isfinite(best)]
        return {
            "users": len(shard),
            "popular_users": int((~by_model & is_reported).sum()),
            "top_items": np.unique(item_index[is_reported, :10]),
            "scored": len(best),
            "best": np.quantile(best, QUANTILES) if len(best) else np.zeros(len(QUANTILES)),
        }

    def _recommend(self, histories: list[History]) -> tuple[Recommendations, np.ndarray]:
        """The lists, and the trained model's state, which the policy observes."""
        now = self.dataset.now_s
        recommend = partial(self.predictor.recommend, now=now, filters=self.filters, rules=self.rules)
        if self.policy is None or self.observer is None:
            lists = recommend(histories, self.k, with_state=True)
            assert lists.state is not None
            return lists, lists.state

        state = recommend(histories, 2, with_state=True).state
        assert state is not None
        observations = self.observer.observe_all(histories, now, state)
        event_types = self.predictor.vocabulary.event_types
        controls = self.policy.controls(observations, self.predictor.model, event_types)
        return recommend(histories, self.k, controls=controls), state


def _summarize(parts: list[BucketSummary], n_items: int) -> SnapshotFigures:
    users = sum(part["users"] for part in parts)
    top_items = np.unique(np.concatenate([part["top_items"] for part in parts]))
    weights = np.array([part["scored"] for part in parts], float)
    best = np.stack([part["best"] for part in parts])
    means = (best * weights[:, None]).sum(0) / max(weights.sum(), 1.0)
    return {
        "users": users,
        "popular_users": sum(part["popular_users"] for part in parts),
        "coverage@10": float((top_items > 0).sum() / n_items),
        # quantiles of every bucket's best scores, averaged over buckets by users
        "best_score_quantiles": {}
        if not weights.sum()
        else {str(q): round(float(value), 6) for q, value in zip(QUANTILES, means, strict=True)},
    }
