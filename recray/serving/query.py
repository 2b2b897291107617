"""A request, resolved once: user, events, query time and item filters, as ids and without a model."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from recray.config.sections import SurfaceSettings
from recray.errors import RequestError
from recray.events.log import Entry
from recray.inference.filters import ALL_EVENTS, SeenRule
from recray.serving.api import Event, Range, RecommendRequest, ScoreRequest
from recray.serving.state import ServingState
from recray.storage.opt_out import OptOut

Mode = Literal["auto", "batch", "realtime"]
_Request = TypeVar("_Request", RecommendRequest, ScoreRequest)
BATCH_IS_FIXED = (
    "mode: batch serves the batch recommendations, which history, events, now, context and controls cannot "
    "change"
)


class StoredEvent(NamedTuple):
    """An event of the event store, with the fields of an `Event`: a user may have hundreds of them, and a
    pydantic model costs several times as much.
    """

    item_id: Any
    event: str | None
    value: float
    timestamp: dt.datetime | None


@dataclass(frozen=True)
class ItemRule:
    """Items that a request allows: by id, by columns of the item table, and by the seen-item filter.

    seen : what the seen-item filter leaves out
    """

    filter_seen: bool = False
    seen: SeenRule = ALL_EVENTS
    allow: tuple[Any, ...] | None = None
    deny: tuple[Any, ...] = ()
    where: Mapping[str, list[Any] | Range] = field(default_factory=dict)

    @property
    def allows_all(self) -> bool:
        """Whether every item is allowed."""
        return not (self.filter_seen or self.allow is not None or self.deny or self.where)


@dataclass(frozen=True)
class Query:
    """The query of a request to `/v1/recommend` or `/v1/score`.

    user_id : in the type of the event log; None for no user, or an id that the log cannot contain
    user : the same as text, as in the event store, or the id as sent; None for no user
    history : events of the request instead of the stored ones; None: the stored ones
    new_events : events of the event store that the stored history lacks, oldest first
    sent_events : events of the request, after all others
    moment : query time; None: just after the last event
    controls : attention controls of the request; None: the policy decides
    candidates : items to score; None: all items are ranked
    variant : who responds whatever the experiment says; None: as it decides
    surface : name and declaration of the place where the list is shown; None: no particular one
    """

    user_id: Any | None
    user: str | None
    k: int = 0
    mode: Mode = "realtime"
    history: tuple[Event, ...] | None = None
    new_events: tuple[StoredEvent, ...] = ()
    sent_events: tuple[Event, ...] = ()
    moment: dt.datetime | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, float] | None = None
    items: ItemRule = ItemRule()
    candidates: tuple[Any, ...] | None = None
    variant: Literal["champion", "challenger", "popular"] | None = None
    surface: tuple[str, SurfaceSettings] | None = None

    @property
    def has_own_rules(self) -> bool:
        """Whether the surface has other rules than the batch recommendations."""
        return self.surface is not None and self.surface[1].changes_rules

    @property
    def has_request_data(self) -> bool:
        """Whether the request contains data that a precomputed list does not know."""
        return bool(
            self.history is not None
            or self.sent_events
            or self.moment is not None
            or self.context
            or self.controls is not None
        )

    @property
    def needs_model(self) -> bool:
        """Whether a precomputed list is not enough."""
        return bool(self.new_events) or self.has_request_data

    @property
    def moment_s(self) -> int | None:
        """Query time in seconds since 1970."""
        return None if self.moment is None else int(self.moment.timestamp())

    def of_user(self, user_id: Any | None, user: str | None, new_entries: Sequence[Entry] = ()) -> Query:
        """The same query of another user.

        new_entries : events of the user that the published run does not know
        """
        new_events = tuple(to_event(entry) for entry in new_entries)
        return replace(self, user_id=user_id, user=user, new_events=new_events)

    def without_model(self) -> Query:
        """The query for a precomputed list, where no model responds: new items are excluded if seen items
        are.
        """
        all_events: list[Event | StoredEvent] = [*(self.history or ()), *self.new_events, *self.sent_events]
        events = [
            event
            for event in all_events
            if self.items.filter_seen
            and (not self.items.seen.events or event.event is None or event.event in self.items.seen.events)
        ]
        items = replace(self.items, deny=(*self.items.deny, *(event.item_id for event in events)))
        return Query(self.user_id, self.user, self.k, "batch", items=items)


def resolve_query(
    request: RecommendRequest | ScoreRequest,
    state: ServingState,
    new_entries: Sequence[Entry] = (),
    surface: SurfaceSettings | None = None,
) -> Query:
    """The query of a request.

    new_entries : events of the user that the published run does not know
    surface : declaration of the request's surface

    Raises RequestError for a request that contradicts itself or names an unknown event type.
    """
    event_types = state.predictor.vocabulary.event_types
    for name, events in (("history", request.history or ()), ("events", request.events)):
        for number, event in enumerate(events):
            if event.event is not None and event.event not in event_types:
                raise RequestError(
                    f"{name}.{number}.event: unknown type {event.event!r}", f"known: {', '.join(event_types)}"
                )
    fields: dict[str, Any]
    if isinstance(request, ScoreRequest):
        fields = {"candidates": tuple(request.items)}
    else:
        allow = None if request.allow is None else tuple(request.allow)
        filter_seen = request.filter_seen or state.filters_seen
        seen = _resolve_seen(request, state, filter_seen=filter_seen)
        items = ItemRule(filter_seen, seen, allow, tuple(request.deny), request.where)
        fields = {"k": request.k, "mode": request.mode, "controls": request.controls, "items": items}
        fields["variant"] = request.variant
        if surface is not None and request.surface is not None:
            fields["surface"] = (request.surface, surface)
    user_id = None if request.user_id is None else state.snapshot.to_user_id(request.user_id)
    query = Query(
        user_id=user_id,
        user=None if request.user_id is None else str(request.user_id if user_id is None else user_id),
        history=None if request.history is None else tuple(request.history),
        new_events=tuple(to_event(entry) for entry in new_entries) if request.history is None else (),
        sent_events=tuple(request.events),
        moment=request.now,
        context=request.context,
        **fields,
    )
    if query.mode == "batch" and query.has_request_data:
        raise RequestError(BATCH_IS_FIXED, "use auto")
    return query


def _resolve_seen(request: RecommendRequest, state: ServingState, *, filter_seen: bool) -> SeenRule:
    """What the seen-item filter of a request leaves out: as in the lists, unless the request says otherwise.
    Raises RequestError.
    """
    if request.seen_events is None and request.seen_days is None:
        return state.seen_rule if filter_seen else ALL_EVENTS
    if not filter_seen:
        name = "seen_days" if request.seen_events is None else "seen_events"
        raise RequestError(f"{name}: the seen-item filter is off", "send filter_seen: true too")
    declared = state.seen_rule
    seen = SeenRule(
        declared.events if request.seen_events is None else tuple(request.seen_events),
        declared.days if request.seen_days is None else request.seen_days,
    )
    predictor = state.predictor
    has_time = predictor.catalogue.has_time
    if problem := seen.find_problem(predictor.vocabulary.event_types, has_time=has_time):
        raise RequestError(*problem)
    return seen


def has_opted_out(user_id: Any, state: ServingState, opted_out: OptOut) -> bool:
    """Whether the user of a request opted out."""
    return bool(len(opted_out)) and user_id is not None and state.to_user_name(user_id) in opted_out


def admit_request(request: _Request, state: ServingState, opted_out: OptOut) -> _Request:
    """The request. If its user opted out, it becomes one of an unknown user."""
    if has_opted_out(request.user_id, state, opted_out):
        return request.model_copy(update={"user_id": None})
    return request


def to_event(entry: Entry) -> StoredEvent:
    """An event of the event store as an event of a request."""
    body, moment = entry.body, dt.datetime.fromtimestamp(entry.at_s, dt.UTC)
    return StoredEvent(body["item_id"], body.get("event"), body.get("value", 1.0), moment)
