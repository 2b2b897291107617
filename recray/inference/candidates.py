"""Candidates of a recommendation list: the exact top k of a catalogue, block by block, and the rules' choice
among them.

Equal scores are ordered by ascending item index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recray.inference.rules import Rules

if TYPE_CHECKING:
    from recray.inference.filters import ExcludedItems

ITEM_BLOCK = 1 << 16  # items scored at once

ScoreBlock = Callable[[slice, "Rules | None"], Tensor]
"""Scores [rows, n] of a block of items, with the boosts of the rules."""


def item_blocks(n_items: int) -> Iterator[slice]:
    """Slices of the item indices from 0 to `n_items`."""
    for first in range(0, n_items + 1, ITEM_BLOCK):
        yield slice(first, min(first + ITEM_BLOCK, n_items + 1))


class CandidateSelector:
    """Selects the best items of a catalogue.

    table_VD : item vectors, by which the rules measure how alike items are
    retired : indices of items that are never recommended
    """

    def __init__(self, table_VD: Tensor, retired: Tensor) -> None:
        self._table_VD, self._retired = table_VD, retired
        self._n_items = len(table_VD) - 1

    def select(
        self, score: ScoreBlock, excluded: ExcludedItems, k: int, rules: Rules | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Items and scores [rows, k], and by how much the best score exceeds the second [rows]."""
        pool = max(k, 2) if rules is None else min(rules.pool_size(max(k, 2)), self._n_items + 1)
        index, scores = self._top(score, excluded, pool, rules)
        # where there is no second item, or none at all, the margin is 0
        margin = torch.nan_to_num(scores[:, 0] - scores[:, 1], nan=0.0, posinf=0.0)
        if rules is None:
            return index[:, :k], scores[:, :k], margin

        item_index, values = self._fill(index, scores, score, excluded, k, rules)
        if rules.last_boost is not None:
            item_index, values = rules.explore(item_index, values, *self._best_cold(score, excluded, rules))
        return item_index, values, margin

    def _fill(
        self, index: Tensor, scores: Tensor, score: ScoreBlock, excluded: ExcludedItems, k: int, rules: Rules
    ) -> tuple[Tensor, Tensor]:
        """The rules' choice of k among the best items, and among more where caps leave places empty."""
        item_index, values = rules.rerank(index, scores, self._table_VD, k)
        filled, pool = min(k, rules.max_length), index.shape[1]
        if not filled:
            return item_index, values
        short = ((item_index[:, filled - 1] == 0) & (index[:, -1] > 0)).nonzero()[:, 0]
        while len(short) and pool <= self._n_items:  # caps left positions empty although there are more items
            pool = min(4 * pool, self._n_items + 1)
            index, scores = self._top(score, excluded, pool, rules, short)
            item_index[short], values[short] = rules.rerank(index, scores, self._table_VD, k)
            short = short[(item_index[short, filled - 1] == 0) & (index[:, -1] > 0)]
        return item_index, values

    def _best_cold(self, score: ScoreBlock, excluded: ExcludedItems, rules: Rules) -> tuple[Tensor, Tensor]:
        """The best cold item that is not excluded, and its score, of each row; 0 and -inf: there is none."""
        assert rules.is_cold_V is not None
        best: tuple[Tensor, Tensor] | None = None
        for items in item_blocks(self._n_items):
            is_cold = rules.is_cold_V[items]
            if not is_cold.any():
                continue
            scores = self._score(score, excluded, items, rules)
            scores = scores.masked_fill(~is_cold.to(scores.device), -torch.inf)
            index, values = top_k(scores, 1)
            best = merge(best, (torch.where(values == -torch.inf, 0, index + items.start), values), 1)
        assert best is not None  # else the rules had no boost for the last place
        return best[0][:, 0], best[1][:, 0]

    def _score(self, score: ScoreBlock, excluded: ExcludedItems, items: slice, rules: Rules | None) -> Tensor:
        """Scores of a block of items, -inf for those that must not be recommended."""
        scores = score(items, rules)
        retired = self._retired[(self._retired >= items.start) & (self._retired < items.stop)] - items.start
        if len(retired):
            scores = scores.index_fill(1, retired, -torch.inf)
        return excluded.apply(scores, items.start)

    def _top(
        self,
        score: ScoreBlock,
        excluded: ExcludedItems,
        n: int,
        rules: Rules | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The n best items that are not excluded, and their scores; 0 and -inf where there are fewer."""
        best: tuple[Tensor, Tensor] | None = None
        for items in item_blocks(self._n_items):
            scores = self._score(score, excluded, items, rules)
            index, values = top_k(scores if rows is None else scores[rows], n)
            best = merge(best, (torch.where(values == -torch.inf, 0, index + items.start), values), n)
        assert best is not None
        return best


def top_k(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices int64 and scores float32 [B, k] of the highest scores, equal scores by ascending index.

    Entries of -inf come last, with index 0. Raises nothing; k above V is cut to V.
    """
    scores_BV = scores_BV.float()
    scores, index = torch.topk(scores_BV, min(k, scores_BV.shape[1]), dim=1)
    # topk returns equal scores in any order, and any of those that tie for the last position
    index, order = index.sort(1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    last = scores[:, -1:]
    is_cut = (scores_BV == last).sum(1) > (scores == last).sum(1)
    if is_cut.any():
        scores[is_cut], index[is_cut] = _top_k_by_key(scores_BV[is_cut], scores.shape[1])
    return torch.where(scores == -torch.inf, 0, index), scores


def _top_k_by_key(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices [B, k] by a unique integer key of each score and its index."""
    V = scores_BV.shape[1]
    bits = scores_BV.contiguous().view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    index = torch.topk((ordered << 32) + (V - 1 - torch.arange(V, device=scores_BV.device)), k, dim=1).indices
    return scores_BV.gather(1, index), index


def merge(best: tuple[Tensor, Tensor] | None, block: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two results of `top_k`; all indices of the second lie above those of the first."""
    if best is None:
        return block
    index, scores = (torch.cat(pair, 1) for pair in zip(best, block, strict=True))
    position, scores = top_k(scores, k)
    return torch.where(scores == -torch.inf, 0, index.gather(1, position)), scores
