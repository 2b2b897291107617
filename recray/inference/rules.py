"""What a shop declares about its lists, beside what the model finds: boosts, exclusions, caps, and one dial for diversity.

Boosts and exclusions change scores before the best items are looked for. Caps and diversity choose among the best: greedily,
maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998). The scores of an answer stay those of the model plus boosts.
Shapes: B lists, P candidates, k places, V items and padding, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

POOL = 5  # candidates for each place


@dataclass(frozen=True)
class Rules:
    """Rules in item indices.

    diversity : 0 (by score alone) to 1 (as unlike one another as can be)
    boost_V : float32 [V], added to scores
    barred : item indices that are never answered
    caps : for each capped column the number of an item's value, int64 [V] (-1: it has none), and how many of one value a list may hold
    """

    diversity: float
    boost_V: Tensor
    barred: np.ndarray
    caps: tuple[tuple[Tensor, int], ...]

    @classmethod
    def declared(cls, declared: dict[str, Any], items: pa.Table) -> Rules | None:
        """The `diversity`, `boosts`, `exclude` and `caps` of `ScoreSettings`, for an item table (row i is item i + 1); None for none."""
        boost = np.zeros(len(items) + 1, np.float32)
        for name, value in declared["boosts"].items():
            boost[1:][_matches(items, name)] += value
        barred = np.zeros(len(items) + 1, bool)
        for name in declared["exclude"]:
            barred[1:] |= _matches(items, name)
        caps = tuple((_groups(items[column]), limit) for column, limit in declared["caps"].items())
        if not (declared["diversity"] or boost.any() or barred.any() or caps):
            return None
        return cls(declared["diversity"], torch.from_numpy(boost), np.flatnonzero(barred), caps)

    def pool(self, k: int) -> int:
        """How many of the best items to choose k from."""
        return k * POOL if self.diversity or self.caps else k

    def choose(self, index_BP: Tensor, scores_BP: Tensor, vectors_VD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """k of P items in a new order, and their scores [B, k]; index 0 and -inf where a cap leaves a place empty.

        index_BP : items by descending score, 0 with score -inf where there are fewer
        vectors_VD : item vectors, whose cosine is likeness
        """
        if not (self.diversity or self.caps):
            return index_BP[:, :k], scores_BP[:, :k]
        rows = torch.arange(len(index_BP), device=index_BP.device)
        free = scores_BP > -torch.inf
        worst = torch.where(free, scores_BP, torch.inf).amin(1, keepdim=True)
        span = (scores_BP[:, :1] - worst).clamp(min=1e-9)
        relevance = torch.where(free, (scores_BP - worst) / span, 0.0)
        unit_BPD = torch.nn.functional.normalize(vectors_VD[index_BP], dim=-1)
        likeness = torch.zeros_like(relevance)
        values = [group_V.to(index_BP.device)[index_BP] for group_V, _ in self.caps]
        picks = []
        for _ in range(min(k, index_BP.shape[1])):
            worth = (1 - self.diversity) * relevance - self.diversity * likeness
            pick = worth.masked_fill(~free, -torch.inf).argmax(1)
            picks.append(torch.where(free.any(1), pick, -1))
            likeness = torch.maximum(likeness, torch.einsum("bpd,bd->bp", unit_BPD, unit_BPD[rows, pick]))
            free[rows, pick] = False
            chosen = torch.stack(picks, 1)
            for (_, limit), value_BP in zip(self.caps, values, strict=True):
                taken = torch.where(chosen >= 0, value_BP.gather(1, chosen.clamp(min=0)), -1)
                mine = value_BP[rows, pick]
                full = ((taken == mine[:, None]).sum(1) >= limit) & (mine >= 0)
                free &= ~(full[:, None] & (value_BP == mine[:, None]))
        place = torch.stack(picks, 1)
        there = place >= 0
        return (
            torch.where(there, index_BP.gather(1, place.clamp(min=0)), 0),
            torch.where(there, scores_BP.gather(1, place.clamp(min=0)), -torch.inf),
        )


def _matches(items: pa.Table, name: str) -> np.ndarray:
    """Which items have the value of `column=value`, bool [items]; a list has it if one of its elements is it."""
    column, _, value = name.partition("=")
    return np.array([value in (map(str, x) if isinstance(x, list) else [str(x)]) for x in items[column].to_pylist()], bool)


def _groups(column: pa.ChunkedArray) -> Tensor:
    """Number of each item's value, int64 [V] with padding first; -1 for none."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()
    return torch.from_numpy(np.concatenate([[-1], codes]))
