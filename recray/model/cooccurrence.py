"""Item-to-item evidence: candidates that the training events connect with the items of a history.

evidence(candidate) = Σ_source Σ_item scale[source, recency of the item] · value_source[item, candidate]
score(candidate) = evidence + log_scale · log(1 + evidence / SMALL)

The sum runs over the history's last items, each once. The logarithm tells candidates with little evidence
from those without. The values are fixed (`recray.training.neighbours`); calibration chooses the scales after
training (`recray.training.calibration`), those of candidates in the history apart. Shapes: N queries, L
events, V items and padding, M neighbours of an item, S sources, R recencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recray.model.shape import Batch

SOURCES = ("together", "next", "linear")
"""Pairs of items near each other, transitions to later items, and a linear model (EASE); in a large catalogue
the cosine of the items' users in its place.
"""
RECENCIES = (1, 5, 20)
"""Where a recency ends, in items from the latest; the last one has no end."""
SEEN = len(RECENCIES) + 1
"""Column of the scales for candidates in the history."""
INITIAL_SCALE = 0.1
SMALL = 0.03


class Neighbours(NamedTuple):
    """Neighbours of each item, the strongest first.

    item : int32 [V, M], 0: none
    value : float16 [V, M, S], a source's strongest neighbour has 1 on average
    """

    item: np.ndarray
    value: np.ndarray


def to_log(evidence: Tensor) -> Tensor:
    """log(1 + evidence / SMALL)."""
    return torch.log1p(evidence / SMALL)


class CooccurrenceHead(nn.Module):
    """Scores candidates by the neighbours of a history's last items. Without neighbours all scores are 0.

    events : how many of the last events count
    """

    scale: Tensor
    log_scale: Tensor
    item: Tensor
    value: Tensor
    weight: Tensor

    def __init__(self, events: int) -> None:
        super().__init__()
        self.events = events
        self.register_buffer("scale", torch.full((len(SOURCES), SEEN + 1), INITIAL_SCALE))
        self.register_buffer("log_scale", torch.tensor(INITIAL_SCALE))
        # as large as the catalogue: in a file of its own beside the weights
        self.register_buffer("item", torch.zeros(0, 0, dtype=torch.int32), persistent=False)
        self.register_buffer("value", torch.zeros(0, 0, len(SOURCES)), persistent=False)
        self.register_buffer("weight", torch.zeros(SEEN + 1, 0, 0), persistent=False)

    @property
    def is_attached(self) -> bool:
        """Whether there are neighbours."""
        return bool(len(self.item))

    def attach(self, neighbours: Neighbours) -> None:
        """Take over the neighbours."""
        self.item = torch.from_numpy(neighbours.item).to(self.scale.device)
        self.value = torch.from_numpy(neighbours.value).to(self.scale.device)
        self.refresh()

    def refresh(self) -> None:
        """Take over the current scales."""
        self.weight = self._weigh(self.scale)

    def _weigh(self, scale_SR: Tensor) -> Tensor:
        """Score of each neighbour by recency of the item, float32 [R + 1, V, M]."""
        weight_RVM = torch.zeros(SEEN + 1, *self.item.shape, device=self.scale.device)
        for recency in scale_SR.any(0).nonzero().flatten().tolist():
            weight_RVM[recency] = self.value.float() @ scale_SR[:, recency]
        return weight_RVM

    def terms(self) -> Iterator[tuple[str, Tensor]]:
        """Name of each scale, and all scales with the others at 0."""
        for number, source in enumerate(SOURCES):
            for recency in range(SEEN + 1):
                only = torch.zeros_like(self.scale)
                only[number, recency] = self.scale[number, recency]
                yield f"evidence.{source}.{'seen' if recency == SEEN else recency}", only

    def forward(self, batch: Batch, queries: slice, n_items: int, first: int = 0) -> Tensor:
        """Scores of the items first : first + n_items [N, n_items]."""
        evidence_NV = self.evidence(batch, queries, n_items, first)
        return evidence_NV + self.log_scale * to_log(evidence_NV)

    def evidence(
        self, batch: Batch, queries: slice, n_items: int, first: int = 0, scale_SR: Tensor | None = None
    ) -> Tensor:
        """Evidence for the items first : first + n_items, float32 [N, n_items].

        scale_SR : in place of its own
        """
        weight_RVM = self.weight if scale_SR is None else self._weigh(scale_SR)
        user_N, position_N = batch.user_N[queries], batch.position_N[queries]
        history_NT = batch.item_BT[user_N]
        length = min(self.events, history_NT.shape[1])
        where_NL = position_N[:, None] - torch.arange(length, device=position_N.device)  # the latest first
        item_NL = history_NT.gather(1, where_NL.clamp(min=0))
        counts_NL = ~(item_NL[:, :, None] == item_NL[:, None, :]).tril(-1).any(2) & (where_NL >= 0)
        ends = torch.tensor(RECENCIES, device=item_NL.device)
        recency_NL = torch.searchsorted(ends, counts_NL.cumsum(1) - 1, right=True)

        # what is outside of these items, or does not count, is added to a column of its own
        neighbour_NX = (self.item[item_NL] * counts_NL[:, :, None]).flatten(1).long() - first
        inside_NX = (neighbour_NX >= max(1 - first, 0)) & (neighbour_NX < n_items)
        neighbour_NX = torch.where(inside_NX, neighbour_NX, n_items)
        inside_NT = (
            (history_NT >= first)
            & (history_NT < first + n_items)
            & (torch.arange(history_NT.shape[1], device=item_NL.device) <= position_N[:, None])
        )
        is_seen_NV = torch.zeros(len(item_NL), n_items + 1, dtype=torch.bool, device=item_NL.device)
        is_seen_NV.scatter_(1, torch.where(inside_NT, history_NT - first, n_items), True)
        recency_NX = torch.where(
            is_seen_NV.gather(1, neighbour_NX), SEEN, recency_NL.repeat_interleave(self.item.shape[1], 1)
        )
        place_NX = torch.arange(self.item.shape[1], device=item_NL.device).repeat(length)
        score_NX = weight_RVM[recency_NX, item_NL.repeat_interleave(self.item.shape[1], 1), place_NX]
        scores_NV = torch.zeros(len(item_NL), n_items + 1, device=item_NL.device)
        return scores_NV.scatter_add_(1, neighbour_NX, score_NX)[:, :n_items]
