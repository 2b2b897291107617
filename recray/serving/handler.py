"""One replica's brain: which part answers a request, what is logged of it, and who answers when a part is away.

Async, without HTTP and without Ray. Parts that may be away are named in `degraded`: `state` (the log), `model`, `snapshot`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from opentelemetry.trace import get_current_span

from recray.config import PolicySettings, ScoreSettings, ServeSettings
from recray.errors import RecrayError, RequestError, UnavailableError
from recray.model.device import device
from recray.optout import OptOut
from recray.serving.api import (
    EventsRequest,
    EventsResponse,
    FeedbackRequest,
    FeedbackResponse,
    ForgetResponse,
    HistoryRequest,
    HistoryResponse,
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
from recray.serving.arms import Arms
from recray.serving.batching import Batcher, BusyError
from recray.serving.guard import ASKED_BY
from recray.serving.journal import Journal
from recray.serving.night import Night
from recray.serving.question import Decision, Explore, Found, Question, items_of
from recray.serving.telemetry import Telemetry
from recray.serving.traces import QUIET, provider, tracer
from recray.serving.trial import Trial, answers
from recray.state.log import RECENT, SAID_BEFORE, SAID_OTHERWISE, Entry, key_of
from recray.state.rewards import Rewards
from recray.storage import Storage

_Asked = TypeVar("_Asked", RecommendRequest, ScoreRequest)
MOST_LOGGED = 1000  # items of an answer
MOST_REFUSED = 100_000  # users whose refusal is logged
FORGET_S = 60.0  # in which a store has dropped a user
AHEAD_S = 86_400.0  # what the clock of whoever tells of events may be ahead


class Handler:
    """Answers from the published night, which `look` exchanges when another one is published.

    Where no snapshot can be read but there is a champion and a dataset, it begins with those, and without a log where the log is away.
    Raises MissingArtifactError, DamagedArtifactError, SettingsError when it is made.
    """

    def __init__(
        self,
        storage: Storage,
        options: ServeSettings,
        score: ScoreSettings,
        telemetry: Telemetry | None = None,
        *,
        private: bool = False,
        policy: PolicySettings | None = None,
        exclude_users: str | None = None,
    ) -> None:
        self.storage, self.options = storage, options
        self.telemetry = telemetry or Telemetry()
        self._log = logging.getLogger("ray.serve")
        self._policy = said = policy or PolicySettings()
        place = device("serve.gpus_per_replica", gpu=options.gpus_per_replica > 0)
        self.arms = Arms(storage, score, Rewards.declared(options), private=private, bound=said.bound, device=place)
        self.journal = Journal(storage, options)
        self.opted_out = OptOut.of(storage.root, exclude_users)
        self._tasks: set[asyncio.Task[None]] = set()
        self._batcher, self._aside = self._new_batcher(), self._new_batcher()  # a challenger makes nobody wait for it but its own
        self.traces = provider(options.traces)
        self._tracer = tracer(self.traces)
        explores = said.sigma > 0 and said.explore > 0
        self._exploration = Explore(said.sigma, said.actions, said.bound, np.random.default_rng()) if explores else None
        self.look()

    def _new_batcher(self) -> Batcher[Question, Found]:
        return Batcher(Night.answer, self.options.max_batch, self.options.max_waiting, lambda size: self.telemetry.batches.append(size))

    @property
    def night(self) -> Night:
        """What answers."""
        return self.arms.night

    def look(self) -> None:
        """Load what was published or released since the last look, aside, and swap the references at once; end a trial that failed.

        A night that cannot be loaded leaves the old one in place, and is tried again after a while.
        """
        self.arms.look(self.journal.log)
        self.journal.look()
        try:
            self.opted_out.look()
        except (RecrayError, OSError) as error:
            self._log.error("the list of who opted out cannot be read, the one of before holds: %s", error)
        try:
            self.telemetry.flush(self._state(), self._serving())
        except Exception as error:
            self._log.error("nothing can be counted: %s", error)

    def _state(self) -> dict[str, float]:
        night, writer = self.night, self.journal.writer
        return {
            "waiting": self._batcher.waiting + self._aside.waiting,
            "coverage": self.telemetry.coverage(night.predictor.answerable),
            "lost": 0 if writer is None else writer.lost,
            "set_aside": 0 if writer is None else writer.set_aside,
            "away": len(self.away()),
            "night_age_s": time.time() - night.dataset.as_of_s,
        }

    def _serving(self) -> dict[str, str]:
        trial = self.arms.trial
        return {"night": self.night.date, "bundle": self.night.name, "challenger": "" if trial is None else trial.challenger}

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Raises RequestError where the request makes no sense, UnavailableError where nobody can answer now."""
        begun, (night, trial, challenger) = time.monotonic(), self.arms.now
        request = self._let_in(night, request)
        degraded: list[Part] = [] if night.whole else ["snapshot"]
        fresh = await self._fresh(night, request, degraded)
        user = _name(night, request)
        chosen, decision = night, None
        exploration = self._exploration
        if exploration is not None and not (self._explores(user) and night.explores(exploration)):
            exploration = None
        now = exploration is not None or not night.lists_as_it_decides
        listed = None if now and request.mode == "auto" else self._listed(night, request, fresh, degraded)
        more: dict[str, Any] = {}
        if trial is not None and challenger is not None and request.mode != "batch" and trial.answers(user):
            chosen, question = challenger, challenger.question(request, fresh, exploration)
            found, more["model_ms"] = await self._model(question, degraded, aside=True)
            if listed is not None:
                more["listed"] = True  # the champion would not have asked its model
            if found is None:
                chosen, found = night, listed
            else:
                decision = question.decision
        elif (found := listed) is None:
            question = night.question(request, fresh, exploration)
            try:
                found, more["model_ms"] = await self._model(question, degraded)
            except UnavailableError:  # too many ask: a list of before the policy is better than none
                more |= {"model_ms": 0.0, "refused": True}
                if not now or (found := self._listed(night, request, fresh, degraded)) is None:
                    self._refused(user, trial, more)
                    raise
            else:
                decision = None if found is None else question.decision
        if found is None:
            alone = _list_alone(night, request, fresh)
            found = self._listed(night, alone, (), degraded) or night.popular(alone)
        items = items_of(found)
        if request.explain and items and "model" not in degraded:
            self._read_by(user, "explain")
            await self._explain(chosen, request, fresh, items, decision, degraded)
        policy = night.snapshot.manifest.get("policy") if found.source == "snapshot" else chosen.policy
        told: dict[str, Any] = {"night": night.date, "bundle": chosen.bundle, "policy": policy, "degraded": degraded}
        if decision is not None:
            told["controls"] = decision.turned()
        answer = RecommendResponse(request_id=_new_id(), source=found.source, items=items, **told)
        self._decided(user, request, answer, begun, trial, decision, more)
        arm = "challenger" if chosen is challenger else "champion"
        ms = 1000 * (time.monotonic() - begun)
        self.telemetry.answered(found.source, chosen.name, arm, degraded, ms, [item.item_id for item in items])
        if decision is not None:
            self.telemetry.actions.extend(zip(decision.actions, decision.action.tolist(), strict=True))
        get_current_span().set_attributes({"recray.source": found.source, "recray.bundle": chosen.name, "recray.degraded": list(degraded)})
        if trial is not None and challenger is not None and trial.shadow and request.mode != "batch":
            if self._aside.waiting:  # it is behind, and nobody waits for what it would say
                self.telemetry.refused["shadow"] += 1
                return answer
            task = asyncio.create_task(self._shadowed(trial, challenger, user, request, fresh, answer, more))
            self._tasks.add(task)  # else nothing holds it
            task.add_done_callback(self._tasks.discard)
        return answer

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """As `recommend`, for given candidates."""
        begun, night = time.monotonic(), self.night
        request = self._let_in(night, request)
        degraded: list[Part] = []
        fresh = await self._fresh(night, request, degraded)
        found, _ = await self._model(night.candidates(request, fresh), degraded)
        if found is None:
            raise UnavailableError("the model does not answer", "come again")
        items = [ScoredItem(item_id=item, score=score) for item, score in found.items]
        source = "popular" if found.source == "popular" else "realtime"
        told = ScoreResponse(request_id=_new_id(), night=night.date, bundle=night.bundle, degraded=degraded, source=source, items=items)
        self._answered(told, source, _name(night, request), begun, {"asked": "score"})
        return told

    async def history(self, request: HistoryRequest) -> HistoryResponse:
        """What answers for a user are read from."""
        night, degraded = self.night, list[Part]()
        if self._opted_out(night, request.user_id):
            return HistoryResponse(events=[], degraded=degraded)
        self._read_by(_name(night, request), "history")
        fresh = await self._fresh(night, request, degraded)
        return HistoryResponse(events=night.known(request.user_id, fresh, request.last), degraded=degraded)

    async def similar(self, request: SimilarRequest) -> SimilarResponse:
        """Raises RequestError for an unknown item, UnavailableError where no model may answer."""
        begun, night = time.monotonic(), self.night
        found = Found(list(await asyncio.to_thread(night.similar, request.item_id, request.k)), "realtime")
        told = SimilarResponse(request_id=_new_id(), night=night.date, bundle=night.bundle, items=items_of(found))
        self._answered(told, "realtime", None, begun, {"asked": "similar"})
        return told

    async def events(self, request: EventsRequest) -> EventsResponse:
        """Keep events: on disk when it returns. Raises RequestError, UnavailableError: then none was kept."""
        night, now = self.night, time.time()
        user = night.user_key(request.user_id)
        if user in self.opted_out:
            return EventsResponse(kept=0, duplicates=0, opted_out=len(request.events))
        entries = []
        for place, event in enumerate(request.events):
            body: dict[str, Any] = {
                "item_id": night.item_id(event.item_id, f"events.{place}.item_id"),
                "event": event.event or night.predictor.default_event,
                "value": event.value,
            }
            if request.context:
                body["context"] = request.context
            at_s = now
            if event.timestamp is not None:
                at_s = body["timestamp"] = event.timestamp.timestamp()  # said, so that the same name with another time is a conflict
            if at_s > now + AHEAD_S:
                raise RequestError(f"events.{place}.timestamp: {event.timestamp} lies in the future", "send UTC, or an offset")
            entries.append(Entry("event", key_of(user, event.event_id) if event.event_id else _new_id(), user, at_s, body))
        numbers = await self.journal.keep(lambda writer: writer.append(entries))
        kept = [entry for entry, number in zip(entries, numbers, strict=True) if number > 0]
        self.telemetry.kept["event"] += len(kept)
        self.telemetry.lags_s.extend(now - entry.at_s for entry in entries)
        unknown = sum(not night.knows(entry.body["item_id"], entry.body["event"]) for entry in kept)
        return EventsResponse(kept=len(kept), duplicates=numbers.count(SAID_BEFORE), conflicts=numbers.count(SAID_OTHERWISE), unknown=unknown)

    async def feedback(self, request: FeedbackRequest) -> FeedbackResponse:
        """Keep an outcome, after its decision: on disk when it returns. Raises UnavailableError: then it was not kept."""
        body = {"request_id": request.request_id, "outcome": request.outcome, "item_id": request.item_id, "value": request.value}
        at_s = time.time() if request.timestamp is None else request.timestamp.timestamp()
        if at_s > time.time() + AHEAD_S:
            raise RequestError(f"timestamp: {request.timestamp} lies in the future", "send UTC, or an offset")
        key = key_of(request.request_id, request.feedback_id) if request.feedback_id else _new_id()
        entry = Entry("outcome", key, None, at_s, body)
        kept, known = await self.journal.keep(lambda writer: writer.outcome(entry, request.request_id))
        self.telemetry.kept["outcome" if known else "set_aside"] += kept
        self.telemetry.lags_s.append(time.time() - at_s)
        return FeedbackResponse(kept=kept, set_aside=not known, notes=self._notes(request))

    def _notes(self, request: FeedbackRequest) -> list[str]:
        """Why an outcome counts nothing, or less than was sent."""
        options, notes = self.options, dict[str, str]()
        if request.outcome not in options.outcomes:
            notes["undeclared"] = f"outcome: {request.outcome} is none of serve.outcomes ({', '.join(options.outcomes)}): it counts nothing"
        if request.item_id is not None and not self.night.knows_item(request.item_id):
            notes["unknown_item"] = f"item_id: {request.item_id} is no item of what is served: it counts nothing unless the response listed it"
        if not 0 <= request.value <= options.outcome_bound:
            bounded = min(max(request.value, 0.0), options.outcome_bound)
            notes["bounded"] = f"value: {request.value:g} counts as {bounded:g} (serve.outcome_bound)"
        for name in notes:
            self.telemetry.kept[f"outcome_{name}"] += 1
        return list(notes.values())

    async def forget(self, user_id: str) -> ForgetResponse:
        """Take a user off: from now on nothing is kept of, and no answer read from, what the user did. Raises RequestError, UnavailableError.

        `recray forget`, or the next night, takes what was collected and published before.
        """
        user = self.night.user_key(user_id)
        try:
            new = await asyncio.to_thread(self.opted_out.add, user)
        except OSError as error:
            raise UnavailableError(f"the list of who opted out cannot be written: {error.strerror}", "come again") from error
        await self.journal.keep(lambda writer: writer.append([]))  # what waits here is written now, and dropped below
        dropped = await self.journal.keep(lambda writer: asyncio.to_thread(writer.log.forget_user, user), FORGET_S)
        return ForgetResponse(new=new, dropped=dropped)

    def _opted_out(self, night: Night, user_id: Any) -> bool:
        if not len(self.opted_out) or user_id is None:
            return False
        found = night.snapshot.as_user(user_id)
        return str(user_id if found is None else found) in self.opted_out

    def _let_in(self, night: Night, request: _Asked) -> _Asked:
        """The request; of a user who opted out, one of nobody."""
        return request.model_copy(update={"user_id": None}) if self._opted_out(night, request.user_id) else request

    def models(self) -> ModelsResponse:
        """What is served."""
        night, trial, _ = self.arms.now
        found = night.describe()
        if trial is not None:
            found.challenger, found.share, found.shadow = trial.challenger, trial.share, trial.shadow
        return found

    def away(self) -> list[Part]:
        """The parts that do not answer as they should."""
        parts: dict[Part, bool] = {"snapshot": not self.night.whole, "state": self.journal.away}
        return [part for part, gone in parts.items() if gone]

    def close(self) -> None:
        """Answer and write what waits."""
        self._batcher.close()
        self._aside.close()
        self.journal.close()
        if self.traces is not None:
            self.traces.shutdown()

    async def _fresh(self, night: Night, request: RecommendRequest | ScoreRequest | HistoryRequest, degraded: list[Part]) -> list[Entry]:
        """Events of the user that the night does not know."""
        if request.user_id is None or (isinstance(request, RecommendRequest) and request.mode == "batch"):
            return []
        if not isinstance(request, HistoryRequest) and request.history is not None:
            return []
        user = night.snapshot.as_user(request.user_id)
        if user is None:
            return []
        limit = min(request.last, RECENT) if isinstance(request, HistoryRequest) else night.events_read(request)
        with self._tracer.start_as_current_span("recray.log", **QUIET):
            found = await self.journal.recent(str(user), night.collected, night.begins_s, limit)
        if found is None:
            degraded.append("state")
        return found or []

    async def _explain(
        self, night: Night, request: RecommendRequest, fresh: list[Entry], items: list[Item], decision: Decision | None, degraded: list[Part]
    ) -> None:
        """Add to the items what carried them, turned as the answer was."""
        question = night.question(request, fresh)
        if decision is not None:
            question = replace(question, action=decision.turned())
        found, _ = await self._model(replace(question, candidates=tuple(item.item_id for item in items), explain=True), degraded)
        for item, why in zip(items, (found and found.why) or [], strict=False):
            item.why, item.text, item.title = why, night.in_words(why), night.title(item.item_id)

    def _listed(self, night: Night, request: RecommendRequest, fresh: Sequence[Entry], degraded: list[Part]) -> Found | None:
        """The nightly list, None where there is none or it cannot be read. Raises RequestError."""
        try:
            return night.look_up(request, fresh)
        except RequestError:
            raise
        except Exception as error:
            self._log.error("the nightly lists cannot be read: %s", type(error).__name__)
            self._log.debug("the nightly lists cannot be read", exc_info=error)
            if "snapshot" not in degraded:
                degraded.append("snapshot")
            return None

    async def _shadowed(
        self,
        trial: Trial,
        challenger: Night,
        user: str | None,
        request: RecommendRequest,
        fresh: list[Entry],
        answer: RecommendResponse,
        champion: dict[str, Any],
    ) -> None:
        """What the challenger would have answered, for the log alone, beside how the champion's model did."""
        begun, degraded = time.monotonic(), list[Part]()
        with contextlib.suppress(RecrayError):
            found, ms = await self._model(challenger.question(request, fresh), degraded, aside=True)
            told = answer.model_copy(
                update={
                    "request_id": f"{answer.request_id}.shadow",
                    "bundle": challenger.bundle,
                    "source": "realtime" if found is None else found.source,
                    "items": [] if found is None else items_of(found),
                    "degraded": degraded,
                }
            )
            more: dict[str, Any] = {"model_ms": ms}
            if "model_ms" in champion:
                more["beside"] = {**champion, "degraded": answer.degraded}
            self._decided(user, request, told, begun, trial, None, more, shadow=True)

    async def _model(self, question: Question, degraded: list[Part], *, aside: bool = False) -> tuple[Found | None, float]:
        """What the model says, None where it fails or takes too long, and how many milliseconds that took. Raises RequestError,
        UnavailableError where too many wait.

        aside : ask in the challenger's queue
        """
        begun = time.monotonic()
        with self._tracer.start_as_current_span("recray.model", **QUIET):
            found = await self._asked(self._aside if aside else self._batcher, question, degraded)
        return found, round(1000 * (time.monotonic() - begun), 3)

    async def _asked(self, batcher: Batcher[Question, Found], question: Question, degraded: list[Part]) -> Found | None:
        try:
            async with asyncio.timeout(self.options.timeout_s):
                return await batcher.ask(question)
        except BusyError:
            if batcher is self._aside:  # a challenger that is behind is not waited for: the champion answers
                self.telemetry.refused["challenger"] += 1
                degraded.append("model")
                return None
            self.telemetry.refused["busy"] += 1
            raise UnavailableError(f"{self.options.max_waiting} requests wait for the model", "come again") from None
        except RequestError:
            raise
        except Exception as error:
            self._log.error("the model does not answer: %s", type(error).__name__)
            self._log.debug("the model does not answer", exc_info=error)  # what it says may name a user
            degraded.append("model")
            return None

    def _read_by(self, user: str | None, what: str) -> None:
        """Log that somebody reads what a user did, and with which key, behind."""
        if user is not None:
            self.journal.later(Entry("access", _new_id(), user, time.time(), {"by": ASKED_BY.get(), "what": what}))

    def _explores(self, user: str | None) -> bool:
        """Whether answers for a user explore: a share of the users, other ones than a trial's."""
        return user is not None and answers(user, "exploration", self._policy.explore)

    def _decided(
        self,
        user: str | None,
        request: RecommendRequest,
        answer: RecommendResponse,
        begun: float,
        trial: Trial | None,
        decision: Decision | None = None,
        more: dict[str, Any] | None = None,
        *,
        shadow: bool = False,
    ) -> None:
        """Log an answer, behind.

        more : how the model did, which a trial is judged by
        """
        body = dict[str, Any]()
        if decision is not None:
            body["decision"] = decision.body()
        if trial is not None and trial.shadow == shadow and request.mode != "batch":
            body |= {"trial": trial.challenger, "share": trial.share, **(more or {})}
            body["arm"] = "shadow" if shadow else "challenger" if trial.answers(user) else "champion"
        self._answered(answer, answer.source, user, begun, body)

    def _refused(self, user: str | None, trial: Trial | None, more: dict[str, Any]) -> None:
        """Log that the champion's queue was full, once for each user of a trial: as many tests count it."""
        if trial is None or trial.shadow or user is None or user in trial.refused:
            return
        if len(trial.refused) >= MOST_REFUSED:
            trial.refused.clear()
        trial.refused.add(user)
        body = {"items": [], "asked": "refused", "degraded": [], "trial": trial.challenger, "share": trial.share, "arm": "champion", **more}
        self.journal.later(Entry("decision", _new_id(), user, time.time(), body))

    def _answered(
        self, answer: RecommendResponse | ScoreResponse | SimilarResponse, source: str, user: str | None, begun: float, more: dict[str, Any]
    ) -> None:
        """Log what was answered, behind: what comes of it is told by its id."""
        body = {
            "items": [item.item_id for item in answer.items[:MOST_LOGGED]],
            "source": source,
            "night": answer.night,
            "bundle": answer.bundle,
            "degraded": answer.degraded,
            "ms": round(1000 * (time.monotonic() - begun), 3),
            **more,
        }
        self.journal.later(Entry("decision", answer.request_id, user, time.time(), body))


_ids = random.Random(secrets.token_bytes(32))  # the system's own are ten times slower


def _new_id() -> str:
    """128 random bits."""
    return f"{_ids.getrandbits(128):032x}"


def _list_alone(night: Night, request: RecommendRequest, fresh: Sequence[Entry]) -> RecommendRequest:
    """What is left of a request where no model answers: a list that was made before."""
    met = []
    if request.new_only or night.snapshot.manifest["new_only"]:
        met = [event.item_id for event in (*(request.history or ()), *request.events)] + [entry.body["item_id"] for entry in fresh]
    plain: dict[str, Any] = {"mode": "batch", "history": None, "events": [], "now": None, "context": {}, "controls": None}
    return request.model_copy(update={**plain, "deny": [*request.deny, *met]})


def _name(night: Night, request: RecommendRequest | ScoreRequest | HistoryRequest) -> str | None:
    """The user as the event log has them, however the request wrote the id; None for nobody."""
    if request.user_id is None:
        return None
    found = night.snapshot.as_user(request.user_id)
    return str(request.user_id if found is None else found)
