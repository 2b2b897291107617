"""One replica of the endpoint: what happens to a request, without HTTP and without Ray.

A request is resolved to a query, the query to a route, and the sources of the route are asked in turn. Parts that are unavailable are named in
`degraded`: `state` (the event store), `model`, `snapshot`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from opentelemetry.trace import get_current_span

from recray.config import PolicySettings, ScoreSettings, ServeSettings
from recray.errors import PartUnavailableError, RecrayError, UnavailableError
from recray.inference.policy import LOOKED_AT
from recray.model.device import device
from recray.optout import OptOut
from recray.serving.api import (
    HistoryRequest,
    HistoryResponse,
    ModelsResponse,
    Part,
    Privacy,
    RecommendRequest,
    RecommendResponse,
    ScoredItem,
    ScoreRequest,
    ScoreResponse,
    SimilarRequest,
    SimilarResponse,
)
from recray.serving.deployment import Deployment, Deployments
from recray.serving.experiment import Experiment
from recray.serving.explain import add_reasons
from recray.serving.history import known_events
from recray.serving.intake import Intake
from recray.serving.modulation import Exploration
from recray.serving.query import Query, resolve_query
from recray.serving.ranker import Ranker, Ranking
from recray.serving.ranking import RankedItems, bind, similar_items
from recray.serving.recorder import EventRecorder, new_id
from recray.serving.sources import Route, choose_route, lists_serve
from recray.serving.state import ServingState
from recray.serving.telemetry import Telemetry
from recray.serving.traces import QUIET, provider, tracer
from recray.state.log import RECENT, Entry
from recray.state.rewards import Rewards
from recray.storage import Storage

_Request = TypeVar("_Request", RecommendRequest, ScoreRequest)


class Service:
    """Serves from the deployment of now, which `look` exchanges when something else is published or released.

    Where no snapshot can be read but there is a champion and a dataset, it begins with those, and without an event store where that is
    unavailable. Raises MissingArtifactError, DamagedArtifactError, SettingsError when it is made.
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
        policy = policy or PolicySettings()
        self.options, self.telemetry = options, telemetry or Telemetry()
        place = device("serve.gpus_per_replica", gpu=options.gpus_per_replica > 0)
        self.deployments = Deployments(storage, score, Rewards.declared(options), private=private, bound=policy.bound, device=place)
        self.recorder = EventRecorder(storage, options)
        self.opted_out = OptOut.of(storage.root, exclude_users)
        self.intake = Intake(self.deployments, self.recorder, self.opted_out, options, self.telemetry)
        self.traces = provider(options.traces)
        self._tracer = tracer(self.traces)
        self.ranker = Ranker(options, self.telemetry, self._tracer)
        self._log = logging.getLogger("ray.serve")
        self._tasks: set[asyncio.Task[None]] = set()

        self._exploration_share, self._exploration = policy.explore, None
        if policy.sigma > 0 and policy.explore > 0:
            self._exploration = Exploration(policy.sigma, policy.actions, policy.bound, np.random.default_rng())
        self.look()

    @property
    def state(self) -> ServingState:
        """What serves now."""
        return self.deployments.current.state

    def look(self) -> None:
        """Take up what was published, released or opted out since the last look, and hand over what was counted."""
        self.deployments.look(self.recorder.log)
        self.recorder.look()
        try:
            self.opted_out.look()
        except (RecrayError, OSError) as error:
            self._log.error("the list of who opted out cannot be read, the one of before holds: %s", error)
        try:
            self.telemetry.flush(self._gauges(), self._labels())
        except Exception as error:
            self._log.error("nothing can be counted: %s", error)

    def _gauges(self) -> dict[str, float]:
        state, writer = self.state, self.recorder.writer
        return {
            "waiting": self.ranker.waiting,
            "coverage": self.telemetry.coverage(state.predictor.answerable),
            "lost": 0 if writer is None else writer.lost,
            "set_aside": 0 if writer is None else writer.set_aside,
            "away": len(self.unavailable_parts()),
            "night_age_s": time.time() - state.dataset.as_of_s,
        }

    def _labels(self) -> dict[str, str]:
        deployment = self.deployments.current
        challenger = "" if deployment.experiment is None else deployment.experiment.challenger
        return {"night": deployment.state.date, "bundle": deployment.state.name, "challenger": challenger}

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Raises RequestError where the request makes no sense, UnavailableError where nobody can respond now."""
        started, deployment = time.monotonic(), self.deployments.current
        request = self._admit(request, deployment.state)
        later, unavailable = await self._events_since(request, deployment.state)
        query = resolve_query(request, deployment.state, later)
        route = choose_route(query, deployment, self._exploration, self._exploration_share)
        try:
            ranking = await self.ranker.rank(query, route, deployment.state)
        except UnavailableError:
            self.recorder.record_refusal(query.user, deployment.experiment)
            raise
        response = to_response(ranking, deployment, unavailable)

        if request.explain and response.items and "model" not in response.degraded:
            await self._add_reasons(response, query, ranking)
        self._record(response, query, route, ranking, deployment, started)
        self._mirror(response, query, ranking, deployment)
        return response

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """As `recommend`, for given candidates."""
        started, state = time.monotonic(), self.state
        request = self._admit(request, state)
        later, unavailable = await self._events_since(request, state)
        query = resolve_query(request, state, later)
        try:
            ranked = await self.ranker.ask(bind(query, state))
        except PartUnavailableError:
            raise UnavailableError("the model does not answer", "come again") from None
        items = [ScoredItem(item_id=item_id, score=score) for item_id, score in ranked.items]
        response = ScoreResponse(
            request_id=new_id(),
            night=state.date,
            bundle=state.bundle,
            degraded=list(unavailable),
            source="popular" if ranked.source == "popular" else "realtime",
            items=items,
        )
        self._record_other(response, response.source, query.user, started, "score")
        return response

    async def history(self, request: HistoryRequest) -> HistoryResponse:
        """What responses for a user are made from."""
        state = self.state
        if self._has_opted_out(request.user_id, state):
            return HistoryResponse(events=[])
        user = state.name_of_user(request.user_id)
        self.recorder.record_access(user, "history")
        later, degraded = list[Entry](), list[Part]()
        if user is not None and state.snapshot.as_user(request.user_id) is not None:
            try:
                later = await self._read_store(user, state, min(request.last, RECENT))
            except PartUnavailableError as error:
                degraded.append(error.part)
        return HistoryResponse(events=known_events(request.user_id, later, request.last, state), degraded=degraded)

    async def similar(self, request: SimilarRequest) -> SimilarResponse:
        """Raises RequestError for an unknown item, UnavailableError where no model may respond."""
        started, state = time.monotonic(), self.state
        ranked = await asyncio.to_thread(similar_items, request.item_id, request.k, state)
        response = SimilarResponse(request_id=new_id(), night=state.date, bundle=state.bundle, items=ranked.to_items())
        self._record_other(response, "realtime", None, started, "similar")
        return response

    def models(self) -> ModelsResponse:
        """What is served."""
        return describe(self.deployments.current)

    def unavailable_parts(self) -> list[Part]:
        """The parts that do not respond as they should."""
        parts: dict[Part, bool] = {"snapshot": not self.state.has_lists, "state": self.recorder.is_unavailable}
        return [part for part, is_unavailable in parts.items() if is_unavailable]

    def close(self) -> None:
        """Respond to and write what waits."""
        self.ranker.close()
        self.recorder.close()
        if self.traces is not None:
            self.traces.shutdown()

    def _has_opted_out(self, user_id: Any, state: ServingState) -> bool:
        return bool(len(self.opted_out)) and user_id is not None and state.name_of_user(user_id) in self.opted_out

    def _admit(self, request: _Request, state: ServingState) -> _Request:
        """The request; of a user who opted out, one of nobody."""
        return request.model_copy(update={"user_id": None}) if self._has_opted_out(request.user_id, state) else request

    async def _events_since(self, request: RecommendRequest | ScoreRequest, state: ServingState) -> tuple[list[Entry], list[Part]]:
        """Events of the user that the run does not know, and which parts did not respond."""
        unavailable: list[Part] = ["snapshot"] if isinstance(request, RecommendRequest) and not state.has_lists else []
        is_batch = isinstance(request, RecommendRequest) and request.mode == "batch"
        user_id = state.snapshot.as_user(request.user_id)
        if user_id is None or is_batch or request.history is not None:
            return [], unavailable
        try:
            return await self._read_store(str(user_id), state, events_read(request, state)), unavailable
        except PartUnavailableError as error:
            return [], [*unavailable, error.part]

    async def _read_store(self, user: str, state: ServingState, limit: int) -> list[Entry]:
        with self._tracer.start_as_current_span("recray.log", **QUIET):
            return await self.recorder.recent_events(user, state, limit)

    async def _add_reasons(self, response: RecommendResponse, query: Query, ranking: Ranking) -> None:
        """Say in a response which events carried its items, under the modulation that it was made with."""
        self.recorder.record_access(query.user, "explain")
        model_input = ranking.model_input or bind(query, ranking.state)
        try:
            explained = await self.ranker.ask(model_input.explaining([item.item_id for item in response.items]))
        except PartUnavailableError:
            response.degraded.append("model")
            return
        add_reasons(response.items, explained.reasons or [], ranking.state)

    def _record(self, response: RecommendResponse, query: Query, route: Route, ranking: Ranking, deployment: Deployment, started: float) -> None:
        """Record an impression, and count it."""
        body: dict[str, Any] = {"source": response.source}
        if (decision := ranking.decision) is not None:
            body["decision"] = decision.to_body()
            self.telemetry.actions.extend(zip(decision.actions, decision.action.tolist(), strict=True))
        experiment = deployment.experiment
        if experiment is not None and not experiment.shadow and query.mode != "batch":
            body |= {**experiment.labels(query.user), **ranking.measured()}
            if route.is_challengers and lists_serve(query, route, deployment.state):
                body["listed"] = True  # the champion would not have asked its model
        elapsed_ms, item_ids = 1000 * (time.monotonic() - started), [item.item_id for item in response.items]
        self.recorder.record_impression(response, item_ids, query.user, elapsed_ms, body)
        variant = "challenger" if ranking.state is deployment.challenger else "champion"
        self.telemetry.answered(response.source, ranking.state.name, variant, response.degraded, elapsed_ms, item_ids)
        attributes = {"recray.source": response.source, "recray.bundle": ranking.state.name, "recray.degraded": list(response.degraded)}
        get_current_span().set_attributes(attributes)

    def _record_other(self, response: ScoreResponse | SimilarResponse, source: str, user: str | None, started: float, what: str) -> None:
        item_ids = [item.item_id for item in response.items]
        self.recorder.record_impression(response, item_ids, user, 1000 * (time.monotonic() - started), {"source": source, "asked": what})

    def _mirror(self, response: RecommendResponse, query: Query, ranking: Ranking, deployment: Deployment) -> None:
        """Ask a challenger the same whose responses nobody sees."""
        experiment, challenger = deployment.experiment, deployment.challenger
        if experiment is None or challenger is None or not experiment.shadow or query.mode == "batch":
            return
        if self.ranker.challenger_is_behind:  # it is behind, and nobody waits for what it would say
            self.telemetry.refused["shadow"] += 1
            return
        beside = {**ranking.measured(), "degraded": response.degraded} if ranking.model_ms is not None else None
        task = asyncio.create_task(self._shadow(response, query, challenger, experiment, beside))
        self._tasks.add(task)  # else nothing holds it
        task.add_done_callback(self._tasks.discard)

    async def _shadow(
        self, response: RecommendResponse, query: Query, challenger: ServingState, experiment: Experiment, beside: dict[str, Any] | None
    ) -> None:
        """Record what the challenger would have responded, beside how the champion's model did."""
        started, ranked, degraded = time.monotonic(), RankedItems([], "realtime"), list[Part]()
        with contextlib.suppress(RecrayError):
            model_input = bind(query, challenger)
            asked_at = time.monotonic()
            try:
                ranked = await self.ranker.ask(model_input, is_challengers=True)
            except PartUnavailableError as error:
                degraded.append(error.part)
            body = {"source": ranked.source, **experiment.labels(query.user), "model_ms": round(1000 * (time.monotonic() - asked_at), 3)}
            if beside is not None:
                body["beside"] = beside
            request_id = f"{response.request_id}.shadow"
            shadow = response.model_copy(update={"request_id": request_id, "bundle": challenger.bundle, "degraded": degraded})
            item_ids = [item.item_id for item in ranked.to_items()]
            self.recorder.record_impression(shadow, item_ids, query.user, 1000 * (time.monotonic() - started), body)


