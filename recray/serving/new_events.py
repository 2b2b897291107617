"""Reads events that the published run does not know yet, for responses."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.trace import Tracer

from recray.errors import PartUnavailableError
from recray.events.log import MAX_RECENT, Entry
from recray.inference.policy import OBSERVED_EVENTS
from recray.serving.api import Part, RecommendRequest, ScoreRequest
from recray.serving.recorder import EventRecorder
from recray.serving.state import ServingState
from recray.serving.traces import QUIET

MOST_READ = 10_000  # events of one read for many users, so that it ends in time


class NewEvents:
    """The new events of users in the event store, as many as can change a response."""

    def __init__(self, recorder: EventRecorder, tracer: Tracer) -> None:
        self._recorder, self._tracer = recorder, tracer

    async def read(
        self, request: RecommendRequest | ScoreRequest, state: ServingState
    ) -> tuple[list[Entry], list[Part]]:
        """Those of a request's user, and unavailable parts."""
        unavailable = find_unavailable_lists(request, state)
        is_batch = isinstance(request, RecommendRequest) and request.mode == "batch"
        user_id = state.snapshot.to_user_id(request.user_id)
        if user_id is None or is_batch or request.history is not None:
            return [], unavailable
        try:
            entries = await self.read_user(str(user_id), state, count_relevant_events(request, state))
            return entries, unavailable
        except PartUnavailableError as error:
            return [], [*unavailable, error.part]

    async def read_user(self, user: str, state: ServingState, limit: int) -> list[Entry]:
        """The last ones of a user. Raises PartUnavailableError."""
        with self._tracer.start_as_current_span("recray.log", **QUIET):
            return await self._recorder.read_recent_events(user, state, limit)

    async def read_users(
        self, users: Sequence[str], request: RecommendRequest, state: ServingState
    ) -> tuple[dict[str, list[Entry]], list[Part]]:
        """Those of many users, without the users who have none, and unavailable parts."""
        entries, unavailable = dict[str, list[Entry]](), find_unavailable_lists(request, state)
        if request.mode == "batch":
            return entries, unavailable
        limit = count_relevant_events(request, state)
        size = max(MOST_READ // limit, 1)
        try:
            with self._tracer.start_as_current_span("recray.log", **QUIET):
                for first in range(0, len(users), size):
                    some = users[first : first + size]
                    entries |= await self._recorder.read_recent_events_of(some, state, limit)
        except PartUnavailableError as error:
            unavailable.append(error.part)
        return entries, unavailable


def find_unavailable_lists(request: RecommendRequest | ScoreRequest, state: ServingState) -> list[Part]:
    """The batch recommendations, where a request could have them and there are none."""
    return ["snapshot"] if isinstance(request, RecommendRequest) and not state.has_lists else []


def count_relevant_events(request: RecommendRequest | ScoreRequest, state: ServingState) -> int:
    """How many of a user's last events can change the response: those that model and policy read, or all with
    the seen-item filter.
    """
    if isinstance(request, RecommendRequest) and (request.filter_seen or state.filters_seen):
        return MAX_RECENT
    length = state.predictor.model.shape.history
    return min(length if state.policy_network is None else max(length, OBSERVED_EVENTS), MAX_RECENT)
