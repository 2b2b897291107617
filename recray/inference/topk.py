"""Exact top k with ties broken by ascending item index."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices int64 and scores float32 [B, k] of the highest scores, equal scores by ascending index.

    Entries of -inf come last, with index 0. Raises nothing; k above V is cut to V.
    """
    scores_BV = scores_BV.float()
    scores, index = torch.topk(scores_BV, min(k, scores_BV.shape[1]), dim=1)
    # equal scores may have come in any order, and at the last place any of them may have come
    index, order = index.sort(1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    last = scores[:, -1:]
    torn = (scores_BV == last).sum(1) > (scores == last).sum(1)
    if torn.any():
        scores[torn], index[torn] = _by_key(scores_BV[torn], scores.shape[1])
    return torch.where(scores == -torch.inf, 0, index), scores


def _by_key(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices [B, k]: each score becomes an integer that sorts like it, joined with the index, so no two are equal."""
    V = scores_BV.shape[1]
    bits = scores_BV.contiguous().view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    index = torch.topk((ordered << 32) + (V - 1 - torch.arange(V, device=scores_BV.device)), k, dim=1).indices
    return scores_BV.gather(1, index), index


def merge(best: tuple[Tensor, Tensor] | None, more: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two answers of `top_k`; all indices of the second lie above those of the first."""
    if best is None:
        return more
    index, scores = (torch.cat(pair, 1) for pair in zip(best, more, strict=True))
    place, scores = top_k(scores, k)
    return torch.where(scores == -torch.inf, 0, index.gather(1, place)), scores
