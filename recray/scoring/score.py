"""The score stage: one task a bucket of users around actors that hold the predictor, then seal and publish."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recray.bundle import Bundle
from recray.cluster import require, unwrapped, without_line
from recray.config import ScoreSettings, Settings
from recray.dataset.reader import Dataset
from recray.inference import Filters, Predictor, Rules
from recray.inference.memory import keep_freed_memory
from recray.inference.policy import Policy
from recray.model.device import device
from recray.snapshot.writer import KIND, publish, snapshot_path, write_part
from recray.storage import Storage, is_sealed, key_of, open_sealed, sealed_directory
from recray.version import __version__

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class By:
    """What the users of a night are scored by: a bundle as it is, turned by a policy (its run key), or its popular list alone."""

    bundle: Bundle
    policy: str | None = None
    popular_only: bool = False


def score_key(settings: Settings, dataset: Dataset, by: By) -> str:
    """Run key of score."""
    turned = "popular only" if by.popular_only else by.policy
    return key_of("score", settings.result_settings("score"), dataset.key, dataset.digest, by.bundle.digest, turned, dataset.as_of_s, __version__)


def score(settings: Settings, key: str, dataset: Dataset, by: By) -> tuple[Path, dict[str, Any], bool]:
    """Score every user, by what a policy decides on the average where there is one, seal the snapshot and publish it. Needs a Ray session.

    Returns its path, its manifest, and whether the publication changed. Raises RefusedError for an older night.
    """
    return write_night(Storage(settings.root()), key, dataset, by, settings.score, partial(_on_ray_data, settings))


def write_night(storage: Storage, key: str, dataset: Dataset, by: By, options: ScoreSettings, each: Each) -> tuple[Path, dict[str, Any], bool]:
    """As `score`; `each` says how the buckets are scored."""
    path = snapshot_path(storage, dataset.as_of_s, key)
    bundle, policy = by.bundle, by.policy
    if not is_sealed(path, KIND, key):
        fields: dict[str, Any] = {
            "as_of_s": dataset.as_of_s,
            "bundle": storage.bundle(bundle.key).relative_to(storage.root).as_posix(),
            "bundle_digest": bundle.digest,
            "policy": policy,
            "popular_only": by.popular_only,
            "dataset": storage.dataset(dataset.key).relative_to(storage.root).as_posix(),
            "dataset_digest": dataset.digest,
            "user_type": str(dataset.user_type),
            "buckets": dataset.n_shards,
            "k": options.k,
            "new_only": options.new_only,
            "rules": options.rules(),
            "precision": options.precision,
        }
        with sealed_directory(path, KIND, key, fields) as folder:
            arguments = {
                "bundle": str(bundle.path),
                "policy": None if policy is None else str(storage.policy(policy)),
                "popular_only": by.popular_only,
                "dataset": str(dataset.path),
                "folder": str(folder),
                "k": options.k,
                "new_only": options.new_only,
                "rules": options.rules(),
                "batch_users": options.batch_users,
                "precision": options.precision,
                "private": bool(bundle.privacy["differential_privacy"]),
            }
            fields.update(_summary(each(arguments, dataset.n_shards), len(bundle.item_ids) + len(bundle.newcomers(dataset))))
    manifest = open_sealed(path, KIND, verify=False)
    return path, manifest, publish(storage, path, manifest)


Each = Callable[[dict[str, Any], int], list[dict[str, Any]]]
"""What a `ScoreBucket` of these arguments (and `threads`, `gpu`) says of each bucket below a count, in any order and any process."""


def _on_ray_data(settings: Settings, arguments: dict[str, Any], buckets: int) -> list[dict[str, Any]]:
    import ray

    options = settings.score
    actors = min(options.actors, buckets)
    require(actors * options.cpus_per_actor, actors * options.gpus_per_actor, "score", settings.train.timeout_s)
    # Ray Data hands its actors their work through the object store, and Ray then warns of each that it may restart
    with unwrapped(), without_line("ScoreBucket", "constructor arguments in the object store"):
        scored = ray.data.from_items(list(range(buckets)), override_num_blocks=buckets).map(
            ScoreBucket,  # type: ignore[arg-type]
            fn_constructor_kwargs={**arguments, "threads": max(1, len(os.sched_getaffinity(0)) // actors), "gpu": options.gpus_per_actor > 0},
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=options.cpus_per_actor,
            num_gpus=options.gpus_per_actor or None,
            ray_remote_args_fn=lambda: {"max_restarts": options.max_failures, "max_task_retries": options.max_failures},
        )
        return scored.take_all()


class ScoreBucket:
    """Actor that scores one bucket (= dataset shard) a call and writes its part.

    What it tells of lists is of all users, of a private bundle's of those alone of whom nothing was learned.
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
        new_only: bool,
        rules: dict[str, Any],
        batch_users: int,
        threads: int,
        precision: str = "float32",
        private: bool = False,
        gpu: bool = False,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        keep_freed_memory()
        self.dataset = Dataset.open(dataset)
        place = device("score.gpus_per_actor", gpu=gpu)
        opened = Bundle.open(bundle)
        self.policy = None if policy is None else Policy.load(Path(policy), opened.digest)
        self.predictor = Predictor.load(opened, dataset=self.dataset, device=place, popular_only=popular_only, half=precision == "bfloat16")
        self.translation = self.predictor.translation(self.dataset)
        self.private = private
        self.folder, self.k, self.batch_users = Path(folder), k, batch_users
        self.filters = Filters(new_only=new_only)
        self.rules = Rules.declared(rules, self.dataset, self.translation.to_bundle, self.predictor.unseen)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        bucket = int(row["item"])
        shard = self.dataset.shard(bucket)
        items: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        states: list[np.ndarray] = [np.zeros((0, 2), np.float32)]
        sources: list[str] = []
        for start in range(0, len(shard), self.batch_users):
            users = range(start, min(start + self.batch_users, len(shard)))
            histories = [self.translation.history(shard.history(user)) for user in users]
            asked: dict[str, Any] = {"now": self.dataset.now_s, "filters": self.filters, "rules": self.rules}
            if self.policy is None:
                answer = self.predictor.recommend(histories, self.k, watched=True, **asked)
                state = answer.state
                assert state is not None
            else:  # it observes the trained model's responses
                state = self.predictor.recommend(histories, 2, watched=True, **asked).state
                assert state is not None
                observed = self.predictor.observe_all(histories, self.dataset.now_s, state)
                controls = self.policy.controls(observed, self.predictor.model, self.predictor.event_types)
                answer = self.predictor.recommend(histories, self.k, controls=controls, **asked)
            items.append(answer.item_index)
            scores.append(answer.scores)
            states.append(state)
            sources += answer.source
        shape = (0, min(self.k, self.predictor.n_items))
        item_index = np.concatenate(items) if items else np.zeros(shape, np.int64)
        score_values = np.concatenate(scores) if scores else np.zeros(shape, np.float32)
        real = item_index > 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(real.sum(1))]), pa.int32())
        item_ids = self.predictor.item_ids.take(pa.array(item_index[real] - 1))
        write_part(self.folder, bucket, shard.user_ids, item_ids, offsets, pa.array(score_values[real]), sources, np.concatenate(states))
        told = shard.asked if self.private else np.ones(len(shard), bool)
        by_model = np.array([source == "model" for source in sources], bool)
        best = score_values[by_model & told, 0] if len(by_model) else np.zeros(0)
        best = best[np.isfinite(best)]
        return {
            "users": len(shard),
            "popular_users": int((~by_model & told).sum()),
            "top_items": np.unique(item_index[told, :10]),
            "scored": len(best),
            "best": np.quantile(best, QUANTILES) if len(best) else np.zeros(len(QUANTILES)),
        }


def _summary(parts: list[dict[str, Any]], n_items: int) -> dict[str, Any]:
    users = sum(part["users"] for part in parts)
    shown = np.unique(np.concatenate([part["top_items"] for part in parts]))
    weights = np.array([part["scored"] for part in parts], float)
    best = np.stack([part["best"] for part in parts])
    means = (best * weights[:, None]).sum(0) / max(weights.sum(), 1.0)
    return {
        "users": users,
        "popular_users": sum(part["popular_users"] for part in parts),
        "coverage@10": float((shown > 0).sum() / n_items),
        # quantiles of every bucket's best scores, averaged over buckets by users
        "best_score_quantiles": {} if not weights.sum() else {str(q): round(float(value), 6) for q, value in zip(QUANTILES, means, strict=True)},
    }
