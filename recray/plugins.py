"""Functions of other packages: a ranking metric or a loss of one's own, declared by an entry point.

    [project.entry-points."recray.metrics"]
    serendipity = "my_package:serendipity"   # (lists_UK, targets, k) -> float64 [U], as `metrics.per_user`

    [project.entry-points."recray.losses"]
    focal = "my_package:focal"               # as `recray.model.losses.Loss`; used with train.loss=focal

A metric is computed in every evaluation as soon as its package is installed, on every node.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, Literal

from recray.errors import SettingsError

Group = Literal["metrics", "losses"]


def list_plugins(group: Group) -> dict[str, str]:
    """The functions of a group by name, in order, as `module:function version of the package`."""
    return {
        point.name: f"{point.value} {point.dist.version if point.dist else ''}".strip()
        for point in sorted(_points(group), key=lambda point: point.name)
    }


def load_plugin(group: Group, name: str) -> Callable[..., Any]:
    """The function of a name. Raises SettingsError where it cannot be imported."""
    point = next((point for point in _points(group) if point.name == name), None)
    if point is None:
        raise SettingsError(
            f"no package of this node declares {name} under recray.{group}", "install it on every node"
        )
    try:
        function = point.load()
    except Exception as error:
        raise SettingsError(
            f"recray.{group}: {name} ({point.value}) cannot be imported: {type(error).__name__}: {error}",
            "fix or remove the package that declares it",
        ) from error
    if not callable(function):
        raise SettingsError(f"recray.{group}: {name} ({point.value}) is no function", "name one")
    return function  # type: ignore[no-any-return]


def _points(group: Group) -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=f"recray.{group}")
