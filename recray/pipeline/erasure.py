"""Forgets a user: deletes the user's events everywhere, and publishes the run again without the user.

The user is added to the opt-out list first, so new events are not kept. Published data is copied without the
user, published, and then the old copy is removed. A job that is killed at any point can be repeated, and the
endpoint always has a complete run to serve.
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

from recray.dataset.ids import to_typed_id
from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import Dataset, assign_bucket
from recray.dataset.schema import USER_ID
from recray.errors import ArtifactError
from recray.events.collect import KIND as COLLECTED
from recray.events.log import Log
from recray.snapshot.reader import Snapshot
from recray.snapshot.writer import KIND as SNAPSHOT
from recray.snapshot.writer import index_name, part_name, publish, snapshot_path
from recray.storage import Storage, immutable_directory, key_of, lease, open_immutable, refresh_manifest
from recray.storage.opt_out import OptOut

SEAL = {"format_version", "kind", "run_key", "files", "sha256"}  # fields of a manifest that a copy renews


@dataclass
class ErasureReport:
    """What was deleted: entries of the event store, rows of collected and quarantined files, artifacts that
    were replaced or removed.
    """

    new: bool = False
    log: int = 0
    rows: int = 0
    artifacts: list[str] = field(default_factory=list)


def forget(storage: Storage, user_id: str, log: Log | None) -> ErasureReport:
    """Delete a user from everything in a workspace, and from the event store (None: it is unavailable, or
    there is none).

    Raises StateError, and the error of a disk that cannot be written.
    """
    erased = ErasureReport(new=OptOut.of(storage.root).add(user_id))
    lease.commit_point("forget:listed")
    erased.log = 0 if log is None else log.forget_user(user_id)
    for path in storage.collected.glob("[!.]*"):
        erased.rows += _erase_from_tables(path, user_id, COLLECTED)
    for path in (storage.root / "quarantine").glob("*"):
        erased.rows += _erase_from_tables(path, user_id, None)
    lease.commit_point("forget:tables")
    shutil.rmtree(storage.staging, ignore_errors=True)
    _publish_without(storage, user_id, erased)
    lease.commit_point("forget:published")
    for path in [*_find_datasets(storage.root / "datasets", user_id), *_find_snapshots(storage, user_id)]:
        _remove(path)
        erased.artifacts.append(str(path.relative_to(storage.root)))
    return erased


def _erase_from_tables(folder: Path, user_id: str, kind: str | None) -> int:
    """Rewrite the Parquet files of a folder without the user's rows, each in one step; returns the number of
    deleted rows.

    kind : of an immutable artifact, whose manifest is renewed; None: a folder without manifest
    """
    dropped, request_ids = 0, set[str]()
    for file in sorted(folder.glob("[!.]*.parquet")):  # decisions before outcomes
        table = pq.read_table(file)
        keep = np.ones(len(table), bool)
        if USER_ID in table.column_names:
            keep &= pc.fill_null(pc.not_equal(table[USER_ID].cast(pa.string()), user_id), True).to_numpy()
        if file.name == "decisions.parquet":
            request_ids = set(table.filter(pa.array(~keep))["request_id"].to_pylist())
        if file.name == "outcomes.parquet":
            keep &= ~np.isin(table["request_id"].to_pylist(), list(request_ids))
        if "line" in table.column_names:  # invalid lines that may name the user
            keep &= pc.fill_null(pc.invert(pc.match_substring(table["line"], user_id)), True).to_numpy()
        if not keep.all():
            dropped += int((~keep).sum())
            scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
            pq.write_table(table.filter(pa.array(keep)), scratch)
            os.replace(scratch, file)
    for leftover in folder.glob(".*.parquet.*"):  # of an attempt that was killed
        leftover.unlink()
    if kind is not None:
        refresh_manifest(folder)  # always: an earlier attempt may have been killed before this line
    return dropped


def _publish_without(storage: Storage, user_id: str, erased: ErasureReport) -> None:
    """Publish a copy of the published run without the user, if the user has a row there."""
    if not storage.latest.exists():
        return
    try:
        snapshot = Snapshot.latest(storage)
        dataset = Dataset.open(storage.root / snapshot.manifest["dataset"])
    except ArtifactError:
        return  # nothing published names the user; the next run replaces both
    if snapshot.find(user_id) is None and not _has_user(dataset, user_id):
        return

    manifest = snapshot.manifest
    new_dataset = _copy_dataset_without(storage, dataset, user_id)
    key = key_of("forget", snapshot.key, OptOut.of(storage.root).digest)
    path = snapshot_path(storage, snapshot.as_of_s, key)
    fields = {name: value for name, value in manifest.items() if name not in SEAL}
    fields |= {
        "dataset": new_dataset.path.relative_to(storage.root).as_posix(),
        "dataset_digest": new_dataset.digest,
    }
    bucket = assign_bucket(user_id, snapshot.buckets)
    fields["users"] -= snapshot.find(user_id) is not None

    if not path.exists():
        with immutable_directory(path, SNAPSHOT, key, fields) as folder:
            for name in manifest["files"]:
                if name in (part_name(bucket), index_name(bucket)):
                    _copy_without_user(snapshot.path / name, folder / name, user_id)
                else:
                    _copy_file(snapshot.path / name, folder / name)

    lease.commit_point("forget:written")
    publish(storage, path, open_immutable(path, SNAPSHOT, verify=False))
    erased.artifacts += [str(artifact.relative_to(storage.root)) for artifact in (path, new_dataset.path)]
    if snapshot.path != path:
        _remove(snapshot.path)
        _remove(dataset.path)


def _copy_dataset_without(storage: Storage, dataset: Dataset, user_id: str) -> Dataset:
    """A copy of the dataset without the user's row, under another key. Counts of items do not change."""
    if not _has_user(dataset, user_id):
        return dataset
    key = key_of("forget", dataset.key, OptOut.of(storage.root).digest)
    path = storage.dataset(key)
    if not path.exists():
        number = assign_bucket(user_id, dataset.n_shards)
        shard = dataset.shard(number)
        row = shard.find(_to_dataset_id(dataset, user_id))
        assert row is not None
        fields = {name: value for name, value in dataset.manifest.items() if name not in SEAL}
        fields["users"] -= 1
        fields["events"] -= int(shard.offsets[row + 1] - shard.offsets[row])
        with immutable_directory(path, DATASET, key, fields) as folder:
            for name in dataset.manifest["files"]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if name == f"shards/{number:05d}.arrow":
                    _copy_without_user(dataset.path / name, folder / name, user_id)
                elif name in (f"splits/{number:05d}.npy", f"held_out/{number:05d}.npy"):
                    np.save(folder / name, np.delete(np.load(dataset.path / name), row, 0))
                else:
                    _copy_file(dataset.path / name, folder / name)
    return Dataset.open(path)


