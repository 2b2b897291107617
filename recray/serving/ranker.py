"""Ranks by the sources of a route in turn. The model runs in batches; the challenger has its own queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from opentelemetry.trace import Tracer

from recray.config import ServeSettings
from recray.errors import PartUnavailableError, RequestError, UnavailableError
from recray.serving.api import Part
from recray.serving.batching import Batcher, BusyError
from recray.serving.modulation import Decision
from recray.serving.query import Query
from recray.serving.ranking import ModelInput, RankedItems, bind_query, rank_inputs
from recray.serving.sources import (
    RankingSource,
    Route,
    look_up_complete_list,
    look_up_list,
    rank_by_popularity,
)
from recray.serving.state import ServingState
from recray.serving.telemetry import Telemetry
from recray.serving.traces import QUIET


@dataclass(frozen=True)
class Ranking:
    """The result of a route's sources.

    state : the state that ranked, the challenger's or the champion's
    model_input : input of the model that ranked, None without one
    unavailable : parts that did not respond
    model_ms : duration of the model, None where it did not run
    was_refused : whether the model's queue was full
    """

    ranked: RankedItems
    state: ServingState
    model_input: ModelInput | None = None
    unavailable: tuple[Part, ...] = ()
    model_ms: float | None = None
    was_refused: bool = False

    @property
    def decision(self) -> Decision | None:
        """The decision of policy or exploration for the model that ranked."""
        return None if self.model_input is None else self.model_input.modulation.decision

    def to_measurements(self) -> dict[str, float]:
        """Duration and refusal of the model, as an experiment reads them."""
        if self.model_ms is None:
            return {}
        return {"model_ms": self.model_ms} | ({"refused": True} if self.was_refused else {})


class Ranker:
    """The models of one replica. Only its own users wait for a challenger."""

    def __init__(self, options: ServeSettings, telemetry: Telemetry, tracer: Tracer) -> None:
        self._options, self._telemetry, self._tracer = options, telemetry, tracer
        self._log = logging.getLogger("ray.serve")
        self._champion_queue, self._challenger_queue = self._make_queue(), self._make_queue()

    def _make_queue(self) -> Batcher[ModelInput, RankedItems]:
        return Batcher(
            rank_inputs,
            self._options.max_batch,
            self._options.max_waiting,
            lambda size: self._telemetry.batches.append(size),
        )

    @property
    def waiting(self) -> int:
        """Number of queries that wait for a model."""
        return self._champion_queue.waiting + self._challenger_queue.waiting

    @property
    def has_challenger_backlog(self) -> bool:
        """Whether queries wait for the challenger."""
        return bool(self._challenger_queue.waiting)

    def close(self) -> None:
        """Run the queued queries, then stop."""
        self._champion_queue.close()
        self._challenger_queue.close()

    async def rank(self, query: Query, route: Route, champion: ServingState) -> Ranking:
        """Rank by the first source of a route that succeeds; sources without a model are the champion's.

        Raises RequestError, and UnavailableError where the model's queue is full and no complete list
        exists.
        """
        busy: UnavailableError | None = None
        model_ms, unavailable, model_input = None, dict[Part, None](), None
        for source in route.sources:
            if busy is not None and source is not RankingSource.COMPLETE_LIST:
                break
            try:
                if source is RankingSource.MODEL:
                    model_input = bind_query(query, route.state, route.exploration)
                    started = time.monotonic()
                    try:
                        ranked = await self.run_model(model_input, is_challengers=route.is_challengers)
                    finally:
                        model_ms = round(1000 * (time.monotonic() - started), 3)
                    return Ranking(ranked, route.state, model_input, tuple(unavailable), model_ms)
                listed = rank_without_model(source, query, champion)
                if listed is not None:
                    return Ranking(listed, champion, None, tuple(unavailable), model_ms, busy is not None)
            except PartUnavailableError as error:
                unavailable[error.part] = None
            except UnavailableError as error:
                busy, model_ms = error, 0.0
        assert busy is not None, "popularity ranks for everybody"
        raise busy

    def look_up(self, query: Query, route: Route, champion: ServingState) -> Ranking | None:
        """The ranking of a route's first source, where that needs no model and succeeds. Raises
        RequestError.
        """
        if route.sources[0] is RankingSource.MODEL:
            return None
        with contextlib.suppress(PartUnavailableError):  # `rank` names it
            listed = rank_without_model(route.sources[0], query, champion)
            return None if listed is None else Ranking(listed, champion)
        return None

    async def run_model(self, model_input: ModelInput, *, is_challengers: bool = False) -> RankedItems:
        """The model's ranking. Raises PartUnavailableError where the model fails or times out, RequestError,
        and UnavailableError where its queue is full.
        """
        queue = self._challenger_queue if is_challengers else self._champion_queue
        try:
            with self._tracer.start_as_current_span("recray.model", **QUIET):
                async with asyncio.timeout(self._options.timeout_s):
                    return await queue.submit(model_input)
        except BusyError:
            self._telemetry.refused["challenger" if is_challengers else "busy"] += 1
            if is_challengers:  # the champion responds instead
                raise PartUnavailableError("model") from None
            raise UnavailableError(
                f"{self._options.max_waiting} requests wait for the model", "retry later"
            ) from None
        except RequestError:
            raise
        except Exception as error:
            self._log.error("the model does not respond: %s", type(error).__name__)
            self._log.debug("the model does not respond", exc_info=error)  # the traceback may name a user
            raise PartUnavailableError("model") from error


def rank_without_model(source: RankingSource, query: Query, state: ServingState) -> RankedItems | None:
    """Items of a list or of the popularity fallback; None where the list is not complete. Raises
    PartUnavailableError, RequestError.
    """
    if source is RankingSource.COMPLETE_LIST:
        return look_up_complete_list(query, state)
    rank = look_up_list if source is RankingSource.LIST else rank_by_popularity
    return rank(query.without_model(), state)
