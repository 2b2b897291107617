"""Item-to-item evidence: candidates that the training events connect with the items of a history.

score(candidate) = Σ_source Σ_item scale[source, recency of the item] · value_source[item, candidate]

The sum runs over the history's last items, each once. The values are fixed (`recray.training.neighbours`);
calibration chooses the scales after training (`recray.training.calibration`), those of candidates in the
history apart. Shapes: N queries, L events, V items and padding, M neighbours of an item, S sources, R
recencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recray.model.shape import Batch

SOURCES = ("together", "next", "linear")
"""Pairs of items near each other, transitions to later items, and a linear model (EASE)."""
RECENCIES = (1, 5, 20)
"""Where a recency ends, in items from the latest; the last one has no end."""
SEEN = len(RECENCIES) + 1
"""Column of the scales for candidates in the history."""
INITIAL_SCALE = 0.1


class Neighbours(NamedTuple):
    """Neighbours of each item, the strongest first.

    item : int32 [V, M], 0: none
    value : float16 [V, M, S], a source's strongest neighbour has 1 on average
    """

    item: np.ndarray
    value: np.ndarray


class CooccurrenceHead(nn.Module):
    """Scores candidates by the neighbours of a history's last items. Without neighbours all scores are 0.

    events : how many of the last events count
    """

    scale: Tensor
    item: Tensor
    value: Tensor

    def __init__(self, events: int) -> None:
        super().__init__()
        self.events = events
        self.register_buffer("scale", torch.full((len(SOURCES), SEEN + 1), INITIAL_SCALE))
        # as large as the catalogue: in a file of its own beside the weights
        self.register_buffer("item", torch.zeros(0, 0, dtype=torch.int32), persistent=False)
        self.register_buffer("value", torch.zeros(0, 0, len(SOURCES)), persistent=False)

    @property
    def is_attached(self) -> bool:
        """Whether there are neighbours."""
        return bool(len(self.item))

    def attach(self, neighbours: Neighbours) -> None:
        """Take over the neighbours."""
        self.item = torch.from_numpy(neighbours.item).to(self.scale.device)
        self.value = torch.from_numpy(neighbours.value).to(self.scale.device)

    def terms(self) -> Iterator[tuple[str, Tensor]]:
        """Name of each scale, and all scales with the others at 0."""
        for number, source in enumerate(SOURCES):
            for recency in range(SEEN + 1):
                only = torch.zeros_like(self.scale)
                only[number, recency] = self.scale[number, recency]
                yield f"evidence.{source}.{'seen' if recency == SEEN else recency}", only

    def forward(
        self, batch: Batch, queries: slice, n_items: int, first: int = 0, scale_SR: Tensor | None = None
    ) -> Tensor:
        """Scores of the items first : first + n_items [N, n_items].

        scale_SR : in place of its own
        """
        scale_SR = self.scale if scale_SR is None else scale_SR
        user_N, position_N = batch.user_N[queries], batch.position_N[queries]
        length = min(self.events, batch.item_BT.shape[1])
        where_NL = position_N[:, None] - torch.arange(length, device=position_N.device)  # the latest first
        item_NL = batch.item_BT[user_N[:, None], where_NL.clamp(min=0)]
        counts_NL = (where_NL >= 0) & ~(item_NL[:, :, None] == item_NL[:, None, :]).tril(-1).any(2)
        ends = torch.tensor(RECENCIES, device=item_NL.device)
        recency_NL = torch.searchsorted(ends, counts_NL.cumsum(1) - 1, right=True)

        neighbour_NLM, value_NLMS = self.item[item_NL].long() - first, self.value[item_NL].float()
        inside_NLM = (neighbour_NLM >= max(1 - first, 0)) & (neighbour_NLM < n_items) & counts_NL[..., None]
        at_NX = neighbour_NLM.clamp(0, n_items - 1).flatten(1)
        unseen_NLM = torch.einsum("nlms,snl->nlm", value_NLMS, scale_SR[:, recency_NL])
        seen_NLM = value_NLMS @ scale_SR[:, SEEN]
        unseen, seen = (
            torch.zeros(len(item_NL), n_items, device=item_NL.device).scatter_add_(
                1, at_NX, torch.where(inside_NLM, score_NLM, 0.0).flatten(1)
            )
            for score_NLM in (unseen_NLM, seen_NLM)
        )
        return torch.where(self._is_seen(batch.item_BT[user_N], position_N, n_items, first), seen, unseen)

    @staticmethod
    def _is_seen(item_NT: Tensor, position_N: Tensor, n_items: int, first: int) -> Tensor:
        """Whether the history has each item [N, n_items]."""
        where_T = torch.arange(item_NT.shape[1], device=item_NT.device)
        inside = (item_NT >= first) & (item_NT < first + n_items) & (where_T <= position_N[:, None])
        # what is outside is marked in a column of its own
        index_NT = torch.where(inside, item_NT - first, n_items)
        marks = torch.zeros(len(item_NT), n_items + 1, dtype=torch.bool, device=item_NT.device)
        return marks.scatter_(1, index_NT, True)[:, :n_items]
