"""Pinned items of a surface, at places of their own between two dates (`serve.surfaces.NAME.pins`)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recray.config.sections import PinSettings
from recray.serving.query import Query
from recray.serving.ranking import RankedItems, to_filters
from recray.serving.state import EMPTY_HISTORY, ServingState


def pin_items(
    ranked: RankedItems, declared: Sequence[PinSettings], query: Query, state: ServingState
) -> RankedItems:
    """The list with the pinned items of a surface, and no longer than the query asks: others move down.

    Pins hold at the query time, now without one. A pin is left out where its place is beyond the list, its
    item is not available, or the request, or `where` of the surface, leaves it out; the seen-item filter does
    not. A pinned item has the score of the item whose place it takes, so that scores fall.
    """
    pins = [pin for pin in _current(declared, query.moment) if pin.position <= query.k]
    if not pins:
        return ranked
    items = list(ranked.items)
    allowed = replace(query.items, filter_seen=False)
    filters = to_filters(allowed, state, query.moment_s)
    for pin in pins:
        index = state.predictor.vocabulary.index_of([pin.item_id])
        if not index[0] or index[0] in state.predictor.retired.cpu():
            continue
        if not filters.is_allowed(index, EMPTY_HISTORY)[0]:
            continue
        (item_id,) = state.predictor.vocabulary.ids_of(index)
        items = [pair for pair in items if pair[0] != item_id]
        index_in_list = min(pin.position - 1, len(items))
        items.insert(index_in_list, (item_id, _score_at(items, index_in_list)))
    return replace(ranked, items=items[: query.k])


def find_unknown(pins: Sequence[PinSettings], state: ServingState) -> list[Any]:
    """The pinned items that a run does not know."""
    index = state.predictor.vocabulary.index_of([pin.item_id for pin in pins])
    return [pin.item_id for pin, number in zip(pins, index, strict=True) if not number]


def _current(pins: Sequence[PinSettings], moment: dt.datetime | None) -> list[PinSettings]:
    """The pins that hold at a moment (None: now), by position."""
    now = dt.datetime.now(dt.UTC) if moment is None else moment
    current = [
        pin for pin in pins if (not pin.since or pin.since <= now) and (not pin.until or now < pin.until)
    ]
    return sorted(current, key=lambda pin: pin.position)


def _score_at(items: Sequence[tuple[Any, float | None]], index: int) -> float:
    if not items:
        return 0.0
    score = items[min(index, len(items) - 1)][1]
    return 0.0 if score is None else score
