"""The requests of one replica, without HTTP and without Ray.

A request is resolved to a query and the query to a route, whose sources rank in turn. A response names
unavailable parts in `degraded`: `state` (the event store), `model`, `snapshot`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recray.config import PolicySettings, ScoreSettings, ServeSettings
from recray.config.sections import SurfaceSettings
from recray.errors import PartUnavailableError, RecrayError, RequestError, SettingsError, UnavailableError
from recray.events.log import MAX_RECENT, Entry
from recray.events.rewards import Rewards
from recray.inference.modulation import list_controls
from recray.model.device import device
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
    UserResponse,
    UsersResponse,
)
from recray.serving.batching import TICKET, Ticket
from recray.serving.catalogue import Catalogue
from recray.serving.cursor import decode_cursor, encode_cursor
from recray.serving.deployment import Deployment, Deployments
from recray.serving.explain import add_reasons, describe_items
from recray.serving.history import to_known_events
from recray.serving.impressions import ImpressionLog, IsShown, RankedResponse, is_always
from recray.serving.intake import Intake
from recray.serving.modulation import Exploration
from recray.serving.new_events import NewEvents
from recray.serving.pins import find_unknown, pin_items
from recray.serving.query import Query, admit_request, has_opted_out, resolve_query
from recray.serving.ranker import Ranker, Ranking
from recray.serving.ranking import bind_query
from recray.serving.recorder import EventRecorder, make_id
from recray.serving.shadow import ShadowTraffic
from recray.serving.sources import Route, choose_route
from recray.serving.state import ServingState
from recray.serving.surfaces import apply_surface
from recray.serving.telemetry import Telemetry
from recray.serving.traces import make_provider, make_tracer
from recray.storage import Storage
from recray.storage.opt_out import OptOut

_LOG = logging.getLogger("ray.serve")


class Service:
    """Serves from the current deployment, which `refresh` replaces when another run or release is there.

    Without a readable snapshot it starts with the champion and the last dataset; the event store may be
    unavailable. The constructor raises MissingArtifactError, DamagedArtifactError, SettingsError.
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
        model_device = device("serve.gpus_per_replica", gpu=options.gpus_per_replica > 0)
        self.deployments = Deployments(
            storage,
            score,
            Rewards.declared(options),
            private=private,
            bound=policy.bound,
            device=model_device,
        )
        self.recorder = EventRecorder(storage, options)
        self.opt_out_list = OptOut.of(storage.root, exclude_users)
        self.intake = Intake(self.deployments, self.recorder, self.opt_out_list, options, self.telemetry)
        self.traces = make_provider(options.traces)
        self._tracer = make_tracer(self.traces)
        self.ranker = Ranker(options, self.telemetry, self._tracer)
        self.new_events = NewEvents(self.recorder, self._tracer)
        shadow = ShadowTraffic(self.ranker, self.recorder, self.telemetry)
        self.impressions = ImpressionLog(self.recorder, self.telemetry, shadow)
        self.catalogue = Catalogue(self.deployments, self.recorder, self.impressions, self.opt_out_list)
        self._logger = logging.getLogger("ray.serve")

        self._exploration_share, self._exploration = policy.exploration_share, None
        if policy.exploration_scale > 0 and policy.exploration_share > 0:
            self._exploration = Exploration(
                policy.exploration_scale, policy.actions, policy.bound, np.random.default_rng()
            )
        self.catalogue.refresh()
        self.refresh()

    @property
    def state(self) -> ServingState:
        """The state of the champion."""
        return self.deployments.current.state

    def refresh(self) -> None:
        """Load a new run, release or opt-out list, and pass the telemetry on."""
        self.deployments.refresh(self.recorder.log)
        self.recorder.reconnect()
        try:
            self.opt_out_list.reload()
        except (RecrayError, OSError) as error:
            self._logger.error("the opt-out list cannot be read, the current one stays: %s", error)
        try:
            self.telemetry.flush(self._read_gauges(), self._read_labels())
        except Exception as error:
            self._logger.error("the telemetry failed: %s", error)

    def _read_gauges(self) -> dict[str, float]:
        state, writer = self.state, self.recorder.writer
        return {
            "waiting": self.ranker.waiting,
            "coverage": self.telemetry.measure_coverage(state.predictor.n_available),
            "lost": 0 if writer is None else writer.lost,
            "set_aside": 0 if writer is None else writer.set_aside,
            "away": len(self.unavailable_parts()),
            "run_age_s": time.time() - state.dataset.as_of_s,
        }

    def _read_labels(self) -> dict[str, str]:
        deployment = self.deployments.current
        challenger = "" if deployment.experiment is None else deployment.experiment.challenger
        return {"as_of": deployment.state.date, "bundle": deployment.state.name, "challenger": challenger}

    async def recommend(self, request: RecommendRequest, is_shown: IsShown = is_always) -> RecommendResponse:
        """Recommend items. Raises RequestError for an invalid request, UnavailableError where no source can
        respond.

        is_shown : whether a response is an impression
        """
        started, deployment = time.monotonic(), self.deployments.current
        request = admit_request(request, deployment.state, self.opt_out_list)
        request, surface = apply_surface(request, self.options.surfaces)
        shown: list[Any] = []
        if request.cursor is not None:
            shown = decode_cursor(request.cursor, deployment.state.to_user_name(request.user_id))
            request = request.model_copy(update={"deny": [*request.deny, *shown]})
        new_entries, unavailable = await self.new_events.read(request, deployment.state)
        query = resolve_query(request, deployment.state, new_entries, surface)
        route = choose_route(query, deployment, self._exploration, self._exploration_share)
        ranked = await self._rank(query, route, deployment, unavailable)
        response = ranked.response

        if request.cursor is not None and len(response.items) == request.k:
            shown += [item.item_id for item in response.items]
            response.cursor = encode_cursor(deployment.state.to_user_name(request.user_id), shown)
        if request.describe:
            describe_items(response.items, ranked.ranking.state)
        if request.explain and response.items and "model" not in response.degraded:
            await self._add_reasons(response, query, ranked.ranking)
        if is_shown(response):
            self.impressions.record([ranked], deployment, started)
        return response

    async def recommend_users(self, request: RecommendRequest) -> UsersResponse:
        """Recommend items to each of `users`: as many at once as the model ranks in a batch, with one place
        in its queue. Raises as `recommend`.
        """
        TICKET.set(Ticket())  # of this request's task, and of those that it starts
        started, deployment = time.monotonic(), self.deployments.current
        queries, unavailable = await self._resolve_users(request, deployment.state)
        ranked, size = list[RankedResponse](), self.options.max_batch
        for first in range(0, len(queries), size):
            ranked += await self._rank_users(queries[first : first + size], deployment, unavailable)
        responses = list[UserResponse]()
        for user, each in zip(request.users or [], ranked, strict=True):
            if request.describe:
                describe_items(each.response.items, each.ranking.state)
            responses.append(UserResponse.model_construct(**each.response.__dict__, user_id=user))
        self.impressions.record(ranked, deployment, started)  # a list that nobody gets is no impression
        return UsersResponse.model_construct(responses=responses)

    async def _resolve_users(
        self, request: RecommendRequest, state: ServingState
    ) -> tuple[list[Query], list[Part]]:
        """The query of each of `users`, and unavailable parts."""
        request, surface = apply_surface(request, self.options.surfaces)
        query = resolve_query(request, state, (), surface)
        users = list[tuple[Any | None, str | None]]()
        for sent in request.users or []:
            if has_opted_out(sent, state, self.opt_out_list):
                users.append((None, None))
            else:
                user_id = state.snapshot.to_user_id(sent)
                users.append((user_id, str(sent if user_id is None else user_id)))
        names = [user for user_id, user in users if user is not None and user_id is not None]
        entries, unavailable = await self.new_events.read_users(names, request, state)
        queries = [query.of_user(user_id, user, entries.get(user or "", ())) for user_id, user in users]
        return queries, unavailable

    async def _rank_users(
        self, queries: Sequence[Query], deployment: Deployment, unavailable: Sequence[Part]
    ) -> list[RankedResponse]:
        """Responses in the order of the queries: the model ranks those without a complete list together."""
        tasks = dict[int, asyncio.Task[RankedResponse]]()
        ranked = dict[int, RankedResponse]()
        for number, query in enumerate(queries):
            route = choose_route(query, deployment, self._exploration, self._exploration_share)
            ranking = self.ranker.look_up(query, route, deployment.state)
            if ranking is None:
                tasks[number] = asyncio.create_task(self._rank(query, route, deployment, unavailable))
            else:
                ranking = with_pins(ranking, query)
                ranked[number] = RankedResponse(
                    to_response(ranking, deployment, unavailable), query, route, ranking
                )
        try:
            ranked |= zip(tasks, await asyncio.gather(*tasks.values()), strict=True)
        finally:
            for task in tasks.values():
                task.cancel()
        await asyncio.sleep(0)  # other requests come in between
        return [ranked[number] for number in range(len(queries))]

    async def _rank(
        self, query: Query, route: Route, deployment: Deployment, unavailable: Sequence[Part]
    ) -> RankedResponse:
        try:
            ranking = await self.ranker.rank(query, route, deployment.state)
        except UnavailableError:
            self.recorder.record_refusal(query.user, deployment.experiment)
            raise
        ranking = with_pins(ranking, query)
        return RankedResponse(to_response(ranking, deployment, unavailable), query, route, ranking)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score candidates. Raises as `recommend`."""
        started, state = time.monotonic(), self.state
        request = admit_request(request, state, self.opt_out_list)
        new_entries, unavailable = await self.new_events.read(request, state)
        query = resolve_query(request, state, new_entries)
        try:
            ranked_items = await self.ranker.run_model(bind_query(query, state))
        except PartUnavailableError:
            raise UnavailableError("the model does not respond", "retry later") from None
        items = [ScoredItem(item_id=item_id, score=score) for item_id, score in ranked_items.items]
        response = ScoreResponse(
            request_id=make_id(),
            as_of=state.date,
            bundle=state.bundle,
            degraded=list(unavailable),
            source="popular" if ranked_items.source == "popular" else "realtime",
            items=items,
        )
        self.impressions.record_other(response, response.source, query.user, started, "score")
        return response

    async def history(self, request: HistoryRequest) -> HistoryResponse:
        """Read the history behind a user's recommendations."""
        state = self.state
        if has_opted_out(request.user_id, state, self.opt_out_list):
            return HistoryResponse(events=[])
        user = state.to_user_name(request.user_id)
        self.recorder.record_access(user, "history")
        new_entries, degraded = list[Entry](), list[Part]()
        if user is not None and state.snapshot.to_user_id(request.user_id) is not None:
            try:
                new_entries = await self.new_events.read_user(user, state, min(request.last, MAX_RECENT))
            except PartUnavailableError as error:
                degraded.append(error.part)
        events = to_known_events(request.user_id, new_entries, request.last, state)
        return HistoryResponse(events=events, degraded=degraded)

    def models(self) -> ModelsResponse:
        """Describe the current deployment."""
        return describe_deployment(self.deployments.current)

    def unavailable_parts(self) -> list[Part]:
        """The parts that are unavailable."""
        parts: dict[Part, bool] = {
            "snapshot": not self.state.has_lists,
            "state": self.recorder.is_unavailable,
        }
        return [part for part, is_unavailable in parts.items() if is_unavailable]

    def close(self) -> None:
        """Run the queued queries and write the queued entries, then stop."""
        self.ranker.close()
        self.recorder.close()
        if self.traces is not None:
            self.traces.shutdown()

    async def _add_reasons(self, response: RecommendResponse, query: Query, ranking: Ranking) -> None:
        """Add to a response the events that carried its items, under the same modulation."""
        self.recorder.record_access(query.user, "explain")
        model_input = ranking.model_input or bind_query(query, ranking.state)
        model_input = model_input.explaining([item.item_id for item in response.items])
        try:
            explained_items = await self.ranker.run_model(model_input)
        except PartUnavailableError:
            response.degraded.append("model")
            return
        add_reasons(response.items, explained_items.reasons or [], ranking.state)


