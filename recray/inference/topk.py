"""Exact top k with ties broken by ascending item index."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices int64 and scores float32 [B, k] of the highest scores, equal scores by ascending index.

    Each score becomes an integer that sorts like it, joined with the index, so that no two keys are equal.
    Entries of -inf come last, with index 0. Raises nothing; k above V is cut to V.
    """
    B, V = scores_BV.shape
    bits = scores_BV.float().contiguous().view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    keys = (ordered << 32) + (V - 1 - torch.arange(V, device=scores_BV.device))
    best, index = torch.topk(keys, min(k, V), dim=1)
    scores = torch.gather(scores_BV.float(), 1, index)
    return torch.where(scores == -torch.inf, 0, index), scores
