"""The log as an endpoint that must not wait for it sees it: opened when it can be, left alone for a while when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from recray.config import ServeSettings
from recray.errors import StateError, UnavailableError
from recray.state.log import Entry, Log, open_log
from recray.state.writer import Writer
from recray.storage import Storage

AWAY_S = 1.0  # how long a log that could not be opened is not tried again
READING = 0.125  # of the time that a request waits for the model, it waits for the log


class Journal:
    """A `Writer` that may be away.

    writer : None until the log could be opened
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
    def away(self) -> bool:
        """Whether the log did not answer when it was last asked."""
        return self.writer is None or self._failed

    async def recent(self, user: str, collected: dict[str, int], from_s: float, limit: int) -> list[Entry] | None:
        """As `Log.recent`, after what was collected of this log (a number by the identity of a log); None where the log is away: then it is
        not asked until `look` finds it back."""
        if self.writer is None or self._failed:
            return None
        try:
            return await self.writer.recent(user, collected.get(self.writer.log.identity, 0), from_s, limit, self._options.timeout_s * READING)
        except StateError as error:
            self._is_away(error)
            return None

    def later(self, entry: Entry) -> None:
        """As `Writer.later`; nothing where the log is away."""
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
        self._is_away(error)
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

    def _is_away(self, error: StateError) -> None:
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
                self._is_away(error)
