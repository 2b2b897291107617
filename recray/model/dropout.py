"""Dropout whose mask costs an eighth of the random numbers on a CPU: one byte an element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zeroes elements with a chance of `p`, rounded to 1/256 on a CPU, and scales the rest, so that the mean stays."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        cut = min(round(256 * self.p), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = (words.view(torch.uint8)[: x.numel()] >= cut).to(x.dtype)
        return x * mask.mul_(256 / (256 - cut)).view(x.shape)
