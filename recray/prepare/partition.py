"""First pass, one Ray task a row group: check the rows, quarantine the bad, scatter the good over the shards of users.

A task writes into a folder of its own and renames it when it is complete, so that a repeated task changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray import schema
from recray.dataset.context import codes
from recray.dataset.reader import bucket_of
from recray.errors import DataError
from recray.prepare.sources import RowGroup, as_id, microseconds, open_parquet
from recray.storage import read_json, write_json

BATCH_ROWS = 131_072
LIVE_POSITION = 1 << 62  # where an order is all that is known, live events come after everything that the owner has
_MIN_US, _MAX_US = 0, 4_102_444_800_000_000  # 1970 to 2100: outside lies a wrong unit


@dataclass(frozen=True)
class PartitionPlan:
    """What every task of the first pass needs to know."""

    columns: dict[str, str]
    types: dict[str, pa.DataType]
    clock: str
    as_of_us: int | None
    shards: int
    staging: Path
    quarantine: Path


@dataclass
class Stats:
    """What the first pass counted: rows = bad + late + events; late rows come after as-of."""

    rows: int = 0
    bad: int = 0
    late: int = 0
    events: int = 0
    last_us: int | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    event_types: dict[str, int] = field(default_factory=dict)

    def add(self, other: Stats) -> None:
        for name in ("rows", "bad", "late", "events"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.reasons, other.reasons), (self.event_types, other.event_types)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        self.saw(other.last_us)

    def saw(self, last_us: int | None) -> None:
        """Take a time into account for `last_us`."""
        if last_us is not None:
            self.last_us = last_us if self.last_us is None else max(last_us, self.last_us)


def partition_row_group(plan: PartitionPlan, group: RowGroup) -> None:
    """Scatter one row group into `plan.staging/<number>/`: an Arrow file a shard, `items.arrow` and `stats.json`."""
    final = plan.staging / f"{group.number:06d}"
    if final.exists():
        return
    scratch = plan.staging / f".{group.number:06d}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir(parents=True)
    stats = Stats()
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    counts: list[pa.Table] = []
    bad: list[pa.Table] = []
    for table, late in _read(plan, group):
        good, rejected = _check(table, plan.clock)
        stats.rows += len(table) + late
        stats.late += late
        bad.append(rejected)
        if plan.as_of_us is not None and plan.clock == schema.TIMESTAMP:
            kept = good.filter(pc.less_equal(good["t"], plan.as_of_us))
            stats.late += len(good) - len(kept)
            good = kept
        if not len(good):
            continue
        if plan.clock == schema.TIMESTAMP:
            stats.saw(pc.max(good["t"]).as_py())
        _count(stats.event_types, good[schema.EVENT])
        counts.append(good.group_by(schema.ITEM_ID).aggregate([([], "count_all")]))
        _scatter(good, plan.shards, scratch, writers)
    for writer in writers.values():
        writer.close()
    rejected = pa.concat_tables(bad)
    stats.bad = len(rejected)
    _count(stats.reasons, rejected["reason"])
    _write_quarantine(plan, group, rejected)
    stats.events = stats.rows - stats.bad - stats.late
    _write_counts(counts, scratch / "items.arrow")
    write_json(scratch / "stats.json", asdict(stats))
    try:
        os.rename(scratch, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(scratch)


def read_stats(plan: PartitionPlan, groups: int) -> Iterator[tuple[Stats, pa.Table]]:
    """Statistics and item counts (item_id, count_all) of every row group, in order."""
    for number in range(groups):
        folder = plan.staging / f"{number:06d}"
        with pa.ipc.open_file(folder / "items.arrow") as reader:
            yield Stats(**read_json(folder / "stats.json")), reader.read_all()


def read_partition(plan: PartitionPlan, groups: int, shard: int) -> pa.Table:
    """Staged events of one shard in the order (file, row)."""
    tables = []
    if not plan.staging.is_dir():
        raise DataError(f"{plan.staging} vanished while it was read", "run one prepare at a time")
    for number in range(groups):
        file = plan.staging / f"{number:06d}" / f"{shard:05d}.arrow"
        if file.exists():
            tables.append(pa.ipc.open_file(pa.memory_map(str(file))).read_all())
    return pa.concat_tables(tables) if tables else staged_schema(plan).empty_table()


def staged_schema(plan: PartitionPlan) -> pa.Schema:
    """Columns of the staged files; `t` is microseconds, a position, or 0."""
    fields = [
        (schema.USER_ID, plan.types[schema.USER_ID]),
        (schema.ITEM_ID, plan.types[schema.ITEM_ID]),
        ("t", pa.int64()),
        (schema.EVENT, pa.string()),
        (schema.VALUE, pa.float32()),
    ]
    if schema.BASKET in plan.types:
        fields.append((schema.BASKET, plan.types[schema.BASKET]))
    fields += [(name, pa.int16()) for name in plan.columns if name.startswith(schema.CONTEXT)]
    return pa.schema(fields)


def _read(plan: PartitionPlan, group: RowGroup) -> Iterator[tuple[pa.Table, int]]:
    """Batches of one row group in the staged columns (`t` is microseconds, a position, or 0), and how many rows were left out of each.

    What was collected has a time, whatever the owner's events have: here the as-of cuts it where `t` is none.
    """
    with open_parquet(group.uri) as file:
        try:
            columns = None if group.live else list(dict.fromkeys(plan.columns.values()))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group.row_group], columns=columns):
                table, rows = pa.table(batch), len(batch)
                if group.live and plan.as_of_us is not None and plan.clock != schema.TIMESTAMP:
                    table = table.filter(pc.less_equal(microseconds(table[schema.TIMESTAMP]), plan.as_of_us))
                staged = _stage(plan, len(table), partial(_live, plan, table) if group.live else partial(_owned, plan, table))
                yield staged, rows - len(table)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{group.uri}: row group {group.row_group} cannot be read: {error}", "write the file again") from None


def _owned(plan: PartitionPlan, batch: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of the owner's in the staged type."""
    found = batch[plan.columns[name]]
    if pa.types.is_dictionary(found.type):
        found = pc.cast(found, found.type.value_type)
    if name == schema.TIMESTAMP:
        return microseconds(found)
    if name in (schema.USER_ID, schema.ITEM_ID, schema.BASKET):
        return as_id(found, plan.types[name], f"column {plan.columns[name]}")
    return found.cast(plan.types[name], safe=name != schema.VALUE)


