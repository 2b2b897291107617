"""Who is to be forgotten: known by salted hashes alone, for the door of the endpoint and for prepare.

The list is a file of the root that is replaced in one step, so a reader has the old or the new one. Nobody is taken off it by recray.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recray.storage import read_json, write_json

FILE = "forgotten.json"


class OptOut:
    """The list of a root. Open it with `OptOut.of`, and look again with `look`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._salt, self._users, self._seen = b"", frozenset[str](), -1.0
        self.look()

    @classmethod
    def of(cls, root: Path) -> OptOut:
        return cls(root / FILE)

    def look(self) -> None:
        """Take over what was added since. Raises DamagedArtifactError."""
        try:
            seen = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if seen != self._seen:
            content = read_json(self.path)
            self._salt, self._users, self._seen = bytes.fromhex(content["salt"]), frozenset(content["users"]), seen

    def __len__(self) -> int:
        return len(self._users)

    def __contains__(self, user_id: Any) -> bool:
        return bool(self._users) and self._named(user_id) in self._users

    def among(self, user_ids: Sequence[Any]) -> np.ndarray:
        """Which of some users are on it, bool [n]."""
        return np.fromiter((user in self for user in user_ids), bool, len(user_ids))

    @property
    def digest(self) -> str | None:
        """Names what is on it; None for an empty list."""
        return hashlib.sha256("".join(sorted(self._users)).encode()).hexdigest() if self._users else None

    def add(self, user_id: Any) -> bool:
        """Put a user on it, on disk when it returns; whether that is new."""
        with self._alone():
            self.look()
            if user_id in self:
                return False
            salt = self._salt or os.urandom(32)
            content: dict[str, Any] = read_json(self.path) if self.path.exists() else {"salt": salt.hex(), "users": {}}
            content["users"][_hashed(salt, user_id)] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
            write_json(self.path, content)
            self.look()
            return True

    def _named(self, user_id: Any) -> str:
        return _hashed(self._salt, user_id)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time, of replicas and jobs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _hashed(salt: bytes, user_id: Any) -> str:
    return hashlib.sha256(salt + str(user_id).encode("utf-8", "surrogatepass")).hexdigest()[:32]
