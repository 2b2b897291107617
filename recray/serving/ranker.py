"""Asks the sources of a route in turn; the model in batches, the challenger's in a queue of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Tracer

from recray.config import ServeSettings
from recray.errors import PartUnavailableError, RequestError, UnavailableError
from recray.serving.api import Part
from recray.serving.batching import Batcher, BusyError
from recray.serving.modulation import Decision
from recray.serving.query import Query
from recray.serving.ranking import ModelInput, RankedItems, bind, rank_inputs
from recray.serving.sources import RankingSource, Route, look_up_complete_list, look_up_list, rank_by_popularity
from recray.serving.state import ServingState
from recray.serving.telemetry import Telemetry
from recray.serving.traces import QUIET


@dataclass(frozen=True)
class Ranking:
    """What the sources of a route came to.

    state : whose items they are, the challenger's or the champion's
    model_input : of the model that ranked them, None where none did
    unavailable : parts that did not respond
    model_ms : how long a model took, None where none was asked
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
        """What the policy decided, or was explored, for the model that ranked."""
        return None if self.model_input is None else self.model_input.modulation.decision

    def measured(self) -> dict[str, Any]:
        """How the model did, as an experiment reads it."""
        if self.model_ms is None:
            return {}
        return {"model_ms": self.model_ms} | ({"refused": True} if self.was_refused else {})


class Ranker:
    """The models behind one replica. A challenger makes nobody wait for it but its own users."""

    def __init__(self, options: ServeSettings, telemetry: Telemetry, tracer: Tracer) -> None:
        self._options, self._telemetry, self._tracer = options, telemetry, tracer
        self._log = logging.getLogger("ray.serve")
        self._champion_queue, self._challenger_queue = self._new_queue(), self._new_queue()

    def _new_queue(self) -> Batcher[ModelInput, RankedItems]:
        return Batcher(rank_inputs, self._options.max_batch, self._options.max_waiting, lambda size: self._telemetry.batches.append(size))

    @property
    def waiting(self) -> int:
        """How many queries wait for a model."""
        return self._champion_queue.waiting + self._challenger_queue.waiting

    @property
    def challenger_is_behind(self) -> bool:
        """Whether queries wait for the challenger."""
        return bool(self._challenger_queue.waiting)

    def close(self) -> None:
        """Respond to what waits."""
        self._champion_queue.close()
        self._challenger_queue.close()

    async def rank(self, query: Query, route: Route, champion: ServingState) -> Ranking:
        """Ask the sources of a route in turn; those that need no model are the champion's.

        Raises RequestError, UnavailableError where too many wait for the model and no complete list stands in.
        """
        busy: UnavailableError | None = None
        model_ms, unavailable, model_input = None, dict[Part, None](), None
        for source in route.sources:
            if busy is not None and source is not RankingSource.COMPLETE_LIST:
                break
            try:
                if source is RankingSource.MODEL:
                    model_input = bind(query, route.state, route.exploration)
                    started = time.monotonic()
                    try:
                        ranked = await self.ask(model_input, is_challengers=route.is_challengers)
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

    async def ask(self, model_input: ModelInput, *, is_challengers: bool = False) -> RankedItems:
        """What the model says. Raises PartUnavailableError where it fails or takes too long, RequestError, UnavailableError where too many wait."""
        try:
            with self._tracer.start_as_current_span("recray.model", **QUIET):
                async with asyncio.timeout(self._options.timeout_s):
                    return await (self._challenger_queue if is_challengers else self._champion_queue).ask(model_input)
        except BusyError:
            self._telemetry.refused["challenger" if is_challengers else "busy"] += 1
            if is_challengers:  # one that is behind is not waited for: the champion responds
                raise PartUnavailableError("model") from None
            raise UnavailableError(f"{self._options.max_waiting} requests wait for the model", "come again") from None
        except RequestError:
            raise
        except Exception as error:
            self._log.error("the model does not answer: %s", type(error).__name__)
            self._log.debug("the model does not answer", exc_info=error)  # what it says may name a user
            raise PartUnavailableError("model") from error


def rank_without_model(source: RankingSource, query: Query, state: ServingState) -> RankedItems | None:
    """What a list or popularity says, None where the list lacks something. Raises PartUnavailableError, RequestError."""
    if source is RankingSource.COMPLETE_LIST:
        return look_up_complete_list(query, state)
    return (look_up_list if source is RankingSource.LIST else rank_by_popularity)(query.without_model(), state)
