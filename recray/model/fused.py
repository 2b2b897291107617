"""Parts of a block whose backward is written by hand, because autograd's costs more passes over memory than a CPU likes.

On other devices and in other precisions they are the ordinary ones. Shapes: [..., D] states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """x Wᵀ + b; where `halved`, a CPU trains it with products in bfloat16, summed in float32, of float32 states and weights."""

    halved = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if not (self.halved and self.training and x.device.type == "cpu" and x.dtype == torch.float32):
            return F.linear(x, self.weight, self.bias)
        found: Tensor = _HalvedLinear.apply(x.flatten(0, -2), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return found.view(*x.shape[:-1], self.out_features)


class _HalvedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        found = torch.mm(x, weight.mT).float()
        return found if bias is None else found.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        half = grad.to(torch.bfloat16)
        return torch.mm(half, weight).float(), torch.mm(half.mT, x).float(), grad.sum(0) if ctx.biased else None


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised states, of the shape of x."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            ordinary: Tensor = super().forward(x)
            return ordinary
        found: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        found: Tensor = (x * scale).mul_(weight)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        grad_weight = (grad * normal).flatten(0, -2).sum(0)
        wanted = grad * weight
        along = (wanted * normal).mean(-1, keepdim=True)
        return wanted.sub_(normal.mul_(along)).mul_(scale), grad_weight, None


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) · second half of the last dimension [..., 2 H] -> [..., H] (Shazeer, arXiv 2002.05202)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value
    found: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return found


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, -1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, -1)
        found = torch.empty_like(x)
        into_gate, into_value = found.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=into_value)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=into_gate)
        return found


class Columns(nn.Embedding):
    """A narrow table that is read column by column, which is how attention adds what it says to the logits of each head."""

    def forward(self, index: Tensor) -> Tensor:
        """[D, ...] of the indices [...]: `Embedding` with the last dimension first."""
        if self.weight.device.type != "cpu" or self.weight.dtype != torch.float32:
            return F.embedding(index, self.weight).movedim(-1, 0)
        found: Tensor = _Columns.apply(index, self.weight)  # type: ignore[no-untyped-call]
        return found


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(weight)
        return torch.index_select(weight.mT, 1, index.flatten()).view(weight.shape[1], *index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        index = ctx.saved_tensors[0].flatten()
        return None, torch.stack([torch.bincount(index, column.flatten(), ctx.rows) for column in grad], 1).to(grad.dtype)


class Embedding(nn.Embedding):
    """A narrow table that a batch looks up millions of times; without padding, maximal norm and sparse gradients."""

    def forward(self, index: Tensor) -> Tensor:
        """Rows [..., D] of the indices [...]."""
        return lookup(index, self.weight)


def lookup(index: Tensor, table: Tensor) -> Tensor:
    """Rows [..., D] of a narrow table [V, D]; its gradient is counted, column by column."""
    if table.device.type != "cpu" or table.dtype != torch.float32:
        return F.embedding(index, table)
    found: Tensor = _Lookup.apply(index, table)  # type: ignore[no-untyped-call]
    return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(weight)
        return F.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        index = ctx.saved_tensors[0].flatten()
        columns = grad.flatten(0, -2).unbind(-1)
        return None, torch.stack([torch.bincount(index, column, ctx.rows) for column in columns], 1).to(grad.dtype)
