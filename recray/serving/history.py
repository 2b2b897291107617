"""A user's history of run and event store, as in the API."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import numpy as np

from recray.events.log import Entry
from recray.serving.api import KnownEvent
from recray.serving.query import to_event
from recray.serving.ranking import join_events
from recray.serving.state import ServingState


def to_known_events(
    user_id: object, new_entries: Sequence[Entry], last: int, state: ServingState
) -> list[KnownEvent]:
    """The last events of a user, oldest first.

    new_entries : events that the run does not know
    """
    predictor = state.predictor
    history = join_events(state.stored_history(user_id), [to_event(entry) for entry in new_entries], state)
    new = {
        (int(predictor.vocabulary.index_of([entry.body["item_id"]])[0]), int(entry.at_s))
        for entry in new_entries
    }
    events = []
    for item, event, time_s, _ in zip(*history.last(last), strict=True):
        item_id = predictor.vocabulary.ids_of(np.array([item]))[0] if item else None
        events.append(
            KnownEvent(
                item_id=item_id,
                title=None if item_id is None else state.find_title(item_id),
                event=predictor.vocabulary.event_types[int(event)],
                timestamp=dt.datetime.fromtimestamp(int(time_s), dt.UTC)
                if predictor.catalogue.has_time
                else None,
                fresh=(int(item), int(time_s)) in new,
            )
        )
    return events
