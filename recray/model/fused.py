"""Layers with hand-written backward passes: on a CPU they read memory less often than autograd's.

On other devices and in other precisions they are the ordinary torch layers. Shapes: [..., D] states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """x Wᵀ + b.

    If `halved`, a CPU trains it with products in bfloat16, summed in float32. States and weights stay
    float32.
    """

    halved = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if not (self.halved and self.training and x.device.type == "cpu" and x.dtype == torch.float32):
            return F.linear(x, self.weight, self.bias)
        flat = x.flatten(0, -2)
        product = _HalvedLinear.apply(flat, self.weight, self.bias)  # type: ignore[no-untyped-call]
        result: Tensor = product.view(*x.shape[:-1], self.out_features)
        return result


class _HalvedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        product = torch.mm(x, weight.mT).float()
        return product if bias is None else product.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        half = grad.to(torch.bfloat16)
        return (
            torch.mm(half, weight).float(),
            torch.mm(half.mT, x).float(),
            grad.sum(0) if ctx.biased else None,
        )


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised states, of the shape of x."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        result: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (
            (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])).add_(eps).rsqrt_()
        )
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = (x * scale).mul_(weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        grad_weight = (grad * normal).flatten(0, -2).sum(0)
        scaled = grad * weight
        along = (scaled * normal).mean(-1, keepdim=True)
        return scaled.sub_(normal.mul_(along)).mul_(scale), grad_weight, None


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) · second half of the last dimension [..., 2 H] -> [..., H] (Shazeer, arXiv
    2002.05202).
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value
    result: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return result


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
        gradient = torch.empty_like(x)
        gate_gradient, value_gradient = gradient.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=value_gradient)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=gate_gradient)
        return gradient


class Columns(nn.Embedding):
    """A narrow table that is read by column: attention adds one column to the logits of each head."""

    def forward(self, index: Tensor) -> Tensor:
        """[D, ...] of the indices [...]: `Embedding` with the last dimension first."""
        if self.weight.device.type != "cpu" or self.weight.dtype != torch.float32:
            return F.embedding(index, self.weight).movedim(-1, 0)
        result: Tensor = _Columns.apply(index, self.weight)  # type: ignore[no-untyped-call]
        return result


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
        return None, torch.stack(
            [torch.bincount(index, column.flatten(), ctx.rows) for column in grad], 1
        ).to(grad.dtype)


class Embedding(nn.Embedding):
    """A narrow table with millions of lookups per batch; no padding, no maximal norm, no sparse gradients."""

    def forward(self, index: Tensor) -> Tensor:
        """Rows [..., D] of the indices [...]."""
        return lookup(index, self.weight)


def lookup(index: Tensor, table: Tensor) -> Tensor:
    """Rows [..., D] of a narrow table [V, D]; the gradient is a weighted count per column."""
    if table.device.type != "cpu" or table.dtype != torch.float32:
        return F.embedding(index, table)
    result: Tensor = _Lookup.apply(index, table)  # type: ignore[no-untyped-call]
    return result


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
        return None, torch.stack([torch.bincount(index, column, ctx.rows) for column in columns], 1).to(
            grad.dtype
        )
