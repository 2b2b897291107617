"""Run-time attention controls, which may differ per request.

All zeros is exactly the trained model. Controls act only on the history, so all requests share one
item table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Controls(NamedTuple):
    """Controls of a batch of B requests; None stands for zeros.

    log_temperature : [B, H], divides the attention logits of head h in every block by exp(value)
    event_bias : [B, E], added to the attention logits of events of a type
    recency_slope : [B], times -log(1 + age) added to the attention logits; age in days, or in events where
        times are unknown
    log_modality_weight : [B, M], weighs modality m of the history's item vectors by exp(value); 0 is the id
    """

    log_temperature: Tensor | None = None
    event_bias: Tensor | None = None
    recency_slope: Tensor | None = None
    log_modality_weight: Tensor | None = None

    @classmethod
    def zeros(cls, batch: int, heads: int, event_types: int, modalities: int) -> Controls:
        return cls(
            torch.zeros(batch, heads),
            torch.zeros(batch, event_types),
            torch.zeros(batch),
            torch.zeros(batch, modalities),
        )

    def select(self, rows: Tensor, device: torch.device) -> Controls:
        """Of some requests, on a device."""
        return self.map(lambda tensor: tensor[rows].to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Controls:
        """Apply `change` to each control that is set."""
        return Controls(*(None if tensor is None else change(tensor) for tensor in self))
