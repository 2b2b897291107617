"""Warm start: a training begins with the weights that its network shares with a parent bundle.

Items and event types are matched by name, so both may have been added or removed since.
"""

from __future__ import annotations

import numpy as np
import torch

from recray.bundle import Bundle
from recray.dataset.reader import Dataset
from recray.model.network import Network

# tables with a row for each event type
BY_EVENT = ("events.weight", "event_bias.weight", "repeat.event.weight")


@torch.no_grad()
def copy_parent_weights(model: Network, dataset: Dataset, parent: Bundle) -> None:
    """Copy the parent's weights into a new model of the dataset. Other weights keep their initial values."""
    parent_model = parent.model()
    parent_weights = dict(parent_model.named_parameters())
    item = dataset.translate(parent.item_ids)
    parent_types = parent.manifest["event_types"]
    event = np.array(
        [parent_types.index(name) if name in parent_types else -1 for name in dataset.event_types]
    )
    for name, weight in model.named_parameters():
        if name not in parent_weights or parent_weights[name].shape[1:] != weight.shape[1:]:
            continue
        if name == "items.ids.weight":
            _copy_rows(weight, parent_weights[name], np.where(item > 0, item, -1))
        elif name.endswith(BY_EVENT):
            _copy_rows(weight, parent_weights[name], event)
        elif parent_weights[name].shape == weight.shape:
            weight.copy_(parent_weights[name])
    if model.repeat is not None and parent_model.repeat is not None:
        model.repeat.log_scale.copy_(parent_model.repeat.log_scale)


def _copy_rows(weight: torch.Tensor, parent_weights: torch.Tensor, source_row: np.ndarray) -> None:
    """Set row i to parent_weights[source_row[i]]; -1 keeps the row."""
    rows = torch.from_numpy(np.flatnonzero(source_row >= 0)).to(weight.device)
    weight[rows] = parent_weights[torch.from_numpy(source_row[source_row >= 0])].to(weight.device)
