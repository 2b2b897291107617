"""Why an item was recommended: the events that carried it, and the same in words."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import numpy as np

from recray.dataset.reader import History
from recray.inference.predictor import Explanation
from recray.serving.api import Item, Reason
from recray.serving.state import ServingState

REASONS = 3  # of an item


def to_reasons(explanation: Explanation, history: History, state: ServingState) -> list[list[Reason]]:
    """Of each item that was explained, the events that carried it."""
    return [_reasons_of_one(history, explanation.position, explanation.attention, drop, state) for drop in explanation.drop]


def _reasons_of_one(history: History, position: np.ndarray, attention: np.ndarray, drop: np.ndarray, state: ServingState) -> list[Reason]:
    """The events that carried an item, most of all first; events of one item count together."""
    predictor = state.predictor
    carried = np.maximum(drop, 0.0)
    share = carried / max(float(carried.sum()), 1e-9)
    items = history.item_index[position]
    reasons: list[Reason] = []
    for item in dict.fromkeys(items[np.argsort(-share, kind="stable")].tolist()):
        same = np.flatnonzero(items == item)
        if share[same].sum() <= 0 or len(reasons) == REASONS:
            break
        last = position[same[-1]]
        reasons.append(
            Reason(
                item_id=predictor.ids_of(np.array([item]))[0],
                event=predictor.event_types[int(history.event_index[last])],
                timestamp=dt.datetime.fromtimestamp(int(history.timestamp_s[last]), dt.UTC) if predictor.has_time else None,
                share=round(float(share[same].sum()), 4),
                attention=round(float(attention[same].sum()), 4),
            )
        )
    return sorted(reasons, key=lambda reason: -reason.share)


def add_reasons(items: Sequence[Item], reasons: Sequence[list[Reason]], state: ServingState) -> None:
    """Say why, and the titles, in the items of a response."""
    for item, why in zip(items, reasons, strict=False):
        item.why, item.text, item.title = why, in_words(why, state), state.title(item.item_id)


def in_words(reasons: Sequence[Reason], state: ServingState) -> str:
    """The reasons as a sentence, by the items' titles where there are any."""
    if not reasons:
        return "nothing in the history speaks for it: it is popular"
    return "because of " + ", ".join(f"{state.title(reason.item_id)} ({reason.event}, {reason.share:.0%})" for reason in reasons)
