"""Surfaces: places of the product (`serve.surfaces`) that declare what their lists are like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recray.config.sections import SurfaceSettings
from recray.errors import RequestError
from recray.inference import Rules
from recray.serving.api import Range, RecommendRequest
from recray.serving.state import ServingState


def apply_surface(
    request: RecommendRequest, surfaces: Mapping[str, SurfaceSettings]
) -> tuple[RecommendRequest, SurfaceSettings | None]:
    """The request with what its surface declares and it lacks, and the surface. Raises RequestError for an
    unknown one.
    """
    if request.surface is None:
        return request, None
    surface = surfaces.get(request.surface)
    if surface is None:
        known = ", ".join(surfaces) or "none"
        raise RequestError(f"surface: no surface {request.surface!r}", f"serve.surfaces declares: {known}")
    declared: dict[str, Any] = {
        "k": surface.k,
        "filter_seen": surface.filter_seen or None,
        "seen_events": None if surface.seen_events is None else list(surface.seen_events),
        "seen_days": surface.seen_days,
    }
    sent = request.model_fields_set
    update = {name: value for name, value in declared.items() if value is not None and name not in sent}
    if "filter_seen" in sent and not request.filter_seen:
        update.pop("seen_events", None)
        update.pop("seen_days", None)
    where = {
        name: Range(**condition) if isinstance(condition, dict) else list(condition)
        for name, condition in surface.where.items()
    }
    update["where"] = {**where, **request.where}
    return request.model_copy(update=update), surface


def rules_of(surface: SurfaceSettings | None, name: str, state: ServingState) -> Rules | None:
    """The rules of a surface's lists; those of the batch recommendations without one.

    Raises RequestError for a column that the item table lacks.
    """
    if surface is None or not surface.changes_rules:
        return state.rules
    if name not in state.surface_rules:
        state.surface_rules[name] = state.build_rules(surface.rules)
    return state.surface_rules[name]
