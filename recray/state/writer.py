"""Between the endpoint's event loop and the log: writers wait together for one commit, decisions are written behind.

A decision is queued and acknowledged at once; it is on disk before any outcome that this process acknowledges, since all that waits
goes into the log in the order in which it came.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from recray.errors import StateError
from recray.state.log import RECENT, Entry, Kind, Log

BEHIND_S = 0.1  # how long a decision may wait for others
BEHIND = 10_000  # decisions that may wait; more are dropped, and counted
AT_ONCE = 2000  # entries of one commit, roughly
ELSEWHERE_S = 0.3  # how long an outcome waits for a decision that another replica may still hold
QUICK = 20  # events that are read at once, without another thread, where the store is quick
READERS = 4  # threads that read; more wait for them
PATIENT = 4  # outcomes that wait so at once; who makes up request ids must not make others wait


class Writer:
    """Async face of a `Log`; one thread writes.

    lost : decisions that could not be written, so far
    set_aside : outcomes whose decision nobody knew, so far
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.lost = 0
        self.set_aside = 0
        self._waiting: queue.Queue[tuple[list[Entry], Future[list[int]] | None] | None] = queue.Queue()
        self._behind = 0
        self._patient = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="recray-state")
        self._thread = threading.Thread(target=self._write, name="recray-log", daemon=True)
        self._thread.start()

    async def append(self, entries: Sequence[Entry]) -> list[int]:
        """As `Log.append`. Raises StateError: then nothing was written."""
        done: Future[list[int]] = Future()
        self._waiting.put((list(entries), done))
        return await asyncio.shield(asyncio.wrap_future(done))  # who is gone must not take the others with them

    def later(self, entry: Entry) -> None:
        """Write an entry behind. Never waits, never raises."""
        if self._behind >= BEHIND:
            self.lost += 1
            return
        self._behind += 1
        self._waiting.put(([entry], None))

    async def recent(self, user: str, after: int, from_s: float, limit: int = RECENT, timeout_s: float | None = None) -> list[Entry]:
        """As `Log.recent`. Many events are read aside, so that nobody else waits. Raises StateError, also where that takes too long."""
        if self.log.quick:
            entries = self.log.recent(user, after, from_s, min(limit, QUICK + 1))
            if len(entries) <= min(limit - 1, QUICK) or limit <= QUICK + 1:
                return entries
        reading = asyncio.get_running_loop().run_in_executor(self._readers, self.log.recent, user, after, from_s, limit)
        try:
            return await asyncio.wait_for(reading, timeout_s)
        except TimeoutError:
            raise StateError(f"it did not answer within {timeout_s:g} s") from None

    async def outcome(self, entry: Entry, decision: str) -> tuple[bool, bool]:
        """Write an outcome after its decision, or set it aside where nobody knows the decision yet (`collect` looks once more).

        Returns whether it was new, and whether the decision is known. Raises StateError.
        """
        await self.append([])  # what waits here is written now
        patient = self._patient < PATIENT
        deadline = time.monotonic() + (ELSEWHERE_S if patient else 0.0)
        self._patient += patient
        try:
            while not (known := await asyncio.to_thread(self.log.has, "decision", decision)) and time.monotonic() < deadline:
                await asyncio.sleep(BEHIND_S / 2)
        finally:
            self._patient -= patient
        kind: Kind = "outcome" if known else "set_aside"
        kept = (await self.append([replace(entry, kind=kind)]))[0] > 0
        self.set_aside += kept and not known
        return kept, known

    def close(self) -> None:
        """Write what waits, then stop."""
        self._waiting.put(None)
        self._thread.join()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _write(self) -> None:
        more = True
        while more:
            taken = [self._waiting.get()]
            until = time.monotonic() + BEHIND_S
            while sum(len(one[0]) for one in taken if one) < AT_ONCE and taken[-1] is not None:
                patient = all(one is not None and one[1] is None for one in taken)  # decisions alone wait for others
                try:
                    taken.append(self._waiting.get(timeout=max(until - time.monotonic(), 0)) if patient else self._waiting.get_nowait())
                except queue.Empty:
                    break
            more = taken[-1] is not None
            self._commit([one for one in taken if one is not None])

    def _commit(self, taken: list[tuple[list[Entry], Future[list[int]] | None]]) -> None:
        entries = [entry for some, _ in taken for entry in some]
        behind = sum(done is None for _, done in taken)
        try:
            numbers = self.log.append(entries) if entries else []
        except Exception as error:  # whatever it is, those who wait must hear of it and this thread must live on
            self.lost += behind
            failed = error if isinstance(error, StateError) else StateError(f"the log takes nothing: {type(error).__name__}")
            failed.__cause__ = error  # what else it says may name a user
            if behind:
                logging.getLogger("recray").warning("%d decisions could not be logged: %s", behind, failed.what)
            for _, done in taken:
                if done is not None and not done.done():
                    done.set_exception(failed)
            return
        finally:
            self._behind -= behind
        start = 0
        for some, done in taken:
            if done is not None and not done.done():
                done.set_result(numbers[start : start + len(some)])
            start += len(some)
