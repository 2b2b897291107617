"""Who is to be forgotten: known by salted hashes alone, for the door of the endpoint and for prepare.

The list is a file of the root that is replaced in one step, so a reader has the old or the new one. Nobody is taken off it by recray. Beside
it there may be a file of the operator's (`data.exclude_users`), an id a line, which is as good as the list as long as it names a user.
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

from recray.config import expanded
from recray.errors import SettingsError
from recray.storage import read_json, write_json

FILE = "forgotten.json"


class OptOut:
    """The list of a root. Open it with `OptOut.of`, and look again with `look`.

    excluded : the operator's file, None for none
    """

    def __init__(self, path: Path, excluded: Path | None = None) -> None:
        self.path, self.excluded = path, excluded
        self._salt, self._users, self._seen = b"", frozenset[str](), -1.0
        self._named_users, self._named_seen = frozenset[str](), -1
        self.look()

    @classmethod
    def of(cls, root: Path, excluded: str | None = None) -> OptOut:
        """Of a root, and of `data.exclude_users`. Raises SettingsError for a file that cannot be read."""
        return cls(root / FILE, None if excluded is None else expanded(excluded, "data.exclude_users"))

    def look(self) -> None:
        """Take over what was added since: the list first, whatever befell the operator's file. Raises DamagedArtifactError, SettingsError."""
        with contextlib.suppress(FileNotFoundError):
            seen = self.path.stat().st_mtime_ns
            if seen != self._seen:
                content = read_json(self.path)
                self._salt, self._users, self._seen = bytes.fromhex(content["salt"]), frozenset(content["users"]), seen
        if self.excluded is not None:
            self._look_at(self.excluded)

    def _look_at(self, excluded: Path) -> None:
        try:
            seen = excluded.stat().st_mtime_ns
            if seen != self._named_seen:
                lines = excluded.read_text(encoding="utf-8-sig").splitlines()
                self._named_users, self._named_seen = frozenset(line.strip() for line in lines) - {""}, seen
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"data.exclude_users: {excluded} cannot be read: {error}", "name a text file with one user id a line") from None

    def __len__(self) -> int:
        return len(self._users) + len(self._named_users)

    def __contains__(self, user_id: Any) -> bool:
        return str(user_id) in self._named_users or self._on_list(user_id)

    def _on_list(self, user_id: Any) -> bool:
        return bool(self._users) and _hashed(self._salt, user_id) in self._users

    def among(self, user_ids: Sequence[Any]) -> np.ndarray:
        """Which of some users are on it, bool [n]."""
        return np.fromiter((user in self for user in user_ids), bool, len(user_ids))

    @property
    def digest(self) -> str | None:
        """Names what is on it; None for an empty list."""
        if not len(self):
            return None
        words = [*sorted(self._users), *([""] if self._named_users else []), *sorted(self._named_users)]
        return hashlib.sha256("\n".join(words).encode("utf-8", "surrogatepass") if self._named_users else "".join(words).encode()).hexdigest()

    def add(self, user_id: Any) -> bool:
        """Put a user on it, on disk when it returns; whether that is new."""
        with self._alone():
            self.look()
            if self._on_list(user_id):
                return False
            salt = self._salt or os.urandom(32)
            content: dict[str, Any] = read_json(self.path) if self.path.exists() else {"salt": salt.hex(), "users": {}}
            content["users"][_hashed(salt, user_id)] = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
            write_json(self.path, content)
            self.look()
            return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time, of replicas and jobs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _hashed(salt: bytes, user_id: Any) -> str:
    return hashlib.sha256(salt + str(user_id).encode("utf-8", "surrogatepass")).hexdigest()[:32]
