"""Item vectors: an id vector and one vector per feature column, fused by attention over these modalities.
Alternatively, a learned linear map of fixed feature codes.

A feature column is a bag of tokens per item (the mean of the tokens' vectors) or a vector per item
(projected). Cold items, which are not in the training events, have no id vector: their features alone
describe them. A modality that an item lacks takes no part.

Shapes: V items and padding (or a selection of them), D width, M modalities (the id first), K tokens, C
numbers of a vector, F width of the fixed vectors.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIXED_WIDTH = 128
"""F. Random codes of this width are nearly orthogonal, so the features of an item table stay distinguishable.
"""


class TokenBags(nn.Module):
    """One feature column of tokens.

    tokens : int64 [K], the tokens of all items, concatenated
    offsets : int64 [V], the first token of each item
    """

    tokens_K: Tensor
    offsets_V: Tensor
    size_V: Tensor

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, buckets: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("tokens_K", torch.as_tensor(tokens, dtype=torch.int64))
        self.register_buffer("offsets_V", torch.as_tensor(offsets, dtype=torch.int64))
        self.register_buffer(
            "size_V", self.offsets_V.diff(append=torch.tensor([len(tokens)])), persistent=False
        )
        self.table = nn.EmbeddingBag(buckets, dim, mode="mean")
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Vectors [V, D] of all items, or of those in `index`."""
        tokens, offsets = (self.tokens_K, self.offsets_V) if index is None else self._select(index)
        result: Tensor = self.table(tokens, offsets)
        return result

    def present(self, index: Tensor | None = None) -> Tensor:
        """Whether an item has a token, bool [V]."""
        present = self.size_V > 0
        return present if index is None else present[index]

    def _select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.size_V[index]
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
        result: Tensor = self.project(self.values_VC if index is None else self.values_VC[index])
        return result

    def present(self, index: Tensor | None = None) -> Tensor:
        """Whether an item has a vector, bool [V]."""
        return self.present_V if index is None else self.present_V[index]


class ItemEncoder(nn.Module):
    """Encodes all items at once.

    Parameters
    ----------
    seen : bool [V]
        Items of the training events; padding (index 0) is False.
    features : name -> (tokens [K], offsets [V]) or (vectors [V, C], present [V]), from
        `recray.dataset.features`
    id_dropout : share of the items that a training step treats as cold, so that features learn to represent
        cold items (DropoutNet, Volkovs et al., NeurIPS 2017)
    fixed : item vectors are a learned linear map (`adapter`) of random codes of the features, which are never
        trained; there are no id vectors, and the whole is one modality
    """

    seen_V: Tensor

    def __init__(
        self,
        seen: np.ndarray,
        features: dict[str, tuple[np.ndarray, np.ndarray]],
        buckets: int,
        dim: int,
        id_dropout: float = 0.0,
        *,
        fixed: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("seen_V", torch.as_tensor(seen))
        self.id_dropout = id_dropout if features else 0.0
        self.ids = None if fixed else nn.Embedding(len(seen), dim)
        self.names = sorted(features)
        width = FIXED_WIDTH if fixed else dim
        self.features = nn.ModuleList(
            VectorColumn(*features[name], width)
            if features[name][0].ndim == 2
            else TokenBags(*features[name], buckets, width)
            for name in self.names
        )
        self._codes: tuple[list[tuple[int, int]], Tensor] | None = None
        self.adapter = nn.Linear(width, dim, bias=False) if fixed else None
        self.fusion = nn.Parameter(torch.zeros(self.modalities, dim)) if features and not fixed else None
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=0.02)
        if self.adapter is not None:
            nn.init.normal_(self.adapter.weight, std=0.02)
            self.features.requires_grad_(False)

    @property
    def modalities(self) -> int:
        return 1 if self.adapter is not None else 1 + len(self.features)

    @torch.no_grad()
    def codes(self, index: Tensor | None = None) -> Tensor:
        """The fixed vectors [V, F], of length one; zero for an item without features.

        They are cached until a feature table changes.
        """
        tables = [(table.data_ptr(), table._version) for table in self.features.parameters()]
        if self._codes is None or self._codes[0] != tables:
            codes = torch.zeros(len(self.seen_V), FIXED_WIDTH, device=self.seen_V.device)
            for column in self._columns:
                codes += F.normalize(column(), dim=1)
            self._codes = tables, F.normalize(codes, dim=1)
        return self._codes[1] if index is None else self._codes[1][index]

    def parts(self, index: Tensor | None = None) -> Tensor:
        """Vectors by modality [M, V, D]; zero where an item lacks it."""
        return self._parts(index, self._seen(index))

    def _parts(self, index: Tensor | None, seen: Tensor) -> Tensor:
        if self.adapter is not None:
            return self.forward(index)[None]
        return torch.stack([self._ids(index, seen), *(column(index) for column in self._columns)])

    def _seen(self, index: Tensor | None) -> Tensor:
        return self.seen_V if index is None else self.seen_V[index]

    @property
    def _columns(self) -> list[TokenBags | VectorColumn]:
        return [column for column in self.features if isinstance(column, TokenBags | VectorColumn)]

    def _ids(self, index: Tensor | None, seen: Tensor) -> Tensor:
        assert self.ids is not None
        return (self.ids.weight if index is None else self.ids(index)) * seen[:, None]

    def present(self, index: Tensor | None = None) -> Tensor:
        """Which item has which modality, bool [M, V]."""
        return self._present(index, self._seen(index))

    def _present(self, index: Tensor | None, seen: Tensor) -> Tensor:
        described = [column.present(index) for column in self._columns]
        if self.adapter is not None:
            return torch.stack(described).any(0, keepdim=True)
        return torch.stack([seen, *described])

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Item vectors [V, D]."""
        if self.adapter is not None:
            result: Tensor = self.adapter(self.codes(index))
            return result
        seen = self._seen(index)
        if self.fusion is None:
            return self._ids(index, seen)
        if self.training and self.id_dropout:
            seen = seen & (torch.rand(seen.shape, device=seen.device) >= self.id_dropout)
        return self.fuse(self._parts(index, seen), self._present(index, seen))

    def fuse(self, parts: Tensor, present: Tensor, log_weight: Tensor | None = None) -> Tensor:
        """Attention over the modalities of an item, times their number: with zero `fusion` the plain sum.

        parts : [M, ..., D]
        present : bool [M, ...]
        log_weight : [M, ...], added to the logits of the modalities
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