def _live(plan: PartitionPlan, batch: pa.Table, name: str) -> pa.ChunkedArray:
    """The same column of what was collected from the endpoint; null for an id that the owner's type cannot hold."""
    kind = plan.types[name]
    if name == schema.TIMESTAMP:
        return microseconds(batch[name])
    if name == schema.POSITION:
        return pc.add(batch["number"], LIVE_POSITION)
    if name == schema.BASKET:
        return microseconds(batch[schema.TIMESTAMP]).cast(kind)
    if name.startswith(schema.CONTEXT):
        given = [None if text is None else json.loads(text).get(name.removeprefix(schema.CONTEXT)) for text in batch["context"].to_pylist()]
        return pa.chunked_array([[None if one is None else str(one).lower() if isinstance(one, bool) else str(one) for one in given]], kind)
    if name in (schema.USER_ID, schema.ITEM_ID) and pa.types.is_integer(kind):
        return pa.chunked_array([[_integer(text) for text in batch[name].to_pylist()]], kind)
    return batch[name].cast(kind)


def _integer(text: str | None) -> int | None:
    """None for what 64 bits do not hold."""
    try:
        found = int(text or "")
    except ValueError:
        return None
    return found if -(1 << 63) <= found < 1 << 63 else None


def _stage(plan: PartitionPlan, rows: int, column: Callable[[str], pa.ChunkedArray]) -> pa.Table:
    staged = {name: column(name) for name in (schema.USER_ID, schema.ITEM_ID)}
    staged["t"] = column(plan.clock) if plan.clock in plan.columns else pa.array(np.zeros(rows, np.int64))
    if schema.EVENT in plan.columns:
        staged[schema.EVENT] = pc.fill_null(column(schema.EVENT), schema.DEFAULT_EVENT)
    else:
        staged[schema.EVENT] = pa.array([schema.DEFAULT_EVENT]).take(pa.array(np.zeros(rows, np.int8)))
    staged[schema.VALUE] = column(schema.VALUE) if schema.VALUE in plan.columns else pa.array(np.ones(rows, np.float32))
    if schema.BASKET in plan.columns:
        staged[schema.BASKET] = column(schema.BASKET)
    for name in plan.columns:
        if name.startswith(schema.CONTEXT):
            staged[name] = pa.array(codes(name.removeprefix(schema.CONTEXT), column(name)))
    return pa.table(staged)


