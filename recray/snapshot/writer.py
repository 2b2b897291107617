"""Writes a snapshot: a part and its index for each bucket of users; and publishes it in one step.

A reader sees one snapshot and never a mixture. A late attempt of an older run cannot replace a newer one.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray.dataset.schema import snapshot_schema
from recray.errors import RefusedError
from recray.storage import SNAPSHOT, Manifest, Storage, lease, manifest_digest, read_json, write_json

KIND = SNAPSHOT


def snapshot_path(storage: Storage, as_of_s: int, key: str) -> Path:
    """Path of the snapshot of a nightly run."""
    date = dt.datetime.fromtimestamp(as_of_s, dt.UTC).date()
    return storage.scores / f"dt={date}" / f"run={key}"


def part_name(bucket: int) -> str:
    """File name of a bucket, for Parquet readers."""
    return f"part-{bucket:05d}.parquet"


def index_name(bucket: int) -> str:
    """File name of a bucket's index: the same rows as an Arrow file, which serving maps into memory."""
    return f"index-{bucket:05d}.arrow"


def write_part(
    folder: Path,
    bucket: int,
    user_ids: pa.Array,
    item_ids: pa.Array,
    offsets: pa.Array,
    scores: pa.Array,
    source: list[str],
    state: np.ndarray | None = None,
) -> None:
    """Write one bucket and its index: users in ascending order, their items flat with list `offsets`
    [users + 1].

    state : float32 [users, 2], see `recray.inference.predictor.Recommendations`; NaN: unknown
    """
    columns = [
        user_ids,
        pa.ListArray.from_arrays(offsets, item_ids),
        pa.ListArray.from_arrays(offsets, scores),
        pa.array(source, pa.string()),
        pa.nulls(len(user_ids), pa.list_(pa.float32())) if state is None else _to_lists(state),
    ]

    table = pa.Table.from_arrays(columns, schema=snapshot_schema(user_ids.type, item_ids.type))
    scratch = folder / f".{part_name(bucket)}"
    pq.write_table(table, scratch, compression="zstd")
    scratch.rename(folder / part_name(bucket))

    scratch = folder / f".{index_name(bucket)}"
    with pa.ipc.new_file(scratch, table.schema) as writer:
        # one batch, also without a user
        (batch,) = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        writer.write_batch(batch)
    scratch.rename(folder / index_name(bucket))


def _to_lists(state: np.ndarray) -> pa.Array:
    is_known = np.isfinite(state).all(1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(2 * is_known)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(state[is_known].ravel()), mask=pa.array(~is_known))


def publish(storage: Storage, snapshot: Path, manifest: Manifest) -> bool:
    """Point `LATEST.json` at a snapshot; False if it already does.

    Raises RefusedError if a snapshot of a later as-of time is published, or if this attempt was fenced off.
    """
    entry = {
        "snapshot": snapshot.relative_to(storage.root).as_posix(),
        "as_of_s": manifest["as_of_s"],
        "run_key": manifest["run_key"],
        "manifest_sha256": manifest_digest(snapshot),
    }
    with lease.commit(storage.root):
        if storage.latest.exists():
            published = read_json(storage.latest)
            if published == entry:
                return False
            if published["as_of_s"] > entry["as_of_s"]:
                raise RefusedError(
                    f"{published['snapshot']} is published and is newer than {entry['snapshot']}",
                    f"to publish the older run on purpose, remove {storage.latest} and score again",
                )
        write_json(storage.latest, entry)
    return True
