"""The recommender: history and moment in, a score for every item out.

score(user, item) = hidden · item vector  +  how often and how recently the user met the item  +  recent popularity,

the last two optional. Hidden states come from causal attention over the history; each position may be asked what comes
next at a moment `now`. Shapes: B users, T events, N queries (user, position), V items and padding, D width, P days.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.model.attention import AGE_BUCKETS, age_bucket, causal_bias, control_bias
from recray.model.blocks import Block
from recray.model.controls import Controls
from recray.model.items import ItemEncoder, fuse


@dataclass(frozen=True)
class Shape:
    """What the network consists of; with the state dict it is all that rebuilds it."""

    event_types: int
    dim: int = 64
    blocks: int = 2
    heads: int = 2
    history: int = 200
    dropout: float = 0.2
    positions: bool = True
    time_bias: bool = True
    repeat: bool = True
    prior: bool = True
    feature_buckets: int = 4096

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Batch(NamedTuple):
    """Histories padded on the right with 0, and the queries into them.

    item, event [B, T]; time [B, T] seconds (or positions); now [B, T] the moment at which position t is asked;
    user, position [N] of the queries; prior [P, V] log(1 + recent count) by day; day [N] the queries' rows in it.
    """

    item_BT: Tensor
    event_BT: Tensor
    time_BT: Tensor
    now_BT: Tensor
    user_N: Tensor
    position_N: Tensor
    prior_PV: Tensor
    day_N: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Recommender(nn.Module):
    """See the module's docstring.

    Parameters
    ----------
    seen, features : as for `ItemEncoder`
    """

    def __init__(self, shape: Shape, seen: np.ndarray, features: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.dim
        self.items = ItemEncoder(seen, features, shape.feature_buckets, dim)
        self.events = nn.Embedding(shape.event_types, dim) if shape.event_types > 1 else None
        self.positions = nn.Embedding(shape.history, dim) if shape.positions else None
        self.gaps = nn.Embedding(AGE_BUCKETS, dim) if shape.time_bias else None
        for table in (self.events, self.positions, self.gaps):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(dim, shape.heads, shape.dropout, time_bias=shape.time_bias) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.repeat = RepeatTerm(dim, shape.event_types, has_time=shape.time_bias) if shape.repeat else None
        self.prior_scale = nn.Parameter(torch.tensor(0.5)) if shape.prior else None

    def hidden(self, batch: Batch, table_VD: Tensor, parts_MVD: Tensor, controls: Controls | None = None, *, masked: bool = False) -> Tensor:
        """Hidden states of the queries [N, D].

        `masked` asks for the explicit mask even where causal order is all there is; inference always does.
        """
        item_BT = batch.item_BT
        x = self._embed(batch, table_VD, parts_MVD, controls)
        T = item_BT.shape[1]
        bias = age = None
        if self.shape.time_bias or masked or controls is not None:
            bias = causal_bias(T, x)
            age_s = batch.now_BT[:, :, None] - batch.time_BT[:, None, :]
            if self.shape.time_bias:
                age = age_bucket(age_s)
            if controls is not None:
                bias = bias + control_bias(controls, batch.event_BT, self._recency(age_s, T))
            bias = bias.expand(item_BT.shape[0], self.shape.heads, T, T)
        for block in self.blocks:
            x = block(x, bias, age, controls)
        found: Tensor = self.norm(x[batch.user_N, batch.position_N])
        return found

    def scores(self, hidden_ND: Tensor, table_VD: Tensor, batch: Batch, queries: slice = slice(None)) -> Tensor:
        """Scores of all items for some of the batch's queries [N, V]; padding gets -inf."""
        padding_V = torch.zeros(len(table_VD), dtype=hidden_ND.dtype, device=hidden_ND.device)
        padding_V[0] = -math.inf
        scores = torch.addmm(padding_V, hidden_ND, table_VD.mT)
        if self.repeat is not None:
            scores = scores + self.repeat(hidden_ND, batch, queries, len(table_VD))
        if self.prior_scale is not None:
            scores = scores + self.prior_scale * batch.prior_PV[batch.day_N[queries]]
        return scores

    def _embed(self, batch: Batch, table_VD: Tensor, parts_MVD: Tensor, controls: Controls | None) -> Tensor:
        if controls is None:
            x = F.embedding(batch.item_BT, table_VD)
        else:
            weights = torch.exp(controls.log_modality_weight)
            x = fuse(torch.stack([part[batch.item_BT] * weights[:, m, None, None] for m, part in enumerate(parts_MVD)]))
        x = x * math.sqrt(self.shape.dim)
        if self.events is not None:
            x = x + self.events(batch.event_BT)
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        if self.gaps is not None:
            x = x + self.gaps(age_bucket(batch.now_BT - batch.time_BT))
        found: Tensor = self.dropout(x)
        return found

    def _recency(self, age_s: Tensor, T: int) -> Tensor:
        """-log(1 + age) [B or 1, T, T], age in days, or in events where no time is known."""
        if self.shape.time_bias:
            return -torch.log1p(age_s.clamp(min=0).float() / 86_400.0)
        where = torch.arange(T, device=age_s.device)
        return -torch.log1p((where[:, None] - where[None, :]).clamp(min=0).float())[None]


class RepeatTerm(nn.Module):
    """Score of items that are in the history: gate(hidden) · log(1 + Σ over the item's events of exp(age + event weight))."""

    def __init__(self, dim: int, event_types: int, *, has_time: bool) -> None:
        super().__init__()
        self.has_time = has_time
        self.age = nn.Embedding(AGE_BUCKETS, 1)
        self.event = nn.Embedding(event_types, 1)
        self.gate = nn.Linear(dim, 1)
        for parameter in (self.age.weight, self.event.weight, self.gate.weight):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.gate.bias)

    def forward(self, hidden_ND: Tensor, batch: Batch, queries: slice, n_items: int) -> Tensor:
        """Dense scores [N, V]."""
        user_N, position_N = batch.user_N[queries], batch.position_N[queries]
        item_NT = batch.item_BT[user_N]
        where_T = torch.arange(item_NT.shape[1], device=item_NT.device)
        if self.has_time:
            age_NT = age_bucket(batch.now_BT[user_N, position_N][:, None] - batch.time_BT[user_N])
        else:
            age_NT = (2.0 * torch.log2(1.0 + (position_N[:, None] - where_T).clamp(min=0).float())).long().clamp(max=AGE_BUCKETS - 1)
        weight_NT = torch.exp(self.age(age_NT) + self.event(batch.event_BT[user_N])).squeeze(-1)
        weight_NT = weight_NT * (where_T <= position_N[:, None])
        mass_NV = torch.zeros(len(item_NT), n_items, dtype=hidden_ND.dtype, device=hidden_ND.device)
        mass_NV = mass_NV.scatter_add(1, item_NT, weight_NT.to(hidden_ND.dtype))
        return F.softplus(self.gate(hidden_ND)) * torch.log1p(mass_NV)
