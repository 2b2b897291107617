"""The requests of one replica, without HTTP and without Ray.

A request is resolved to a query and the query to a route, whose sources rank in turn. A response names
unavailable parts in `degraded`: `state` (the event store), `model`, `snapshot`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from opentelemetry.trace import get_current_span

from recray.config import PolicySettings, ScoreSettings, ServeSettings
from recray.config.sections import SurfaceSettings
from recray.errors import PartUnavailableError, RecrayError, RequestError, SettingsError, UnavailableError
from recray.events.items import ItemChange
from recray.events.log import MAX_RECENT, Entry
from recray.events.rewards import Rewards
from recray.inference.modulation import list_controls
from recray.inference.policy import OBSERVED_EVENTS
from recray.model.device import device
from recray.serving.api import (
    HistoryRequest,
    HistoryResponse,
    ItemsRequest,
    ItemsResponse,
    ModelsResponse,
    Part,
    Privacy,
    RecommendRequest,
    RecommendResponse,
    SampleUsersResponse,
    ScoredItem,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    SearchResponse,
    SimilarRequest,
    SimilarResponse,
    UserResponse,
    UsersResponse,
)
from recray.serving.batching import TICKET, Ticket
from recray.serving.cursor import decode_cursor, encode_cursor
from recray.serving.deployment import Deployment, Deployments
from recray.serving.explain import add_reasons, describe_items
from recray.serving.history import to_known_events
from recray.serving.intake import Intake
from recray.serving.items import resolve_changes
from recray.serving.modulation import Exploration
from recray.serving.query import Query, admit_request, has_opted_out, resolve_query
from recray.serving.ranker import Ranker, Ranking
from recray.serving.ranking import bind_query, rank_similar_items
from recray.serving.recorder import EventRecorder, make_id
from recray.serving.search import sample_users, search_items
from recray.serving.shadow import ShadowTraffic
from recray.serving.sources import Route, choose_route, is_list_sufficient
from recray.serving.state import ServingState
from recray.serving.surfaces import apply_surface
from recray.serving.telemetry import Telemetry
from recray.serving.traces import QUIET, make_provider, make_tracer
from recray.storage import Storage
from recray.storage.opt_out import OptOut

SAMPLE_USERS = 5


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
        self.shadow = ShadowTraffic(self.ranker, self.recorder, self.telemetry)
        self._logger = logging.getLogger("ray.serve")

        self._exploration_share, self._exploration = policy.exploration_share, None
        if policy.exploration_scale > 0 and policy.exploration_share > 0:
            self._exploration = Exploration(
                policy.exploration_scale, policy.actions, policy.bound, np.random.default_rng()
            )
        self.refresh_items()
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

    def refresh_items(self) -> None:
        """Take over the changes of items."""
        self.deployments.refresh_items(self.recorder.log)

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

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Recommend items. Raises RequestError for an invalid request, UnavailableError where no source can
        respond.
        """
        response, record = await self._respond(request)
        record()
        return response

    async def _respond(self, request: RecommendRequest) -> tuple[RecommendResponse, Callable[[], None]]:
        """A response, and what records it once it is sent."""
        started, deployment = time.monotonic(), self.deployments.current
        request = admit_request(request, deployment.state, self.opt_out_list)
        request, surface = apply_surface(request, self.options.surfaces)
        shown: list[Any] = []
        if request.cursor is not None:
            shown = decode_cursor(request.cursor, deployment.state.to_user_name(request.user_id))
            request = request.model_copy(update={"deny": [*request.deny, *shown]})
        new_entries, unavailable = await self._read_new_entries(request, deployment.state)
        query = resolve_query(request, deployment.state, new_entries)
        if surface is not None and request.surface is not None:
            query = replace(query, surface=(request.surface, surface))
        route = choose_route(query, deployment, self._exploration, self._exploration_share)
        try:
            ranking = await self.ranker.rank(query, route, deployment.state)
        except UnavailableError:
            self.recorder.record_refusal(query.user, deployment.experiment)
            raise
        response = to_response(ranking, deployment, unavailable)
        if request.cursor is not None and len(response.items) == request.k:
            shown += [item.item_id for item in response.items]
            response.cursor = encode_cursor(deployment.state.to_user_name(request.user_id), shown)

        if request.describe:
            describe_items(response.items, ranking.state)
        if request.explain and response.items and "model" not in response.degraded:
            await self._add_reasons(response, query, ranking)

        def record() -> None:
            self._record(response, query, route, ranking, deployment, started)
            if query.variant is None:
                self.shadow.mirror_query(response, query, ranking, deployment)

        return response, record

    async def recommend_users(self, request: RecommendRequest) -> UsersResponse:
        """Recommend items to each of `users`: as many at once as the model ranks in a batch, with one place
        in its queue. Raises as `recommend`.
        """
        TICKET.set(Ticket())  # of this request's task, and of those that it starts
        all_users, size = request.users or [], self.options.max_batch
        responses, records = list[UserResponse](), list[Callable[[], None]]()
        for first in range(0, len(all_users), size):
            users = all_users[first : first + size]
            requests = [request.model_copy(update={"user_id": user, "users": None}) for user in users]
            tasks = [asyncio.create_task(self._respond(each)) for each in requests]
            try:
                done = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
            for user, (response, record) in zip(users, done, strict=True):
                responses.append(UserResponse.model_construct(**response.__dict__, user_id=user))
                records.append(record)
        for record in records:  # a list that nobody gets is no impression
            record()
        return UsersResponse.model_construct(responses=responses)

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score candidates. Raises as `recommend`."""
        started, state = time.monotonic(), self.state
        request = admit_request(request, state, self.opt_out_list)
        new_entries, unavailable = await self._read_new_entries(request, state)
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
        self._record_endpoint_response(response, response.source, query.user, started, "score")
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
                new_entries = await self._read_store(user, state, min(request.last, MAX_RECENT))
            except PartUnavailableError as error:
                degraded.append(error.part)
        events = to_known_events(request.user_id, new_entries, request.last, state)
        return HistoryResponse(events=events, degraded=degraded)

    async def similar(self, request: SimilarRequest) -> SimilarResponse:
        """Find similar items. Raises RequestError for an unknown item, UnavailableError without a model."""
        started, state = time.monotonic(), self.state
        ranked_items = await asyncio.to_thread(rank_similar_items, request.item_id, request.k, state)
        response = SimilarResponse(
            request_id=make_id(), as_of=state.date, bundle=state.bundle, items=ranked_items.to_items()
        )
        if request.describe:
            describe_items(response.items, state)
        self._record_endpoint_response(response, "realtime", None, started, "similar")
        return response

    async def change_items(self, request: ItemsRequest) -> ItemsResponse:
        """Change items; on disk when it returns. Raises RequestError, UnavailableError."""
        state = self.state
        changes = await asyncio.to_thread(resolve_changes, request.items, state)
        known = {change.key for change in changes if state.knows_item(change.item_id)}
        await self._store_changes(changes)
        return ItemsResponse(changed=len(known), added=len({change.key for change in changes} - known))

    async def restore_item(self, item_id: str) -> ItemsResponse:
        """Drop the changes of an item; on disk when it returns. Raises RequestError, UnavailableError."""
        item = self.state.require_item(item_id, "item_id")
        is_known = self.state.knows_item(item)
        await self._store_changes([ItemChange(item, is_removed=True)])
        return ItemsResponse(changed=int(is_known), added=0)

    async def _store_changes(self, changes: list[ItemChange]) -> None:
        await self.recorder.write(lambda writer: asyncio.to_thread(writer.log.change_items, changes))
        await asyncio.to_thread(self.refresh_items)

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Find items by text."""
        return SearchResponse(
            items=await asyncio.to_thread(search_items, request.text, request.k, self.state)
        )

    async def sample_users(self) -> SampleUsersResponse:
        """A few users to look at."""
        users = await asyncio.to_thread(sample_users, SAMPLE_USERS, self.state, self.opt_out_list)
        return SampleUsersResponse(users=users)

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

    async def _read_new_entries(
        self, request: RecommendRequest | ScoreRequest, state: ServingState
    ) -> tuple[list[Entry], list[Part]]:
        """Events of the user that the run does not know, and unavailable parts."""
        unavailable: list[Part] = (
            ["snapshot"] if isinstance(request, RecommendRequest) and not state.has_lists else []
        )
        is_batch = isinstance(request, RecommendRequest) and request.mode == "batch"
        user_id = state.snapshot.to_user_id(request.user_id)
        if user_id is None or is_batch or request.history is not None:
            return [], unavailable
        try:
            limit = count_relevant_events(request, state)
            return await self._read_store(str(user_id), state, limit), unavailable
        except PartUnavailableError as error:
            return [], [*unavailable, error.part]

    async def _read_store(self, user: str, state: ServingState, limit: int) -> list[Entry]:
        with self._tracer.start_as_current_span("recray.log", **QUIET):
            return await self.recorder.read_recent_events(user, state, limit)

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

    def _record(
        self,
        response: RecommendResponse,
        query: Query,
        route: Route,
        ranking: Ranking,
        deployment: Deployment,
        started: float,
    ) -> None:
        """Record an impression in event store, telemetry and trace."""
        details: dict[str, Any] = {"source": response.source}
        if (
            decision := ranking.decision
        ) is not None and query.variant is None:  # no policy learns from a preview
            details["decision"] = decision.to_body()
            self.telemetry.actions.extend(zip(decision.actions, decision.action.tolist(), strict=True))
        experiment = deployment.experiment
        if query.surface is not None:
            details["surface"] = query.surface[0]
            if not query.surface[1].experiment:
                experiment = None
        if query.variant is not None:
            details["asked"] = "preview"  # of a person who compares
        elif experiment is not None and not experiment.shadow and query.mode != "batch":
            details |= {**experiment.to_labels(query.user), **ranking.to_measurements()}
            if route.is_challengers and is_list_sufficient(query, route, deployment.state):
                details["listed"] = True  # the champion would not have run its model
        elapsed_ms, item_ids = 1000 * (time.monotonic() - started), [item.item_id for item in response.items]
        self.recorder.record_impression(response, item_ids, query.user, elapsed_ms, details)
        variant = "challenger" if ranking.state is deployment.challenger else "champion"
        self.telemetry.count_response(
            response.source, ranking.state.name, variant, response.degraded, elapsed_ms, item_ids
        )
        if (span := get_current_span()).is_recording():
            attributes = {
                "recray.source": response.source,
                "recray.bundle": ranking.state.name,
                "recray.degraded": list(response.degraded),
            }
            span.set_attributes(attributes)

    def _record_endpoint_response(
        self,
        response: ScoreResponse | SimilarResponse,
        source: str,
        user: str | None,
        started: float,
        kind: str,
    ) -> None:
        """Record the response of another endpoint."""
        item_ids = [item.item_id for item in response.items]
        self.recorder.record_impression(
            response, item_ids, user, 1000 * (time.monotonic() - started), {"source": source, "asked": kind}
        )


def check_surfaces(surfaces: Mapping[str, SurfaceSettings], state: ServingState) -> None:
    """Raises SettingsError for a surface that a run cannot have: a column or an event type that it lacks."""
    for name in surfaces:
        try:
            request, surface = apply_surface(RecommendRequest(surface=name), surfaces)
            query = resolve_query(request, state)
            bind_query(replace(query, surface=None if surface is None else (name, surface)), state)
        except RequestError as error:
            raise SettingsError(f"serve.surfaces.{name}: {error.message}", error.fix) from None


def count_relevant_events(request: RecommendRequest | ScoreRequest, state: ServingState) -> int:
    """How many of a user's last events can change the response: those that model and policy read, or all with
    the seen-item filter.
    """
    if isinstance(request, RecommendRequest) and (request.filter_seen or state.filters_seen):
        return MAX_RECENT
    length = state.predictor.model.shape.history
    return min(length if state.policy_network is None else max(length, OBSERVED_EVENTS), MAX_RECENT)


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
