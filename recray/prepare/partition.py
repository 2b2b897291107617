"""First pass, one Ray task a row group: check the rows, quarantine the bad, scatter the good over the shards of users.

A task writes into a folder of its own and renames it when it is complete, so that a repeated task changes nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from recray import schema
from recray.dataset.context import codes
from recray.dataset.ids import CANONICAL, canonical_integer
from recray.dataset.reader import bucket_of, nothing_learned_of
from recray.errors import DataError
from recray.optout import OptOut
from recray.prepare.files import InputFile
from recray.prepare.formats import NULL_IDS, NULL_WORDS, POINT_ZERO, Batch, open_file
from recray.prepare.sources import RowGroup, as_id, is_blank
from recray.prepare.times import MAX_US, OUTSIDE, UNDER_US, TimeRule, signed
from recray.storage import read_json, write_json

BATCH_ROWS = 131_072
LARGEST = (1 << 63) - 1
LIVE_POSITION = 1 << 62  # where an order is all that is known, live events come after everything that the owner has
FUTURE = "time is in the future"
WORDS = re.compile(r"[\s,;|\t\"'{}\[\]:]+")  # what stands between the words of a line that is no row
P = "p"  # staged column: what orders events of one time
ROW = "row"  # staged column: a digest of what the others hold less exactly, so that rows which differ are told apart


@dataclass(frozen=True)
class PartitionPlan:
    """What every task of the first pass needs to know."""

    columns: dict[str, str]
    types: dict[str, pa.DataType]
    clock: str
    times: TimeRule
    as_of_us: int | None
    future_us: int | None  # a time from here on has not come yet; None: the as-of says what counts
    min_value: float | None
    remembers_low: bool  # whether the owner's events below it are staged, so that the endpoint's copies of them are known as such
    loses: bool  # whether there is a column ROW
    pointed: tuple[str, ...]  # ids that text files write as 7.0
    whole_items: bool  # whether data.items alone says which items there are, and has whole numbers
    described_by: dict[str, Any] | None  # the split whose held-out users alone say which types of events there are, and when the data end
    default_event: str
    opted_out: OptOut
    first_live: int  # number of the first row group that was collected from the endpoint
    shards: int
    staging: Path
    quarantine: Path

    @property
    def has_order(self) -> bool:
        """Whether a position orders what happened at one time."""
        return self.clock == schema.TIMESTAMP and schema.POSITION in self.columns


@dataclass
class Stats:
    """What the first pass counted: rows = bad + opted_out + late + low + events; late rows come after as-of, low ones are worth less than
    `data.min_value`.

    last_us : the newest time, of the users who describe the data (`PartitionPlan.described_by`)
    clocked : whether any time of theirs has a time of day
    event_types : events of each type, theirs
    negative : events that are worth 0 or less
    words : events whose user or item is called like nothing (`NULL_IDS`)
    padded : ids that begin or end with a blank
    """

    rows: int = 0
    bad: int = 0
    late: int = 0
    low: int = 0
    opted_out: int = 0
    events: int = 0
    negative: int = 0
    words: int = 0
    padded: int = 0
    last_us: int | None = None
    clocked: bool = False
    reasons: dict[str, int] = field(default_factory=dict)
    event_types: dict[str, int] = field(default_factory=dict)

    def add(self, other: Stats) -> None:
        for name in ("rows", "bad", "late", "low", "opted_out", "events", "negative", "words", "padded"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.clocked |= other.clocked
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
    for staged in _read(plan, group):
        good, rejected, clocked = _check(plan, staged)
        if len(plan.opted_out):
            gone, theirs_bad = (_by_user(rows, lambda users: plan.opted_out.among(users.to_pylist())) for rows in (good, rejected))
            if "line" in rejected.column_names:
                lines = rejected["line"].to_pylist()
                theirs_bad |= np.array([line is not None and plan.opted_out.among(WORDS.split(line)).any() for line in lines], bool)
            stats.opted_out += int(gone.sum() + theirs_bad.sum())
            good, clocked, rejected = good.filter(pa.array(~gone)), clocked[~gone], rejected.filter(pa.array(~theirs_bad))
        described = describing(plan, good)
        stats.clocked |= bool(clocked[described].any())
        stats.rows += len(staged.table) + len(staged.broken)
        bad.append(rejected)
        if plan.as_of_us is not None:
            kept = good["t"].to_numpy() <= plan.as_of_us
            stats.late += int((~kept).sum())
            good, described = good.filter(pa.array(kept)), described[kept]
        told = good
        if plan.min_value is not None:
            kept = good[schema.VALUE].to_numpy() >= np.float32(plan.min_value)
            stats.low += int((~kept).sum())
            good, described = good.filter(pa.array(kept)), described[kept]
        _scatter(told if plan.remembers_low and not group.live else good, plan.shards, scratch, writers)
        if not len(good):
            continue
        theirs = good if described.all() else good.filter(pa.array(described))
        if plan.clock == schema.TIMESTAMP:
            stats.saw(pc.max(theirs["t"]).as_py())
        if schema.VALUE in plan.columns:
            stats.negative += int((good[schema.VALUE].to_numpy() <= 0).sum())
        stats.words += _count_ids(good, lambda text: pc.is_in(text, pa.array(NULL_IDS)))
        stats.padded += _count_ids(good, lambda text: pc.not_equal(pc.utf8_trim_whitespace(text), text))
        _count(stats.event_types, theirs[schema.EVENT])
        counts.append(good.group_by(schema.ITEM_ID).aggregate([([], "count_all")]))
    for writer in writers.values():
        writer.close()
    rejected = pa.concat_tables(bad, promote_options="default")
    stats.bad = len(rejected)
    _count(stats.reasons, rejected["reason"])
    _write_quarantine(plan, group, rejected)
    stats.events = stats.rows - stats.bad - stats.opted_out - stats.late - stats.low
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


def example(quarantine: Path) -> str:
    """One bad row, for a person: what the file says, and which file that is."""
    for part in sorted(quarantine.glob("[!.]*.parquet")):
        row = {name: value for name, value in pq.read_table(part).slice(0, 1).to_pylist()[0].items() if name not in ("file", "reason", ROW)}
        if row.get("line") is not None:
            said = repr(row["line"][:200])
        else:
            given = {name.removeprefix("given_"): value for name, value in row.items() if name.startswith("given_")}
            said = ", ".join(
                f"{name} {value!r}" for name, value in {**{name: row[name] for name in (schema.USER_ID, schema.ITEM_ID)}, **given}.items()
            )
        return f"{said} in {pq.read_table(part, columns=['file'])['file'][0].as_py()}"
    return "none that was kept"


def read_partition(plan: PartitionPlan, groups: int, shard: int) -> pa.Table:
    """Staged events of one shard in the order (file, row), with the column `live`."""
    tables = []
    if not plan.staging.is_dir():
        raise DataError(f"{plan.staging} vanished while it was read", "run one prepare at a time")
    for number in range(groups):
        file = plan.staging / f"{number:06d}" / f"{shard:05d}.arrow"
        if file.exists():
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            tables.append(table.append_column("live", pa.repeat(number >= plan.first_live, len(table))))
    return pa.concat_tables(tables) if tables else staged_schema(plan).append(pa.field("live", pa.bool_())).empty_table()


def staged_schema(plan: PartitionPlan) -> pa.Schema:
    """Columns of the staged files; `t` is microseconds, a position, or 0."""
    fields = [
        (schema.USER_ID, plan.types[schema.USER_ID]),
        (schema.ITEM_ID, plan.types[schema.ITEM_ID]),
        ("t", pa.int64()),
        (schema.EVENT, pa.string()),
        (schema.VALUE, pa.float32()),
    ]
    fields += [(name, plan.types[name]) for name in (schema.BASKET, schema.EVENT_ID) if name in plan.types]
    if plan.has_order:
        fields.append((P, pa.int64()))
    if plan.loses:
        fields.append((ROW, pa.uint64()))
    fields += [(name, pa.int16()) for name in plan.columns if name.startswith(schema.CONTEXT)]
    return pa.schema(fields)


@dataclass
class _Staged:
    """A batch in the staged columns, and what is wrong with its rows: by reason, bool [rows].

    given : what the file says in the columns that could not be read, by column
    clocked : which times have a time of day
    broken : lines of the file that are no rows
    """

    table: pa.Table
    wrong: dict[str, np.ndarray]
    given: dict[str, pa.ChunkedArray]
    clocked: np.ndarray
    broken: list[str]


def _read(plan: PartitionPlan, group: RowGroup) -> Iterator[_Staged]:
    """Batches of one row group. Raises DataError for a file that cannot be read."""
    with open_file(group.file) as file:
        columns = None if group.live else list(plan.columns.values())
        for batch in file.batches(group.part, BATCH_ROWS, columns):
            staged = (_Live if group.live else _Owned)(plan, batch, group.file)
            yield staged.stage()


class _Owned:
    """Rows of the owner's, column by column in the staged types."""

    def __init__(self, plan: PartitionPlan, batch: Batch, file: InputFile) -> None:
        self.plan, self.rows, self.file, self.broken = plan, batch.rows, file, list(batch.broken)
        self.wrong: dict[str, np.ndarray] = {}
        self.given: dict[str, pa.ChunkedArray] = {}
        self.clocked = np.zeros(len(self.rows), bool)
        if file.format == "jsonl":
            self._without_odd(batch.odd)

    def _without_odd(self, odd: Mapping[str, np.ndarray]) -> None:
        """Rows of JSON with a list, an object or half a character where a single value belongs are bad, and null there."""
        for name, column in self.plan.columns.items():
            given = self.rows[column]
            mask = given.is_valid().to_numpy() if pa.types.is_nested(given.type) else odd.get(column)
            if mask is not None and mask.any():
                self.wrong[f"{name.removeprefix(schema.CONTEXT)} is a list, an object or half a character"] = mask
                empty = pa.nulls(len(given), pa.string())
                kept = empty if pa.types.is_nested(given.type) else pc.if_else(pa.array(mask), pa.scalar(None, pa.string()), given)
                self.rows = self.rows.set_column(self.rows.schema.get_field_index(column), column, kept)

    def stage(self) -> _Staged:
        plan, count = self.plan, len(self.rows)
        staged = {name: self.column(name) for name in (schema.USER_ID, schema.ITEM_ID)}
        staged["t"] = self.column(plan.clock) if plan.clock in plan.columns else pa.array(np.zeros(count, np.int64))
        if schema.EVENT in plan.columns:
            staged[schema.EVENT] = pc.fill_null(self.column(schema.EVENT), plan.default_event)
        else:
            staged[schema.EVENT] = pa.array([plan.default_event]).take(pa.array(np.zeros(count, np.int8)))
        staged[schema.VALUE] = self.column(schema.VALUE) if schema.VALUE in plan.columns else pa.array(np.ones(count, np.float32))
        for name in (schema.BASKET, schema.EVENT_ID):
            if name in plan.columns:
                staged[name] = self.column(name)
        if plan.has_order:
            staged[P] = pc.fill_null(self.column(schema.POSITION), np.iinfo(np.int64).max)
        if plan.loses:
            staged[ROW] = pa.array(self.digest())
        for name in plan.columns:
            if name.startswith(schema.CONTEXT):
                staged[name] = pa.array(codes(name.removeprefix(schema.CONTEXT), self.column(name)))
        return _Staged(pa.table(staged), self.wrong, self.given, self.clocked, self.broken)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column in the staged type; what cannot be read is null there and named in `wrong`."""
        kind = self.plan.types[name]
        found = self.rows[self.plan.columns[name]]
        if name == schema.TIMESTAMP:
            return self._time(found)
        if name in (schema.USER_ID, schema.ITEM_ID, schema.BASKET):
            where, is_text = f"{self.file.uri}: {self.plan.columns[name]}", self.file.format != "parquet"
            if self.plan.whole_items and name == schema.ITEM_ID and pa.types.is_string(found.type):
                found = self._whole_numbers(found)
            ids = as_id(found, kind, where, text=is_text, pointed=name in self.plan.pointed)
            return _said(ids) if name == schema.BASKET else ids
        if name == schema.VALUE:
            return self._value(found)
        if name == schema.POSITION:
            return self._position(found)
        said = _said(found.cast(pa.string()) if pa.types.is_string(kind) else found, text=self.file.format != "parquet")
        if name in self.plan.pointed and self.file.format != "parquet":
            said = pc.replace_substring_regex(said, rf"^(-?[0-9]+){POINT_ZERO}", r"\1")
        return said.cast(kind)

    def _whole_numbers(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Ids where data.items alone says which there are, and has whole numbers: other text is no item."""
        text = pc.replace_substring_regex(_said(column, text=True), rf"^(-?[0-9]+){POINT_ZERO}", r"\1")
        other = pc.fill_null(pc.invert(pc.match_substring_regex(text, CANONICAL)), False)
        if pc.any(other).as_py():
            self.wrong["item_id is no whole number, as those of data.items are"] = other.to_numpy()
        return pc.if_else(other, pa.scalar(None, pa.string()), text)

    def _time(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        found = self.plan.times.read(column)
        self.clocked = found.clocked
        if found.unreadable is not None and found.unreadable.any():
            self.wrong["time is no ISO 8601 (2024-03-01 10:00:00)"] = found.unreadable
        self.given[schema.TIMESTAMP] = column
        return found.us

    def digest(self) -> np.ndarray:
        """A number for what each row says in the columns that are staged less exactly, uint64 [rows]."""
        found = np.zeros(len(self.rows), np.uint64)
        for name, column in self.plan.columns.items():
            given = self.rows[column]
            if name == schema.TIMESTAMP:
                given = _below_us(given, self.plan.times.unit)
            elif name != schema.VALUE and not name.startswith(schema.CONTEXT):
                continue
            if given is not None:
                found = found * np.uint64(0x9E3779B97F4A7C15) + digest_of(given)
        return found

    def _position(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if pa.types.is_uint64(column.type):
            large = pc.fill_null(pc.greater(column, pa.scalar(LARGEST, pa.uint64())), False)
            if pc.any(large).as_py():
                self.wrong["position has more than 63 bits"] = large.to_numpy()
            return signed(column)
        if not pa.types.is_string(column.type):
            return column.cast(pa.int64())
        text = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), POINT_ZERO, "")
        return pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text).cast(pa.int64())

    def _value(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if not pa.types.is_string(column.type):
            return column.cast(pa.float32(), safe=False)
        text = pc.utf8_trim_whitespace(column)
        text = pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text)
        try:
            return text.cast(pa.float32())
        except pa.ArrowInvalid:
            values = pa.chunked_array([pa.array([_number(one) for one in text.to_pylist()], pa.float32())])
            self.wrong["value is not a number"] = pc.and_(pc.is_valid(text), pc.is_null(values)).to_numpy()
            self.given[schema.VALUE] = column
            return values


