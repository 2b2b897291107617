"""A training that begins with another bundle's weights, as far as the two networks have them in common.

Items and event types are matched by their names, so both may have come or gone since.
"""

from __future__ import annotations

import numpy as np
import torch

from recray.bundle import Bundle
from recray.dataset.reader import Dataset
from recray.model.recommender import Recommender

BY_EVENT = ("events.weight", "event_bias.weight", "repeat.event.weight")  # tables with a row for each event type


@torch.no_grad()
def begin_with(model: Recommender, dataset: Dataset, parent: Bundle) -> None:
    """Put the parent's weights into a fresh model of the dataset. What the parent does not have stays as it was drawn."""
    theirs = dict(parent.model().named_parameters())
    item = dataset.translate(parent.item_ids)
    known = parent.manifest["event_types"]
    event = np.array([known.index(name) if name in known else -1 for name in dataset.event_types])
    for name, mine in model.named_parameters():
        if name not in theirs or theirs[name].shape[1:] != mine.shape[1:]:
            continue
        if name == "items.ids.weight":
            _copy_rows(mine, theirs[name], np.where(item > 0, item, -1))
        elif name.endswith(BY_EVENT):
            _copy_rows(mine, theirs[name], event)
        elif theirs[name].shape == mine.shape:
            mine.copy_(theirs[name])


def _copy_rows(mine: torch.Tensor, theirs: torch.Tensor, place: np.ndarray) -> None:
    """Row i becomes theirs[place[i]]; -1 leaves it."""
    rows = torch.from_numpy(np.flatnonzero(place >= 0)).to(mine.device)
    mine[rows] = theirs[torch.from_numpy(place[place >= 0])].to(mine.device)
