"""Forgetting a user: nothing that recray keeps of the user's events is left, and what is published goes on without.

The user is on the opt-out list first, so whatever comes meanwhile is not kept. What is served is written anew beside the old, published, and
then the old is removed; so a job that is killed anywhere, and repeated, ends right, and the endpoint always finds a whole night.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray import lease
from recray.dataset.ids import as_id
from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import Dataset, bucket_of_one
from recray.errors import ArtifactError
from recray.optout import OptOut
from recray.schema import USER_ID
from recray.snapshot.reader import Snapshot
from recray.snapshot.writer import KIND as SNAPSHOT
from recray.snapshot.writer import index_name, part_name, publish, snapshot_path
from recray.state.collect import KIND as COLLECTED
from recray.state.log import Log
from recray.storage import Storage, key_of, open_sealed, reseal, sealed_directory

SEAL = {"format_version", "kind", "run_key", "files", "sha256"}  # of a manifest, which is written anew


@dataclass
class Erased:
    """What was dropped: entries of the log, rows of collected and quarantined files, artifacts that were written anew or removed."""

    new: bool = False
    log: int = 0
    rows: int = 0
    artifacts: list[str] = field(default_factory=list)


def forget(storage: Storage, user_id: str, log: Log | None) -> Erased:
    """Drop a user from everything under a root, and from the log (None: it is away, or there is none).

    Raises StateError, and what a disk that takes nothing raises.
    """
    found = Erased(new=OptOut.of(storage.root).add(user_id))
    lease.commit_point("forget:listed")
    found.log = 0 if log is None else log.forget_user(user_id)
    for path in storage.collected.glob("[!.]*"):
        found.rows += _from_tables(path, user_id, COLLECTED)
    for path in (storage.root / "quarantine").glob("*"):
        found.rows += _from_tables(path, user_id, None)
    lease.commit_point("forget:tables")
    shutil.rmtree(storage.staging, ignore_errors=True)
    _publish_without(storage, user_id, found)
    lease.commit_point("forget:published")
    for path in [*_holding(storage.root / "datasets", user_id), *_scored(storage, user_id)]:
        _remove(path)
        found.artifacts.append(str(path.relative_to(storage.root)))
    return found


def _from_tables(folder: Path, user_id: str, kind: str | None) -> int:
    """Rewrite the Parquet files of a folder without the user's rows, each in one step; how many rows went.

    kind : of a sealed folder, which is sealed anew; None: it is not sealed
    """
    dropped, asked = 0, set[str]()
    for file in sorted(folder.glob("[!.]*.parquet")):  # decisions before outcomes
        table = pq.read_table(file)
        keep = np.ones(len(table), bool)
        if USER_ID in table.column_names:
            keep &= pc.fill_null(pc.not_equal(table[USER_ID].cast(pa.string()), user_id), True).to_numpy()
        if file.name == "decisions.parquet":
            asked = set(table.filter(pa.array(~keep))["request_id"].to_pylist())
        if file.name == "outcomes.parquet":
            keep &= ~np.isin(table["request_id"].to_pylist(), list(asked))
        if "line" in table.column_names:  # of a file that could not be read: what may name the user goes
            keep &= pc.fill_null(pc.invert(pc.match_substring(table["line"], user_id)), True).to_numpy()
        if not keep.all():
            dropped += int((~keep).sum())
            scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
            pq.write_table(table.filter(pa.array(keep)), scratch)
            os.replace(scratch, file)
    for left in folder.glob(".*.parquet.*"):  # by an attempt that was killed
        left.unlink()
    if kind is not None:
        reseal(folder)  # also where an attempt was killed before it came to this
    return dropped


def _publish_without(storage: Storage, user_id: str, found: Erased) -> None:
    """Publish the night without the user, where the published one has the user's row."""
    if not storage.latest.exists():
        return
    try:
        snapshot = Snapshot.latest(storage)
        dataset = Dataset.open(storage.root / snapshot.manifest["dataset"])
    except ArtifactError:
        return  # nothing is served that could name the user; the next night makes both anew
    if snapshot.find(user_id) is None and not _has(dataset, user_id):
        return
    manifest = snapshot.manifest
    without = _dataset_without(storage, dataset, user_id)
    key = key_of("forget", snapshot.key, OptOut.of(storage.root).digest)
    path = snapshot_path(storage, snapshot.as_of_s, key)
    fields = {name: value for name, value in manifest.items() if name not in SEAL}
    fields |= {"dataset": without.path.relative_to(storage.root).as_posix(), "dataset_digest": without.digest}
    bucket = bucket_of_one(user_id, snapshot.buckets)
    fields["users"] -= snapshot.find(user_id) is not None
    if not path.exists():
        with sealed_directory(path, SNAPSHOT, key, fields) as folder:
            for name in manifest["files"]:
                if name in (part_name(bucket), index_name(bucket)):
                    _without(snapshot.path / name, folder / name, user_id)
                else:
                    _same(snapshot.path / name, folder / name)
    lease.commit_point("forget:written")
    publish(storage, path, open_sealed(path, SNAPSHOT, verify=False))
    found.artifacts += [str(one.relative_to(storage.root)) for one in (path, without.path)]
    if snapshot.path != path:
        _remove(snapshot.path)
        _remove(dataset.path)


