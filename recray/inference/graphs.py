"""Forward passes on a GPU as CUDA graphs: one launch replaces some hundred, for the batch sizes of requests.

A batch is padded to the next of a few sizes, which are captured before the first request. Shapes: B users,
T events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recray.model.controls import Controls
from recray.model.shape import Batch

EVENTS = 32  # histories are padded to a multiple of this
WARM_UP = 2  # passes before a capture, because what a library does at its first call cannot be captured
_CAPTURING = threading.Lock()  # one capture at a time in a process

Forward = Callable[[Batch, Controls | None], Tensor]
Size = tuple[int, int, tuple[bool, ...]]


class _CapturedGraph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch
    controls: Controls | None
    output: Tensor


class Graphs:
    """A forward pass of batches of one query a user, as `Network.hidden(masked=True)` reads them. The
    weights must stay where they are.

    forward : the pass to capture; it may not wait for the GPU
    like : a batch of one user, and the controls (or None) of one user for each set that requests may have
    users, history : largest batch and longest history
    """

    def __init__(
        self, forward: Forward, like: tuple[Batch, list[Controls | None]], users: int, history: int
    ) -> None:
        self._lock = threading.Lock()
        self._history = history
        self._captured: dict[Size, _CapturedGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        batch, variants = like
        with _CAPTURING, torch.cuda.device(batch.item_BT.device), torch.no_grad():
            for controls in variants:
                for size_B, size_T in list_sizes(users, history):
                    self._captured[size_B, size_T, _control_fields(controls)] = _capture(
                        forward, batch, controls, size_B, size_T, pool
                    )

    def __call__(self, batch: Batch, controls: Controls | None) -> Tensor | None:
        """Output of the forward pass for the users [B, ...], up to the rounding of another batch shape; None
        for a size that was not captured.
        """
        B, T = batch.item_BT.shape
        captured = self._captured.get((*padded_size(B, T, self._history), _control_fields(controls)))
        if captured is None:
            return None
        with self._lock, torch.cuda.device(batch.item_BT.device):
            fill(captured.batch, captured.controls, batch, controls)
            captured.graph.replay()
            return captured.output[:B].clone()


def padded_size(B: int, T: int, history: int) -> tuple[int, int]:
    """Users and events to which a batch [B, T] is padded."""
    return 1 << (B - 1).bit_length(), min(-(-T // EVENTS) * EVENTS, history)


def list_sizes(users: int, history: int) -> list[tuple[int, int]]:
    """All values of `padded_size` for batches up to these."""
    return sorted({padded_size(B, T, history) for B in range(1, users + 1) for T in range(1, history + 1)})


def allocate(
    batch: Batch, controls: Controls | None, users: int, events: int
) -> tuple[Batch, Controls | None]:
    """A batch of empty histories of this size and its controls, with the types of `batch` and `controls`.

    It has no day columns, which a forward pass of the histories does not read.
    """
    device = batch.item_BT.device
    histories = [torch.zeros(users, events, dtype=part.dtype, device=device) for part in batch[:5]]
    position, nothing = torch.zeros(users, dtype=torch.int64, device=device), torch.zeros(1, 1, device=device)
    context = torch.zeros(users, batch.context_NC.shape[1], dtype=torch.int64, device=device)
    padded = Batch._make(
        (
            *histories,
            torch.arange(users, device=device),
            position,
            nothing,
            nothing,
            torch.zeros_like(position),
            context,
            None,
        )
    )
    if controls is None:
        return padded, None
    return padded, Controls(
        *(None if part is None else torch.zeros(users, *part.shape[1:], device=device) for part in controls)
    )


def fill(padded: Batch, padded_controls: Controls | None, batch: Batch, controls: Controls | None) -> None:
    """Copy a batch [B, T] and its controls into larger ones. The rest stays empty histories, whose output
    is discarded.
    """
    B, T = batch.item_BT.shape
    for target, part in zip(padded[:5], batch[:5], strict=True):
        assert isinstance(target, Tensor) and isinstance(part, Tensor)
        target.zero_()
        target[:B, :T] = part
    padded.position_N.zero_()
    padded.position_N[:B] = batch.position_N
    padded.context_NC[:B] = batch.context_NC
    for padded_control, control in zip(padded_controls or (), controls or (), strict=True):
        if padded_control is not None and control is not None:
            padded_control[:B] = control


def _control_fields(controls: Controls | None) -> tuple[bool, ...]:
    """Which fields of the controls are set."""
    return tuple(part is not None for part in controls or ())


def _capture(
    forward: Forward, batch: Batch, controls: Controls | None, users: int, events: int, pool: Any
) -> _CapturedGraph:
    padded, padded_controls = allocate(batch, controls, users, events)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            forward(padded, padded_controls)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = forward(padded, padded_controls)
    return _CapturedGraph(graph, padded, padded_controls, output)
