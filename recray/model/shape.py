"""The architecture of a network and the batches that it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRESETS: dict[str, dict[str, Any]] = {
    "ligr": {
        "attention": "softmax",
        "residual": "gated",
        "feed": "swiglu",
        "scores": "dot",
        "positions": True,
        "relative": False,
    },
    "sasrec": {
        "attention": "softmax",
        "residual": "plain",
        "feed": "relu",
        "scores": "dot",
        "positions": True,
        "relative": False,
    },
    "dp": {
        "attention": "softmax",
        "residual": "plain",
        "feed": "swiglu",
        "scores": "dot",
        "positions": True,
        "relative": False,
    },
    "hstu": {
        "attention": "pointwise",
        "residual": "plain",
        "feed": "none",
        "scores": "cosine",
        "positions": False,
        "relative": True,
    },
}
"""Architectures of the literature: LiGR (arXiv 2502.03417), SASRec (arXiv 1808.09781), HSTU (arXiv
2402.17152).
"""


@dataclass(frozen=True)
class Shape:
    """Architecture of a network. Together with the state dict it rebuilds the network.

    The fields are described in `ModelSettings`.
    """

    event_types: int
    dim: int = 64
    blocks: int = 2
    heads: int = 2
    history: int = 200
    dropout: float = 0.2
    attention: str = "softmax"
    residual: str = "gated"
    feed: str = "swiglu"
    scores: str = "dot"
    positions: bool = True
    relative: bool = False
    time_bias: bool = True
    values: bool = False
    repeat: bool = True
    repeat_by_item: bool = False
    prior: bool = True
    fresh: bool = False
    feature_buckets: int = 4096
    id_dropout: float = 0.0
    fixed_items: bool = False
    context: int = 0
    counts: bool = False
    cooccurrence: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Packing(NamedTuple):
    """Positions of the events of padded histories [B, T] in the packed row.

    source_P : int64, index of each position among the B · T events; 0 for padding
    row_P : int64, index of each position's user; -1 for padding
    first_B : int64, first position of each history
    block : int64 [P / BLOCK], first block that each block of positions attends to
    """

    source_P: Tensor
    row_P: Tensor
    first_B: Tensor
    block: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Packing:
        return Packing(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class Batch(NamedTuple):
    """Histories padded on the right with 0, and the queries into them.

    item_BT, event_BT : item indices and event types
    value_BT : as logged
    time_BT : seconds, or positions
    now_BT : time at which position t is queried
    user_N, position_N : of the queries
    prior_PV, fresh_PV : log(1 + recent count) and bucket of an item's age, by day; int64 [P] days while the
        candidate items are not drawn yet
    day_N : the queries' rows in them
    context_NC : codes of each request's context; 0 unknown
    packing : for a model that trains on packed histories; None for padded ones
    """

    item_BT: Tensor
    event_BT: Tensor
    value_BT: Tensor
    time_BT: Tensor
    now_BT: Tensor
    user_N: Tensor
    position_N: Tensor
    prior_PV: Tensor
    fresh_PV: Tensor
    day_N: Tensor
    context_NC: Tensor
    packing: Packing | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch._make(None if part is None else part.to(device, non_blocking=True) for part in self)