def check_surfaces(surfaces: Mapping[str, SurfaceSettings], state: ServingState) -> None:
    """Raises SettingsError for a surface that a run cannot have: a column or an event type that it lacks."""
    for name in surfaces:
        try:
            request, surface = apply_surface(RecommendRequest(surface=name), surfaces)
            bind_query(resolve_query(request, state, (), surface), state)
        except RequestError as error:
            raise SettingsError(f"serve.surfaces.{name}: {error.message}", error.fix) from None
        for item in find_unknown(surfaces[name].pins, state):
            _LOG.warning("serve.surfaces.%s.pins: no item %r, so it is not shown", name, item)


def with_pins(ranking: Ranking, query: Query) -> Ranking:
    """A ranking with the pinned items of the query's surface."""
    if query.surface is None or not query.surface[1].pins:
        return ranking
    return replace(ranking, ranked=pin_items(ranking.ranked, query.surface[1].pins, query, ranking.state))


def to_response(ranking: Ranking, deployment: Deployment, unavailable: Sequence[Part]) -> RecommendResponse:
    """A ranking as a response, with a new id."""
    state, ranked_items, decision = ranking.state, ranking.ranked, ranking.decision
    return RecommendResponse(
        request_id=make_id(),
        as_of=deployment.state.date,
        bundle=state.bundle,
        policy=deployment.state.snapshot.manifest.get("policy")
        if ranked_items.source == "snapshot"
        else state.policy,
        controls=None if decision is None else decision.to_controls(),
        degraded=list(dict.fromkeys([*unavailable, *ranking.unavailable])),
        source=ranked_items.source,
        items=ranked_items.to_items(),
    )


def describe_deployment(deployment: Deployment) -> ModelsResponse:
    """A deployment as a response."""
    state, experiment = deployment.state, deployment.experiment
    manifest = state.snapshot.manifest
    return ModelsResponse(
        bundle=state.bundle,
        policy=state.policy,
        bundle_digest=manifest["bundle_digest"],
        snapshot=state.digest,
        dataset=state.dataset.key,
        as_of=state.date,
        users=None if state.is_private else manifest["users"],
        privacy=Privacy.model_validate(state.privacy, extra="ignore") if state.is_private else None,
        items=state.predictor.n_available,
        controls=list_controls(state.predictor.model, state.predictor.vocabulary.event_types),
        popular_only=state.predictor.popular_only,
        loaded_at=state.loaded_at,
        challenger=None if experiment is None else experiment.challenger,
        share=0.0 if experiment is None else experiment.share,
        shadow=experiment is not None and experiment.shadow,
    )
