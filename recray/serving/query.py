"""A request, resolved once: who asks, after which events, for which moment, and which items may be shown. It knows ids, and no model."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recray.errors import RequestError
from recray.serving.api import Event, Range, RecommendRequest, ScoreRequest
from recray.serving.state import ServingState
from recray.state.log import Entry

Mode = Literal["auto", "batch", "realtime"]
OF_THE_MODEL = "mode: batch answers with the nightly list, which history, events, now, context and controls cannot change"


@dataclass(frozen=True)
class ItemRule:
    """Which items a request allows: ids, columns of the item table, and whether items of the history are left out."""

    filter_seen: bool = False
    allow: tuple[Any, ...] | None = None
    deny: tuple[Any, ...] = ()
    where: Mapping[str, list[Any] | Range] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether it allows every item."""
        return not (self.filter_seen or self.allow is not None or self.deny or self.where)


@dataclass(frozen=True)
class Query:
    """What `/v1/recommend` and `/v1/score` ask.

    user_id : in the type of the event log, None for nobody that it could know
    user : the same as the event store has it, or the id as it was sent; None for nobody
    history : events sent along instead of the stored ones; None: the stored ones
    stored_later : events of the event store that the stored history lacks, oldest first
    sent_later : events sent along, after all others
    moment : the moment asked about; None: just after the last event known
    controls : how the request modulates the attention; None: as the policy decides
    candidates : items to score; None: all items are ranked
    """

    user_id: Any | None
    user: str | None
    k: int = 0
    mode: Mode = "realtime"
    history: tuple[Event, ...] | None = None
    stored_later: tuple[Event, ...] = ()
    sent_later: tuple[Event, ...] = ()
    moment: dt.datetime | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, float] | None = None
    items: ItemRule = ItemRule()
    candidates: tuple[Any, ...] | None = None

    @property
    def sends_more(self) -> bool:
        """Whether it says what a list that was made before cannot know."""
        return bool(self.history is not None or self.sent_later or self.moment is not None or self.context or self.controls is not None)

    @property
    def needs_model(self) -> bool:
        """Whether a list that was made before lacks something."""
        return bool(self.stored_later) or self.sends_more

    @property
    def moment_s(self) -> int | None:
        return None if self.moment is None else int(self.moment.timestamp())

    def without_model(self) -> Query:
        """What is left of it where no model responds: a list that was made before, without the items that came up since."""
        later = (*(self.history or ()), *self.stored_later, *self.sent_later) if self.items.filter_seen else ()
        items = replace(self.items, deny=(*self.items.deny, *(event.item_id for event in later)))
        return Query(self.user_id, self.user, self.k, "batch", items=items)


def resolve_query(request: RecommendRequest | ScoreRequest, state: ServingState, later: Sequence[Entry] = ()) -> Query:
    """The query of a request.

    later : events of the user that the published run does not know

    Raises RequestError where the request contradicts itself, or names an event type that is not known.
    """
    event_types = state.predictor.event_types
    for name, events in (("history", request.history or ()), ("events", request.events)):
        for number, event in enumerate(events):
            if event.event is not None and event.event not in event_types:
                raise RequestError(f"{name}.{number}.event: nothing is known of {event.event!r}", f"known: {', '.join(event_types)}")
    asks_for: dict[str, Any]
    if isinstance(request, ScoreRequest):
        asks_for = {"candidates": tuple(request.items)}
    else:
        allow = None if request.allow is None else tuple(request.allow)
        items = ItemRule(request.new_only or state.filters_seen, allow, tuple(request.deny), request.where)
        asks_for = {"k": request.k, "mode": request.mode, "controls": request.controls, "items": items}
    user_id = None if request.user_id is None else state.snapshot.as_user(request.user_id)
    query = Query(
        user_id=user_id,
        user=None if request.user_id is None else str(request.user_id if user_id is None else user_id),
        history=None if request.history is None else tuple(request.history),
        stored_later=tuple(to_event(entry) for entry in later) if request.history is None else (),
        sent_later=tuple(request.events),
        moment=request.now,
        context=request.context,
        **asks_for,
    )
    if query.mode == "batch" and query.sends_more:
        raise RequestError(OF_THE_MODEL, "use auto")
    return query


def to_event(entry: Entry) -> Event:
    """An event of the event store as one of a request."""
    moment = dt.datetime.fromtimestamp(entry.at_s, dt.UTC)
    body = entry.body
    return Event.model_construct(item_id=body["item_id"], event=body.get("event"), value=body.get("value", 1.0), timestamp=moment)
