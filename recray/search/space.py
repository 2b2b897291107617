"""Search spaces: the settings that trials vary, with the values that they may take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from recray.config import Settings, with_values
from recray.config.sections import Range
from recray.dataset.reader import Dataset
from recray.errors import Problems, SettingsError
from recray.model.shape import PRESETS

Domain = Sequence[Any] | Range
SECTIONS = ("model", "train")
FEW_USERS, MANY_EVENTS = 5_000, 1_000_000
LONG_HISTORY = 100  # events of a user, from which half of them is a choice


def read_space(settings: Settings, dataset: Dataset) -> dict[str, Domain]:
    """The space of `search.space`, or one for a dataset of this size.

    Raises SettingsError, with all problems, for a setting that does not exist or that a search may not vary,
    and for a value that it cannot have.
    """
    space: dict[str, Domain] = dict(settings.search.space) or choose_space(settings, dataset)
    problems = Problems()
    for name, domain in space.items():
        section, _, field = name.partition(".")
        known = section in SECTIONS and field in type(getattr(settings, section)).model_fields
        if not known:
            error = SettingsError(
                f"search.space: {name!r} is no setting of model or train, which a search may vary",
                "recray settings model and recray settings train list them",
            )
            problems.errors.append(error)
            continue
        for value in _examples(domain):
            problems.collect(partial(with_values, settings, {name: value}))
    problems.raise_all()
    return space


def choose_space(settings: Settings, dataset: Dataset) -> dict[str, Domain]:
    """The space for the size and kind of a dataset; its values contain those of the settings."""
    lengths = np.concatenate([np.diff(shard.offsets) for shard in dataset.shards()])
    is_small = dataset.n_users < FEW_USERS
    space: dict[str, Domain] = {
        "model.dropout": [0.1, 0.2, 0.3, 0.4, 0.5],
        "model.dim": [32, 64, 128] if dataset.n_events < MANY_EVENTS else [64, 128, 256],
        "model.blocks": [1, 2] if is_small else [1, 2, 4],
        "model.heads": [1, 2, 4],
        "model.scores": ["dot", "cosine"],
        "train.learning_rate": Range(min=3e-4, max=4e-3, log=True),
        "train.target_baskets": [1, 2, 4, 8],
        "train.batch_tokens": [2500, 5000, 10_000],
        "train.weight_decay": [0.0, 0.01, 0.1],
    }
    if len(lengths) and np.quantile(lengths, 0.9) > LONG_HISTORY:
        space["model.history"] = [50, 100, 200, 400]
    if dataset.features:
        space["model.id_dropout"] = [0.0, 0.1, 0.3]
    if dataset.has_time:
        space["model.popularity_prior_days"] = [0, 7, 30, 60]
        space["model.time_bias"] = [False, True]
    if settings.model.repeat_consumption:
        space["model.repeat_by_item"] = [False, True]
    if dataset.manifest["settings"]["data"]["columns"].get("value", "value") is not None:
        space["model.values"] = [False, True]
    own = own_values(settings, space)
    return {name: _with_own(settings, name, domain, own[name]) for name, domain in space.items()}


def _with_own(settings: Settings, name: str, domain: Domain, own: Any) -> Domain:
    """The domain, with the settings' own value."""
    if isinstance(domain, Range):
        return Range(min=min(domain.min, own), max=max(domain.max, own), log=domain.log)
    if own in domain:
        return domain
    if own is None:  # as the preset has it
        preset = PRESETS[settings.model.preset][name.partition(".")[2]]
        return [None, *(value for value in domain if value != preset)]
    return sorted([*domain, own])


def own_values(settings: Settings, space: Mapping[str, Domain]) -> dict[str, Any]:
    """The settings' own values of a space: its first trial."""
    values = {}
    for name in space:
        section, _, field = name.partition(".")
        values[name] = getattr(getattr(settings, section), field)
    return values


def nearest(domain: Domain, value: Any) -> Any:
    """The value of a domain that is closest to a value; the first where none is close."""
    if isinstance(domain, Range):
        return min(max(value, domain.min), domain.max) if _is_number(value) else domain.min
    if value in domain or not _is_number(value) or not all(map(_is_number, domain)):
        return value if value in domain else domain[0]
    return min(domain, key=lambda other: abs(other - value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def count_choices(space: Mapping[str, Domain]) -> float:
    """Number of different trials; infinite with a range."""
    if any(isinstance(domain, Range) for domain in space.values()):
        return math.inf
    return math.prod(len(list(_examples(domain))) for domain in space.values())


def to_json(space: Mapping[str, Domain]) -> dict[str, Any]:
    """A space as JSON values."""
    return {
        name: domain.model_dump() if isinstance(domain, Range) else list(domain)
        for name, domain in space.items()
    }


def _examples(domain: Domain) -> Iterator[Any]:
    return iter((domain.min, domain.max)) if isinstance(domain, Range) else iter(domain)
