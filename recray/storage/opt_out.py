"""The opt-out list: users to forget, stored as salted hashes only; read by the endpoint and by prepare.

The list is a file of the workspace that is replaced in one step, so a reader sees the old or the new one.
recray never removes a user from it. A file of the operator with one id per line (`data.exclude_users`) counts
too, as long as it contains a user.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from recray.config import expand_path
from recray.errors import SettingsError
from recray.storage import read_json, write_json

FILE = "forgotten.json"


class ListContent(TypedDict):
    """The content of `FILE`: the salt of the hashes in hex, and the time at which each user was added."""

    salt: str
    users: dict[str, str]


class OptOut:
    """The opt-out list of a workspace. Open it with `OptOut.of`, and read changes with `reload`.

    excluded : the operator's file, None for none
    """

    def __init__(self, path: Path, excluded: Path | None = None) -> None:
        self.path, self.excluded = path, excluded
        self._salt, self._users, self._modified_ns = b"", frozenset[str](), -1.0
        self._excluded_users, self._excluded_modified_ns = frozenset[str](), -1
        self.reload()

    @classmethod
    def of(cls, root: Path, excluded: str | None = None) -> OptOut:
        """The list of a workspace, with `data.exclude_users`. Raises SettingsError for a file that cannot be
        read.
        """
        return cls(root / FILE, None if excluded is None else expand_path(excluded, "data.exclude_users"))

    def reload(self) -> None:
        """Read what was added since: first the list, so that a broken operator's file cannot hide it. Raises
        DamagedArtifactError, SettingsError.
        """
        with contextlib.suppress(FileNotFoundError):
            modified_ns = self.path.stat().st_mtime_ns
            if modified_ns != self._modified_ns:
                content = read_json(self.path)
                self._salt, self._users, self._modified_ns = (
                    bytes.fromhex(content["salt"]),
                    frozenset(content["users"]),
                    modified_ns,
                )
        if self.excluded is not None:
            self._reload_excluded(self.excluded)

    def _reload_excluded(self, excluded: Path) -> None:
        try:
            modified_ns = excluded.stat().st_mtime_ns
            if modified_ns != self._excluded_modified_ns:
                lines = excluded.read_text(encoding="utf-8-sig").splitlines()
                self._excluded_users, self._excluded_modified_ns = (
                    frozenset(line.strip() for line in lines) - {""},
                    modified_ns,
                )
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"data.exclude_users: {excluded} cannot be read: {error}",
                "name a text file with one user id per line",
            ) from None

    def __len__(self) -> int:
        return len(self._users) + len(self._excluded_users)

    def __contains__(self, user_id: Any) -> bool:
        return str(user_id) in self._excluded_users or self._is_listed(user_id)

    def _is_listed(self, user_id: Any) -> bool:
        return bool(self._users) and _hash_user(self._salt, user_id) in self._users

    def mask_members(self, user_ids: Sequence[Any]) -> np.ndarray:
        """Which of some users are on the list, bool [n]."""
        return np.fromiter((user in self for user in user_ids), bool, len(user_ids))

    @property
    def digest(self) -> str | None:
        """Digest of the list; None for an empty one."""
        if not len(self):
            return None
        parts = [*sorted(self._users), *([""] if self._excluded_users else []), *sorted(self._excluded_users)]
        return hashlib.sha256(
            "\n".join(parts).encode("utf-8", "surrogatepass")
            if self._excluded_users
            else "".join(parts).encode()
        ).hexdigest()

    def add(self, user_id: Any) -> bool:
        """Add a user, on disk when it returns; returns whether the user is new."""
        with self._lock():
            self.reload()
            if self._is_listed(user_id):
                return False
            salt = self._salt or os.urandom(32)
            content: ListContent = (
                read_json(self.path) if self.path.exists() else {"salt": salt.hex(), "users": {}}
            )
            content["users"][_hash_user(salt, user_id)] = dt.datetime.now(dt.UTC).isoformat(
                timespec="seconds"
            )
            write_json(self.path, content)
            self.reload()
            return True

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time among replicas and jobs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _hash_user(salt: bytes, user_id: Any) -> str:
    return hashlib.sha256(salt + str(user_id).encode("utf-8", "surrogatepass")).hexdigest()[:32]
