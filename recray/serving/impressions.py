"""Records responses: as impressions in the event store, in the telemetry and the trace, and for a shadow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from opentelemetry.trace import get_current_span

from recray.events.log import Entry
from recray.serving.api import RecommendResponse, ScoreResponse, SimilarResponse
from recray.serving.deployment import Deployment
from recray.serving.query import Query
from recray.serving.ranker import Ranking
from recray.serving.recorder import EventRecorder, to_impression
from recray.serving.shadow import ShadowTraffic
from recray.serving.sources import Route, is_list_sufficient
from recray.serving.telemetry import Telemetry

IsShown = Callable[[RecommendResponse], bool]
"""Whether a response is sent, and so an impression."""


def is_always(response: RecommendResponse) -> bool:
    """Every response is sent."""
    return True


class RankedResponse(NamedTuple):
    """A response and how it came about."""

    response: RecommendResponse
    query: Query
    route: Route
    ranking: Ranking


class ImpressionLog:
    """Records the responses of one replica."""

    def __init__(self, recorder: EventRecorder, telemetry: Telemetry, shadow: ShadowTraffic) -> None:
        self._recorder, self._telemetry, self._shadow = recorder, telemetry, shadow

    def record(self, responses: Sequence[RankedResponse], deployment: Deployment, started: float) -> None:
        """Record responses in event store, telemetry and trace, and mirror their queries to a shadow."""
        elapsed_ms, impressions = 1000 * (time.monotonic() - started), list[Entry]()
        for ranked in responses:
            response, query, _, ranking = ranked
            details = to_details(ranked, deployment)
            item_ids = [item.item_id for item in response.items]
            impressions.append(to_impression(response, item_ids, query.user, elapsed_ms, details))
            if (decision := ranking.decision) is not None and query.variant is None:
                self._telemetry.actions.extend(zip(decision.actions, decision.action.tolist(), strict=True))
            variant = "challenger" if ranking.state is deployment.challenger else "champion"
            self._telemetry.count_response(
                response.source, ranking.state.name, variant, response.degraded, elapsed_ms, item_ids
            )
        self._recorder.record(impressions)
        for response, query, _, ranking in responses:
            if query.variant is None:
                self._shadow.mirror_query(response, query, ranking, deployment)
        if responses and (span := get_current_span()).is_recording():
            last = responses[-1]
            attributes = {
                "recray.source": last.response.source,
                "recray.bundle": last.ranking.state.name,
                "recray.degraded": list(last.response.degraded),
            }
            span.set_attributes(attributes)

    def record_other(
        self,
        response: ScoreResponse | SimilarResponse,
        source: str,
        user: str | None,
        started: float,
        kind: str,
    ) -> None:
        """Record the response of another endpoint."""
        item_ids = [item.item_id for item in response.items]
        elapsed_ms, details = 1000 * (time.monotonic() - started), {"source": source, "asked": kind}
        self._recorder.record([to_impression(response, item_ids, user, elapsed_ms, details)])


def to_details(ranked: RankedResponse, deployment: Deployment) -> dict[str, Any]:
    """What the entry of an impression says beside the items."""
    response, query, route, ranking = ranked
    details: dict[str, Any] = {"source": response.source}
    if ranking.decision is not None and query.variant is None:  # no policy learns from a preview
        details["decision"] = ranking.decision.to_body()
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
    return details
