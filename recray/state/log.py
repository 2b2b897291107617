"""The log of the endpoint: events, decisions and outcomes, in one order, each once.

A store promises: what `append` returned for is on disk; all entries of one call are there or none; a number, once seen, has no
smaller one appear after it, so a reader who remembers the last number misses nothing and reads nothing twice.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["event", "decision", "outcome", "set_aside", "access"]
RECENT = 1000  # of a user's events, at most
SCANNED = 5000  # entries that are looked at in one go
SAID_BEFORE, SAID_OTHERWISE = 0, -1  # in the place of a number: an entry of that kind and key was there, with the same body or another one


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    key : names it; a second entry of the same kind and key is dropped
    user : id as text, None where nobody is known
    at_s : moment of what happened, seconds since 1970
    body : what else is known, as JSON
    """

    kind: Kind
    key: str
    user: str | None
    at_s: float
    body: dict[str, Any]

    @property
    def named(self) -> str | None:
        """What the caller called it, None where the key was drawn; see `key_of`."""
        first, nul, rest = self.key.partition("\0")
        if nul and not first:
            length, _, both = rest.partition("\0")
            return both[int(length) :]
        return rest if nul else None

    @property
    def said(self) -> str:
        """Digest of the body."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Entry:
        return cls(**json.loads(text))


def key_of(whose: str, named: str) -> str:
    """Key of an entry that the caller named: whose it is, and the name. No two pairs have the same."""
    pair = f"{whose}\0{named}"
    return pair if pair.count("\0") == 1 and whose else f"\0{len(whose)}\0{whose}{named}"


class Log(abc.ABC):
    """Blocking; for any thread. Every method raises StateError where the store cannot be reached or takes nothing."""

    quick = False  # whether `recent` of few events is faster than another thread

    @abc.abstractmethod
    def append(self, entries: Sequence[Entry]) -> list[int]:
        """Number of each entry, in order; SAID_BEFORE or SAID_OTHERWISE for one that was there before. On disk when it returns."""

    @abc.abstractmethod
    def recent(self, user: str, after: int, from_s: float, limit: int = RECENT) -> list[Entry]:
        """The user's last events, so many at most, that have a number above `after` or happened at `from_s` or later, in the order of their
        numbers."""

    @abc.abstractmethod
    def has(self, kind: Kind, key: str) -> bool:
        """Whether there is such an entry."""

    @abc.abstractmethod
    def read(self, after: int, limit: int) -> list[tuple[int, Entry]]:
        """The next entries with a number above `after`, with their numbers."""

    def of_user(self, user: str) -> Iterator[tuple[int, Entry]]:
        """The user's entries, and what came of answers to the user, with their numbers. Reads the whole log."""
        asked, number = set[str](), 0
        while found := self.read(number, SCANNED):
            number = found[-1][0]
            for place, entry in found:  # an outcome comes after its answer
                if entry.user == user or (entry.kind in ("outcome", "set_aside") and entry.body.get("request_id") in asked):
                    if entry.kind == "decision":
                        asked.add(entry.key)
                    yield place, entry

    @abc.abstractmethod
    def last(self) -> int:
        """The highest number given out so far, 0 for none. Numbers grow, with gaps."""

    @abc.abstractmethod
    def forget(self, through: int) -> None:
        """Drop the entries up to number `through`; their keys may be taken again."""

    @abc.abstractmethod
    def forget_user(self, user: str) -> int:
        """Drop the user's events, answers to the user and what came of them; how many entries. No byte of them stays in the store's files,
        as far as it is the store's to say."""

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """Names this store for ever: another one counts anew."""

    @abc.abstractmethod
    def close(self) -> None: ...