def _dataset_without(storage: Storage, dataset: Dataset, user_id: str) -> Dataset:
    """The dataset under another key, without the user's row; counts of items stay those that were counted."""
    if not _has(dataset, user_id):
        return dataset
    key = key_of("forget", dataset.key, OptOut.of(storage.root).digest)
    path = storage.dataset(key)
    if not path.exists():
        number = bucket_of_one(user_id, dataset.n_shards)
        shard = dataset.shard(number)
        row = shard.find(_typed(dataset, user_id))
        assert row is not None
        fields = {name: value for name, value in dataset.manifest.items() if name not in SEAL}
        fields["users"] -= 1
        fields["events"] -= int(shard.offsets[row + 1] - shard.offsets[row])
        with sealed_directory(path, DATASET, key, fields) as folder:
            for name in dataset.manifest["files"]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if name == f"shards/{number:05d}.arrow":
                    _without(dataset.path / name, folder / name, user_id)
                elif name in (f"splits/{number:05d}.npy", f"held_out/{number:05d}.npy"):
                    np.save(folder / name, np.delete(np.load(dataset.path / name), row, 0))
                else:
                    _same(dataset.path / name, folder / name)
    return Dataset.open(path)


def _without(source: Path, target: Path, user_id: str) -> None:
    """A file of rows by user, Parquet or Arrow, without one user's."""
    if source.suffix == ".parquet":
        table = pq.read_table(source)
        pq.write_table(table.filter(pc.not_equal(table[USER_ID].cast(pa.string()), user_id)), target, compression="zstd")
        return
    with pa.ipc.open_file(pa.memory_map(str(source))) as reader:
        table = reader.read_all()
    table = table.filter(pc.not_equal(table[USER_ID].cast(pa.string()), user_id)).combine_chunks()
    with pa.ipc.new_file(target, table.schema) as writer:
        (batch,) = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        writer.write_batch(batch)


def _same(source: Path, target: Path) -> None:
    """The same file under another name, without a copy where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _typed(dataset: Dataset, user_id: str) -> Any:
    return as_id(user_id, integral=dataset.user_type != pa.string())


def _has(dataset: Dataset, user_id: str) -> bool:
    typed = _typed(dataset, user_id)
    return typed is not None and dataset.user_history(typed) is not None


def _holding(folder: Path, user_id: str) -> Iterator[Path]:
    """Datasets that have the user, or cannot be read."""

    def holds(path: Path) -> bool:
        return _has(Dataset.open(path), user_id)

    yield from (path for path in folder.glob("*") if path.name.startswith(".") or _unreadable_or(holds, path))


def _scored(storage: Storage, user_id: str) -> Iterator[Path]:
    """Snapshots that have the user, or cannot be read."""

    def holds(path: Path) -> bool:
        return Snapshot(path, open_sealed(path, SNAPSHOT, verify=False)).find(user_id) is not None

    yield from (path for path in storage.scores.glob("dt=*/*") if path.name.startswith(".") or _unreadable_or(holds, path))


def _unreadable_or(holds: Callable[[Path], bool], path: Path) -> bool:
    try:
        return holds(path)
    except (ArtifactError, OSError, pa.ArrowException):
        return True


def _remove(path: Path) -> None:
    """Remove a folder; one that is half removed looks like scratch, which is swept away."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with lease.commit():
        os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
