"""Publishes runs of untrained models, since the cost of an endpoint does not depend on what its model has
learned.
"""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import torch

from recray.bundle import Bundle, PrivacyStatement, TrainingMetrics, write_bundle
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.prepare.prepare import prepare, run_in_process
from recray.release import Member, Release
from recray.snapshot.score import BucketArguments, BucketScorer, BucketSummary, ScoringModel, write_snapshot
from recray.storage import Storage
from recray.testing.synthetic import SyntheticShop
from recray.training.loop import Progress
from recray.training.plan import bundle_settings, plan_training, training_settings
from recray.training.private import PrivateLoop
from recray.training.trainer import mechanism_for
from recray.training.worker import build_loop, fit_neighbours_for

KEY = "untrained"


def prepare_here(settings: Settings, as_of: dt.datetime | None = None) -> Dataset:
    """The dataset of the settings, prepared in this process without Ray."""
    return prepare(settings, as_of, run_tasks=run_in_process)


def publish_synthetic(
    folder: Path, *, users: int, items: int, events_per_user: int, overrides: tuple[str, ...] = ()
) -> Storage:
    """Publish the run of a synthetic shop with an untrained model, without Ray."""
    SyntheticShop(users=users, items=items, events_per_user=events_per_user, seed=1).write(folder / "shop")
    root = folder / "root"
    paths = [
        f"data.events=[{folder / 'shop' / 'events'}]",
        f"data.items={folder / 'shop' / 'items.parquet'}",
        f"storage.root={root}",
    ]
    settings = load_settings(
        None,
        [*paths, "data.features={category: categorical, brand: categorical, price: numeric}", *overrides],
    )
    return publish_untrained(settings, prepare_here(settings), root)


def publish_untrained(
    settings: Settings, dataset: Dataset, root: Path, privacy: PrivacyStatement | None = None
) -> Storage:
    """Publish a champion of untrained weights for the dataset, and its batch recommendations by
    `settings.score`, in a workspace.

    privacy : as for `untrained_bundle`
    """
    storage = Storage(root)
    if dataset.path != storage.dataset(dataset.key):
        shutil.copytree(dataset.path, storage.dataset(dataset.key))
    bundle = untrained_bundle(settings, dataset, storage.bundle(KEY), KEY, privacy)
    Release(champion=Member.of(bundle)).write(storage)
    write_snapshot(
        storage,
        KEY,
        Dataset.open(storage.dataset(dataset.key)),
        ScoringModel(bundle),
        settings.score,
        score_buckets,
    )
    return storage


def skip_training(settings: Settings, as_of: dt.datetime | None = None) -> Bundle:
    """Write what the train stage of these settings would write, so that it is skipped: untrained weights."""
    dataset = prepare_here(settings, as_of)
    key = plan_training(settings, dataset).key
    path = Storage(settings.root()).bundle(key)
    return untrained_bundle(settings, dataset, path, key, metrics=Progress().to_dict())


def untrained_bundle(
    settings: Settings,
    dataset: Dataset,
    path: Path,
    key: str,
    privacy: PrivacyStatement | None = None,
    metrics: TrainingMetrics | None = None,
) -> Bundle:
    """Write a model bundle of untrained weights.

    privacy : its privacy statement
    metrics : of a training; None: it has none
    """
    mechanism = mechanism_for(settings, dataset)
    loop = build_loop(
        str(dataset.path),
        training_settings(settings),
        torch.device("cpu"),
        None,
        None if mechanism is None else vars(mechanism),
    )
    if isinstance(loop, PrivateLoop):
        loop.release_counts()
        loop.best = loop.ema_model.state_dict()
    return write_bundle(
        path,
        key,
        dataset=dataset,
        shape=loop.model.shape,
        state=loop.best,
        settings=bundle_settings(settings),
        metrics=metrics or {},
        privacy=privacy,
        neighbours=fit_neighbours_for(settings, dataset) if loop.model.cooccurrence is not None else None,
    )


def score_buckets(arguments: BucketArguments, count: int) -> list[BucketSummary]:
    """Score the buckets in this process, without Ray."""
    bucket = BucketScorer(**arguments, threads=torch.get_num_threads())
    return [bucket({"item": number}) for number in range(count)]
