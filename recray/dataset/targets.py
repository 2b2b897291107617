"""Which events are targets: what recommendations are for. The others are history alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recray.errors import DataError


@dataclass(frozen=True)
class TargetRule:
    """The weight of each event type as a target, float32 [event types]; 0: history alone.

    Events with a negative value are returns, and no targets.
    """

    weight: np.ndarray

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> TargetRule | None:
        """The rule of a dataset's manifest; None: every event is a target, with weight 1."""
        if (targets := manifest.get("targets")) is None:
            return None
        return cls(np.array([targets.get(name, 0.0) for name in manifest["event_types"]], np.float32))

    def weigh(self, event_index: np.ndarray, value: np.ndarray) -> np.ndarray:
        """The weight of each event, float32 [events]."""
        result: np.ndarray = np.where(value >= 0, self.weight[event_index], np.float32(0))
        return result


def choose_targets(
    declared: Mapping[str, float], counts: Mapping[str, int], types: Sequence[str], *, has_returns: bool
) -> dict[str, float] | None:
    """The weights of a dataset's event types for its manifest; None where every event counts alike.

    declared : `data.targets`
    counts : events of each type
    has_returns : whether values are below 0

    Raises DataError for a type that does not occur.
    """
    if missing := [name for name in declared if name not in types]:
        known = ", ".join(f"{name} ({counts.get(name, 0):,})" for name in types[:10])
        raise DataError(
            f"data.targets: no event has the type {', '.join(map(repr, missing))}; types are {known}",
            "correct data.targets, or map the column of the types: data.columns.event=YOUR_COLUMN",
        )
    if declared:
        return dict(declared)
    return dict.fromkeys(types, 1.0) if has_returns else None
