"""Shadow traffic: a challenger gets the same queries as the champion, and its responses are only recorded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

from recray.errors import PartUnavailableError, RecrayError
from recray.serving.api import Part, RecommendResponse
from recray.serving.batching import TICKET
from recray.serving.deployment import Deployment
from recray.serving.experiment import Experiment
from recray.serving.query import Query
from recray.serving.ranker import Ranker, Ranking
from recray.serving.ranking import RankedItems, bind_query
from recray.serving.recorder import EventRecorder, to_impression
from recray.serving.state import ServingState
from recray.serving.telemetry import Telemetry


class ShadowTraffic:
    """Mirrors queries to a challenger in the background."""

    def __init__(self, ranker: Ranker, recorder: EventRecorder, telemetry: Telemetry) -> None:
        self._ranker, self._recorder, self._telemetry = ranker, recorder, telemetry
        self._tasks: set[asyncio.Task[None]] = set()

    def mirror_query(
        self, response: RecommendResponse, query: Query, ranking: Ranking, deployment: Deployment
    ) -> None:
        """Send a query to the challenger of an experiment with shadow traffic, after its response."""
        experiment, challenger = deployment.experiment, deployment.challenger
        if experiment is None or challenger is None or not experiment.shadow or query.mode == "batch":
            return
        if self._ranker.has_challenger_backlog:
            self._telemetry.refused["shadow"] += 1
            return
        champion = None
        if ranking.model_ms is not None:
            champion = {**ranking.to_measurements(), "degraded": response.degraded}
        task = asyncio.create_task(self._rank_and_record(response, query, challenger, experiment, champion))
        self._tasks.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._tasks.discard)

    async def _rank_and_record(
        self,
        response: RecommendResponse,
        query: Query,
        challenger: ServingState,
        experiment: Experiment,
        champion: Mapping[str, Any] | None,
    ) -> None:
        """Record the challenger's response to a query, with the measurements of the champion's model."""
        TICKET.set(None)  # it waits for itself, not with the request
        started, ranked, degraded = time.monotonic(), RankedItems([], "realtime"), list[Part]()
        with contextlib.suppress(RecrayError):
            model_input = bind_query(query, challenger)
            model_started = time.monotonic()
            try:
                ranked = await self._ranker.run_model(model_input, is_challengers=True)
            except PartUnavailableError as error:
                degraded.append(error.part)
            details = {
                "source": ranked.source,
                **experiment.to_labels(query.user),
                "model_ms": round(1000 * (time.monotonic() - model_started), 3),
            }
            if champion is not None:
                details["beside"] = champion

            request_id = f"{response.request_id}.shadow"
            shadow = response.model_copy(
                update={"request_id": request_id, "bundle": challenger.bundle, "degraded": degraded}
            )
            item_ids = [item.item_id for item in ranked.to_items()]
            elapsed_ms = 1000 * (time.monotonic() - started)
            self._recorder.record([to_impression(shadow, item_ids, query.user, elapsed_ms, details)])