def _copy_without_user(source: Path, target: Path, user_id: str) -> None:
    """Copy a file with one row per user, Parquet or Arrow, without one user's row."""
    if source.suffix == ".parquet":
        table = pq.read_table(source)
        pq.write_table(
            table.filter(pc.not_equal(table[USER_ID].cast(pa.string()), user_id)), target, compression="zstd"
        )
        return
    with pa.ipc.open_file(pa.memory_map(str(source))) as reader:
        table = reader.read_all()
    table = table.filter(pc.not_equal(table[USER_ID].cast(pa.string()), user_id)).combine_chunks()
    with pa.ipc.new_file(target, table.schema) as writer:
        (batch,) = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        writer.write_batch(batch)


def _copy_file(source: Path, target: Path) -> None:
    """The same file under another name, linked if the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _to_dataset_id(dataset: Dataset, user_id: str) -> Any:
    return to_typed_id(user_id, is_integral=dataset.user_type != pa.string())


def _has_user(dataset: Dataset, user_id: str) -> bool:
    dataset_id = _to_dataset_id(dataset, user_id)
    return dataset_id is not None and dataset.user_history(dataset_id) is not None


def _find_datasets(folder: Path, user_id: str) -> Iterator[Path]:
    """Datasets that contain the user, or cannot be read."""

    def has_user(path: Path) -> bool:
        return _has_user(Dataset.open(path), user_id)

    yield from (
        path for path in folder.glob("*") if path.name.startswith(".") or _has_or_unreadable(has_user, path)
    )


def _find_snapshots(storage: Storage, user_id: str) -> Iterator[Path]:
    """Snapshots that contain the user, or cannot be read."""

    def has_user(path: Path) -> bool:
        return Snapshot(path, open_immutable(path, SNAPSHOT, verify=False)).find(user_id) is not None

    yield from (
        path
        for path in storage.scores.glob("dt=*/*")
        if path.name.startswith(".") or _has_or_unreadable(has_user, path)
    )


def _has_or_unreadable(has_user: Callable[[Path], bool], path: Path) -> bool:
    try:
        return has_user(path)
    except (ArtifactError, OSError, pa.ArrowException):
        return True


def _remove(path: Path) -> None:
    """Remove a folder. It is renamed to a scratch name first, so that a half-removed one is cleaned up
    later.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with lease.commit():
        os.rename(path, scratch)
    shutil.rmtree(scratch, ignore_errors=True)