class _Live(_Owned):
    """What was collected from the endpoint; null for an id that the owner's type cannot hold."""

    def digest(self) -> np.ndarray:
        found: np.ndarray = digest_of(self.rows[schema.VALUE]) * np.uint64(0x9E3779B97F4A7C15) + digest_of(self.rows["context"])
        return found

    def column(self, name: str) -> pa.ChunkedArray:
        kind = self.plan.types[name]
        if name == schema.TIMESTAMP:
            found = TimeRule().read(self.rows[name])
            self.clocked = found.clocked
            return found.us
        if name == schema.POSITION:
            return pc.add(self.rows["number"], LIVE_POSITION)
        if name == schema.BASKET:
            return pa.chunked_array([pa.nulls(len(self.rows), kind)])
        if name == schema.EVENT_ID and name not in self.rows.column_names:
            return pa.chunked_array([pa.nulls(len(self.rows), kind)])
        if name.startswith(schema.CONTEXT):
            field = name.removeprefix(schema.CONTEXT)
            given = [None if text is None else json.loads(text).get(field) for text in self.rows["context"].to_pylist()]
            return pa.chunked_array([[None if one is None else str(one).lower() if isinstance(one, bool) else str(one) for one in given]], kind)
        if name in (schema.USER_ID, schema.ITEM_ID) and pa.types.is_integer(kind):
            return pa.chunked_array([[None if text is None else canonical_integer(text) for text in self.rows[name].to_pylist()]], kind)
        return _said(self.rows[name].cast(kind)) if name == schema.EVENT else self.rows[name].cast(kind)


