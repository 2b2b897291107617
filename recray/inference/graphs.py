"""Forward passes on a GPU as CUDA graphs: one launch for what takes some hundred, in the sizes that requests come in.

A batch is filled up to the next of a few sizes, which are recorded before the first request comes. Shapes: B users, T events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recray.model.controls import Controls
from recray.model.shape import Batch

EVENTS = 32  # histories are filled up to a multiple of it
WARM_UP = 2  # passes before a recording: what a library does at its first call cannot be recorded
_RECORDING = threading.Lock()  # one at a time in a process

Forward = Callable[[Batch, Controls | None], Tensor]
Size = tuple[int, int, tuple[bool, ...]]


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch
    controls: Controls | None
    found: Tensor


class Graphs:
    """A forward pass of batches of one query a user, as `Recommender.hidden(masked=True)` reads them; weights stay where they are.

    forward : what is recorded; it may not wait for the GPU
    like : a batch of one user, and for each set of controls that requests may have those of one user, or None
    users, history : largest batch and longest history
    """

    def __init__(self, forward: Forward, like: tuple[Batch, list[Controls | None]], users: int, history: int) -> None:
        self._lock = threading.Lock()
        self._history = history
        self._recorded: dict[Size, _Recorded] = {}
        pool = torch.cuda.graph_pool_handle()
        batch, turned = like
        with _RECORDING, torch.cuda.device(batch.item_BT.device), torch.no_grad():
            for controls in turned:
                for size_B, size_T in sizes(users, history):
                    self._recorded[size_B, size_T, _given(controls)] = _record(forward, batch, controls, size_B, size_T, pool)

    def __call__(self, batch: Batch, controls: Controls | None) -> Tensor | None:
        """What the forward pass finds for the users [B, ...], to the rounding of another batch shape; None for a size that is not recorded."""
        B, T = batch.item_BT.shape
        recorded = self._recorded.get((*size(B, T, self._history), _given(controls)))
        if recorded is None:
            return None
        with self._lock, torch.cuda.device(batch.item_BT.device):
            fill(recorded.batch, recorded.controls, batch, controls)
            recorded.graph.replay()
            return recorded.found[:B].clone()


def size(B: int, T: int, history: int) -> tuple[int, int]:
    """Users and events that a batch [B, T] is filled up to."""
    return 1 << (B - 1).bit_length(), min(-(-T // EVENTS) * EVENTS, history)


def sizes(users: int, history: int) -> list[tuple[int, int]]:
    """All that `size` may say of batches up to these."""
    return sorted({size(B, T, history) for B in range(1, users + 1) for T in range(1, history + 1)})


def room(batch: Batch, controls: Controls | None, users: int, events: int) -> tuple[Batch, Controls | None]:
    """A batch of empty histories of a size and its controls, of the types of others; without what is known of days, which a forward pass
    of the histories does not read."""
    device = batch.item_BT.device
    histories = [torch.zeros(users, events, dtype=part.dtype, device=device) for part in batch[:5]]
    place, nothing = torch.zeros(users, dtype=torch.int64, device=device), torch.zeros(1, 1, device=device)
    context = torch.zeros(users, batch.context_NC.shape[1], dtype=torch.int64, device=device)
    mine = Batch._make((*histories, torch.arange(users, device=device), place, nothing, nothing, torch.zeros_like(place), context, None))
    if controls is None:
        return mine, None
    return mine, Controls(*(None if part is None else torch.zeros(users, *part.shape[1:], device=device) for part in controls))


def fill(mine: Batch, turned: Controls | None, batch: Batch, controls: Controls | None) -> None:
    """Put a batch [B, T] and its controls where there is room for as many. What is left are empty histories; nobody reads what is found for them."""
    B, T = batch.item_BT.shape
    for to, part in zip(mine[:5], batch[:5], strict=True):
        assert isinstance(to, Tensor) and isinstance(part, Tensor)
        to.zero_()
        to[:B, :T] = part
    mine.position_N.zero_()
    mine.position_N[:B] = batch.position_N
    mine.context_NC[:B] = batch.context_NC
    for into, given in zip(turned or (), controls or (), strict=True):
        if into is not None and given is not None:
            into[:B] = given


def _given(controls: Controls | None) -> tuple[bool, ...]:
    return tuple(part is not None for part in controls or ())


def _record(forward: Forward, batch: Batch, controls: Controls | None, users: int, events: int, pool: Any) -> _Recorded:
    mine, turned = room(batch, controls, users, events)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            forward(mine, turned)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        found = forward(mine, turned)
    return _Recorded(graph, mine, turned, found)
