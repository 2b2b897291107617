"""Between the endpoint's event loop and the event store: requests share commits, impressions are written in
the background.

An impression is queued and acknowledged at once. It is on disk before any outcome that this process
acknowledges, since the queue is written in order.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from recray.errors import StateError
from recray.events.log import MAX_RECENT, Entry, Kind, Log

T = TypeVar("T")
COMMIT_WAIT_S = 0.1  # how long a queued impression may wait for others
MAX_QUEUED = 10_000  # queued impressions; more are dropped and counted
COMMIT_ENTRIES = 2000  # entries of one commit, approximately
DECISION_WAIT_S = 0.3  # how long an outcome waits for an impression that another replica may still queue
INLINE_EVENTS = 20  # events that are read in the event loop if the store is fast
READERS = 4  # threads that read
MAX_WAITING_OUTCOMES = 4  # at once: made-up request ids must not delay other requests


class Writer:
    """Async interface of a `Log`; one thread writes.

    lost : impressions that could not be written so far
    set_aside : outcomes without a known impression so far
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.lost = 0
        self.set_aside = 0
        self._queue: queue.Queue[tuple[list[Entry], Future[list[int]] | None] | None] = queue.Queue()
        self._queued = 0
        self._waiting_outcomes = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="recray-state")
        self._thread = threading.Thread(target=self._write, name="recray-log", daemon=True)
        self._thread.start()

    async def append(self, entries: Sequence[Entry]) -> list[int]:
        """As `Log.append`. Raises StateError: then nothing was written."""
        done: Future[list[int]] = Future()
        self._queue.put((list(entries), done))
        return await asyncio.shield(asyncio.wrap_future(done))  # a cancelled request must not cancel others

    def enqueue(self, entries: Sequence[Entry]) -> None:
        """Write entries in the background. Never waits, never raises."""
        if self._queued >= MAX_QUEUED:
            self.lost += len(entries)
            return
        self._queued += len(entries)
        self._queue.put((list(entries), None))

    async def recent(
        self, user: str, after: int, from_s: float, limit: int = MAX_RECENT, timeout_s: float | None = None
    ) -> list[Entry]:
        """As `Log.recent`. Many events are read in another thread, so that no other request waits. Raises
        StateError, also after `timeout_s`.
        """
        if self.log.is_fast:
            entries = self.log.recent(user, after, from_s, min(limit, INLINE_EVENTS + 1))
            if len(entries) <= min(limit - 1, INLINE_EVENTS) or limit <= INLINE_EVENTS + 1:
                return entries
        return await self._read(timeout_s, self.log.recent, user, after, from_s, limit)

    async def recent_of(
        self, users: Sequence[str], after: int, from_s: float, limit: int, timeout_s: float | None = None
    ) -> dict[str, list[Entry]]:
        """As `Log.recent_of`, in another thread. Raises StateError, also after `timeout_s`."""
        return await self._read(timeout_s, self.log.recent_of, users, after, from_s, limit)

    async def _read(self, timeout_s: float | None, read: Callable[..., T], *arguments: Any) -> T:
        reading = asyncio.get_running_loop().run_in_executor(self._readers, read, *arguments)
        try:
            return await asyncio.wait_for(reading, timeout_s)
        except TimeoutError:
            raise StateError(f"the event store did not respond within {timeout_s:g} s") from None

    async def append_outcomes(self, entries: Sequence[Entry], decision: str) -> tuple[int, bool]:
        """Write outcomes after their impression, or set them aside if the impression is unknown so far
        (`collect` checks again).

        Returns how many outcomes were new, and whether the impression is known. Raises StateError.
        """
        await self.append([])  # writes the queue
        may_wait = self._waiting_outcomes < MAX_WAITING_OUTCOMES
        deadline = time.monotonic() + (DECISION_WAIT_S if may_wait else 0.0)
        self._waiting_outcomes += may_wait
        try:
            while (
                not (is_known := await asyncio.to_thread(self.log.has, "decision", decision))
                and time.monotonic() < deadline
            ):
                await asyncio.sleep(COMMIT_WAIT_S / 2)
        finally:
            self._waiting_outcomes -= may_wait
        kind: Kind = "outcome" if is_known else "set_aside"
        numbers = await self.append([replace(entry, kind=kind) for entry in entries])
        new = sum(number > 0 for number in numbers)
        self.set_aside += 0 if is_known else new
        return new, is_known

    def close(self) -> None:
        """Write the queue, then stop."""
        self._queue.put(None)
        self._thread.join()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _write(self) -> None:
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            deadline = time.monotonic() + COMMIT_WAIT_S
            while sum(len(item[0]) for item in batch if item) < COMMIT_ENTRIES and batch[-1] is not None:
                # only impressions wait for more entries
                may_wait = all(item is not None and item[1] is None for item in batch)
                try:
                    batch.append(
                        self._queue.get(timeout=max(deadline - time.monotonic(), 0))
                        if may_wait
                        else self._queue.get_nowait()
                    )
                except queue.Empty:
                    break
            is_open = batch[-1] is not None
            self._commit([item for item in batch if item is not None])

    def _commit(self, batch: list[tuple[list[Entry], Future[list[int]] | None]]) -> None:
        entries = [entry for item_entries, _ in batch for entry in item_entries]
        impressions = sum(len(item_entries) for item_entries, done in batch if done is None)
        try:
            numbers = self.log.append(entries) if entries else []
        except Exception as error:  # whatever it is: waiting callers must get it, and this thread goes on
            self.lost += impressions
            state_error = (
                error
                if isinstance(error, StateError)
                else StateError(f"the event store cannot be written: {type(error).__name__}")
            )
            state_error.__cause__ = error  # its text may name a user
            if impressions:
                logging.getLogger("recray").warning(
                    "%d impressions could not be recorded: %s", impressions, state_error.message
                )
            for _, done in batch:
                if done is not None and not done.done():
                    done.set_exception(state_error)
            return
        finally:
            self._queued -= impressions

        start = 0
        for item_entries, done in batch:
            if done is not None and not done.done():
                done.set_result(numbers[start : start + len(item_entries)])
            start += len(item_entries)
