"""The event store: events, impressions (decisions) and outcomes of the endpoint, in one order, each once;
beside them the changes of items.

A store promises that an entry is on disk when `append` returns, and that all entries of one call are stored
or none. After a number was read, no smaller one appears: a reader who remembers the last number misses
nothing and reads nothing twice.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from recray.events.items import ItemChange

Kind = Literal["event", "decision", "outcome", "set_aside", "access"]
MAX_RECENT = 1000  # last events of a user that are read at most
SCAN_ENTRIES = 5000  # entries per read of a scan
# in place of a number, if an entry of that kind and key exists, with the same body or another one
DUPLICATE, CONFLICT = 0, -1


@dataclass(frozen=True)
class Entry:
    """One entry of the store.

    key : unique per kind; a second entry of the same kind and key is dropped
    user : id as text, None if unknown
    at_s : time of what happened, seconds since 1970
    body : other data, as JSON
    """

    kind: Kind
    key: str
    user: str | None
    at_s: float
    body: dict[str, Any]

    @property
    def external_id(self) -> str | None:
        """The id that the caller gave it, None if the key was drawn at random; see `make_key`."""
        first, separator, rest = self.key.partition("\0")
        if separator and not first:
            length, _, owner_and_name = rest.partition("\0")
            return owner_and_name[int(length) :]
        return rest if separator else None

    @property
    def body_digest(self) -> str:
        """Digest of the body."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Entry:
        return cls(**json.loads(text))


def make_key(owner: str, name: str) -> str:
    """Key of an entry with an id from the caller, unique for each pair of owner and name."""
    pair = f"{owner}\0{name}"
    return pair if pair.count("\0") == 1 and owner else f"\0{len(owner)}\0{owner}{name}"


class Log(abc.ABC):
    """An event store. Blocking; may be used from any thread. Every method raises StateError if the store
    cannot be reached or cannot be written.
    """

    is_fast = False  # whether reading a few events is faster than a switch to another thread

    @abc.abstractmethod
    def append(self, entries: Sequence[Entry]) -> list[int]:
        """Number of each entry, in order; DUPLICATE or CONFLICT for one that exists. On disk when it
        returns.
        """

    @abc.abstractmethod
    def recent(self, user: str, after: int, from_s: float, limit: int = MAX_RECENT) -> list[Entry]:
        """The user's last events in the order of their numbers, at most `limit`, that have a number above
        `after` or happened at `from_s` or later.
        """

    @abc.abstractmethod
    def recent_of(
        self, users: Sequence[str], after: int, from_s: float, limit: int = MAX_RECENT
    ) -> dict[str, list[Entry]]:
        """The same of many users at once, without the users who have none."""

    @abc.abstractmethod
    def has(self, kind: Kind, key: str) -> bool:
        """Whether there is such an entry."""

    @abc.abstractmethod
    def read(self, after: int, limit: int) -> list[tuple[int, Entry]]:
        """The next entries with a number above `after`, at most `limit`, with their numbers."""

    def read_user(self, user: str) -> Iterator[tuple[int, Entry]]:
        """The user's entries, and the outcomes of the user's impressions, with their numbers. Scans the whole
        store.
        """
        request_ids, number = set[str](), 0
        while page := self.read(number, SCAN_ENTRIES):
            number = page[-1][0]
            for entry_number, entry in page:  # an outcome comes after its impression
                if entry.user == user or (
                    entry.kind in ("outcome", "set_aside") and entry.body.get("request_id") in request_ids
                ):
                    if entry.kind == "decision":
                        request_ids.add(entry.key)
                    yield entry_number, entry

    @abc.abstractmethod
    def last(self) -> int:
        """The highest number so far, 0 for none. Numbers grow, with gaps."""

    @abc.abstractmethod
    def drop_through(self, through: int) -> None:
        """Drop the entries up to number `through`. Their keys may be used again."""

    @abc.abstractmethod
    def forget_user(self, user: str) -> int:
        """Delete the user's events, impressions and their outcomes, and overwrite them in the files as far as
        the store can. Returns how many entries.
        """

    @abc.abstractmethod
    def change_items(self, changes: Sequence[ItemChange]) -> None:
        """Store changes of items, each on top of earlier ones of its item, all or none. On disk when it
        returns.
        """

    @abc.abstractmethod
    def read_items(self, after: int) -> tuple[int, list[ItemChange]]:
        """Number of the last change of items, 0 for none, and the items that changed after number `after`, of
        all changes of an item the sum. The number is below `after` where the store was emptied.
        """

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """Identifies this store for good: a new store counts from 1 again."""

    @abc.abstractmethod
    def close(self) -> None: ...
