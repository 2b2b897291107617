"""A published night of untrained weights: what an endpoint costs does not depend on what its model has learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from recray.benchmark.data import prepare_alone
from recray.bundle import Bundle, write_bundle
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.dataset.worlds import World
from recray.release import Member, Release
from recray.scoring.score import By, ScoreBucket, write_night
from recray.storage import Storage
from recray.training.private import PrivateLoop
from recray.training.trainer import bundle_settings, mechanism_for
from recray.training.worker import build_loop

KEY = "untrained"


def world_night(folder: Path, *, users: int, items: int, events_per_user: int, overrides: tuple[str, ...] = ()) -> Storage:
    """The night of a made-up world, without Ray."""
    World(users=users, items=items, events_per_user=events_per_user, seed=1).write(folder / "world")
    root = folder / "root"
    named = [f"data.events=[{folder / 'world' / 'events'}]", f"data.items={folder / 'world' / 'items.parquet'}", f"storage.root={root}"]
    settings = load_settings(None, [*named, "data.features={category: categorical, brand: categorical, price: numeric}", *overrides])
    return publish_untrained(settings, prepare_alone(settings), root)


def publish_untrained(settings: Settings, dataset: Dataset, root: Path, privacy: dict[str, Any] | None = None) -> Storage:
    """A champion of untrained weights for the dataset, and its night by `settings.score`, published under a root. `privacy`: as for `untrained`."""
    storage = Storage(root)
    if dataset.path != storage.dataset(dataset.key):
        shutil.copytree(dataset.path, storage.dataset(dataset.key))
    bundle = untrained(settings, dataset, storage.bundle(KEY), KEY, privacy)
    Release(champion=Member.of(bundle)).write(storage)
    write_night(storage, KEY, Dataset.open(storage.dataset(dataset.key)), By(bundle), settings.score, each_bucket)
    return storage


def untrained(settings: Settings, dataset: Dataset, path: Path, key: str, privacy: dict[str, Any] | None = None) -> Bundle:
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


def each_bucket(arguments: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Score the buckets one after the other, without Ray."""
    bucket = ScoreBucket(**arguments, threads=torch.get_num_threads())
    return [bucket({"item": number}) for number in range(count)]
