"""What a night is asked, what was decided for it, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from recray.dataset.reader import History
from recray.errors import RequestError
from recray.inference import Filters
from recray.serving.api import Item, Reason, Source

if TYPE_CHECKING:
    from recray.serving.night import Night


@dataclass(frozen=True)
class Explore:
    """How an answer explores: sigma around what is decided; actions that are turned, and their bound, where no policy names them."""

    sigma: float
    actions: tuple[str, ...]
    bound: float
    random: np.random.Generator


class UnknownItemError(RequestError):
    """Nobody knows the item that was asked about."""


@dataclass(frozen=True)
class Found:
    """What was found: items with their scores (None: not known), and who found them."""

    items: list[tuple[Any, float | None]]
    source: Source
    why: list[list[Reason]] | None = None


@dataclass(frozen=True)
class Decision:
    """What a policy saw and decided, for the log: observation [D]; mean and action [K]; log_density of the action, None where nothing was
    explored; sigma of the exploration; bound: what an action of one turns, as a share of what it can."""

    policy: str
    actions: tuple[str, ...]
    observation: np.ndarray
    mean: np.ndarray
    action: np.ndarray
    log_density: float | None
    sigma: float
    bound: float

    def turned(self) -> dict[str, float]:
        """How far each control is turned, by name."""
        return dict(zip(self.actions, (self.bound * float(value) for value in self.action), strict=True))

    def body(self) -> dict[str, Any]:
        """As JSON values; numbers keep all their digits, so that a density can be made again."""
        told: dict[str, Any] = {name: [float(value) for value in getattr(self, name)] for name in ("observation", "mean", "action")}
        told |= {name: getattr(self, name) for name in ("log_density", "sigma", "bound")}
        return {"policy": self.policy, "actions": list(self.actions), **told}


@dataclass(frozen=True)
class Question:
    """What the model of a night is to answer: the `k` best items, or the scores of `candidates` (outside ids).

    context : codes [C]
    action : how the attention is turned, by the names of `recray.inference.policy.dials`
    decision : where that was decided by a policy, or explored
    explain : say what carried the candidates instead of scoring them
    """

    night: Night
    history: History
    now: int
    context: np.ndarray
    k: int = 0
    filters: Filters = Filters()
    candidates: tuple[Any, ...] | None = None
    action: dict[str, float] = field(default_factory=dict)
    decision: Decision | None = None
    explain: bool = False


def items_of(found: Found) -> list[Item]:
    """As the API shows them."""
    return [Item.model_construct(item_id=item, score=score, title=None, why=None, text=None) for item, score in found.items if score is not None]
