"""Queries as inputs of a model, and its passes over batches of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from recray.dataset.context import encode_request
from recray.dataset.reader import History
from recray.errors import RequestError, UnavailableError, UnknownItemError
from recray.inference import Filters, Rules
from recray.inference.explain import explain
from recray.inference.modulation import controls_of
from recray.inference.rules import match_range, match_values
from recray.inference.similar import find_similar
from recray.model.controls import Controls
from recray.serving.api import Event, Item, Range, Reason, Source
from recray.serving.explain import to_reasons
from recray.serving.modulation import Exploration, Modulation, choose_modulation, is_ranked_by_model
from recray.serving.query import ItemRule, Query, StoredEvent
from recray.serving.state import EMPTY_HISTORY, ServingState
from recray.serving.surfaces import rules_of

_ITEMS = TypeAdapter(list[Item])
MAX_MASKS = 64  # attribute filters whose items are cached


@dataclass(frozen=True)
class RankedItems:
    """Items, best first, with their scores (None: unknown item), their source, and the reasons of each if
    requested.
    """

    items: list[tuple[Any, float | None]]
    source: Source
    reasons: list[list[Reason]] | None = None

    def to_items(self) -> list[Item]:
        """The items with scores, as in a response."""
        pairs = [{"item_id": item, "score": score} for item, score in self.items if score is not None]
        return _ITEMS.validate_python(pairs)  # three times as fast as to construct each


@dataclass(frozen=True)
class ModelInput:
    """A query in the indices of one state's bundle, for the `k` best items or the scores of `candidates`
    (outside ids).

    context : codes [C]
    explain : find the events that carried the candidates, instead of scoring them
    """

    state: ServingState
    history: History
    now_s: int
    context: np.ndarray
    modulation: Modulation
    k: int = 0
    filters: Filters = Filters()
    rules: Rules | None = None
    candidates: tuple[Any, ...] | None = None
    explain: bool = False

    def explaining(self, candidates: Sequence[Any]) -> ModelInput:
        """The same input, to explain some items."""
        return replace(self, candidates=tuple(candidates), explain=True)


def bind_query(query: Query, state: ServingState, exploration: Exploration | None = None) -> ModelInput:
    """A query as input of a state's model. Raises RequestError for a context, a control or a column that the
    state does not have.

    exploration : for a response that explores
    """
    history, now_s = _assemble_history(query, state)
    context = encode_request(
        state.predictor.vocabulary.context, query.context, None if query.moment is None else now_s
    )
    filters = Filters() if query.candidates is not None else to_filters(query.items, state, now_s)
    modulation = choose_modulation(query, state, history, now_s, exploration)
    name, surface = query.surface or ("", None)
    rules = rules_of(surface, name, state)
    return ModelInput(state, history, now_s, context, modulation, query.k, filters, rules, query.candidates)


def _assemble_history(query: Query, state: ServingState) -> tuple[History, int]:
    """The history and the query time."""
    events: list[Event | StoredEvent] = [*(query.history or ()), *query.new_events, *query.sent_events]
    stored = EMPTY_HISTORY
    if query.history is None and query.user_id is not None:
        stored = state.stored_history(query.user_id)
    history = join_events(stored, events, state, query.moment_s)

    if query.moment_s is not None:
        if state.predictor.catalogue.has_time:
            is_past = history.timestamp_s <= query.moment_s
            history = history if is_past.all() else History(*(values[is_past] for values in history))
        return history, query.moment_s
    now_s = state.dataset.now_s
    if events and len(history.timestamp_s):
        now_s = max(now_s, int(history.timestamp_s.max()) + 1)
    return history, now_s


def join_events(
    stored: History, events: Sequence[Event | StoredEvent], state: ServingState, moment_s: int | None = None
) -> History:
    """A stored history and the events after it, in order of time, without event types that the bundle does
    not know.
    """
    predictor = state.predictor
    events = [
        event for event in events if event.event is None or event.event in predictor.vocabulary.event_types
    ]
    if not events:
        return stored
    if predictor.catalogue.has_time:
        now_s = state.dataset.now_s if moment_s is None else moment_s
        times = np.array(
            [now_s if event.timestamp is None else int(event.timestamp.timestamp()) for event in events],
            np.int64,
        )
    else:
        times = np.arange(len(events)) + (int(stored.timestamp_s.max()) + 1 if len(stored.timestamp_s) else 0)
    types = predictor.vocabulary.event_index([event.event for event in events])
    items = predictor.vocabulary.index_of([event.item_id for event in events])
    new = History(items, types, times, np.array([event.value for event in events], np.float32))
    history = History(*(np.concatenate(pair) for pair in zip(stored, new, strict=True)))
    order = np.argsort(history.timestamp_s, kind="stable")
    return History(*(values[order] for values in history))


def to_filters(rule: ItemRule, state: ServingState, now_s: int | None = None) -> Filters:
    """The item rule in item indices.

    now_s : query time, seconds since 1970; None: just after the as-of of the run

    Raises RequestError for a column that the item table lacks, or that is
    not numeric.
    """
    predictor = state.predictor
    allow = None if rule.allow is None else np.unique(predictor.vocabulary.index_of(rule.allow))
    for column, condition in rule.where.items():
        mask = _find_items_where(column, condition, state)
        allow = mask if allow is None else np.intersect1d(allow, mask)
    deny = np.unique(predictor.vocabulary.index_of(rule.deny)) if rule.deny else None
    allow = None if allow is None else allow[allow > 0]
    deny = None if deny is None else deny[deny > 0]
    if not rule.filter_seen:
        return Filters(allow=allow, deny=deny)
    now_s = state.dataset.now_s if now_s is None else now_s
    return rule.seen.to_filters(predictor.vocabulary.event_types, now_s, allow=allow, deny=deny)


def _find_items_where(column: str, condition: list[Any] | Range, state: ServingState) -> np.ndarray:
    """Indices of the items that an attribute filter allows."""
    dataset, masks = state.dataset, state.item_masks
    key = json.dumps([column, condition.model_dump() if isinstance(condition, Range) else condition])
    if key not in masks:
        if column not in dataset.features:
            raise RequestError(
                f"where: no column {column!r}", f"known: {', '.join(dataset.features) or 'none'}"
            )
        if isinstance(condition, Range):
            dtype = dataset.items[column].type
            if not (pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)):
                raise RequestError(f"where: {column!r} is not numeric", "send a list of values")
            rows = match_range(dataset.items[column], condition.min, condition.max)
        else:
            rows = match_values(dataset, column, condition)
        if len(masks) >= MAX_MASKS:
            del masks[next(iter(masks))]
        masks[key] = np.unique(state.translation.to_bundle[1:][rows])
    return masks[key]


_Rank = Callable[[list[ModelInput]], list[RankedItems]]


def rank_inputs(inputs: Sequence[ModelInput]) -> list[RankedItems]:
    """Rankings in the order of the inputs, with one pass of a model for all inputs of one state and kind."""
    groups: dict[tuple[int, int, _Rank], list[int]] = {}
    for number, model_input in enumerate(inputs):
        rank: _Rank = _rank_all if model_input.candidates is None else _score_candidates
        if model_input.explain:
            rank = _explain_candidates
        groups.setdefault((id(model_input.state), id(model_input.rules), rank), []).append(number)
    ranked: dict[int, RankedItems] = {}
    for (*_, rank), numbers in groups.items():
        ranked |= zip(numbers, rank([inputs[number] for number in numbers]), strict=True)
    return [ranked[number] for number in range(len(inputs))]


def _stack_controls(inputs: Sequence[ModelInput]) -> Controls:
    """The attention controls of all inputs."""
    predictor = inputs[0].state.predictor
    actions = [model_input.modulation.controls for model_input in inputs]
    return controls_of(actions, predictor.model, predictor.vocabulary.event_types)


def _rank_all(inputs: list[ModelInput]) -> list[RankedItems]:
    predictor = inputs[0].state.predictor
    best = predictor.recommend(
        [model_input.history for model_input in inputs],
        max(model_input.k for model_input in inputs),
        now=[model_input.now_s for model_input in inputs],
        filters=[model_input.filters for model_input in inputs],
        rules=inputs[0].rules,
        controls=_stack_controls(inputs),
        context=[model_input.context for model_input in inputs],
    )
    ranked = []
    for row, model_input in enumerate(inputs):
        index = best.item_index[row][: model_input.k]
        scores = best.scores[row][: model_input.k]
        ids = predictor.vocabulary.ids_of(index[index > 0])
        source: Source = "realtime" if best.source[row] == "model" else "popular"
        ranked.append(RankedItems(list(zip(ids, scores[index > 0].tolist(), strict=True)), source))
    return ranked


def _score_candidates(inputs: list[ModelInput]) -> list[RankedItems]:
    state, predictor = inputs[0].state, inputs[0].state.predictor
    index = [predictor.vocabulary.index_of(model_input.candidates or ()) for model_input in inputs]
    scores = predictor.score(
        [model_input.history for model_input in inputs],
        index,
        now=[model_input.now_s for model_input in inputs],
        controls=_stack_controls(inputs),
        context=[model_input.context for model_input in inputs],
    )
    ranked = []
    for model_input, items, values in zip(inputs, index, scores, strict=True):
        triples = zip(model_input.candidates or (), items.tolist(), values.tolist(), strict=True)
        source: Source = "realtime" if is_ranked_by_model(state, model_input.history) else "popular"
        ranked.append(
            RankedItems([(item_id, value if item else None) for item_id, item, value in triples], source)
        )
    return ranked


def _explain_candidates(inputs: list[ModelInput]) -> list[RankedItems]:
    ranked = []
    for model_input in inputs:
        predictor, ids = model_input.state.predictor, model_input.candidates or ()
        explanation = explain(
            predictor,
            model_input.history,
            predictor.vocabulary.index_of(ids),
            now=model_input.now_s,
            context=model_input.context,
            controls=_stack_controls([model_input]),
        )
        reasons = to_reasons(explanation, model_input.history, model_input.state)
        ranked.append(RankedItems([(item_id, None) for item_id in ids], "realtime", reasons))
    return ranked


def rank_similar_items(item_id: Any, k: int, state: ServingState) -> RankedItems:
    """The most similar items of an item, with their cosines. Raises UnknownItemError, and UnavailableError
    where no model was promoted yet.
    """
    predictor = state.predictor
    if predictor.popular_only:
        raise UnavailableError(
            "no model was promoted yet: only the popularity fallback serves",
            "see the report of the last nightly run",
        )
    item = int(predictor.vocabulary.index_of([item_id])[0])
    if not item:
        raise UnknownItemError(f"item_id: no item {item_id!r}", "send an id of the item table")
    index, cosines = find_similar(predictor, item, k, int(time.time()))
    return RankedItems(
        list(zip(predictor.vocabulary.ids_of(index), cosines.tolist(), strict=True)), "realtime"
    )
