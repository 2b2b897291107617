"""Full softmax cross-entropy in blocks of queries, so that [queries x items] never exists at once.

Shapes: N queries, V items and padding, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recray.model.recommender import Batch, Recommender


class Targets(NamedTuple):
    """What the queries should have answered: query i has the items item[offsets[i]:offsets[i + 1]], equal shares each time one occurs."""

    offsets: Tensor
    item: Tensor


def backward_in_blocks(
    model: Recommender, hidden_ND: Tensor, table_VD: Tensor, batch: Batch, targets: Targets, scale: float, block: int = 256
) -> Tensor:
    """Cross-entropy summed over the queries, times `scale`, with gradients left in every `.grad`; returns the sum itself.

    The loss of a query is the mean over its target items of -log softmax(scores)[item]. Each block runs forward and
    backward down to the hidden states and the item table; one last backward goes through the network.
    """
    hidden, table = hidden_ND.detach().requires_grad_(), table_VD.detach().requires_grad_()
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), block):
        queries = slice(start, min(start + block, len(hidden)))
        loss = _cross_entropy(model.scores(hidden[queries], table, batch, queries), targets, queries)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (hidden, table)]
    torch.autograd.backward([hidden_ND, table_VD], gradients)
    return total


def _cross_entropy(scores_NV: Tensor, targets: Targets, queries: slice) -> Tensor:
    offsets = targets.offsets[queries.start : queries.stop + 1]
    item = targets.item[offsets[0] : offsets[-1]]
    count = offsets.diff()
    if len(item) == len(scores_NV):
        return F.cross_entropy(scores_NV, item, reduction="sum")
    wanted = torch.zeros_like(scores_NV)
    row = torch.repeat_interleave(torch.arange(len(count), device=item.device), count)
    wanted.index_put_((row, item), (1.0 / count.to(wanted.dtype))[row], accumulate=True)
    return -(wanted * F.log_softmax(scores_NV.clamp(min=-1e9), -1)).sum()
