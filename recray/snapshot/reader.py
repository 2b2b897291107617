"""Reads the published snapshot, one user at a time."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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


class _Bucket:
    """The rows of one bucket, in order of user ids. Numbers are read through NumPy, ten times as fast as
    one by one through Arrow.
    """

    def __init__(self, rows: pa.RecordBatch) -> None:
        self._users = rows[USER_ID]
        self._user_numbers = self._users.to_numpy() if pa.types.is_integer(self._users.type) else None
        self._items, self._scores = _Lists(rows["item_ids"]), _Lists(rows["scores"])
        self._sources, self._states = rows["source"], rows["state"]

    def find(self, user_id: Any) -> ScoredUser | None:
        """The row of a user, an id in the column's type; None for an unknown one."""
        users = self._users
        if self._user_numbers is not None:
            row = int(np.searchsorted(self._user_numbers, user_id))
        else:
            row = bisect_left(range(len(users)), user_id, key=lambda row: users[row].as_py())
        if row == len(users) or users[row].as_py() != user_id:
            return None
        source, state = self._sources[row].as_py(), self._states[row].as_py()
        return ScoredUser(self._items.read(row), self._scores.read(row), source, state)


class _Lists:
    """A column of lists, read one row at a time."""

    def __init__(self, lists: pa.ListArray) -> None:
        self._offsets, self._values = lists.offsets.to_numpy(), lists.values
        is_text = not (
            pa.types.is_integer(lists.type.value_type) or pa.types.is_floating(lists.type.value_type)
        )
        self._numbers = None if is_text or lists.values.null_count else lists.values.to_numpy()

    def read(self, row: int) -> list[Any]:
        first, last = int(self._offsets[row]), int(self._offsets[row + 1])
        if self._numbers is not None:
            return list(self._numbers[first:last].tolist())
        return list(self._values[first:last].to_pylist())


class Snapshot:
    """An opened snapshot. A bucket's index is mapped into memory at its first use."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.key: str = manifest["run_key"]
        self.buckets: int = manifest["buckets"]
        self.as_of_s: int = manifest["as_of_s"]
        self.k: int = manifest["k"]
        self._buckets: dict[int, _Bucket] = {}
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
        return self._bucket(assign_bucket(user_id, self.buckets)).find(user_id)

    def to_user_id(self, user_id: Any) -> Any:
        """A user's id in the type of the event log; None if it does not fit."""
        return to_typed_id(user_id, is_integral=self.manifest["user_type"] != "string")

    def _bucket(self, number: int) -> _Bucket:
        with self._lock:
            if number not in self._buckets:
                self._buckets[number] = _Bucket(self._open(number))
            return self._buckets[number]

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
