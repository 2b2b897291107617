"""Records events, impressions and outcomes. The event store may be unavailable; no response waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from recray.config import ServeSettings
from recray.errors import PartUnavailableError, StateError, UnavailableError
from recray.events.log import Entry, Log
from recray.events.store import open_log
from recray.events.writer import Writer
from recray.serving.api import BaseResponse
from recray.serving.experiment import Experiment
from recray.serving.guard import KEY_NAME
from recray.serving.state import ServingState
from recray.storage import Storage

T = TypeVar("T")
RETRY_S = 1.0  # pause after a failure of the event store
READ_SHARE = 0.125  # timeout of a read, as a share of serve.timeout_s
MOST_RECORDED = 1000  # items of a response
MOST_REFUSED = 100_000  # users with a recorded refusal

_ids = random.Random(secrets.token_bytes(32))  # the system's random numbers are ten times slower


def make_id() -> str:
    """A random id of 128 bits."""
    return f"{_ids.getrandbits(128):032x}"


def to_impression(
    response: BaseResponse,
    item_ids: Sequence[Any],
    user: str | None,
    elapsed_ms: float,
    details: dict[str, Any],
) -> Entry:
    """The entry of a response; its outcomes refer to its id.

    details : further fields of the entry, `source` among them
    """
    body = {
        "items": list(item_ids[:MOST_RECORDED]),
        "source": details.pop("source"),
        "night": response.as_of,
        "bundle": response.bundle,
        "degraded": response.degraded,
        "ms": round(elapsed_ms, 3),
        **details,
    }
    return Entry("decision", response.request_id, user, time.time(), body)


class EventRecorder:
    """Records in an event store that may be unavailable: it is opened when possible, and paused after a
    failure.

    writer : None until the event store is open
    """

    def __init__(self, storage: Storage, options: ServeSettings) -> None:
        self._storage, self._options = storage, options
        self._logger = logging.getLogger("ray.serve")
        self._opening = threading.Lock()
        self._failed = False
        self._retry_at = 0.0
        self.writer: Writer | None = None
        self._open_log()

    @property
    def log(self) -> Log | None:
        """The event store, None until it is open."""
        return None if self.writer is None else self.writer.log

    @property
    def is_unavailable(self) -> bool:
        """Whether the last access to the event store failed."""
        return self.writer is None or self._failed

    async def read_recent_events(self, user: str, state: ServingState, limit: int) -> list[Entry]:
        """The last events of a user that are not in a run, at most `limit`.

        Raises PartUnavailableError; an unavailable store is not read until `reconnect` succeeds.
        """
        return await self._read(lambda writer: writer.recent, user, state, limit)

    async def read_recent_events_of(
        self, users: Sequence[str], state: ServingState, limit: int
    ) -> dict[str, list[Entry]]:
        """The same of many users at once, without the users who have none."""
        return await self._read(lambda writer: writer.recent_of, users, state, limit)

    async def _read(
        self,
        method: Callable[[Writer], Callable[..., Awaitable[T]]],
        whose: str | Sequence[str],
        state: ServingState,
        limit: int,
    ) -> T:
        if self.writer is None or self._failed:
            raise PartUnavailableError("state")
        collected = state.collected.get(self.writer.log.identity, 0)
        timeout_s = self._options.timeout_s * READ_SHARE
        try:
            return await method(self.writer)(whose, collected, state.begins_s, limit, timeout_s)
        except StateError as error:
            self._record_failure(error)
            raise PartUnavailableError("state") from error

    def record(self, entries: Sequence[Entry]) -> None:
        """Write entries in the background; nothing where the store is not open."""
        if self.writer is not None:
            self.writer.enqueue(entries)

    def record_refusal(self, user: str | None, experiment: Experiment | None) -> None:
        """Record that the champion's queue was full, once for each user of an experiment: its tests count
        users.
        """
        if experiment is None or experiment.shadow or user is None or user in experiment.refused_users:
            return
        if len(experiment.refused_users) >= MOST_REFUSED:
            experiment.refused_users.clear()
        experiment.refused_users.add(user)
        body = {
            "items": [],
            "asked": "refused",
            "degraded": [],
            **experiment.to_labels(user),
            "model_ms": 0.0,
            "refused": True,
        }
        self.record([Entry("decision", make_id(), user, time.time(), body)])

    def record_access(self, user: str | None, purpose: str) -> None:
        """Record in the background that a user's events are read, and with which API key."""
        if user is not None:
            self.record(
                [Entry("access", make_id(), user, time.time(), {"by": KEY_NAME.get(), "what": purpose})]
            )

    async def write(self, operation: Callable[[Writer], Any], timeout_s: float | None = None) -> Any:
        """The result of `operation` with the writer.

        timeout_s : None: `serve.timeout_s`

        Raises UnavailableError where the event store is unavailable, or does not respond in time.
        """
        timeout_s = timeout_s or self._options.timeout_s
        if self.writer is None and time.monotonic() >= self._retry_at:
            await asyncio.to_thread(self._open_log)
        if self.writer is None:
            raise UnavailableError("the event store is unavailable: nothing was kept", "retry later")
        error: StateError
        try:
            async with asyncio.timeout(timeout_s):
                return await operation(self.writer)
        except StateError as state_error:
            error = state_error
        except TimeoutError:
            error = StateError(f"it did not respond within {timeout_s:g} s")
        self._record_failure(error)
        raise UnavailableError(
            "the event store is unavailable: whether anything was kept is unknown",
            "retry later, with the same event_id or feedback_id",
        ) from error

    def reconnect(self) -> None:
        """Open the event store, or check whether it is available again."""
        if self.writer is None:
            self._open_log()
        elif self._failed:
            with contextlib.suppress(StateError):
                self.writer.log.last()
                self._failed = False

    def close(self) -> None:
        """Write the queue, then close the event store."""
        if self.writer is not None:
            self.writer.close()
            self.writer.log.close()

    def _record_failure(self, error: StateError) -> None:
        self._failed, self._retry_at = True, time.monotonic() + RETRY_S
        self._logger.error("the event store is unavailable: %s", error.message)

    def _open_log(self) -> None:
        with self._opening:
            if self.writer is not None:
                return
            try:
                log = open_log(self._options.state, self._storage.root, self._options.keep_days)
                self.writer, self._failed = Writer(log), False
            except StateError as error:
                self._record_failure(error)
