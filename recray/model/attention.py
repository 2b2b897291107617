"""Causal multi-head attention over a history: biases by age, distance and event type, and run-time controls.

There are two kinds.
- `softmax` (Vaswani et al., arXiv 1706.03762): the weights of a position sum to one. A temperature divides
  the logits, so the weights become the trained ones to the power 1 / temperature, normalised.
- `pointwise` (HSTU, arXiv 2402.17152): the weights are SiLU(logits) / history. Their sum is free, which keeps
  intensity. A temperature divides the logits before the SiLU, so it scales the total attention.

Histories are padded on the right, so real positions need only a causal mask. A CPU splits the query positions
into ranges. Each range attends only to the events that precede it: this skips up to half of the pairs of a
long history, and a range fits the cache.

Shapes: B users, T events, Q query positions of a range, K events that it may attend to, H heads, D width, C
width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.model.controls import Controls
from recray.model.fused import Columns, Linear
from recray.model.packed import Row, attend

AGE_BUCKETS = 32
RANGE_SIZE = 64  # query positions that a CPU attends from at once
NORM_EPS = 1e-6


def age_bucket(age_s: Tensor) -> Tensor:
    """Bucket of an age in seconds: half powers of two of hours, int64 in [0, AGE_BUCKETS)."""
    hours = age_s / 3600.0
    return hours.relu_().add_(1.0).log2_().mul_(2.0).clamp_max_(AGE_BUCKETS - 1).long()


class QueryRange(NamedTuple):
    """Query positions that are attended from together, and their inputs over the first K events.

    position_Q : int64 [Q] or [B, Q]
    age_BQK : int64, bucket of the attended event's age at the query; None where times are unknown
    bias_BHQK : causal mask and biases of the controls, added to the logits
    """

    position_Q: Tensor
    age_BQK: Tensor | None
    bias_BHQK: Tensor


class AttentionInputs(NamedTuple):
    """Inputs of attention over a batch beside the states.

    event_BT : int64, event types; None where there is only one
    ranges : the query positions in order; empty where all positions are queried with a causal mask alone
    """

    event_BT: Tensor | None
    ranges: tuple[QueryRange, ...]


def split_positions(T: int, device: torch.device) -> tuple[Tensor, ...]:
    """All positions of T events, int64 [Q] for each query range."""
    return torch.split(torch.arange(T, device=device), RANGE_SIZE if device.type == "cpu" else T)


class Attention(nn.Module):
    """Causal attention with learned biases.

    Parameters
    ----------
    kind : softmax or pointwise
    relative : adds a bias by distance, up to `history`
    time_bias : adds a bias by age
    event_types : number of types; above 1 adds a bias by the attended event's type
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kind: str,
        history: int,
        relative: bool,
        time_bias: bool,
        event_types: int,
    ) -> None:
        super().__init__()
        self.heads, self.kind, self.history = heads, kind, history
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.gate = Linear(dim, dim, bias=False) if kind == "pointwise" else None
        self.out = Linear(dim, dim, bias=False)
        self.age_bias = Columns(AGE_BUCKETS, heads) if time_bias else None
        self.distance_bias = nn.Embedding(history, heads) if relative else None
        self.event_bias = nn.Embedding(event_types, heads) if event_types > 1 else None
        for table in (self.age_bias, self.distance_bias, self.event_bias):
            if table is not None:
                nn.init.zeros_(table.weight)

    def forward(
        self,
        x_BTD: Tensor,
        inputs: AttentionInputs | Row,
        controls: Controls | None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Attend from all positions [B, T, D], or from one position per user, int64 [B]: [B, 1, D].

        A `Row` already holds the controls. Its batch size is 1: all histories of a step are concatenated.
        """
        B, T, D = x_BTD.shape
        if position is None:
            projected = self.qkv(x_BTD)
            q, k, v = projected.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
            own_BQD = x_BTD
        else:
            own_BQD = x_BTD[torch.arange(B, device=x_BTD.device), position][:, None]
            q = F.linear(own_BQD, self.qkv.weight[:D]).view(B, 1, self.heads, -1).transpose(1, 2)
            k, v = F.linear(x_BTD, self.qkv.weight[D:]).view(B, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        bfloat16_on_cpu = k.dtype == torch.bfloat16 and k.device.type == "cpu"
        if bfloat16_on_cpu:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if self.kind == "pointwise":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        cooling = None
        if controls is not None and controls.log_temperature is not None:
            cooling = torch.exp(-controls.log_temperature)[:, :, None, None]
        if cooling is not None:
            q = q * cooling
        if isinstance(inputs, Row):
            mixed = self._packed(q, k, v, inputs)
        elif inputs.ranges:
            attend_range = (
                self._pointwise
                if self.kind == "pointwise"
                else _bfloat16_softmax
                if bfloat16_on_cpu
                else F.scaled_dot_product_attention
            )
            queries_and_biases = zip(_split_queries(q, inputs), self._biases(inputs, cooling), strict=True)
            outputs = [
                attend_range(range_q, k[:, :, : bias.shape[3]], v[:, :, : bias.shape[3]], bias)
                for range_q, bias in queries_and_biases
            ]
            mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed_BQD = mixed.transpose(1, 2).reshape(own_BQD.shape)
        if self.gate is not None:
            mixed_BQD = F.rms_norm(mixed_BQD, (D,), eps=NORM_EPS) * F.silu(self.gate(own_BQD))
        result: Tensor = self.out(mixed_BQD)
        return result

    def weights(self, x_BTD: Tensor, inputs: AttentionInputs, position: Tensor | None = None) -> Tensor:
        """Attention weights without controls [B, T or 1, T]: means over the heads, each row sums to one.

        position : int64 [B], one query position per user; None: all positions
        """
        B, T, D = x_BTD.shape
        own = x_BTD if position is None else x_BTD[torch.arange(B, device=x_BTD.device), position][:, None]
        q = F.linear(own, self.qkv.weight[:D]).view(B, own.shape[1], self.heads, -1).transpose(1, 2)
        k = F.linear(x_BTD, self.qkv.weight[D : 2 * D]).view(B, T, self.heads, -1).transpose(1, 2)
        rows = []
        for range_q, bias in zip(_split_queries(q, inputs), self._biases(inputs, None), strict=True):
            range_k = k[:, :, : bias.shape[3]]
            if self.kind == "softmax":
                weights = (range_q @ range_k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
            else:
                mask = torch.isinf(bias)
                logits = F.silu(range_q) @ F.silu(range_k).mT / math.sqrt(q.shape[-1])
                weights = F.silu(logits + bias.masked_fill(mask, 0.0)).masked_fill(mask, 0.0).abs()
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
            rows.append(F.pad(weights.mean(1), (0, T - bias.shape[3])))
        return torch.cat(rows, 1)

    def _biases(self, inputs: AttentionInputs, cooling: Tensor | None) -> Iterator[Tensor]:
        """Per query range all that is added to the logits [B or 1, H or 1, Q, K].

        The temperature also divides the learned part.
        """
        by_event = None  # one lookup for all ranges: DP-SGD counts the lookups of a table
        if self.event_bias is not None and inputs.event_BT is not None:
            by_event = self.event_bias(inputs.event_BT).transpose(1, 2)[:, :, None]
        for position_Q, age_BQK, bias in inputs.ranges:
            K = bias.shape[3]
            learned: Tensor | None = None
            if self.age_bias is not None and age_BQK is not None:
                learned = self.age_bias(age_BQK).transpose(0, 1)
            if self.distance_bias is not None:
                distance = position_Q[..., None] - torch.arange(K, device=position_Q.device)
                by_distance = self.distance_bias(distance.clamp(0, self.history - 1)).movedim(-1, -3)
                learned = by_distance if learned is None else learned + by_distance
            if by_event is not None:
                learned = by_event[..., :K] if learned is None else learned + by_event[..., :K]
            if learned is not None and cooling is not None:
                learned = learned * cooling
            yield bias if learned is None else bias + learned

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        age, distance, event = (
            None if table is None else table.weight
            for table in (self.age_bias, self.distance_bias, self.event_bias)
        )
        _, time_P, now_P, event_P, cooling_PH = row
        history = self.history
        if cooling_PH is not None:
            q = (q * cooling_PH.mT[:, :, None]).to(k.dtype)

        def logit(
            logit_value: Tensor, batch: Tensor, head: Tensor, query: Tensor, attended: Tensor
        ) -> Tensor:
            learned: Tensor | None = None
            if age is not None and now_P is not None and time_P is not None:
                learned = age[age_bucket(now_P[query] - time_P[attended]), head]
            if distance is not None:
                by_distance = distance[(query - attended).clamp(0, history - 1), head]
                learned = by_distance if learned is None else learned + by_distance
            if event is not None and event_P is not None:
                by_event = event[event_P[attended], head]
                learned = by_event if learned is None else learned + by_event
            if learned is None:
                return logit_value
            return logit_value + (learned if cooling_PH is None else learned * cooling_PH[query, head])

        return attend(q, k, v, row, None if age is None and distance is None and event is None else logit)

    def _pointwise(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.isinf(bias)
        weights = F.silu(logits + bias.masked_fill(mask, 0.0)).masked_fill(mask, 0.0)
        return (weights / self.history) @ v


def _bfloat16_softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention in bfloat16, for inference only.

    On a CPU it is faster than torch's kernel, which gains nothing from bfloat16.
    """
    with torch.autocast("cpu", enabled=False):
        logits = (q / math.sqrt(q.shape[-1])).to(k.dtype) @ k.mT
        return (logits.add_(bias.to(k.dtype)).softmax(-1)) @ v


def _split_queries(q: Tensor, inputs: AttentionInputs) -> tuple[Tensor, ...]:
    """Split queries [B, H, all query positions, C] by query range."""
    return torch.split(q, [query_range.position_Q.shape[-1] for query_range in inputs.ranges], 2)


def causal_bias(position_Q: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [1 or B, 1, Q, K]: 0 up to the query position [Q] or [B, Q], -inf after it."""
    after = torch.arange(K, device=position_Q.device) > position_Q[..., None]
    bias = torch.zeros(after.shape, dtype=dtype, device=after.device).masked_fill(after, -math.inf)
    return bias[None, None] if bias.dim() == 2 else bias[:, None]


def control_bias(controls: Controls, event_BK: Tensor, recency_BQK: Tensor) -> Tensor | None:
    """Additive bias of the controls [B, 1, Q, K], by event type and recency of the attended event.

    None where the controls have neither.
    """
    bias: Tensor | None = None
    if controls.event_bias is not None:
        bias = torch.gather(controls.event_bias, 1, event_BK)[:, None, :]
    if controls.recency_slope is not None:
        by_recency = controls.recency_slope[:, None, None] * recency_BQK
        bias = by_recency if bias is None else bias + by_recency
    return None if bias is None else bias[:, None]
