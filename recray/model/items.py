"""Item vectors: an id vector and one vector per feature column, fused by attention over these modalities.

A feature column is a bag of tokens per item, whose vector is the mean of its tokens' vectors, or a vector per item, which is
projected. Items that training never saw keep no id vector and live from their features. A modality that an item does not
have takes no part. Shapes: V items and padding (or a selection of them), D width, M modalities (the id first), K tokens, C
numbers of a vector.
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

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Vectors [V, D] of all items, or of those in `index`."""
        tokens, offsets = (self.tokens_K, self.offsets_V) if index is None else self._chosen(index)
        found: Tensor = self.table(tokens, offsets)
        return found

    def present(self, index: Tensor | None = None) -> Tensor:
        """Whether an item has a token, bool [V]."""
        found = self._sizes() > 0
        return found if index is None else found[index]

    def _sizes(self) -> Tensor:
        return torch.diff(self.offsets_V, append=self.offsets_V.new_tensor([len(self.tokens_K)]))

    def _chosen(self, index: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self._sizes()[index]
        offsets = sizes.cumsum(0) - sizes
        where = torch.arange(int(sizes.sum()), device=index.device)
        return self.tokens_K[where + torch.repeat_interleave(self.offsets_V[index] - offsets, sizes)], offsets


class VectorColumn(nn.Module):
    """One column of vectors float32 [V, C], and whether an item has one, bool [V]."""

    values_VC: Tensor
    present_V: Tensor

    def __init__(self, values: np.ndarray, present: np.ndarray, dim: int) -> None:
        super().__init__()
        self.register_buffer("values_VC", torch.as_tensor(values))
        self.register_buffer("present_V", torch.as_tensor(present))
        self.project = nn.Linear(values.shape[1], dim, bias=False)
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Vectors [V, D] of all items, or of those in `index`; zero where there is none."""
        found: Tensor = self.project(self.values_VC if index is None else self.values_VC[index])
        return found

    def present(self, index: Tensor | None = None) -> Tensor:
        """Whether an item has a vector, bool [V]."""
        return self.present_V if index is None else self.present_V[index]


class ItemEncoder(nn.Module):
    """All item vectors at once.

    Parameters
    ----------
    seen : bool [V]
        Items that training saw; padding (index 0) is False.
    features : name -> (tokens [K], offsets [V]) or (vectors [V, C], present [V]), as `recray.dataset.features` makes them
    id_dropout : share of the items that a training step takes for unseen, so that features learn to speak for those that are
        (DropoutNet, Volkovs et al., NeurIPS 2017)
    """

    seen_V: Tensor

    def __init__(self, seen: np.ndarray, features: dict[str, tuple[np.ndarray, np.ndarray]], buckets: int, dim: int, id_dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("seen_V", torch.as_tensor(seen))
        self.id_dropout = id_dropout if features else 0.0
        self.ids = nn.Embedding(len(seen), dim)
        nn.init.normal_(self.ids.weight, std=0.02)
        self.names = sorted(features)
        self.features = nn.ModuleList(
            VectorColumn(*features[name], dim) if features[name][0].ndim == 2 else TokenBags(*features[name], buckets, dim) for name in self.names
        )

        self.fusion = nn.Parameter(torch.zeros(self.modalities, dim)) if features else None

    @property
    def modalities(self) -> int:
        return 1 + len(self.features)

    def parts(self, index: Tensor | None = None) -> Tensor:
        """Vectors by modality [M, V, D]; zero where an item does not have it."""
        return self._parts(index, self._seen(index))

    def _parts(self, index: Tensor | None, seen: Tensor) -> Tensor:
        return torch.stack([self._ids(index, seen), *(column(index) for column in self._columns)])

    def _seen(self, index: Tensor | None) -> Tensor:
        return self.seen_V if index is None else self.seen_V[index]

    @property
    def _columns(self) -> list[TokenBags | VectorColumn]:
        return [column for column in self.features if isinstance(column, TokenBags | VectorColumn)]

    def _ids(self, index: Tensor | None, seen: Tensor) -> Tensor:
        found: Tensor = (self.ids.weight if index is None else self.ids(index)) * seen[:, None]
        return found

    def present(self, index: Tensor | None = None) -> Tensor:
        """Which item has which modality, bool [M, V]."""
        return self._present(index, self._seen(index))

    def _present(self, index: Tensor | None, seen: Tensor) -> Tensor:
        return torch.stack([seen, *(column.present(index) for column in self._columns)])

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Item vectors [V, D]."""
        seen = self._seen(index)
        if self.fusion is None:
            return self._ids(index, seen)
        if self.training and self.id_dropout:
            seen = seen & (torch.rand(seen.shape, device=seen.device) >= self.id_dropout)
        return self.fuse(self._parts(index, seen), self._present(index, seen))

    def fuse(self, parts: Tensor, present: Tensor, log_weight: Tensor | None = None) -> Tensor:
        """Attention over the modalities of an item, times how many it has: at zero `fusion` the plain sum.

        parts [M, ..., D], present bool [M, ...], log_weight [M, ...] added to the logits of the modalities.
        """
        if self.fusion is None:
            return parts[0] if log_weight is None else parts[0] * log_weight[0].exp()[..., None]
        query = self.fusion.view(len(parts), *[1] * (parts.dim() - 2), -1)
        logits = (parts * query).sum(-1)
        weight = present.to(logits.dtype)
        if log_weight is not None:
            logits, weight = logits + log_weight, weight * log_weight.exp()
        logits = logits.masked_fill(~present, -torch.inf)
        share = (logits - logits.amax(0).clamp(min=torch.finfo(logits.dtype).min)).exp()
        scale = weight.sum(0) / share.sum(0).clamp(min=torch.finfo(logits.dtype).tiny)
        return (share[..., None] * parts).sum(0) * scale[..., None]
