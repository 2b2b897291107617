"""Micro-batching without a delay: when one thread gets free, it runs the model on all queries that wait."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Q = TypeVar("Q")  # query
R = TypeVar("R")  # result


class BusyError(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Ticket:
    """A request's place in a queue, for all its queries: while one of them is queued, it takes one place.

    admitted_by : queues in which it had a place; these do not refuse it any more
    """

    admitted_by: set[int] = field(default_factory=set)


TICKET: ContextVar[Ticket | None] = ContextVar("TICKET", default=None)
"""Of a request with many queries; None for one with a single query."""


@dataclass
class _QueuedQuery(Generic[Q, R]):
    query: Q
    loop: asyncio.AbstractEventLoop
    result: asyncio.Future[R]
    ticket: Ticket


class Batcher(Generic[Q, R]):
    """Calls `run` with batches of queries, one batch at a time, from one thread.

    A single query runs at once. Queries that arrive while the thread is busy run together afterwards. The
    queries of a batch that fails are run one by one, so that an invalid query affects no other.

    run : returns results in the order of the queries
    max_batch : maximum number of queries in a batch
    max_waiting : maximum number of requests with a queued query; more raise BusyError
    on_batch : called with the size of each batch
    """

    def __init__(
        self,
        run: Callable[[Sequence[Q]], Sequence[R]],
        max_batch: int,
        max_waiting: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._on_batch = run, on_batch
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._queue: deque[_QueuedQuery[Q, R]] = deque()
        self._tickets = Counter[Ticket]()  # queued queries of each request
        self._ready = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run_batches, name="recray-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests with a queued query."""
        return len(self._tickets)

    async def submit(self, query: Q) -> R:
        """The result of a query. Raises BusyError, and the errors of `run`."""
        loop, ticket = asyncio.get_running_loop(), TICKET.get() or Ticket()
        queued: _QueuedQuery[Q, R] = _QueuedQuery(query, loop, loop.create_future(), ticket)
        with self._ready:
            if id(self) not in ticket.admitted_by and len(self._tickets) >= self._max_waiting:
                raise BusyError
            self._queue.append(queued)
            self._tickets[ticket] += 1
            ticket.admitted_by.add(id(self))
            self._ready.notify()
        return await queued.result

    def close(self) -> None:
        """Run the queued queries, then stop."""
        with self._ready:
            self._open = False
            self._ready.notify()
        self._thread.join()

    def _run_batches(self) -> None:
        while True:
            with self._ready:
                while self._open and not self._queue:
                    self._ready.wait()
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
                self._tickets -= Counter(queued.ticket for queued in batch)
            if not batch:
                return
            batch = [queued for queued in batch if not queued.result.cancelled()]
            if batch:
                self._run_batch(batch)

    def _run_batch(self, batch: list[_QueuedQuery[Q, R]]) -> None:
        self._on_batch(len(batch))
        try:
            results = self._run([queued.query for queued in batch])
        except Exception as error:
            if len(batch) == 1:
                failure = error  # `error` is unbound when the loop calls
                _deliver(batch, lambda queued, _: queued.result.set_exception(failure), [None])
                return
            for queued in batch:
                self._run_batch([queued])
            return
        _deliver(batch, lambda queued, result: queued.result.set_result(result), results)


def _deliver(
    batch: list[_QueuedQuery[Q, R]],
    set_result: Callable[[_QueuedQuery[Q, R], Any], None],
    results: Sequence[Any],
) -> None:
    """Set the results of a batch, with one call per event loop."""

    def set_results(loop: asyncio.AbstractEventLoop) -> None:
        for queued, result in zip(batch, results, strict=True):
            if queued.loop is loop and not queued.result.done():
                set_result(queued, result)

    for loop in {queued.loop for queued in batch}:
        with contextlib.suppress(RuntimeError):  # a loop that was closed
            loop.call_soon_threadsafe(set_results, loop)