def digest_of(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each value of a column, the same for the same value, uint64 [n]; that of null is one of its own."""
    if pa.types.is_timestamp(column.type) or pa.types.is_integer(column.type):
        column = column.cast(pa.int64(), safe=False)
    elif pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
    else:
        encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
        known = np.array([*(xxhash.xxh64_intdigest(text.encode()) for text in encoded.dictionary.to_pylist()), 1], np.uint64)
        found: np.ndarray = known[pc.fill_null(encoded.indices, len(known) - 1).to_numpy()]
        return found
    values = pc.fill_null(column, 0).to_numpy().view(np.uint64)
    mixed = (values ^ (values >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers: np.ndarray = np.where(column.is_null().to_numpy(), np.uint64(1), mixed ^ (mixed >> np.uint64(32)))
    return numbers


def _below_us(times: pa.ChunkedArray, unit: str) -> pa.ChunkedArray | None:
    """What times say more exactly than a microsecond; None where they cannot."""
    if pa.types.is_timestamp(times.type) or (pa.types.is_integer(times.type) and unit == "ns"):
        return times
    if not pa.types.is_string(times.type):
        return None
    if unit == "ns":
        return times
    digits = pc.struct_field(pc.extract_regex(times, UNDER_US), "more")
    return pc.fill_null(digits, "")


def _said(column: pa.ChunkedArray, *, text: bool = False) -> pa.ChunkedArray:
    """Text, with null for what is blank, and in a text file for a word for nothing."""
    if not pa.types.is_string(column.type):
        return column
    if text:
        column = pc.if_else(pc.is_in(column, pa.array(NULL_IDS)), pa.scalar(None, pa.string()), column)
    blank = is_blank(column)
    return pc.if_else(blank, pa.scalar(None, pa.string()), column) if pc.any(blank).as_py() else column


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def describing(plan: PartitionPlan, rows: pa.Table) -> np.ndarray:
    """Rows of users who describe the data, bool [rows]."""
    if plan.described_by is None:
        return np.ones(len(rows), bool)
    split = plan.described_by
    return _by_user(rows, lambda users: nothing_learned_of(users, split))


def _by_user(rows: pa.Table, which: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
    """Rows of the users of whom something is true, bool [rows]; rows without a user are not among them."""
    users = rows[schema.USER_ID].combine_chunks().dictionary_encode()
    users = users.combine_chunks() if isinstance(users, pa.ChunkedArray) else users
    found: np.ndarray = np.append(which(users.dictionary), False)[pc.fill_null(users.indices, len(users.dictionary)).to_numpy()]
    return found


def _check(plan: PartitionPlan, staged: _Staged) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """Good rows, and bad rows with the columns `reason` (the first that applies) and `given_…` (what the file says of time and value);
    which of the good rows have a time of day."""
    table = staged.table
    t, value = table["t"], table[schema.VALUE]
    # a value that is missing stands for 1; one that is not a number is an error
    broken = pc.and_(pc.is_valid(value), pc.invert(pc.fill_null(pc.is_finite(value), True)))
    checks = {reason: pa.chunked_array([pa.array(mask)]) for reason, mask in staged.wrong.items()}
    for name in (schema.USER_ID, schema.ITEM_ID):
        checks[f"{name} is null"] = pc.is_null(table[name])
        if pa.types.is_string(table[name].type):
            checks[f"{name} is blank"] = is_blank(table[name])
            too_long = pc.greater(pc.utf8_length(table[name]), schema.LONGEST_ID)
            checks[f"{name} has more than {schema.LONGEST_ID} letters"] = pc.fill_null(too_long, False)
    checks |= {f"{'position' if plan.clock == schema.POSITION else 'time'} is null": pc.is_null(t), "value is not finite": broken}
    if plan.clock == schema.TIMESTAMP:
        checks[plan.times.outside] = pc.fill_null(pc.or_(pc.less_equal(t, OUTSIDE), pc.greater(t, MAX_US)), False)
        if plan.future_us is not None:
            checks[FUTURE] = pc.fill_null(pc.greater(t, plan.future_us), False)
    checks = {text: failed for text, failed in checks.items() if pc.any(failed).as_py()}
    good, clocked = table, staged.clocked
    rejected = table.slice(0, 0).append_column("reason", pa.array([], pa.string()))
    if checks:
        reason: pa.ChunkedArray | pa.Scalar = pa.scalar(None, pa.string())
        for text, failed in reversed(checks.items()):
            reason = pc.if_else(failed, text, reason)
        bad = pc.is_valid(reason)
        clocked = clocked[~bad.to_numpy()]
        rejected = table.append_column("reason", reason)
        for name, column in staged.given.items():
            rejected = rejected.append_column(f"given_{name}", column.cast(pa.string()))
        rejected, good = rejected.filter(bad), table.filter(pc.invert(bad))
    if staged.broken:
        lines = pa.table({"reason": pa.repeat(pa.scalar("line is no row"), len(staged.broken)), "line": pa.array(staged.broken, pa.string())})
        rejected = pa.concat_tables([rejected, lines], promote_options="default")
    where = good.schema.get_field_index(schema.VALUE)
    return good.set_column(where, schema.VALUE, pc.fill_null(good[schema.VALUE], 1.0)), rejected, clocked


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


def _count_ids(good: pa.Table, condition: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> int:
    """Users and items of the rows of which something is true, where they are text."""
    texts = [good[name] for name in (schema.USER_ID, schema.ITEM_ID) if pa.types.is_string(good[name].type)]
    return sum(int(pc.sum(condition(text)).as_py() or 0) for text in texts)


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
    pq.write_table(rejected.append_column("file", pa.array([group.file.uri] * len(rejected))), scratch)
    os.rename(scratch, plan.quarantine / f"{group.number:06d}.parquet")
