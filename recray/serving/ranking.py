"""Queries as a model takes them, and its passes over many at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from recray.dataset.context import asked
from recray.dataset.reader import History
from recray.errors import RequestError, UnavailableError, UnknownItemError
from recray.inference import Filters
from recray.inference.rules import between, having
from recray.model.controls import Controls
from recray.serving.api import Event, Item, Range, Reason, Source
from recray.serving.explain import to_reasons
from recray.serving.modulation import Exploration, Modulation, asks_model, choose_modulation
from recray.serving.query import ItemRule, Query
from recray.serving.state import EMPTY_HISTORY, ServingState

MASKS = 64  # attribute filters whose items are remembered


@dataclass(frozen=True)
class RankedItems:
    """Items, best first, with their scores (None: not known), and which source ranked them; `reasons` of each where they were asked for."""

    items: list[tuple[Any, float | None]]
    source: Source
    reasons: list[list[Reason]] | None = None

    def to_items(self) -> list[Item]:
        """As the API shows them."""
        return [Item.model_construct(item_id=item, score=score, title=None, why=None, text=None) for item, score in self.items if score is not None]


@dataclass(frozen=True)
class ModelInput:
    """A query in the indices of one state's bundle: the `k` best items are asked for, or the scores of `candidates` (outside ids).

    context : codes [C]
    explain : say which events carried the candidates, instead of scoring them
    """

    state: ServingState
    history: History
    now_s: int
    context: np.ndarray
    modulation: Modulation
    k: int = 0
    filters: Filters = Filters()
    candidates: tuple[Any, ...] | None = None
    explain: bool = False

    def explaining(self, candidates: Sequence[Any]) -> ModelInput:
        """The same, asked what carried some items."""
        return replace(self, candidates=tuple(candidates), explain=True)


def bind(query: Query, state: ServingState, exploration: Exploration | None = None) -> ModelInput:
    """A query as a state's model takes it. Raises RequestError for a context, a control or a column that it does not have.

    exploration : for a response that explores
    """
    history, now_s = _history_of(query, state)
    context = asked(state.predictor.context, query.context, None if query.moment is None else now_s)
    filters = Filters() if query.candidates is not None else to_filters(query.items, state)
    modulation = choose_modulation(query, state, history, now_s, exploration)
    return ModelInput(state, history, now_s, context, modulation, query.k, filters, query.candidates)


def _history_of(query: Query, state: ServingState) -> tuple[History, int]:
    """The history, and the moment that is asked about."""
    later = [*(query.history or ()), *query.stored_later, *query.sent_later]
    history = EMPTY_HISTORY if query.history is not None or query.user_id is None else state.stored_history(query.user_id)
    history = join_events(history, later, state, query.moment_s)
    if query.moment_s is not None:
        if state.predictor.has_time:
            known = history.timestamp_s <= query.moment_s
            history = history if known.all() else History(*(values[known] for values in history))
        return history, query.moment_s
    now_s = state.dataset.now_s
    if later and len(history.timestamp_s):
        now_s = max(now_s, int(history.timestamp_s.max()) + 1)
    return history, now_s


def join_events(stored: History, events: Sequence[Event], state: ServingState, moment_s: int | None = None) -> History:
    """A stored history and what came after it, in order of time, without events of a type that the bundle has not met."""
    predictor = state.predictor
    events = [event for event in events if event.event is None or event.event in predictor.event_types]
    if not events:
        return stored
    if predictor.has_time:
        now_s = state.dataset.now_s if moment_s is None else moment_s
        times = np.array([now_s if event.timestamp is None else int(event.timestamp.timestamp()) for event in events], np.int64)
    else:
        times = np.arange(len(events)) + (int(stored.timestamp_s.max()) + 1 if len(stored.timestamp_s) else 0)
    types = predictor.event_index([event.event for event in events])
    items = predictor.index_of([event.item_id for event in events])
    later = History(items, types, times, np.array([event.value for event in events], np.float32))
    joined = History(*(np.concatenate(pair) for pair in zip(stored, later, strict=True)))
    order = np.argsort(joined.timestamp_s, kind="stable")
    return History(*(values[order] for values in joined))


def to_filters(rule: ItemRule, state: ServingState) -> Filters:
    """The items of a rule, by index. Raises RequestError for a column that the item table does not have, or that holds no numbers."""
    predictor = state.predictor
    allow = None if rule.allow is None else np.unique(predictor.index_of(rule.allow))
    for column, condition in rule.where.items():
        mask = _items_where(column, condition, state)
        allow = mask if allow is None else np.intersect1d(allow, mask)
    deny = np.unique(predictor.index_of(rule.deny)) if rule.deny else None
    return Filters(rule.filter_seen, None if allow is None else allow[allow > 0], None if deny is None else deny[deny > 0])


def _items_where(column: str, condition: list[Any] | Range, state: ServingState) -> np.ndarray:
    """Indices of the items that an attribute filter leaves."""
    dataset, masks = state.dataset, state.item_masks
    key = json.dumps([column, condition.model_dump() if isinstance(condition, Range) else condition])
    if key not in masks:
        if column not in dataset.features:
            raise RequestError(f"where: no column {column!r}", f"known: {', '.join(dataset.features) or 'none'}")
        if isinstance(condition, Range):
            dtype = dataset.items[column].type
            if not (pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)):
                raise RequestError(f"where: {column!r} holds no numbers", "name a list of values")
            rows = between(dataset.items[column], condition.min, condition.max)
        else:
            rows = having(dataset, column, condition)
        if len(masks) >= MASKS:
            del masks[next(iter(masks))]
        masks[key] = np.unique(state.translation.to_bundle[1:][rows])
    return masks[key]


_Rank = Callable[[list[ModelInput]], list[RankedItems]]


def rank_inputs(inputs: Sequence[ModelInput]) -> list[RankedItems]:
    """What the models say, in the order of the inputs: one pass for all inputs of one state and kind."""
    groups: dict[tuple[int, _Rank], list[int]] = {}
    for number, one in enumerate(inputs):
        rank: _Rank = _explain if one.explain else _rank_all if one.candidates is None else _score_candidates
        groups.setdefault((id(one.state), rank), []).append(number)
    ranked: dict[int, RankedItems] = {}
    for (_, rank), numbers in groups.items():
        ranked |= zip(numbers, rank([inputs[number] for number in numbers]), strict=True)
    return [ranked[number] for number in range(len(inputs))]


def _controls(inputs: Sequence[ModelInput]) -> Controls:
    """Of all inputs at once."""
    return inputs[0].state.predictor.controls_of([one.modulation.controls for one in inputs])


def _rank_all(inputs: list[ModelInput]) -> list[RankedItems]:
    state, predictor = inputs[0].state, inputs[0].state.predictor
    best = predictor.recommend(
        [one.history for one in inputs],
        max(one.k for one in inputs),
        now=[one.now_s for one in inputs],
        filters=[one.filters for one in inputs],
        rules=state.rules,
        controls=_controls(inputs),
        context=[one.context for one in inputs],
    )
    ranked = []
    for row, one in enumerate(inputs):
        index, scores = best.item_index[row][: one.k], best.scores[row][: one.k]
        ids = predictor.ids_of(index[index > 0])
        source: Source = "realtime" if best.source[row] == "model" else "popular"
        ranked.append(RankedItems(list(zip(ids, scores[index > 0].tolist(), strict=True)), source))
    return ranked


def _score_candidates(inputs: list[ModelInput]) -> list[RankedItems]:
    state, predictor = inputs[0].state, inputs[0].state.predictor
    index = [predictor.index_of(one.candidates or ()) for one in inputs]
    scores = predictor.score(
        [one.history for one in inputs],
        index,
        now=[one.now_s for one in inputs],
        controls=_controls(inputs),
        context=[one.context for one in inputs],
    )
    ranked = []
    for one, items, values in zip(inputs, index, scores, strict=True):
        triples = zip(one.candidates or (), items.tolist(), values.tolist(), strict=True)
        source: Source = "realtime" if asks_model(state, one.history) else "popular"
        ranked.append(RankedItems([(item_id, value if item else None) for item_id, item, value in triples], source))
    return ranked


def _explain(inputs: list[ModelInput]) -> list[RankedItems]:
    ranked = []
    for one in inputs:
        predictor, ids = one.state.predictor, one.candidates or ()
        explanation = predictor.explain(one.history, predictor.index_of(ids), now=one.now_s, context=one.context, controls=_controls([one]))
        reasons = to_reasons(explanation, one.history, one.state)
        ranked.append(RankedItems([(item_id, None) for item_id in ids], "realtime", reasons))
    return ranked


def similar_items(item_id: Any, k: int, state: ServingState) -> RankedItems:
    """Items like an item, with their cosines. Raises UnknownItemError, UnavailableError where no model may serve."""
    predictor = state.predictor
    if predictor.popular_only:
        raise UnavailableError("no model was promoted yet: the popular list alone is served", "see the report of the last night")
    item = int(predictor.index_of([item_id])[0])
    if not item:
        raise UnknownItemError(f"item_id: no item {item_id!r}", "ask for one of the item table")
    index, cosines = predictor.similar(item, k, int(time.time()))
    return RankedItems(list(zip(predictor.ids_of(index), cosines.tolist(), strict=True)), "realtime")
