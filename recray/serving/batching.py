"""Micro-batching that waits for nobody: one thread runs the model on whatever questions wait when it gets free."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class BusyError(Exception):
    """More questions wait than may."""


@dataclass
class _Waiting(Generic[Q, A]):
    question: Q
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[A]


class Batcher(Generic[Q, A]):
    """Asks `run` with lists of questions, one list at a time, from one thread.

    A lone question is run at once; those that come while the thread is at work are run together afterwards. A batch that fails is
    asked again one by one, so that a question hurts nobody but itself.

    run : answers in the order of the questions
    most : questions of one batch
    waiting : questions that may wait; more raise BusyError
    on_batch : told the size of each batch
    """

    def __init__(
        self, run: Callable[[Sequence[Q]], Sequence[A]], most: int, waiting: int, on_batch: Callable[[int], None] = lambda size: None
    ) -> None:
        self._run, self._most, self._limit, self._on_batch = run, most, waiting, on_batch
        self._queue: deque[_Waiting[Q, A]] = deque()
        self._ready = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="recray-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many questions wait now."""
        return len(self._queue)

    async def ask(self, question: Q) -> A:
        """The answer to a question. Raises BusyError, and whatever `run` raises for it."""
        loop = asyncio.get_running_loop()
        one: _Waiting[Q, A] = _Waiting(question, loop, loop.create_future())
        with self._ready:
            if len(self._queue) >= self._limit:
                raise BusyError
            self._queue.append(one)
            self._ready.notify()
        return await one.done

    def close(self) -> None:
        """Answer what waits, then stop."""
        with self._ready:
            self._open = False
            self._ready.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._ready:
                while self._open and not self._queue:
                    self._ready.wait()
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._most))]
            if not batch:
                return
            batch = [one for one in batch if not one.done.cancelled()]  # nobody waits for those any more
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[_Waiting[Q, A]]) -> None:
        self._on_batch(len(batch))
        try:
            answers = self._run([one.question for one in batch])
        except Exception as error:
            if len(batch) == 1:
                failed = error  # `error` is gone when it is told
                _wake(batch, lambda one, _: one.done.set_exception(failed), [None])
                return
            for one in batch:
                self._answer([one])
            return
        _wake(batch, lambda one, answer: one.done.set_result(answer), answers)


def _wake(batch: list[_Waiting[Q, A]], tell: Callable[[_Waiting[Q, A], Any], None], answers: Sequence[Any]) -> None:
    """Tell those who wait, with one call an event loop."""

    def all_of(loop: asyncio.AbstractEventLoop) -> None:
        for one, answer in zip(batch, answers, strict=True):
            if one.loop is loop and not one.done.done():
                tell(one, answer)

    for loop in {one.loop for one in batch}:
        with contextlib.suppress(RuntimeError):  # a loop that was closed has nobody who waits
            loop.call_soon_threadsafe(all_of, loop)
