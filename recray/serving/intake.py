"""Takes in events, outcomes and opt-outs. They are on disk when the endpoint responds."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from typing import Any

from recray.config import ServeSettings
from recray.errors import RequestError, UnavailableError
from recray.events.log import CONFLICT, DUPLICATE, Entry, make_key
from recray.events.rewards import SHOWN
from recray.serving.api import (
    EventsRequest,
    EventsResponse,
    FeedbackRequest,
    FeedbackResponse,
    ForgetResponse,
    ImpressionsRequest,
    ImpressionsResponse,
)
from recray.serving.deployment import Deployments
from recray.serving.recorder import EventRecorder, make_id
from recray.serving.telemetry import Telemetry
from recray.storage.opt_out import OptOut

FORGET_S = 60.0  # timeout of erasing a user from the event store
AHEAD_S = 86_400.0  # tolerance for clocks of clients that are ahead


class Intake:
    """Keeps events and outcomes in the event store."""

    def __init__(
        self,
        deployments: Deployments,
        recorder: EventRecorder,
        opted_out: OptOut,
        options: ServeSettings,
        telemetry: Telemetry,
    ) -> None:
        self._deployments, self._recorder, self._opted_out = deployments, recorder, opted_out
        self._options, self._telemetry = options, telemetry

    async def events(self, request: EventsRequest) -> EventsResponse:
        """Keep events; on disk when it returns. Raises RequestError, UnavailableError: then none was kept."""
        state, now_s = self._deployments.current.state, time.time()
        user = state.require_user(request.user_id)
        if user in self._opted_out:
            return EventsResponse(kept=0, duplicates=0, opted_out=len(request.events))
        entries = []
        for number, event in enumerate(request.events):
            body: dict[str, Any] = {
                "item_id": state.require_item(event.item_id, f"events.{number}.item_id"),
                "event": event.event or state.predictor.vocabulary.default_event,
                "value": event.value,
            }
            if request.context:
                body["context"] = request.context
            at_s = now_s
            if event.timestamp is not None:
                at_s = body["timestamp"] = (
                    event.timestamp.timestamp()
                )  # said, so that the same name with another time is a conflict
            if at_s > now_s + AHEAD_S:
                raise RequestError(
                    f"events.{number}.timestamp: {event.timestamp} lies in the future",
                    "send UTC, or an offset",
                )
            key = make_key(user, event.event_id) if event.event_id else make_id()
            entries.append(Entry("event", key, user, at_s, body))
        numbers = await self._recorder.write(lambda writer: writer.append(entries))
        kept = [entry for entry, number in zip(entries, numbers, strict=True) if number > 0]
        self._telemetry.stored["event"] += len(kept)
        self._telemetry.lags_s.extend(now_s - entry.at_s for entry in entries)
        event_types = state.predictor.vocabulary.event_types
        unknown = sum(
            not (state.knows_item(entry.body["item_id"]) and entry.body["event"] in event_types)
            for entry in kept
        )
        return EventsResponse(
            kept=len(kept),
            duplicates=numbers.count(DUPLICATE),
            conflicts=numbers.count(CONFLICT),
            unknown=unknown,
        )

    async def feedback(self, request: FeedbackRequest) -> FeedbackResponse:
        """Keep an outcome, after its impression; on disk when it returns. Raises RequestError,
        UnavailableError.
        """
        body = {
            "request_id": request.request_id,
            "outcome": request.outcome,
            "item_id": request.item_id,
            "value": request.value,
        }
        at_s = _moment_s(request.timestamp)
        key = make_key(request.request_id, request.feedback_id) if request.feedback_id else make_id()
        entry = Entry("outcome", key, None, at_s, body)
        new, is_known = await self._recorder.write(
            lambda writer: writer.append_outcomes([entry], request.request_id)
        )
        self._telemetry.stored["outcome" if is_known else "set_aside"] += new
        self._telemetry.lags_s.append(time.time() - at_s)
        return FeedbackResponse(kept=bool(new), set_aside=not is_known, notes=self._note_reward(request))

    async def impressions(self, request: ImpressionsRequest) -> ImpressionsResponse:
        """Keep which items of a response were really shown, and where; on disk when it returns. Raises
        RequestError, UnavailableError.
        """
        at_s = _moment_s(request.timestamp)
        entries = []
        for shown in request.items:
            body: dict[str, Any] = {"request_id": request.request_id, "outcome": SHOWN}
            body |= {"item_id": shown.item_id, "value": float(shown.position)}
            key = make_key(
                request.request_id, f"{SHOWN} {shown.item_id}"
            )  # the first report of an item counts
            entries.append(Entry("outcome", key, None, at_s, body))
        new, is_known = await self._recorder.write(
            lambda writer: writer.append_outcomes(entries, request.request_id)
        )
        self._telemetry.stored["shown"] += new
        return ImpressionsResponse(kept=new, duplicates=len(entries) - new, set_aside=not is_known)

    def _note_reward(self, request: FeedbackRequest) -> list[str]:
        """Why the reward of an outcome is 0, or less than was sent."""
        options, notes = self._options, dict[str, str]()
        if request.outcome not in options.outcomes:
            notes["undeclared"] = (
                f"outcome: {request.outcome} is not in serve.outcomes ({', '.join(options.outcomes)}): "
                "its reward is 0"
            )
        if request.item_id is not None and not self._deployments.current.state.knows_item(request.item_id):
            notes["unknown_item"] = (
                f"item_id: the model does not know {request.item_id}: its reward is 0 unless the response "
                "listed it"
            )
        if not 0 <= request.value <= options.outcome_bound:
            bounded = min(max(request.value, 0.0), options.outcome_bound)
            notes["bounded"] = f"value: {request.value:g} counts as {bounded:g} (serve.outcome_bound)"
        for name in notes:
            self._telemetry.stored[f"outcome_{name}"] += 1
        return list(notes.values())

    async def forget(self, user_id: str) -> ForgetResponse:
        """Opt a user out: from now on no event of the user is kept or read. Raises RequestError,
        UnavailableError.

        `recray forget`, or the next run, erases what was collected and published before.
        """
        user = self._deployments.current.state.require_user(user_id)
        try:
            new = await asyncio.to_thread(self._opted_out.add, user)
        except OSError as error:
            raise UnavailableError(
                f"the opt-out list cannot be written: {error.strerror}", "retry later"
            ) from error
        await self._recorder.write(
            lambda writer: writer.append([])
        )  # writes the queue, so that its entries are erased too
        dropped = await self._recorder.write(
            lambda writer: asyncio.to_thread(writer.log.forget_user, user), FORGET_S
        )
        return ForgetResponse(new=new, dropped=dropped)


def _moment_s(moment: dt.datetime | None) -> float:
    """Seconds since 1970 of a moment, None for now. Raises RequestError if it lies in the future."""
    now_s = time.time()
    at_s = now_s if moment is None else moment.timestamp()
    if at_s > now_s + AHEAD_S:
        raise RequestError(f"timestamp: {moment} lies in the future", "send UTC, or an offset")
    return at_s
