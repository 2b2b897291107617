"""One replica's brain: which part answers a request, what is logged of it, and who answers when a part is away.

Async, without HTTP and without Ray. Parts that may be away are named in `degraded`: `state` (the log), `model`, `snapshot`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from recray.config import ScoreSettings, ServeSettings
from recray.errors import ArtifactError, RecrayError, RequestError, StateError
from recray.serving.api import (
    EventsRequest,
    EventsResponse,
    FeedbackRequest,
    FeedbackResponse,
    Item,
    ModelsResponse,
    Part,
    RecommendRequest,
    RecommendResponse,
    ScoredItem,
    ScoreRequest,
    ScoreResponse,
    SimilarRequest,
    SimilarResponse,
)
from recray.serving.batching import Batcher, BusyError
from recray.serving.night import Found, Night, Question, items_of
from recray.state.log import Entry, Log, open_log
from recray.state.writer import Writer
from recray.storage import Storage

AHEAD_S = 86_400.0  # what the clock of whoever tells of events may be ahead
AWAY_S = 1.0  # how long a log that failed is not asked again


class UnavailableError(RecrayError):
    """Nobody can answer now; the caller may come again."""


class Handler:
    """Answers from the published night, which `look` exchanges when another one is published.

    Where no snapshot can be read but there is a champion and a dataset, it begins with those, and without a log where the log is away.
    Raises MissingArtifactError, DamagedArtifactError, SettingsError when it is made.
    """

    def __init__(self, storage: Storage, options: ServeSettings, score: ScoreSettings) -> None:
        self.storage, self.options = storage, options
        self._log = logging.getLogger("ray.serve")
        self._published = self._latest()
        self.night = first_night(storage, score, self._log.error)
        self._writer: Writer | None = None
        self._away_until = 0.0
        self._reopen_at = 0.0
        self._batcher: Batcher[Question, Found] = Batcher(Night.answer, options.max_batch, options.max_queued_requests)
        self._open_log()

    def look(self) -> None:
        """Load a newly published night aside and swap the reference. One that cannot be loaded leaves the old one in place."""
        try:
            found = self._latest()
            if not found or found == self._published:
                return
            self._published = found  # tried once: what is broken stays broken until something else is published
            self.night = Night.load(self.storage)
        except Exception as error:  # whatever it is, the watch must go on
            self._log.error("the published night cannot be loaded, the old one stays: %s", error)

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Raises RequestError where the request makes no sense, UnavailableError where nobody can answer now."""
        begun, night = time.monotonic(), self.night
        degraded: list[Part] = [] if night.whole else ["snapshot"]
        fresh = await self._fresh(night, request, degraded)
        found = night.look_up(request, fresh)
        if found is None:
            found = await self._model(night.question(request, fresh), degraded)
        if found is None:
            found = night.look_up(request.model_copy(update=_LIST_ALONE)) or night.popular(request)
        items = items_of(found)
        if request.explain and items and "model" not in degraded:
            await self._explain(night, request, fresh, items, degraded)
        answer = RecommendResponse(request_id=_new_id(), night=night.date, bundle=night.bundle, degraded=degraded, source=found.source, items=items)
        self._decided(request, answer, begun)
        return answer

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """As `recommend`, for given candidates."""
        night = self.night
        degraded: list[Part] = []
        fresh = await self._fresh(night, request, degraded)
        found = await self._model(night.candidates(request, fresh), degraded)
        if found is None:
            raise UnavailableError("the model does not answer", "come again")
        items = [ScoredItem(item_id=item, score=score) for item, score in found.items]
        source = "popular" if found.source == "popular" else "realtime"
        return ScoreResponse(request_id=_new_id(), night=night.date, bundle=night.bundle, degraded=degraded, source=source, items=items)

    async def similar(self, request: SimilarRequest) -> SimilarResponse:
        """Raises RequestError for an unknown item."""
        night = self.night
        found = Found(list(await asyncio.to_thread(night.similar, request.item_id, request.k)), "realtime")
        return SimilarResponse(request_id=_new_id(), night=night.date, bundle=night.bundle, items=items_of(found))

    async def events(self, request: EventsRequest) -> EventsResponse:
        """Keep events: on disk when it returns. Raises RequestError, UnavailableError: then none was kept."""
        user, now = self.night.user_key(request.user_id), time.time()
        entries = []
        for place, event in enumerate(request.events):
            body: dict[str, Any] = {
                "item_id": self.night.item_id(event.item_id, f"events.{place}.item_id"),
                "event": event.event or self.night.predictor.event_types[0],
                "value": event.value,
            }
            if request.context:
                body["context"] = request.context
            at_s = now if event.timestamp is None else event.timestamp.timestamp()
            if at_s > now + AHEAD_S:
                raise RequestError(f"events.{place}.timestamp: {event.timestamp} lies in the future", "send UTC, or an offset")
            entries.append(Entry("event", event.event_id or _new_id(), user, at_s, body))
        numbers = await self._keep(lambda writer: writer.append(entries))
        kept = sum(number > 0 for number in numbers)
        return EventsResponse(kept=kept, known=len(numbers) - kept)

    async def feedback(self, request: FeedbackRequest) -> FeedbackResponse:
        """Keep an outcome, after its decision: on disk when it returns. Raises UnavailableError: then it was not kept."""
        body = {"request_id": request.request_id, "outcome": request.outcome, "item_id": request.item_id, "value": request.value}
        at_s = time.time() if request.timestamp is None else request.timestamp.timestamp()
        entry = Entry("outcome", request.feedback_id or _new_id(), None, at_s, body)
        kept, known = await self._keep(lambda writer: writer.outcome(entry, request.request_id))
        return FeedbackResponse(kept=kept, set_aside=not known)

    def models(self) -> ModelsResponse:
        """What is served."""
        return self.night.describe()

    def away(self) -> list[Part]:
        """The parts that do not answer as they should."""
        parts: dict[Part, bool] = {"snapshot": not self.night.whole, "state": self._writer is None or time.monotonic() < self._away_until}
        return [part for part, gone in parts.items() if gone]

    def close(self) -> None:
        """Answer and write what waits."""
        self._batcher.close()
        if self._writer is not None:
            self._writer.close()
            self._writer.log.close()

    async def _fresh(self, night: Night, request: RecommendRequest | ScoreRequest, degraded: list[Part]) -> list[Entry]:
        """Events of the user that the night does not know."""
        if request.user_id is None or request.history is not None or (isinstance(request, RecommendRequest) and request.mode == "batch"):
            return []
        user = night.snapshot.as_user(request.user_id)
        if user is None:
            return []
        if self._writer is not None and time.monotonic() >= self._away_until:
            try:
                return await self._writer.recent(str(user), night.collected.get(self._writer.log.identity, 0), night.dataset.as_of_s + 1)
            except StateError as error:
                self._is_away(error)
        degraded.append("state")
        return []

    async def _explain(self, night: Night, request: RecommendRequest, fresh: list[Entry], items: list[Item], degraded: list[Part]) -> None:
        """Add to the items what carried them."""
        question = night.question(request, fresh)
        found = await self._model(replace(question, candidates=tuple(item.item_id for item in items), explain=True), degraded)
        for item, why in zip(items, (found and found.why) or [], strict=False):
            item.why, item.text = why, night.in_words(why)

    async def _model(self, question: Question, degraded: list[Part]) -> Found | None:
        """What the model says; None where it fails or takes too long. Raises RequestError, UnavailableError where too many wait."""
        try:
            return await asyncio.wait_for(self._batcher.ask(question), self.options.timeout_s)
        except BusyError:
            raise UnavailableError(f"{self.options.max_queued_requests} questions wait for the model", "come again") from None
        except RequestError:
            raise
        except Exception as error:
            self._log.error("the model does not answer: %s", error or type(error).__name__)
            degraded.append("model")
            return None

    def _decided(self, request: RecommendRequest, answer: RecommendResponse, begun: float) -> None:
        """Log an answer, behind."""
        if self._writer is None:
            return
        user = None if request.user_id is None else str(request.user_id)
        body = {
            "items": [item.item_id for item in answer.items],
            "source": answer.source,
            "night": answer.night,
            "bundle": answer.bundle,
            "degraded": answer.degraded,
            "ms": round(1000 * (time.monotonic() - begun), 3),
        }
        self._writer.later(Entry("decision", answer.request_id, user, time.time(), body))

    async def _keep(self, write: Callable[[Writer], Any]) -> Any:
        """What `write` returns. Raises UnavailableError where the log is away."""
        if self._writer is None and time.monotonic() >= self._reopen_at:
            await asyncio.to_thread(self._open_log)
        if self._writer is None:
            raise UnavailableError("the log is away: nothing was kept", "come again")
        try:
            return await write(self._writer)
        except StateError as error:
            self._is_away(error)
            raise UnavailableError("the log is away: nothing was kept", "come again") from error

    def _is_away(self, error: StateError) -> None:
        self._away_until = time.monotonic() + AWAY_S
        self._log.error("the log is away: %s", error.what)

    def _latest(self) -> bytes:
        return self.storage.latest.read_bytes() if self.storage.latest.exists() else b""

    def _open_log(self) -> None:
        try:
            log: Log = open_log(self.options.state, self.storage.root)
            self._writer = Writer(log)
        except StateError as error:
            self._reopen_at = time.monotonic() + AWAY_S
            self._is_away(error)


_ids = random.Random(secrets.token_bytes(32))  # the system's own are ten times slower


def _new_id() -> str:
    """128 random bits."""
    return f"{_ids.getrandbits(128):032x}"


_LIST_ALONE: dict[str, Any] = {"mode": "batch", "history": None, "events": [], "now": None, "context": {}}


def first_night(storage: Storage, score: ScoreSettings, say: Callable[[str], None]) -> Night:
    """The published night, or what can stand in for it. Raises MissingArtifactError, DamagedArtifactError of the night if neither is there."""
    try:
        return Night.load(storage)
    except ArtifactError as error:
        try:
            night = Night.stand_in(storage, score)
        except RecrayError:
            raise error from None
        say(f"no nightly lists, the champion answers all: {error}")
        return night
