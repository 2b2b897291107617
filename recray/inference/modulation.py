"""How an action modulates the attention: the controls by name, and the densities of exploring actions.

An action lies in [-1, 1]^K; all zeros is exactly the trained model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.special import log_ndtr, ndtr, ndtri

from recray.errors import SettingsError
from recray.model.controls import Controls

if TYPE_CHECKING:
    from torch import Tensor

    from recray.model.network import Network

# the effect of an action of 1
LOG_TEMPERATURE, EVENT_BIAS, RECENCY_SLOPE, LOG_WEIGHT = math.log(3.0), 2.0, 1.0, 1.0


class Slot(NamedTuple):
    """Position of a control: field of `Controls`, column in it (None: all), and what an action of 1 adds."""

    field: int
    column: int | None
    scale: float


def find_slots(names: Sequence[str], model: Network, event_types: Sequence[str]) -> list[Slot]:
    """The slot of each control.

    Names: `temperature` (all heads) or `temperature.HEAD`, `recency`, `event.TYPE`, `weight.MODALITY` (`id`
    or a feature column of the history's items).
    Raises SettingsError for a name that the model does not have.
    """
    slots = _list_slots(model, event_types)
    if unknown := [name for name in names if name not in slots]:
        raise SettingsError(f"policy.actions: {', '.join(unknown)}", f"known: {', '.join(slots)}")
    return [slots[name] for name in names]


def list_controls(model: Network, event_types: Sequence[str]) -> list[str]:
    """The names of a model's controls, without those of single heads."""
    return [name for name in _list_slots(model, event_types) if not name.startswith("temperature.")]


def _list_slots(model: Network, event_types: Sequence[str]) -> dict[str, Slot]:
    """Every control of a model."""
    modalities = ["id", *model.items.names][: model.items.modalities]
    slots = {"temperature": Slot(0, None, LOG_TEMPERATURE), "recency": Slot(2, None, RECENCY_SLOPE)}
    slots |= {f"temperature.{head}": Slot(0, head, LOG_TEMPERATURE) for head in range(model.shape.heads)}
    slots |= {f"event.{name}": Slot(1, column, EVENT_BIAS) for column, name in enumerate(event_types)}
    slots |= {f"weight.{name}": Slot(3, column, LOG_WEIGHT) for column, name in enumerate(modalities)}
    return slots


def to_controls(
    action_BK: np.ndarray | Tensor, slots: Sequence[Slot], model: Network, event_types: Sequence[str]
) -> Controls:
    """Actions [B, K] as controls of the model, with their gradient if they have one."""
    controls = Controls.zeros(len(action_BK), model.shape.heads, len(event_types), model.items.modalities)
    used = set()
    for (field, column, scale), values in zip(slots, torch.as_tensor(action_BK).float().T, strict=True):
        tensor = controls[field]
        assert tensor is not None
        used.add(field)
        if tensor.ndim == 1:
            tensor += scale * values
        elif column is None:
            tensor += scale * values[:, None]
        else:
            tensor[:, column] += scale * values
    return Controls(*(tensor if field in used else None for field, tensor in enumerate(controls)))


def controls_of(
    actions: Sequence[Mapping[str, float]], model: Network, event_types: Sequence[str]
) -> Controls:
    """The controls of requests that are each modulated by named actions (see `find_slots`).

    Raises SettingsError for a name that the model does not have.
    """
    names = list(dict.fromkeys(name for action in actions for name in action))
    if not names:
        return Controls()
    values = np.array([[action.get(name, 0.0) for name in names] for action in actions])
    return to_controls(values, find_slots(names, model, event_types), model, event_types)


def explore(
    mean_NK: np.ndarray, sigma: float | np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Actions float32 [N, K] around the mean actions, and their log-densities [N].

    They are drawn from normal distributions truncated to [-1, 1].
    """
    low, high = ndtr((-1.0 - mean_NK) / sigma), ndtr((1.0 - mean_NK) / sigma)
    drawn = np.clip(
        mean_NK + sigma * ndtri(low + random.random(mean_NK.shape) * (high - low)), -1.0, 1.0
    ).astype(np.float32)
    return drawn, log_density(drawn, mean_NK, sigma)


def log_density(action_NK: np.ndarray, mean_NK: np.ndarray, sigma: float | np.ndarray) -> np.ndarray:
    """Log-density of actions under the distribution of `explore`, float64 [N]; sigma may be [N, 1].

    The truncated normal distribution (Johnson, Kotz and Balakrishnan 1994, section 13.10): phi((a - m) / s) /
    (s Z), where Z is the normal mass between -1 and 1.
    """
    action, mean = np.asarray(action_NK, np.float64), np.asarray(mean_NK, np.float64)
    upper = np.abs(mean)  # by symmetry; a mean above 0 keeps the digits of the tails
    low, high = log_ndtr((upper - 1.0) / sigma), log_ndtr((upper + 1.0) / sigma)
    inside = high + np.log1p(-np.exp(low - high))
    log_densities = (
        -0.5 * ((action - mean) / sigma) ** 2 - np.log(sigma) - 0.5 * math.log(2 * math.pi) - inside
    )
    result: np.ndarray = log_densities.sum(-1)
    return result
