"""A published run of untrained weights: what an endpoint costs does not depend on what its model has learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from recray.bundle import Bundle, write_bundle
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.prepare.prepare import one_by_one, prepare
from recray.release import Member, Release
from recray.scoring.score import By, ScoreBucket, write_night
from recray.stages import AsOf
from recray.storage import Storage
from recray.testing.synthetic import SyntheticShop
from recray.training.private import PrivateLoop
from recray.training.trainer import bundle_settings, mechanism_for
from recray.training.worker import build_loop

KEY = "untrained"


def prepare_here(settings: Settings, as_of: AsOf = None) -> Dataset:
    """The dataset of the settings, made in this process without Ray."""
    return prepare(settings, as_of, each=one_by_one)


def publish_synthetic(folder: Path, *, users: int, items: int, events_per_user: int, overrides: tuple[str, ...] = ()) -> Storage:
    """The run of a synthetic shop, without Ray."""
    SyntheticShop(users=users, items=items, events_per_user=events_per_user, seed=1).write(folder / "world")
    root = folder / "root"
    named = [f"data.events=[{folder / 'world' / 'events'}]", f"data.items={folder / 'world' / 'items.parquet'}", f"storage.root={root}"]
    settings = load_settings(None, [*named, "data.features={category: categorical, brand: categorical, price: numeric}", *overrides])
    return publish_untrained(settings, prepare_here(settings), root)


def publish_untrained(settings: Settings, dataset: Dataset, root: Path, privacy: dict[str, Any] | None = None) -> Storage:
    """A champion of untrained weights for the dataset, and its run by `settings.score`, published in a workspace.

    privacy : as for `untrained_bundle`
    """
    storage = Storage(root)
    if dataset.path != storage.dataset(dataset.key):
        shutil.copytree(dataset.path, storage.dataset(dataset.key))
    bundle = untrained_bundle(settings, dataset, storage.bundle(KEY), KEY, privacy)
    Release(champion=Member.of(bundle)).write(storage)
    write_night(storage, KEY, Dataset.open(storage.dataset(dataset.key)), By(bundle), settings.score, score_buckets)
    return storage


def untrained_bundle(settings: Settings, dataset: Dataset, path: Path, key: str, privacy: dict[str, Any] | None = None) -> Bundle:
    """A bundle of untrained weights. `privacy`: what its statement says."""
    chosen, mechanism = bundle_settings(settings), mechanism_for(settings, dataset)
    loop = build_loop(str(dataset.path), chosen, torch.device("cpu"), None, None if mechanism is None else vars(mechanism))
    if isinstance(loop, PrivateLoop):
        loop.begin()
        loop.best = loop.average.state_dict()
    return write_bundle(
        path,
        key,
        dataset=dataset,
        shape=loop.model.shape,
        state=loop.best,
        features=chosen["data"]["features"],
        prior_days=chosen["model"]["prior_days"],
        settings=chosen,
        metrics={},
        privacy=privacy,
    )


def score_buckets(arguments: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Score the buckets one after the other, without Ray."""
    bucket = ScoreBucket(**arguments, threads=torch.get_num_threads())
    return [bucket({"item": number}) for number in range(count)]
