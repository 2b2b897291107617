"""One transformer block: pre-norm, gated residuals and SwiGLU (Shazeer, arXiv 2002.05202; LiGR, arXiv 2502.03417)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.model.attention import Attention
from recray.model.controls import Controls


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.into = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(x).chunk(2, -1)
        found: Tensor = self.out(F.silu(gate) * value)
        return found


class GatedResidual(nn.Module):
    """x + sigmoid(W x) * dropout(update)."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        found: Tensor = x + torch.sigmoid(self.gate(x)) * self.dropout(update)
        return found


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float, *, time_bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, time_bias=time_bias)
        self.attention_residual = GatedResidual(dim, dropout)
        self.feed_norm = nn.RMSNorm(dim, eps=1e-6)
        self.feed = SwiGLU(dim, 2 * dim)
        self.feed_residual = GatedResidual(dim, dropout)

    def forward(self, x: Tensor, bias: Tensor | None, age: Tensor | None, controls: Controls | None) -> Tensor:
        x = self.attention_residual(x, self.attention(self.attention_norm(x), bias, age, controls))
        found: Tensor = self.feed_residual(x, self.feed(self.feed_norm(x)))
        return found
