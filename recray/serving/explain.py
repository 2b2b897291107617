"""Reasons of a recommendation: the events that carried it, also as text."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import numpy as np

from recray.dataset.reader import History
from recray.inference.explain import Explanation
from recray.serving.api import Item, Reason
from recray.serving.state import ServingState

MOST_REASONS = 3  # of an item


def to_reasons(explanation: Explanation, history: History, state: ServingState) -> list[list[Reason]]:
    """The events that carried each explained item."""
    return [
        _to_item_reasons(history, explanation.position, explanation.attention, drop, state)
        for drop in explanation.drop
    ]


def _to_item_reasons(
    history: History, position: np.ndarray, attention: np.ndarray, drop: np.ndarray, state: ServingState
) -> list[Reason]:
    """The events that carried an item, by share; events of the same item are added up."""
    predictor = state.predictor
    carried = np.maximum(drop, 0.0)
    share = carried / max(float(carried.sum()), 1e-9)
    items = history.item_index[position]
    reasons: list[Reason] = []
    for item in dict.fromkeys(items[np.argsort(-share, kind="stable")].tolist()):
        rows = np.flatnonzero(items == item)
        if share[rows].sum() <= 0 or len(reasons) == MOST_REASONS:
            break
        last = position[rows[-1]]
        reasons.append(
            Reason(
                item_id=predictor.vocabulary.ids_of(np.array([item]))[0],
                event=predictor.vocabulary.event_types[int(history.event_index[last])],
                timestamp=dt.datetime.fromtimestamp(int(history.timestamp_s[last]), dt.UTC)
                if predictor.catalogue.has_time
                else None,
                share=round(float(share[rows].sum()), 4),
                attention=round(float(attention[rows].sum()), 4),
            )
        )
    return sorted(reasons, key=lambda reason: -reason.share)


def add_reasons(items: Sequence[Item], reasons: Sequence[list[Reason]], state: ServingState) -> None:
    """Add reasons and titles to the items of a response."""
    for item, why in zip(items, reasons, strict=False):
        item.why, item.text, item.title = why, describe_reasons(why, state), state.find_title(item.item_id)


def describe_items(items: Sequence[Item], state: ServingState) -> None:
    """Add to the items of a response what people see of them."""
    for item in items:
        for name, value in state.describe_item(item.item_id).items():
            setattr(item, name, value)


def describe_reasons(reasons: Sequence[Reason], state: ServingState) -> str:
    """The reasons as text, with the items' titles where there are any."""
    if not reasons:
        return "no event of the history carried it: it is popular"
    return "because of " + ", ".join(
        f"{state.find_title(reason.item_id)} ({reason.event}, {reason.share:.0%})" for reason in reasons
    )
