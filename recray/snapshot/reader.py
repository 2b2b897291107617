"""Reading the published snapshot, one user at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray.dataset.reader import bucket_of
from recray.errors import DamagedArtifactError
from recray.schema import USER_ID
from recray.snapshot.writer import KIND, part_name
from recray.storage import Storage, manifest_digest, open_sealed, read_json


@dataclass(frozen=True)
class ScoredUser:
    """One row: items best first, their scores, and the source of the list (`model` or `popular`)."""

    item_ids: list[Any]
    scores: list[float]
    source: str


class Snapshot:
    """An opened snapshot. Parts are read when first asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.key: str = manifest["run_key"]
        self.buckets: int = manifest["buckets"]
        self.as_of_s: int = manifest["as_of_s"]
        self.k: int = manifest["k"]
        self._parts: dict[int, tuple[np.ndarray, pa.Table]] = {}
        self._lock = threading.Lock()

    @classmethod
    def latest(cls, storage: Storage) -> Snapshot:
        """The published snapshot, after every file was verified. Raises MissingArtifactError, DamagedArtifactError."""
        entry = read_json(storage.latest)
        path = storage.root / entry["snapshot"]
        manifest = open_sealed(path, KIND)
        if manifest_digest(path) != entry["manifest_sha256"]:
            raise DamagedArtifactError(f"{path} is not the snapshot that was published", "score the night again")
        return cls(path, manifest)

    def find(self, user_id: Any) -> ScoredUser | None:
        """The user's row, or None. An id that does not fit the snapshot's type is unknown."""
        user_id = self.as_user(user_id)
        if user_id is None:
            return None
        users, table = self._part(int(bucket_of([user_id], self.buckets)[0]))
        row = int(np.searchsorted(users, user_id))
        if row == len(users) or users[row] != user_id:
            return None
        return ScoredUser(*(table[name][row].as_py() for name in ("item_ids", "scores", "source")))

    def as_user(self, user_id: Any) -> Any:
        if self.manifest["user_type"] == "string":
            return str(user_id)
        try:
            return int(user_id)
        except (TypeError, ValueError):
            return None

    def _part(self, bucket: int) -> tuple[np.ndarray, pa.Table]:
        with self._lock:
            if bucket not in self._parts:
                table = pq.read_table(self.path / part_name(bucket)).combine_chunks()
                self._parts[bucket] = (table[USER_ID].to_numpy(), table)
            return self._parts[bucket]
