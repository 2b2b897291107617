"""Run-time controls of the attention: what may change per request, on the history side only.

All zeros is the trained model exactly. The item table is the same for every request, so controls cost no second table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Controls(NamedTuple):
    """Controls of a batch of B requests; None stands for zeros.

    log_temperature [B, H]: attention logits of head group h (its head in every block) are divided by exp(value);
    event_bias [B, E]: added to the attention logits of events of a type;
    recency_slope [B]: times -log(1 + age) added to the attention logits, age in days (in events where no time is known);
    log_modality_weight [B, M]: item vectors of the history weigh their modality m (0 is the id) by exp(value).
    """

    log_temperature: Tensor | None = None
    event_bias: Tensor | None = None
    recency_slope: Tensor | None = None
    log_modality_weight: Tensor | None = None

    @classmethod
    def zeros(cls, batch: int, heads: int, event_types: int, modalities: int) -> Controls:
        return cls(torch.zeros(batch, heads), torch.zeros(batch, event_types), torch.zeros(batch), torch.zeros(batch, modalities))
