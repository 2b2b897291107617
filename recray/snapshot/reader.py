"""Reads the published snapshot, one user at a time."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recray.dataset.ids import to_typed_id
from recray.dataset.reader import assign_bucket
from recray.dataset.schema import USER_ID
from recray.errors import DamagedArtifactError
from recray.snapshot.writer import KIND, index_name, part_name
from recray.storage import Manifest, Storage, manifest_digest, open_immutable


@dataclass(frozen=True)
class ScoredUser:
    """One row: items best first, their scores, the source of the list (`model` or `popular`), and the state
    that a policy observes, if known.
    """

    item_ids: list[Any]
    scores: list[float]
    source: str
    state: list[float] | None


class Snapshot:
    """An opened snapshot. A bucket's index is mapped into memory at its first use."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.key: str = manifest["run_key"]
        self.buckets: int = manifest["buckets"]
        self.as_of_s: int = manifest["as_of_s"]
        self.k: int = manifest["k"]
        self._indexes: dict[int, pa.RecordBatch] = {}
        self._lock = threading.Lock()

    @classmethod
    def latest(cls, storage: Storage) -> Snapshot:
        """The published snapshot, after its index files were verified. Raises MissingArtifactError,
        DamagedArtifactError.
        """
        path, sha256 = storage.read_latest()
        manifest = open_immutable(path, KIND, verify=_is_served)
        if manifest_digest(path) != sha256:
            raise DamagedArtifactError(
                f"{path} is not the snapshot that was published", "repeat `recray score`"
            )
        return cls(path, manifest)

    @classmethod
    def create_empty(cls, storage: Storage, manifest: Manifest) -> Snapshot:
        """A snapshot without users, for serving where none can be read. `manifest`: as a snapshot's, without
        its files.
        """
        return cls(storage.scores, {**manifest, "run_key": "", "buckets": 1, "k": 0, "users": 0, "files": {}})

    def find(self, user_id: Any) -> ScoredUser | None:
        """The user's row, or None. An id that does not fit the snapshot's type is unknown."""
        user_id = self.to_user_id(user_id)
        if user_id is None or not self.manifest["users"]:
            return None
        index = self._index(assign_bucket(user_id, self.buckets))
        users = index[USER_ID]
        row = bisect_left(range(len(users)), user_id, key=lambda row: users[row].as_py())
        if row == len(users) or users[row].as_py() != user_id:
            return None
        return ScoredUser(*(index[name][row].as_py() for name in ("item_ids", "scores", "source", "state")))

    def to_user_id(self, user_id: Any) -> Any:
        """A user's id in the type of the event log; None if it does not fit."""
        return to_typed_id(user_id, is_integral=self.manifest["user_type"] != "string")

    def _index(self, bucket: int) -> pa.RecordBatch:
        with self._lock:
            if bucket not in self._indexes:
                self._indexes[bucket] = self._open(bucket)
            return self._indexes[bucket]

    def _open(self, bucket: int) -> pa.RecordBatch:
        if index_name(bucket) in self.manifest["files"]:
            return pa.ipc.open_file(pa.memory_map(str(self.path / index_name(bucket)))).get_batch(0)
        # snapshots of 0.1.0 have no index
        table = pq.read_table(self.path / part_name(bucket)).combine_chunks()
        return pa.RecordBatch.from_arrays(
            [column.combine_chunks() for column in table.columns], schema=table.schema
        )


def _is_served(name: str) -> bool:
    return not name.startswith("part-")
