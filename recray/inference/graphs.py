"""Forward passes on a GPU as CUDA graphs: one launch for what takes some hundred, in the sizes that requests come in.

A batch is filled up to the next of a few sizes, each captured when it is first met. Shapes: B users, T events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recray.model.controls import Controls
from recray.model.recommender import Batch

USERS = 64  # of a batch, at most: larger ones keep a GPU busy as they are
EVENTS = 32  # histories are filled up to a multiple of it
WARM_UP = 2  # passes before a capture: what a library does at its first call cannot be captured

Forward = Callable[[Batch, Controls | None], Tensor]
Size = tuple[int, int, tuple[bool, ...]]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch
    controls: Controls | None
    found: Tensor


class Graphs:
    """`forward` of batches of one query a user, as `Recommender.hidden(masked=True)` reads them; weights stay where they are.

    history : longest history, which sizes do not exceed
    """

    def __init__(self, forward: Forward, history: int) -> None:
        self.forward, self.history = forward, history
        self._captured: dict[Size, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()

    def __call__(self, batch: Batch, controls: Controls | None) -> Tensor:
        """What `forward` finds for the users [B, ...]; the same to the rounding of another batch shape."""
        B, T = batch.item_BT.shape
        users, events = size(B, T, self.history)
        given = tuple(part is not None for part in controls or ())
        with self._lock, torch.cuda.device(batch.item_BT.device):
            captured = self._captured.get((users, events, given))
            if captured is None:
                captured = self._captured[users, events, given] = self._capture(batch, controls, users, events)
            _fill(captured, batch, controls)
            captured.graph.replay()
            return captured.found[:B].clone()

    def _capture(self, batch: Batch, controls: Controls | None, users: int, events: int) -> _Captured:
        device = batch.item_BT.device

        def room(like: Tensor, *shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=like.dtype, device=device)

        histories = [room(part, users, events) for part in batch[:5]]
        position = torch.zeros(users, dtype=torch.int64, device=device)
        context = room(batch.context_NC, users, batch.context_NC.shape[1])
        rest = (torch.arange(users, device=device), position, batch.prior_PV, batch.fresh_PV, position, context, None)
        mine = Batch._make((*histories, *rest))
        turned = None if controls is None else Controls(*(None if part is None else room(part, users, *part.shape[1:]) for part in controls))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.forward(mine, turned)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = self.forward(mine, turned)
        return _Captured(graph, mine, turned, found)


def size(B: int, T: int, history: int) -> tuple[int, int]:
    """Users and events that a batch [B, T] is filled up to."""
    return 1 << (B - 1).bit_length(), min(-(-T // EVENTS) * EVENTS, history)


def _fill(captured: _Captured, batch: Batch, controls: Controls | None) -> None:
    """Histories that fill the size up are empty; their events are padding, and nobody reads what is found for them."""
    B, T = batch.item_BT.shape
    for mine, theirs in zip(captured.batch[:5], batch[:5], strict=True):
        mine.zero_()
        mine[:B, :T] = theirs
    captured.batch.position_N.zero_()
    captured.batch.position_N[:B] = batch.position_N
    captured.batch.context_NC[:B] = batch.context_NC
    for turned, asked in zip(captured.controls or (), controls or (), strict=True):
        if turned is not None and asked is not None:
            turned[:B] = asked