def _check(table: pa.Table, clock: str) -> tuple[pa.Table, pa.Table]:
    """Good rows, and bad rows with the column `reason` (the first that applies)."""
    t = table["t"]
    # a value that is missing stands for 1; one that is not a number is an error
    value = table[schema.VALUE]
    broken = pc.and_(pc.is_valid(value), pc.invert(pc.fill_null(pc.is_finite(value), True)))
    checks = {
        "user_id is null": pc.is_null(table[schema.USER_ID]),
        "item_id is null": pc.is_null(table[schema.ITEM_ID]),
        "time is null": pc.is_null(t),
        "value is not finite": broken,
    }
    if clock == schema.TIMESTAMP:
        checks["time is outside 1970 to 2100"] = pc.fill_null(pc.or_(pc.less(t, _MIN_US), pc.greater(t, _MAX_US)), False)
    reason: pa.ChunkedArray | pa.Scalar = pa.scalar(None, pa.string())
    for text, failed in reversed(checks.items()):
        reason = pc.if_else(failed, text, reason)
    bad = pc.is_valid(reason)
    rejected = table.append_column("reason", reason).filter(bad)
    good = table.filter(pc.invert(bad))
    where = good.schema.get_field_index(schema.VALUE)
    return good.set_column(where, schema.VALUE, pc.fill_null(good[schema.VALUE], 1.0)), rejected


def _scatter(good: pa.Table, shards: int, folder: Path, writers: dict[int, pa.ipc.RecordBatchFileWriter]) -> None:
    users = good[schema.USER_ID].combine_chunks().dictionary_encode()
    if isinstance(users, pa.ChunkedArray):
        users = users.combine_chunks()
    bucket = bucket_of(users.dictionary.to_pylist(), shards)[users.indices.to_numpy()]
    order = np.argsort(bucket, kind="stable")
    edges = np.searchsorted(bucket[order], np.arange(shards + 1))
    good = good.take(pa.array(order)).combine_chunks()
    for shard in np.flatnonzero(np.diff(edges)).tolist():
        if shard not in writers:
            writers[shard] = pa.ipc.new_file(folder / f"{shard:05d}.arrow", good.schema)
        writers[shard].write_table(good.slice(edges[shard], edges[shard + 1] - edges[shard]))


def _count(into: dict[str, int], column: pa.ChunkedArray) -> None:
    for entry in column.value_counts().to_pylist():
        into[entry["values"]] = into.get(entry["values"], 0) + entry["counts"]


def _write_counts(counts: list[pa.Table], path: Path) -> None:
    table = pa.concat_tables(counts) if counts else pa.table({schema.ITEM_ID: [], "count_all": pa.array([], pa.int64())})
    if counts:
        table = table.group_by(schema.ITEM_ID).aggregate([("count_all", "sum")]).rename_columns([schema.ITEM_ID, "count_all"])
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def _write_quarantine(plan: PartitionPlan, group: RowGroup, rejected: pa.Table) -> None:
    if not len(rejected):
        return
    plan.quarantine.mkdir(parents=True, exist_ok=True)
    scratch = plan.quarantine / f".{group.number:06d}.{uuid.uuid4().hex[:8]}"
    pq.write_table(rejected.append_column("file", pa.array([group.uri] * len(rejected))), scratch)
    os.rename(scratch, plan.quarantine / f"{group.number:06d}.parquet")
