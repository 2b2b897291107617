"""One pre-norm transformer block with selectable parts.

- `residual`: gated, x + sigmoid(W x) * update (LiGR, arXiv 2502.03417), or plain, x + update.
- `feed`: swiglu (Shazeer, arXiv 2002.05202), relu (SASRec, arXiv 1808.09781) or none (HSTU, arXiv
  2402.17152).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.model.attention import NORM_EPS, Attention, AttentionInputs
from recray.model.controls import Controls
from recray.model.dropout import Dropout
from recray.model.fused import Linear, RMSNorm, swiglu
from recray.model.packed import Row


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.into = Linear(dim, 2 * hidden, bias=False)
        self.out = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(swiglu(self.into(x)))
        return result


class GatedResidual(nn.Module):
    """x + sigmoid(W x) * dropout(update)."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.gate = Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        return torch.addcmul(x, torch.sigmoid(self.gate(x)), self.dropout(update))


class PlainResidual(nn.Module):
    """x + dropout(update)."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        result: Tensor = x + self.dropout(update)
        return result


RESIDUALS: dict[str, type[GatedResidual] | type[PlainResidual]] = {
    "gated": GatedResidual,
    "plain": PlainResidual,
}


class Block(nn.Module):
    def __init__(self, dim: int, dropout: float, *, residual: str, feed: str, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=NORM_EPS)
        self.attention = attention
        self.attention_residual = RESIDUALS[residual](dim, dropout)
        self.feed: nn.Module | None = None
        if feed != "none":
            self.feed_norm = RMSNorm(dim, eps=NORM_EPS)
            self.feed = (
                SwiGLU(dim, 2 * dim)
                if feed == "swiglu"
                else nn.Sequential(Linear(dim, 4 * dim), nn.ReLU(), Linear(4 * dim, dim))
            )
            self.feed_residual = RESIDUALS[residual](dim, dropout)

    def forward(
        self,
        x: Tensor,
        inputs: AttentionInputs | Row,
        controls: Controls | None,
        position: Tensor | None = None,
    ) -> Tensor:
        """New states [B, T, D]; with `position` int64 [B] only those of one position per user, [B, 1, D]."""
        update = self.attention(self.attention_norm(x), inputs, controls, position)
        if position is not None:
            x = x[torch.arange(len(x), device=x.device), position][:, None]
        x = self.attention_residual(x, update)
        if self.feed is not None:
            x = self.feed_residual(x, self.feed(self.feed_norm(x)))
        return x
