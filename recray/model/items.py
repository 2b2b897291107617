"""Item vectors: an id vector plus one vector per feature column, summed.

Every feature column is a bag of tokens per item, whatever its kind; its vector is the mean of its tokens' vectors. Items
that training never saw keep no id vector and live from their features. Shapes: V items and padding, D width, M modalities
(the id first), K tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class TokenBags(nn.Module):
    """One feature column: `tokens` int64 [K] of all items one after the other, `offsets` int64 [V] where each begins."""

    tokens_K: Tensor
    offsets_V: Tensor

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, buckets: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("tokens_K", torch.as_tensor(tokens, dtype=torch.int64))
        self.register_buffer("offsets_V", torch.as_tensor(offsets, dtype=torch.int64))
        self.table = nn.EmbeddingBag(buckets, dim, mode="mean")
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self) -> Tensor:
        found: Tensor = self.table(self.tokens_K, self.offsets_V)
        return found


class ItemEncoder(nn.Module):
    """All item vectors at once.

    Parameters
    ----------
    seen : bool [V]
        Items that training saw; padding (index 0) is False.
    features : name -> (tokens [K], offsets [V]), as `recray.dataset.features` makes them
    """

    seen_V: Tensor

    def __init__(self, seen: np.ndarray, features: dict[str, tuple[np.ndarray, np.ndarray]], buckets: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("seen_V", torch.as_tensor(seen))
        self.ids = nn.Embedding(len(seen), dim)
        nn.init.normal_(self.ids.weight, std=0.02)
        self.names = sorted(features)
        self.features = nn.ModuleList(TokenBags(*features[name], buckets, dim) for name in self.names)

    @property
    def modalities(self) -> int:
        return 1 + len(self.features)

    def parts(self) -> Tensor:
        """Vectors by modality [M, V, D]."""
        ids = self.ids.weight * self.seen_V[:, None]
        return torch.stack([ids, *(bags() for bags in self.features)])

    def forward(self) -> Tensor:
        """Item vectors [V, D]."""
        return fuse(self.parts())


def fuse(parts_MVD: Tensor) -> Tensor:
    """Sum over modalities, one after the other: gathering before or after gives the same bits."""
    total = parts_MVD[0]
    for part in parts_MVD[1:]:
        total = total + part
    return total
