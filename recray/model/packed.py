"""Histories one after the other in one row, which is how a GPU trains: only the end of the row is padded, and nothing is as large
as all pairs of positions.

Softmax attention alone: mask and biases are compiled into its kernel (FlexAttention, Dong et al., arXiv 2412.05496), and with it the
blocks around it. Shapes: B users, T events, P positions of the row, H heads, D width, C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from recray.model.shape import Packing, Shape

NARROWEST = 16  # head that the kernel takes
BLOCK = 128  # positions of the row that the kernel takes or leaves together


class Row(NamedTuple):
    """What packed attention sees beside the states: `mask`, and for each position its time and the moment it is asked [P] in seconds, its
    event type [P] and the inverse of its heads' temperatures [P, H]; None where the model has none."""

    mask: BlockMask
    time_P: Tensor | None
    now_P: Tensor | None
    event_P: Tensor | None
    cooling_PH: Tensor | None


def packs(shape: Shape) -> bool:
    """Whether the kernel can do what a network asks for: softmax attention, and heads of at least 16."""
    return shape.attention == "softmax" and shape.dim // shape.heads >= NARROWEST


def pack(item_BT: Tensor, positions: int) -> Packing:
    """The packing of histories padded on the right with 0, in a row of `positions`, or a multiple of it where they need more.

    positions : a multiple of BLOCK; what is compiled is compiled for each length of the row
    """
    B, T = item_BT.shape
    length = (item_BT > 0).sum(1)
    row = torch.repeat_interleave(torch.arange(B), length)
    first = length.cumsum(0) - length
    place = torch.arange(len(row)) - first[row] + row * T
    fill = -len(row) % positions if len(row) else positions
    begins = torch.cat([first[row], torch.arange(len(row), len(row) + fill)])
    return Packing(nn.functional.pad(place, (0, fill)), nn.functional.pad(row, (0, fill), value=-1), first, begins[::BLOCK] // BLOCK)


def mask_of(packing: Packing) -> BlockMask:
    """Each position sees those of its own history up to itself."""
    row_P, blocks = packing.row_P, len(packing.block)
    own = torch.arange(blocks, device=row_P.device)
    seen = (packing.block[:, None] + own).clamp(max=blocks - 1)

    def causal(batch: Tensor, head: Tensor, asked: Tensor, event: Tensor) -> Tensor:
        return (row_P[asked] == row_P[event]) & (asked >= event)

    count = own - packing.block + 1
    return BlockMask.from_kv_blocks(count[None, None].int(), seen[None, None].int(), BLOCK_SIZE=BLOCK, mask_mod=causal)


Logit = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logit, batch, head, asked position, attended position) -> the logit with its biases"""


def attend(q: Tensor, k: Tensor, v: Tensor, row: Row, logit: Logit | None) -> Tensor:
    """Softmax attention within each history: [1, H, P, C]."""
    found = flex_attention(q, k, v, score_mod=logit, block_mask=row.mask)
    assert isinstance(found, Tensor)
    return found


def through(blocks: nn.ModuleList, x_PD: Tensor, row: Row) -> Tensor:
    """What the blocks make of the row: [P, D]. Compiled on a GPU, at the first use of a length."""
    run = _compiled() if x_PD.is_cuda else _through
    return run(blocks, x_PD, *row)


def _through(
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
    return torch.compile(_through, dynamic=False)
