"""Rewards of outcomes: declared by name, bounded, for an item of the response, once for each request, item
and outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from recray.config import ServeSettings

SHOWN = "recray.shown"
"""Outcome that an item of a response was really shown; its value is the position, from 1. No caller can send
it as feedback: the name has a dot.
"""
MAX_POSITION_WEIGHT = 10.0
MAX_RESPONSES = 200_000  # remembered responses
MAX_EARLY = 20_000  # requests with outcomes but without a response so far
_BYTES = 8


@dataclass(frozen=True)
class Rewards:
    """Rewards of outcomes (`serve.outcomes`): `worth` by name, times the reported value, clipped to 0 and
    `bound`, times the inverse propensity of the item's position.

    People look at position p with a propensity of p ** -position_bias (Joachims, Swaminathan and Schnabel,
    WSDM 2017). The inverse is at most `MAX_POSITION_WEIGHT`.
    """

    worth: Mapping[str, float]
    bound: float
    position_bias: float = 0.0

    @classmethod
    def declared(cls, options: ServeSettings) -> Rewards:
        """The rewards of the settings."""
        return cls(options.outcomes, options.outcome_bound, options.position_bias)

    def of(self, outcome: str, value: float, position: int = 1) -> float:
        """The reward of an outcome of the item at a position, from 1; 0 if it is not declared."""
        weight = min(float(position**self.position_bias), MAX_POSITION_WEIGHT)
        return self.worth.get(outcome, 0.0) * min(max(value, 0.0), self.bound) * weight


@dataclass
class Credits:
    """Credits outcomes to responses in any order: an early outcome is credited when its response arrives.

    rewards : the reward of each outcome
    limit : responses to remember, the oldest is dropped first; None: all
    """

    rewards: Rewards
    limit: int | None = MAX_RESPONSES
    _items: dict[str, bytes] = field(default_factory=dict)
    _credited: dict[str, set[tuple[str | None, str]]] = field(default_factory=dict)
    _early: dict[str, list[tuple[str, str | None, float]]] = field(default_factory=dict)
    _shown: dict[str, dict[str, int]] = field(default_factory=dict)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._items

    def add_response(self, request_id: str, items: Iterable[Any]) -> float:
        """Remember the items of a response; returns the reward of its early outcomes."""
        if self.limit is not None and len(self._items) >= self.limit:
            oldest = next(iter(self._items))
            del self._items[oldest]
            self._credited.pop(oldest, None)
            self._shown.pop(oldest, None)
        self._items[request_id] = b"".join(_digest(str(item)) for item in items)
        return sum(self.add_outcome(request_id, *outcome) for outcome in self._early.pop(request_id, ()))

    def was_shown(self, request_id: str) -> bool:
        """Whether an item of a known response was reported as shown."""
        return request_id in self._shown

    def rejection_reason(self, request_id: str, outcome: str, item_id: Any) -> str:
        """Why an outcome of a known response would not count; empty if it would."""
        item = None if item_id is None else str(item_id)
        if outcome not in self.rewards.worth:
            return "undeclared"
        if item is not None and _find(self._items[request_id], _digest(item)) < 0:
            return "not_in_response"
        return "repeated" if (item, outcome) in self._credited.get(request_id, ()) else ""

    def add_outcome(self, request_id: str, outcome: str, item_id: Any, value: float) -> float:
        """The reward of an outcome, `item_id` None for the response as a whole; 0 if it does not count, or
        its response is unknown so far.

        The position of the item is the one that was reported as shown until then, else that in the response.
        """
        item = None if item_id is None else str(item_id)
        items = self._items.get(request_id)
        if items is None:
            if self.limit is not None and len(self._early) >= MAX_EARLY:
                del self._early[next(iter(self._early))]
            self._early.setdefault(request_id, []).append((outcome, item, value))
            return 0.0
        credited = self._credited.setdefault(request_id, set())
        index = -1 if item is None else _find(items, _digest(item))
        if (item, outcome) in credited or (item is not None and index < 0):
            return 0.0
        credited.add((item, outcome))
        if outcome == SHOWN and item is not None:
            self._shown.setdefault(request_id, {})[item] = max(round(value), 1)
            return 0.0
        position = 1 if item is None else self._shown.get(request_id, {}).get(item, index + 1)
        return self.rewards.of(outcome, value, position)


def _digest(item: str) -> bytes:
    return xxhash.xxh64_digest(item.encode("utf-8", "surrogatepass"))


def _find(digests: bytes, digest: bytes) -> int:
    """Place of an item among those of a response, from 0; -1 if it is not there."""
    position = digests.find(digest)
    while position % _BYTES and position >= 0:
        position = digests.find(digest, position + 1)
    return position // _BYTES
