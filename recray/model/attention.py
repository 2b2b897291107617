"""Causal multi-head attention over a history, with biases by age, distance and event type, and the run-time controls.

Two kinds. `softmax` (Vaswani et al., arXiv 1706.03762): weights of a position sum to one; a temperature divides the logits,
so the weights become the trained ones to the power 1 / temperature, normalised. `pointwise` (HSTU, arXiv 2402.17152): weights
are SiLU(logits) / history and sum to anything, so that intensity is kept; a temperature divides the logits before the SiLU,
so it scales how strongly anything is attended at all.

Histories are padded on the right, so a causal mask is all that real positions need. A CPU goes through the asked positions in runs, each
over the events that causal order leaves it: of a long history up to half of all pairs are never looked at, and what a run needs stays
in the cache. Shapes: B users, T events, Q asked positions of a run, K the events it may see, H heads, D width, C width of a head.
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
RUN = 64  # positions that are asked together
NORM_EPS = 1e-6


def age_bucket(age_s: Tensor) -> Tensor:
    """Bucket of an age in seconds: half powers of two of hours, int64 in [0, AGE_BUCKETS)."""
    hours = age_s / 3600.0
    return hours.relu_().add_(1.0).log2_().mul_(2.0).clamp_max_(AGE_BUCKETS - 1).long()


class Run(NamedTuple):
    """Positions that are asked together, and what they see of the first K events.

    position_Q int64 [Q] or [B, Q]; age_BQK int64: bucket of the attended event's age when it is asked, or None where no time is known;
    bias_BHQK: the causal mask and the controls' biases, added to the logits.
    """

    position_Q: Tensor
    age_BQK: Tensor | None
    bias_BHQK: Tensor


class Seen(NamedTuple):
    """What attention sees of a batch beside the states: event_BT int64, event types, or None where there is one, and the asked positions in
    runs, in their order; none where all are asked and causal order is all there is."""

    event_BT: Tensor | None
    runs: tuple[Run, ...]


def runs(T: int, device: torch.device) -> tuple[Tensor, ...]:
    """All positions of T events int64 [Q], as they are asked together."""
    return torch.split(torch.arange(T, device=device), RUN if device.type == "cpu" else T)


class Attention(nn.Module):
    """Parameters: `kind` softmax or pointwise, `relative` a bias by distance up to `history`, `time_bias` one by age,
    `event_types` one by the attended event's type (1: none)."""

    def __init__(self, dim: int, heads: int, *, kind: str, history: int, relative: bool, time_bias: bool, event_types: int) -> None:
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

    def forward(self, x_BTD: Tensor, seen: Seen | Row, controls: Controls | None, asked: Tensor | None = None) -> Tensor:
        """Attend from all positions [B, T, D], or from one a user, `asked` int64 [B]: [B, 1, D].

        A `Row` says what the controls say, and its batch is one: all histories of a step, one after the other.
        """
        B, T, D = x_BTD.shape
        if asked is None:
            projected = self.qkv(x_BTD)
            q, k, v = projected.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
            own_BQD = x_BTD
        else:
            own_BQD = x_BTD[torch.arange(B, device=x_BTD.device), asked][:, None]
            q = F.linear(own_BQD, self.qkv.weight[:D]).view(B, 1, self.heads, -1).transpose(1, 2)
            k, v = F.linear(x_BTD, self.qkv.weight[D:]).view(B, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        halved = k.dtype == torch.bfloat16 and k.device.type == "cpu"
        if halved:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if self.kind == "pointwise":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        cooling = None
        if controls is not None and controls.log_temperature is not None:
            cooling = torch.exp(-controls.log_temperature)[:, :, None, None]
        if cooling is not None:
            q = q * cooling
        if isinstance(seen, Row):
            mixed = self._packed(q, k, v, seen)
        elif seen.runs:
            mix = self._pointwise if self.kind == "pointwise" else _halved if halved else F.scaled_dot_product_attention
            asked_with = zip(_by_run(q, seen), self._biases(seen, cooling), strict=True)
            each = [mix(some_q, k[:, :, : bias.shape[3]], v[:, :, : bias.shape[3]], bias) for some_q, bias in asked_with]
            mixed = each[0] if len(each) == 1 else torch.cat(each, 2)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed_BQD = mixed.transpose(1, 2).reshape(own_BQD.shape)
        if self.gate is not None:
            mixed_BQD = F.rms_norm(mixed_BQD, (D,), eps=NORM_EPS) * F.silu(self.gate(own_BQD))
        found: Tensor = self.out(mixed_BQD)
        return found

    def weights(self, x_BTD: Tensor, seen: Seen, asked: Tensor | None = None) -> Tensor:
        """How much each position, or one a user, `asked` int64 [B], attends to each event, without controls: [B, T or 1, T], means over
        the heads, each row's sum one."""
        B, T, D = x_BTD.shape
        own = x_BTD if asked is None else x_BTD[torch.arange(B, device=x_BTD.device), asked][:, None]
        q = F.linear(own, self.qkv.weight[:D]).view(B, own.shape[1], self.heads, -1).transpose(1, 2)
        k = F.linear(x_BTD, self.qkv.weight[D : 2 * D]).view(B, T, self.heads, -1).transpose(1, 2)
        rows = []
        for asked_q, bias in zip(_by_run(q, seen), self._biases(seen, None), strict=True):
            seen_k = k[:, :, : bias.shape[3]]
            found: Tensor
            if self.kind == "softmax":
                found = (asked_q @ seen_k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
            else:
                mask = torch.isinf(bias)
                logits = F.silu(asked_q) @ F.silu(seen_k).mT / math.sqrt(q.shape[-1])
                found = F.silu(logits + bias.masked_fill(mask, 0.0)).masked_fill(mask, 0.0).abs()
                found = found / found.sum(-1, keepdim=True).clamp(min=1e-9)
            rows.append(F.pad(found.mean(1), (0, T - bias.shape[3])))
        return torch.cat(rows, 1)

    def _biases(self, seen: Seen, cooling: Tensor | None) -> Iterator[Tensor]:
        """For each run everything that is added to the logits [B or 1, H or 1, Q, K]; the learned part shares the temperature."""
        by_event = None  # looked up once: a step of differential privacy counts how often a table is
        if self.event_bias is not None and seen.event_BT is not None:
            by_event = self.event_bias(seen.event_BT).transpose(1, 2)[:, :, None]
        for position_Q, age_BQK, bias in seen.runs:
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
        age, distance, event = (None if table is None else table.weight for table in (self.age_bias, self.distance_bias, self.event_bias))
        _, time_P, now_P, event_P, cooling_PH = row
        history = self.history
        if cooling_PH is not None:
            q = (q * cooling_PH.mT[:, :, None]).to(k.dtype)

        def logit(found: Tensor, batch: Tensor, head: Tensor, asked: Tensor, attended: Tensor) -> Tensor:
            learned: Tensor | None = None
            if age is not None and now_P is not None and time_P is not None:
                learned = age[age_bucket(now_P[asked] - time_P[attended]), head]
            if distance is not None:
                by_distance = distance[(asked - attended).clamp(0, history - 1), head]
                learned = by_distance if learned is None else learned + by_distance
            if event is not None and event_P is not None:
                by_event = event[event_P[attended], head]
                learned = by_event if learned is None else learned + by_event
            if learned is None:
                return found
            return found + (learned if cooling_PH is None else learned * cooling_PH[asked, head])

        return attend(q, k, v, row, None if age is None and distance is None and event is None else logit)

    def _pointwise(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.isinf(bias)
        weights = F.silu(logits + bias.masked_fill(mask, 0.0)).masked_fill(mask, 0.0)
        return (weights / self.history) @ v


def _halved(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention in bfloat16, for answers alone; on a CPU faster than torch's kernel, which goes no faster for half the bits."""
    with torch.autocast("cpu", enabled=False):
        logits = (q / math.sqrt(q.shape[-1])).to(k.dtype) @ k.mT
        return (logits.add_(bias.to(k.dtype)).softmax(-1)) @ v


def _by_run(q: Tensor, seen: Seen) -> tuple[Tensor, ...]:
    """Queries [B, H, all positions that are asked, C] of each run."""
    return torch.split(q, [run.position_Q.shape[-1] for run in seen.runs], 2)


def causal_bias(position_Q: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [1 or B, 1, Q, K]: 0 up to the asked position [Q] or [B, Q], -inf after it."""
    after = torch.arange(K, device=position_Q.device) > position_Q[..., None]
    bias = torch.zeros(after.shape, dtype=dtype, device=after.device).masked_fill(after, -math.inf)
    return bias[None, None] if bias.dim() == 2 else bias[:, None]


def control_bias(controls: Controls, event_BK: Tensor, recency_BQK: Tensor) -> Tensor | None:
    """Additive bias of the controls [B, 1, Q, K], event type and recency of the attended event; None if there is none."""
    found: Tensor | None = None
    if controls.event_bias is not None:
        found = torch.gather(controls.event_bias, 1, event_BK)[:, None, :]
    if controls.recency_slope is not None:
        by_recency = controls.recency_slope[:, None, None] * recency_BQK
        found = by_recency if found is None else found + by_recency
    return None if found is None else found[:, None]
