"""What the endpoint records: events, impressions, outcomes. The event store may be unavailable, and no response waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from recray.config import ServeSettings
from recray.errors import PartUnavailableError, StateError, UnavailableError
from recray.serving.api import Answer
from recray.serving.experiment import Experiment
from recray.serving.guard import ASKED_BY
from recray.serving.state import ServingState
from recray.state.log import Entry, Log
from recray.state.store import open_log
from recray.state.writer import Writer
from recray.storage import Storage

AWAY_S = 1.0  # how long a log that could not be opened is not tried again
READING = 0.125  # of the time that a request waits for the model, it waits for the log
MOST_RECORDED = 1000  # items of a response
MOST_REFUSED = 100_000  # users whose refusal is recorded

_ids = random.Random(secrets.token_bytes(32))  # the system's own are ten times slower


def new_id() -> str:
    """128 random bits."""
    return f"{_ids.getrandbits(128):032x}"


class EventRecorder:
    """A `Writer` that may be unavailable: opened when it can be, left alone for a while when it fails.

    writer : None until the event store could be opened
    """

    def __init__(self, storage: Storage, options: ServeSettings) -> None:
        self._storage, self._options = storage, options
        self._said = logging.getLogger("ray.serve")
        self._opening = threading.Lock()
        self._failed = False
        self._away_until = 0.0
        self.writer: Writer | None = None
        self._open()

    @property
    def log(self) -> Log | None:
        """The log, None where it could not be opened yet."""
        return None if self.writer is None else self.writer.log

    @property
    def is_unavailable(self) -> bool:
        """Whether the event store did not respond when it was last asked."""
        return self.writer is None or self._failed

    async def recent_events(self, user: str, state: ServingState, limit: int) -> list[Entry]:
        """Events of a user, at most so many, that a run does not know.

        Raises PartUnavailableError where the store is unavailable: then it is not asked until `look` finds it back.
        """
        if self.writer is None or self._failed:
            raise PartUnavailableError("state")
        collected = state.collected.get(self.writer.log.identity, 0)
        try:
            return await self.writer.recent(user, collected, state.begins_s, limit, self._options.timeout_s * READING)
        except StateError as error:
            self._failed_with(error)
            raise PartUnavailableError("state") from error

    def record_impression(self, response: Answer, item_ids: Sequence[Any], user: str | None, elapsed_ms: float, more: dict[str, Any]) -> None:
        """Record a response, behind: what comes of it is reported by its id. more : what else is recorded of it"""
        body = {
            "items": list(item_ids[:MOST_RECORDED]),
            "source": more.pop("source"),
            "night": response.night,
            "bundle": response.bundle,
            "degraded": response.degraded,
            "ms": round(elapsed_ms, 3),
            **more,
        }
        self._later(Entry("decision", response.request_id, user, time.time(), body))

    def record_refusal(self, user: str | None, experiment: Experiment | None) -> None:
        """Record that the champion's queue was full, once for each user of an experiment: as many its tests count."""
        if experiment is None or experiment.shadow or user is None or user in experiment.refused:
            return
        if len(experiment.refused) >= MOST_REFUSED:
            experiment.refused.clear()
        experiment.refused.add(user)
        body = {"items": [], "asked": "refused", "degraded": [], **experiment.labels(user), "model_ms": 0.0, "refused": True}
        self._later(Entry("decision", new_id(), user, time.time(), body))

    def record_access(self, user: str | None, what: str) -> None:
        """Record that somebody reads what a user did, and with which key, behind."""
        if user is not None:
            self._later(Entry("access", new_id(), user, time.time(), {"by": ASKED_BY.get(), "what": what}))

    def _later(self, entry: Entry) -> None:
        """As `Writer.later`; nothing where the store is unavailable."""
        if self.writer is not None:
            self.writer.later(entry)

    async def keep(self, write: Callable[[Writer], Any], timeout_s: float | None = None) -> Any:
        """What `write` returns. Raises UnavailableError where the log is away, or takes longer (None: than `serve.timeout_s`)."""
        timeout_s = timeout_s or self._options.timeout_s
        if self.writer is None and time.monotonic() >= self._away_until:
            await asyncio.to_thread(self._open)
        if self.writer is None:
            raise UnavailableError("the log is away: nothing was kept", "come again")
        error: StateError
        try:
            async with asyncio.timeout(timeout_s):
                return await write(self.writer)
        except StateError as failed:
            error = failed
        except TimeoutError:
            error = StateError(f"it did not take anything within {timeout_s:g} s")
        self._failed_with(error)
        raise UnavailableError("the log is away: nothing is known to be kept", "come again, with the same event_id or feedback_id") from error

    def look(self) -> None:
        """Open a log that is away, or find out whether it is back."""
        if self.writer is None:
            self._open()
        elif self._failed:
            with contextlib.suppress(StateError):
                self.writer.log.last()
                self._failed = False

    def close(self) -> None:
        """Write what waits."""
        if self.writer is not None:
            self.writer.close()
            self.writer.log.close()

    def _failed_with(self, error: StateError) -> None:
        self._failed, self._away_until = True, time.monotonic() + AWAY_S
        self._said.error("the log is away: %s", error.what)

    def _open(self) -> None:
        with self._opening:
            if self.writer is not None:
                return
            try:
                log = open_log(self._options.state, self._storage.root, self._options.keep_days)
                self.writer, self._failed = Writer(log), False
            except StateError as error:
                self._failed_with(error)
