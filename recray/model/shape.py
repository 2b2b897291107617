"""What a network consists of, and the batches that it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRESETS: dict[str, dict[str, Any]] = {
    "ligr": {"attention": "softmax", "residual": "gated", "feed": "swiglu", "scores": "dot", "positions": True, "relative": False},
    "sasrec": {"attention": "softmax", "residual": "plain", "feed": "relu", "scores": "dot", "positions": True, "relative": False},
    "dp": {"attention": "softmax", "residual": "plain", "feed": "swiglu", "scores": "dot", "positions": True, "relative": False},
    "hstu": {"attention": "pointwise", "residual": "plain", "feed": "none", "scores": "cosine", "positions": False, "relative": True},
}
"""Parts of the networks of the literature: LiGR (arXiv 2502.03417), SASRec (arXiv 1808.09781), HSTU (arXiv 2402.17152)."""


@dataclass(frozen=True)
class Shape:
    """What the network consists of; with the state dict it is all that rebuilds it. The parts are those of `ModelSettings`."""

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Packing(NamedTuple):
    """Where the events of padded histories [B, T] lie in the row.

    place_P int64: which of the B · T each position is, 0 for what fills the row; row_P int64: whose it is, -1 for that;
    first_B int64: where each history begins; block int64 [P / BLOCK]: the first block that each block of positions sees.
    """

    place_P: Tensor
    row_P: Tensor
    first_B: Tensor
    block: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Packing:
        return Packing(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class Batch(NamedTuple):
    """Histories padded on the right with 0, and the queries into them.

    item, event [B, T]; value [B, T] as logged; time [B, T] seconds (or positions); now [B, T] the moment at which position t
    is asked; user, position [N] of the queries; prior [P, V] log(1 + recent count) by day and
    fresh [P, V] the bucket of an item's age on it, or int64 [P] the days themselves as long as it is open which items compete; day [N]
    the queries' rows in them; context [N, C] codes of each request's context, 0 unknown; packing: where the events lie for a model that
    trains on all histories in one row, None for one that goes through them padded.
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