def events_read(request: RecommendRequest | ScoreRequest, state: ServingState) -> int:
    """How many of a user's last events can change the response: what the model and the policy read, or all where seen items are left out."""
    if isinstance(request, RecommendRequest) and (request.new_only or state.filters_seen):
        return RECENT
    length = state.predictor.model.shape.history
    return min(length if state.policy_network is None else max(length, LOOKED_AT), RECENT)


def to_response(ranking: Ranking, deployment: Deployment, unavailable: Sequence[Part]) -> RecommendResponse:
    """A ranking as the API shows it, under a new id."""
    state, ranked, decision = ranking.state, ranking.ranked, ranking.decision
    return RecommendResponse(
        request_id=new_id(),
        night=deployment.state.date,
        bundle=state.bundle,
        policy=deployment.state.snapshot.manifest.get("policy") if ranked.source == "snapshot" else state.policy,
        controls=None if decision is None else decision.controls(),
        degraded=list(dict.fromkeys([*unavailable, *ranking.unavailable])),
        source=ranked.source,
        items=ranked.to_items(),
    )


def describe(deployment: Deployment) -> ModelsResponse:
    """What a deployment serves."""
    state, experiment = deployment.state, deployment.experiment
    manifest = state.snapshot.manifest
    return ModelsResponse(
        bundle=state.bundle,
        policy=state.policy,
        bundle_digest=manifest["bundle_digest"],
        snapshot=state.digest,
        dataset=state.dataset.key,
        night=state.date,
        users=None if state.is_private else manifest["users"],
        privacy=Privacy.model_validate(state.privacy, extra="ignore") if state.is_private else None,
        items=state.predictor.answerable,
        popular_only=state.predictor.popular_only,
        loaded_at=state.loaded_at,
        challenger=None if experiment is None else experiment.challenger,
        share=0.0 if experiment is None else experiment.share,
        shadow=experiment is not None and experiment.shadow,
    )
