"""Causal multi-head attention over a history, with biases by age and the run-time controls.

Histories are padded on the right, so a causal mask is all that real positions need. Shapes: B users, T events, H heads,
D width, C width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.model.controls import Controls

AGE_BUCKETS = 32


def age_bucket(age_s: Tensor) -> Tensor:
    """Bucket of an age in seconds: half powers of two of hours, int64 in [0, AGE_BUCKETS)."""
    hours = age_s.clamp(min=0).float() / 3600.0
    return (2.0 * torch.log2(1.0 + hours)).long().clamp(max=AGE_BUCKETS - 1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, *, time_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.age_bias = nn.Embedding(AGE_BUCKETS, heads) if time_bias else None
        if self.age_bias is not None:
            nn.init.zeros_(self.age_bias.weight)

    def forward(self, x_BTD: Tensor, bias_BHTT: Tensor | None, age_BTT: Tensor | None, controls: Controls | None) -> Tensor:
        """Attend; `bias_BHTT` holds the causal mask and the controls' biases, None means causal only."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if controls is not None:
            q = q * torch.exp(-controls.log_temperature)[:, :, None, None]
        if self.age_bias is not None and age_BTT is not None and bias_BHTT is not None:
            learned = self.age_bias(age_BTT).permute(0, 3, 1, 2)
            if controls is not None:
                learned = learned * torch.exp(-controls.log_temperature)[:, :, None, None]
            bias_BHTT = bias_BHTT + learned
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHTT, is_causal=bias_BHTT is None)
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return found


def causal_bias(T: int, like: Tensor) -> Tensor:
    """Additive causal mask [1, 1, T, T]: 0 on and below the diagonal, -inf above."""
    return torch.full((T, T), -math.inf, dtype=like.dtype, device=like.device).triu(1)[None, None]


def control_bias(controls: Controls, event_BT: Tensor, recency_BTT: Tensor) -> Tensor:
    """Additive bias of the controls [B, 1, T, T]: event type and recency of the attended event."""
    by_event_BT = torch.gather(controls.event_bias, 1, event_BT)
    return (by_event_BT[:, None, :] + controls.recency_slope[:, None, None] * recency_BTT)[:, None]
