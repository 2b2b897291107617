"""Changes of items since the item table was read: availability, attributes, new items."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ItemChange:
    """What was changed of an item; the item table has the rest.

    item_id : in the type of the item table
    available : whether it may be recommended; None: unchanged
    attributes : new values of columns of the item table
    at_s : time of the last change, seconds since 1970
    is_removed : the item is as in the item table again
    """

    item_id: Any
    available: bool | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    at_s: float = field(default_factory=time.time)
    is_removed: bool = False

    @property
    def key(self) -> str:
        """The item as text, unique per store."""
        return str(self.item_id)

    def after(self, earlier: ItemChange | None) -> ItemChange:
        """This change on top of an earlier one of the item: what it does not name stays."""
        if earlier is None or earlier.is_removed or self.is_removed:
            return self
        available = earlier.available if self.available is None else self.available
        return ItemChange(self.item_id, available, {**earlier.attributes, **self.attributes}, self.at_s)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ItemChange:
        return cls(**json.loads(text))


def merge_changes(changes: Iterable[ItemChange], stored: dict[str, ItemChange]) -> dict[str, ItemChange]:
    """Each changed item on top of what is stored of it, by `ItemChange.key`."""
    merged: dict[str, ItemChange] = {}
    for change in changes:
        merged[change.key] = change.after(merged.get(change.key, stored.get(change.key)))
    return merged
