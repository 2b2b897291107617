"""Sequence packing for training on a GPU: histories are concatenated in one row, padded only at its end.

No tensor is as large as all pairs of positions. Only softmax attention can be packed: mask and biases are
compiled into its kernel (FlexAttention, Dong et al., arXiv 2412.05496), together with the blocks around it.
Shapes: B users, T events, P positions of the row, H heads, D width, C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from recray.model.shape import Packing, Shape

NARROWEST = 16  # smallest head width of the kernel
BLOCK = 128  # positions of the row that the kernel masks together


class Row(NamedTuple):
    """Inputs of packed attention beside the states; None where the model does not use them.

    mask : block mask of the histories
    time_P, now_P : seconds, time of each position's event and time of its query
    event_P : event type of each position
    cooling_PH : inverse temperature of each position's heads
    """

    mask: BlockMask
    time_P: Tensor | None
    now_P: Tensor | None
    event_P: Tensor | None
    cooling_PH: Tensor | None


def is_packable(shape: Shape) -> bool:
    """Whether the kernel supports a network: it needs softmax attention and heads of width 16 or more."""
    return shape.attention == "softmax" and shape.dim // shape.heads >= NARROWEST


def pack(item_BT: Tensor, positions: int) -> Packing:
    """Pack histories that are padded on the right with 0 in a row of a multiple of `positions`.

    positions : a multiple of BLOCK; each row length is compiled once
    """
    B, T = item_BT.shape
    length = (item_BT > 0).sum(1)
    row = torch.repeat_interleave(torch.arange(B), length)
    first = length.cumsum(0) - length
    source = torch.arange(len(row)) - first[row] + row * T
    fill = -len(row) % positions if len(row) else positions
    begins = torch.cat([first[row], torch.arange(len(row), len(row) + fill)])
    return Packing(
        nn.functional.pad(source, (0, fill)),
        nn.functional.pad(row, (0, fill), value=-1),
        first,
        begins[::BLOCK] // BLOCK,
    )


def build_mask(packing: Packing) -> BlockMask:
    """Causal mask: each position attends to its own history up to itself."""
    row_P, blocks = packing.row_P, len(packing.block)
    own = torch.arange(blocks, device=row_P.device)
    attended = (packing.block[:, None] + own).clamp(max=blocks - 1)

    def causal(batch: Tensor, head: Tensor, query: Tensor, event: Tensor) -> Tensor:
        return (row_P[query] == row_P[event]) & (query >= event)

    count = own - packing.block + 1
    return BlockMask.from_kv_blocks(
        count[None, None].int(), attended[None, None].int(), BLOCK_SIZE=BLOCK, mask_mod=causal
    )


Logit = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logit, batch, head, query position, attended position) -> the logit with its biases"""


def attend(q: Tensor, k: Tensor, v: Tensor, row: Row, logit: Logit | None) -> Tensor:
    """Softmax attention within each history: [1, H, P, C]."""
    output = flex_attention(q, k, v, score_mod=logit, block_mask=row.mask)
    assert isinstance(output, Tensor)
    return output


def run_blocks(blocks: nn.ModuleList, x_PD: Tensor, row: Row) -> Tensor:
    """Output of the blocks [P, D]. A GPU compiles them at the first use of a row length."""
    run_row = _compiled() if x_PD.is_cuda else _run_blocks
    return run_row(blocks, x_PD, *row)


def _run_blocks(
    blocks: nn.ModuleList,
    x_PD: Tensor,
    mask: BlockMask,
    time_P: Tensor | None,
    now_P: Tensor | None,
    event_P: Tensor | None,
    cooling_PH: Tensor | None,
) -> Tensor:
    row, x = Row(mask, time_P, now_P, event_P, cooling_PH), x_PD[None]
    for block in blocks:
        x = block(x, row, None)
    return x[0]


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_run_blocks, dynamic=False)
