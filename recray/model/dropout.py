"""Dropout whose mask needs one random byte per element on a CPU, an eighth of the usual cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zero elements with probability `p` and scale the others to keep the mean.

    A CPU rounds `p` to a multiple of 1/256.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        threshold = min(round(256 * self.p), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = (words.view(torch.uint8)[: x.numel()] >= threshold).to(x.dtype)
        return x * mask.mul_(256 / (256 - threshold)).view(x.shape)
