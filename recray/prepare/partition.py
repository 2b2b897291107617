"""First pass, one Ray task per row group: check the rows, quarantine invalid ones, scatter valid ones to the
shards of users.

A task writes into a folder of its own and renames it when it is complete, so a repeated task changes nothing.
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

from recray.dataset import schema
from recray.dataset.context import encode_column
from recray.dataset.ids import CANONICAL, to_canonical_integer
from recray.dataset.reader import assign_buckets, is_holdout
from recray.errors import DataError
from recray.prepare.files import InputFile
from recray.prepare.formats import NULL_IDS, NULL_WORDS, POINT_ZERO, Batch, open_file
from recray.prepare.sources import RowGroup, is_blank, to_id_column
from recray.prepare.times import MAX_US, OUT_OF_RANGE, SUB_MICROSECOND, TimeRule, to_signed
from recray.storage import read_json, write_json
from recray.storage.opt_out import OptOut

BATCH_ROWS = 131_072
MAX_INT64 = (1 << 63) - 1
LIVE_POSITION = 1 << 62  # without times, collected events come after all of data.events
FUTURE = "time is in the future"
WORD_SEPARATORS = re.compile(r"[\s,;|\t\"'{}\[\]:]+")  # between the words of an invalid line
STAGED_POSITION = "p"  # staged column: orders events of one time
# staged column: a digest of values that other columns store less exactly, so that distinct rows stay distinct
ROW_DIGEST = "row"


@dataclass(frozen=True)
class PartitionPlan:
    """Input of every task of the first pass."""

    columns: dict[str, str]
    types: dict[str, pa.DataType]
    clock: str
    times: TimeRule
    as_of_us: int | None
    future_us: int | None  # later times are in the future and invalid; None: there is an as-of
    min_value: float | None
    # whether events below min_value are staged, so that the endpoint's copies of them are recognized
    keeps_low_values: bool
    has_row_digests: bool  # whether there is a column ROW_DIGEST
    integral_float_ids: tuple[str, ...]  # ids that text files write as 7.0
    needs_integer_items: bool  # whether data.items alone defines the catalogue, with integer ids
    # the split whose holdout users alone define the event types and the end of the data; None: all users do
    holdout_split: Mapping[str, Any] | None
    default_event: str
    opted_out: OptOut
    first_live: int  # number of the first row group that the endpoint collected
    shards: int
    staging: Path
    quarantine: Path

    @property
    def has_order(self) -> bool:
        """Whether a position orders events of one time."""
        return self.clock == schema.TIMESTAMP and schema.POSITION in self.columns


@dataclass
class Stats:
    """Counts of the first pass: rows = bad + opted_out + late + low + events. Late rows are after the as-of,
    low rows below `data.min_value`.

    last_us : newest time, of the users who describe the data (`PartitionPlan.holdout_split`)
    clocked : whether any time of these users has a time of day
    event_types : events of each type, of these users
    zero, negative : events with a value of 0, and below
    words : events whose user or item id is a word for null (`NULL_IDS`)
    padded : ids that begin or end with a blank
    """

    rows: int = 0
    bad: int = 0
    late: int = 0
    low: int = 0
    opted_out: int = 0
    events: int = 0
    zero: int = 0
    negative: int = 0
    words: int = 0
    padded: int = 0
    last_us: int | None = None
    clocked: bool = False
    reasons: dict[str, int] = field(default_factory=dict)
    event_types: dict[str, int] = field(default_factory=dict)

    def add(self, other: Stats) -> None:
        for name in (
            "rows",
            "bad",
            "late",
            "low",
            "opted_out",
            "events",
            "zero",
            "negative",
            "words",
            "padded",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.clocked |= other.clocked
        for counts, other_counts in ((self.reasons, other.reasons), (self.event_types, other.event_types)):
            for key, count in other_counts.items():
                counts[key] = counts.get(key, 0) + count
        self.update_last_us(other.last_us)

    def update_last_us(self, last_us: int | None) -> None:
        """Take a time into account for `last_us`."""
        if last_us is not None:
            self.last_us = last_us if self.last_us is None else max(last_us, self.last_us)


def partition_row_group(plan: PartitionPlan, group: RowGroup) -> None:
    """Scatter one row group into `plan.staging/<number>/`: one Arrow file per shard, `items.arrow` and
    `stats.json`.
    """
    target = plan.staging / f"{group.number:06d}"
    if target.exists():
        return
    scratch = plan.staging / f".{group.number:06d}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir(parents=True)
    stats = Stats()
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    item_counts: list[pa.Table] = []
    invalid_tables: list[pa.Table] = []
    for batch in _stage_batches(plan, group):
        valid, invalid, has_time_of_day = _split_invalid(plan, batch)
        if len(plan.opted_out):
            is_opted_out, is_opted_out_invalid = (
                _mask_opted_out(plan.opted_out, rows) for rows in (valid, invalid)
            )
            stats.opted_out += int(is_opted_out.sum() + is_opted_out_invalid.sum())
            valid, has_time_of_day, invalid = (
                valid.filter(pa.array(~is_opted_out)),
                has_time_of_day[~is_opted_out],
                invalid.filter(pa.array(~is_opted_out_invalid)),
            )

        is_statistics_row = mask_statistics_users(plan, valid)
        stats.clocked |= bool(has_time_of_day[is_statistics_row].any())
        stats.rows += len(batch.table) + len(batch.invalid_lines)
        invalid_tables.append(invalid)

        if plan.as_of_us is not None:
            is_before_as_of = valid["t"].to_numpy() <= plan.as_of_us
            stats.late += int((~is_before_as_of).sum())
            valid, is_statistics_row = (
                valid.filter(pa.array(is_before_as_of)),
                is_statistics_row[is_before_as_of],
            )
        valid_before_value_filter = valid
        if plan.min_value is not None:
            reaches_min_value = valid[schema.VALUE].to_numpy() >= np.float32(plan.min_value)
            stats.low += int((~reaches_min_value).sum())
            valid, is_statistics_row = (
                valid.filter(pa.array(reaches_min_value)),
                is_statistics_row[reaches_min_value],
            )

        staged = valid_before_value_filter if plan.keeps_low_values and not group.live else valid
        _scatter_to_shards(staged, plan.shards, scratch, writers)
        if not len(valid):
            continue

        statistics_rows = valid if is_statistics_row.all() else valid.filter(pa.array(is_statistics_row))
        if plan.clock == schema.TIMESTAMP:
            stats.update_last_us(pc.max(statistics_rows["t"]).as_py())
        if schema.VALUE in plan.columns:
            values = valid[schema.VALUE].to_numpy()
            stats.zero += int((values == 0).sum())
            stats.negative += int((values < 0).sum())
        stats.words += _count_matching_ids(valid, lambda text: pc.is_in(text, pa.array(NULL_IDS)))
        stats.padded += _count_matching_ids(
            valid, lambda text: pc.not_equal(pc.utf8_trim_whitespace(text), text)
        )
        _add_counts(stats.event_types, statistics_rows[schema.EVENT])
        item_counts.append(valid.group_by(schema.ITEM_ID).aggregate([([], "count_all")]))

    for writer in writers.values():
        writer.close()
    invalid = pa.concat_tables(invalid_tables, promote_options="default")
    stats.bad = len(invalid)
    _add_counts(stats.reasons, invalid["reason"])
    _write_quarantine(plan, group, invalid)
    stats.events = stats.rows - stats.bad - stats.opted_out - stats.late - stats.low
    _write_counts(item_counts, scratch / "items.arrow")
    write_json(scratch / "stats.json", asdict(stats))
    try:
        os.rename(scratch, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(scratch)


def _mask_opted_out(opted_out: OptOut, rows: pa.Table) -> np.ndarray:
    """Rows of users who opted out, bool [rows]; an invalid line that contains such an id counts as theirs."""
    is_opted_out = _mask_by_user(rows, lambda users: opted_out.mask_members(users.to_pylist()))
    if "line" in rows.column_names:
        lines = rows["line"].to_pylist()
        is_opted_out |= np.array(
            [
                line is not None and opted_out.mask_members(WORD_SEPARATORS.split(line)).any()
                for line in lines
            ],
            bool,
        )
    return is_opted_out


def read_stats(plan: PartitionPlan, groups: int) -> Iterator[tuple[Stats, pa.Table]]:
    """Statistics and item counts (item_id, count_all) of every row group, in order."""
    for number in range(groups):
        folder = plan.staging / f"{number:06d}"
        with pa.ipc.open_file(folder / "items.arrow") as reader:
            yield Stats(**read_json(folder / "stats.json")), reader.read_all()


def format_invalid_row(quarantine: Path) -> str:
    """One invalid row as an example for the user: its content and its file."""
    for file in sorted(quarantine.glob("[!.]*.parquet")):
        row = {
            name: value
            for name, value in pq.read_table(file).slice(0, 1).to_pylist()[0].items()
            if name not in ("file", "reason", ROW_DIGEST)
        }
        if row.get("line") is not None:
            content = repr(row["line"][:200])
        else:
            originals = {
                name.removeprefix("given_"): value for name, value in row.items() if name.startswith("given_")
            }
            content = ", ".join(
                f"{name} {value!r}"
                for name, value in {
                    **{name: row[name] for name in (schema.USER_ID, schema.ITEM_ID)},
                    **originals,
                }.items()
            )
        return f"{content} in {pq.read_table(file, columns=['file'])['file'][0].as_py()}"
    return "none was kept"


def read_partition(plan: PartitionPlan, groups: int, shard: int) -> pa.Table:
    """Staged events of one shard in the order (file, row), with the column `live`: whether the endpoint
    collected them.
    """
    tables = []
    if not plan.staging.is_dir():
        raise DataError(f"{plan.staging} vanished while it was read", "run one prepare at a time")
    for number in range(groups):
        file = plan.staging / f"{number:06d}" / f"{shard:05d}.arrow"
        if file.exists():
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            tables.append(table.append_column("live", pa.repeat(number >= plan.first_live, len(table))))
    return (
        pa.concat_tables(tables)
        if tables
        else staged_schema(plan).append(pa.field("live", pa.bool_())).empty_table()
    )


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
        fields.append((STAGED_POSITION, pa.int64()))
    if plan.has_row_digests:
        fields.append((ROW_DIGEST, pa.uint64()))
    fields += [(name, pa.int16()) for name in plan.columns if name.startswith(schema.CONTEXT)]
    return pa.schema(fields)


@dataclass
class _StagedBatch:
    """A batch in the staged columns, with masks of its invalid rows: by reason, bool [rows].

    originals : the columns as the file has them, where values could not be read, by column
    clocked : which times have a time of day
    invalid_lines : lines of the file that could not be parsed
    """

    table: pa.Table
    invalid: dict[str, np.ndarray]
    originals: dict[str, pa.ChunkedArray]
    clocked: np.ndarray
    invalid_lines: list[str]


def _stage_batches(plan: PartitionPlan, group: RowGroup) -> Iterator[_StagedBatch]:
    """Batches of one row group. Raises DataError for a file that cannot be read."""
    with open_file(group.file) as file:
        columns = None if group.live else list(plan.columns.values())
        for batch in file.batches(group.part, BATCH_ROWS, columns):
            staged = (_CollectedRows if group.live else _InputRows)(plan, batch, group.file)
            yield staged.stage()


class _InputRows:
    """Rows of `data.events`, staged column by column."""

    def __init__(self, plan: PartitionPlan, batch: Batch, file: InputFile) -> None:
        self.plan, self.rows, self.file, self.invalid_lines = (
            plan,
            batch.rows,
            file,
            list(batch.invalid_lines),
        )
        self.invalid: dict[str, np.ndarray] = {}
        self.originals: dict[str, pa.ChunkedArray] = {}
        self.clocked = np.zeros(len(self.rows), bool)
        if file.format == "jsonl":
            self._mask_invalid_values(batch.invalid_values)

    def _mask_invalid_values(self, invalid_values: Mapping[str, np.ndarray]) -> None:
        """Mark JSON rows with a list, an object or half a character in place of a single value as invalid,
        and put null there.
        """
        for name, column_name in self.plan.columns.items():
            column = self.rows[column_name]
            mask = (
                column.is_valid().to_numpy()
                if pa.types.is_nested(column.type)
                else invalid_values.get(column_name)
            )
            if mask is not None and mask.any():
                self.invalid[
                    f"{name.removeprefix(schema.CONTEXT)} is a list, an object or half a character"
                ] = mask
                nulls = pa.nulls(len(column), pa.string())
                masked = (
                    nulls
                    if pa.types.is_nested(column.type)
                    else pc.if_else(pa.array(mask), pa.scalar(None, pa.string()), column)
                )
                self.rows = self.rows.set_column(
                    self.rows.schema.get_field_index(column_name), column_name, masked
                )

    def stage(self) -> _StagedBatch:
        plan, count = self.plan, len(self.rows)
        staged = {name: self.stage_column(name) for name in (schema.USER_ID, schema.ITEM_ID)}
        staged["t"] = (
            self.stage_column(plan.clock)
            if plan.clock in plan.columns
            else pa.array(np.zeros(count, np.int64))
        )
        if schema.EVENT in plan.columns:
            staged[schema.EVENT] = pc.fill_null(self.stage_column(schema.EVENT), plan.default_event)
        else:
            staged[schema.EVENT] = pa.array([plan.default_event]).take(pa.array(np.zeros(count, np.int8)))
        staged[schema.VALUE] = (
            self.stage_column(schema.VALUE)
            if schema.VALUE in plan.columns
            else pa.array(np.ones(count, np.float32))
        )
        for name in (schema.BASKET, schema.EVENT_ID):
            if name in plan.columns:
                staged[name] = self.stage_column(name)
        if plan.has_order:
            staged[STAGED_POSITION] = pc.fill_null(self.stage_column(schema.POSITION), np.iinfo(np.int64).max)
        if plan.has_row_digests:
            staged[ROW_DIGEST] = pa.array(self.digest_rows())
        for name in plan.columns:
            if name.startswith(schema.CONTEXT):
                staged[name] = pa.array(
                    encode_column(name.removeprefix(schema.CONTEXT), self.stage_column(name))
                )
        return _StagedBatch(pa.table(staged), self.invalid, self.originals, self.clocked, self.invalid_lines)

    def stage_column(self, name: str) -> pa.ChunkedArray:
        """A column in its staged type; a value that cannot be read is null there and marked in `invalid`."""
        staged_type = self.plan.types[name]
        column = self.rows[self.plan.columns[name]]
        if name == schema.TIMESTAMP:
            return self._stage_time(column)
        if name in (schema.USER_ID, schema.ITEM_ID, schema.BASKET):
            column_location, is_text = (
                f"{self.file.uri}: {self.plan.columns[name]}",
                self.file.format != "parquet",
            )
            if self.plan.needs_integer_items and name == schema.ITEM_ID and pa.types.is_string(column.type):
                column = self._to_integer_text(column)
            ids = to_id_column(
                column,
                staged_type,
                column_location,
                is_text_file=is_text,
                is_integral=name in self.plan.integral_float_ids,
            )
            return _blank_to_null(ids) if name == schema.BASKET else ids
        if name == schema.VALUE:
            return self._stage_value(column)
        if name == schema.POSITION:
            return self._stage_position(column)
        text = _blank_to_null(
            column.cast(pa.string()) if pa.types.is_string(staged_type) else column,
            is_text_file=self.file.format != "parquet",
        )
        if name in self.plan.integral_float_ids and self.file.format != "parquet":
            text = pc.replace_substring_regex(text, rf"^(-?[0-9]+){POINT_ZERO}", r"\1")
        return text.cast(staged_type)

    def _to_integer_text(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Item ids where `data.items` alone defines the catalogue, with integer ids: any other text is not an
        item.
        """
        text = pc.replace_substring_regex(
            _blank_to_null(column, is_text_file=True), rf"^(-?[0-9]+){POINT_ZERO}", r"\1"
        )
        is_not_integer = pc.fill_null(pc.invert(pc.match_substring_regex(text, CANONICAL)), False)
        if pc.any(is_not_integer).as_py():
            self.invalid["item_id is no whole number, as those of data.items are"] = is_not_integer.to_numpy()
        return pc.if_else(is_not_integer, pa.scalar(None, pa.string()), text)

    def _stage_time(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        times = self.plan.times.read(column)
        self.clocked = times.clocked
        if times.unreadable is not None and times.unreadable.any():
            self.invalid["time is no ISO 8601 (2024-03-01 10:00:00)"] = times.unreadable
        self.originals[schema.TIMESTAMP] = column
        return times.us

    def digest_rows(self) -> np.ndarray:
        """A digest of each row over the columns that are staged with less precision, uint64 [rows]."""
        digests = np.zeros(len(self.rows), np.uint64)
        for name, column in self.plan.columns.items():
            values = self.rows[column]
            if name == schema.TIMESTAMP:
                values = _sub_microseconds(values, self.plan.times.unit)
            elif name != schema.VALUE and not name.startswith(schema.CONTEXT):
                continue
            if values is not None:
                digests = digests * np.uint64(0x9E3779B97F4A7C15) + digest_values(values)
        return digests

    def _stage_position(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if pa.types.is_uint64(column.type):
            is_too_large = pc.fill_null(pc.greater(column, pa.scalar(MAX_INT64, pa.uint64())), False)
            if pc.any(is_too_large).as_py():
                self.invalid["position has more than 63 bits"] = is_too_large.to_numpy()
            return to_signed(column)
        if not pa.types.is_string(column.type):
            return column.cast(pa.int64())
        text = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), POINT_ZERO, "")
        return pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text).cast(
            pa.int64()
        )

    def _stage_value(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if not pa.types.is_string(column.type):
            return column.cast(pa.float32(), safe=False)
        text = pc.utf8_trim_whitespace(column)
        text = pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text)
        try:
            return text.cast(pa.float32())
        except pa.ArrowInvalid:
            values = pa.chunked_array(
                [pa.array([_parse_float(number) for number in text.to_pylist()], pa.float32())]
            )
            self.invalid["value is not a number"] = pc.and_(pc.is_valid(text), pc.is_null(values)).to_numpy()
            self.originals[schema.VALUE] = column
            return values


class _CollectedRows(_InputRows):
    """Rows that the endpoint collected; null for an id that does not fit the type of `data.events`."""

    def digest_rows(self) -> np.ndarray:
        result: np.ndarray = digest_values(self.rows[schema.VALUE]) * np.uint64(
            0x9E3779B97F4A7C15
        ) + digest_values(self.rows["context"])
        return result

    def stage_column(self, name: str) -> pa.ChunkedArray:
        staged_type = self.plan.types[name]
        if name == schema.TIMESTAMP:
            times = TimeRule().read(self.rows[name])
            self.clocked = times.clocked
            return times.us
        if name == schema.POSITION:
            return pc.add(self.rows["number"], LIVE_POSITION)
        if name == schema.BASKET:
            return pa.chunked_array([pa.nulls(len(self.rows), staged_type)])
        if name == schema.EVENT_ID and name not in self.rows.column_names:
            return pa.chunked_array([pa.nulls(len(self.rows), staged_type)])
        if name.startswith(schema.CONTEXT):
            context_name = name.removeprefix(schema.CONTEXT)
            values = [
                None if text is None else json.loads(text).get(context_name)
                for text in self.rows["context"].to_pylist()
            ]
            return pa.chunked_array(
                [
                    [
                        None
                        if value is None
                        else str(value).lower()
                        if isinstance(value, bool)
                        else str(value)
                        for value in values
                    ]
                ],
                staged_type,
            )
        if name in (schema.USER_ID, schema.ITEM_ID) and pa.types.is_integer(staged_type):
            return pa.chunked_array(
                [
                    [
                        None if text is None else to_canonical_integer(text)
                        for text in self.rows[name].to_pylist()
                    ]
                ],
                staged_type,
            )
        column = self.rows[name].cast(staged_type)
        return _blank_to_null(column) if name == schema.EVENT else column


def digest_values(column: pa.ChunkedArray) -> np.ndarray:
    """A digest of each value of a column, equal for equal values, uint64 [n]. Null has a digest of its
    own.
    """
    if pa.types.is_timestamp(column.type) or pa.types.is_integer(column.type):
        column = column.cast(pa.int64(), safe=False)
    elif pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
    else:
        encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
        digests = np.array(
            [*(xxhash.xxh64_intdigest(text.encode()) for text in encoded.dictionary.to_pylist()), 1],
            np.uint64,
        )
        result: np.ndarray = digests[pc.fill_null(encoded.indices, len(digests) - 1).to_numpy()]
        return result
    values = pc.fill_null(column, 0).to_numpy().view(np.uint64)
    mixed = (values ^ (values >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.where(column.is_null().to_numpy(), np.uint64(1), mixed ^ (mixed >> np.uint64(32)))


def _sub_microseconds(column: pa.ChunkedArray, unit: str) -> pa.ChunkedArray | None:
    """The part of times below a microsecond; None if their type holds none."""
    if pa.types.is_timestamp(column.type) or (pa.types.is_integer(column.type) and unit == "ns"):
        return column
    if not pa.types.is_string(column.type):
        return None
    if unit == "ns":
        return column
    digits = pc.struct_field(pc.extract_regex(column, SUB_MICROSECOND), "digits")
    return pc.fill_null(digits, "")


def _blank_to_null(column: pa.ChunkedArray, *, is_text_file: bool = False) -> pa.ChunkedArray:
    """Text, with null for blanks, and in a text file for words that stand for null."""
    if not pa.types.is_string(column.type):
        return column
    if is_text_file:
        column = pc.if_else(pc.is_in(column, pa.array(NULL_IDS)), pa.scalar(None, pa.string()), column)
    blank = is_blank(column)
    return pc.if_else(blank, pa.scalar(None, pa.string()), column) if pc.any(blank).as_py() else column


def _parse_float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def mask_statistics_users(plan: PartitionPlan, rows: pa.Table) -> np.ndarray:
    """Rows of users who describe the data, bool [rows]."""
    if plan.holdout_split is None:
        return np.ones(len(rows), bool)
    holdout_split = plan.holdout_split
    return _mask_by_user(rows, lambda users: is_holdout(users, holdout_split))


def _mask_by_user(rows: pa.Table, predicate: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
    """Rows of the users for whom a predicate holds, bool [rows]; false for rows without a user."""
    users = rows[schema.USER_ID].combine_chunks().dictionary_encode()
    users = users.combine_chunks() if isinstance(users, pa.ChunkedArray) else users
    result: np.ndarray = np.append(predicate(users.dictionary), False)[
        pc.fill_null(users.indices, len(users.dictionary)).to_numpy()
    ]
    return result


def _split_invalid(plan: PartitionPlan, batch: _StagedBatch) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """Valid rows, invalid rows, and which valid rows have a time of day.

    Invalid rows have the columns `reason` (the first that applies) and `given_…` (time and value as the file
    has them).
    """
    table = batch.table
    checks = _check_rows(plan, batch)
    valid, clocked = table, batch.clocked
    invalid = table.slice(0, 0).append_column("reason", pa.array([], pa.string()))
    if checks:
        reason: pa.ChunkedArray | pa.Scalar = pa.scalar(None, pa.string())
        for text, is_failed in reversed(checks.items()):
            reason = pc.if_else(is_failed, text, reason)
        is_invalid = pc.is_valid(reason)
        clocked = clocked[~is_invalid.to_numpy()]
        invalid = table.append_column("reason", reason)
        for name, column in batch.originals.items():
            invalid = invalid.append_column(f"given_{name}", column.cast(pa.string()))
        invalid, valid = invalid.filter(is_invalid), table.filter(pc.invert(is_invalid))

    if batch.invalid_lines:
        lines = pa.table(
            {
                "reason": pa.repeat(pa.scalar("line is no row"), len(batch.invalid_lines)),
                "line": pa.array(batch.invalid_lines, pa.string()),
            }
        )
        invalid = pa.concat_tables([invalid, lines], promote_options="default")

    value_position = valid.schema.get_field_index(schema.VALUE)
    valid = valid.set_column(value_position, schema.VALUE, pc.fill_null(valid[schema.VALUE], 1.0))
    return valid, invalid, clocked


def _check_rows(plan: PartitionPlan, batch: _StagedBatch) -> dict[str, pa.ChunkedArray]:
    """Failed checks by reason, bool [rows] each, the most important first."""
    table = batch.table
    time, value = table["t"], table[schema.VALUE]
    checks = {reason: pa.chunked_array([pa.array(mask)]) for reason, mask in batch.invalid.items()}
    for name in (schema.USER_ID, schema.ITEM_ID):
        checks[f"{name} is null"] = pc.is_null(table[name])
        if pa.types.is_string(table[name].type):
            checks[f"{name} is blank"] = is_blank(table[name])
            too_long = pc.greater(pc.utf8_length(table[name]), schema.LONGEST_ID)
            checks[f"{name} has more than {schema.LONGEST_ID} letters"] = pc.fill_null(too_long, False)

    # a missing value counts as 1; NaN and infinity are errors
    is_infinite = pc.and_(pc.is_valid(value), pc.invert(pc.fill_null(pc.is_finite(value), True)))
    checks |= {
        f"{'position' if plan.clock == schema.POSITION else 'time'} is null": pc.is_null(time),
        "value is not finite": is_infinite,
    }
    if plan.clock == schema.TIMESTAMP:
        is_outside = pc.or_(pc.less_equal(time, OUT_OF_RANGE), pc.greater(time, MAX_US))
        checks[plan.times.outside] = pc.fill_null(is_outside, False)
        if plan.future_us is not None:
            checks[FUTURE] = pc.fill_null(pc.greater(time, plan.future_us), False)
    return {reason: is_failed for reason, is_failed in checks.items() if pc.any(is_failed).as_py()}


def _scatter_to_shards(
    rows: pa.Table, shards: int, folder: Path, writers: dict[int, pa.ipc.RecordBatchFileWriter]
) -> None:
    users = rows[schema.USER_ID].combine_chunks().dictionary_encode()
    if isinstance(users, pa.ChunkedArray):
        users = users.combine_chunks()
    shard_of_row = assign_buckets(users.dictionary.to_pylist(), shards)[users.indices.to_numpy()]
    order = np.argsort(shard_of_row, kind="stable")
    edges = np.searchsorted(shard_of_row[order], np.arange(shards + 1))
    rows = rows.take(pa.array(order)).combine_chunks()
    for shard in np.flatnonzero(np.diff(edges)).tolist():
        if shard not in writers:
            writers[shard] = pa.ipc.new_file(folder / f"{shard:05d}.arrow", rows.schema)
        writers[shard].write_table(rows.slice(edges[shard], edges[shard + 1] - edges[shard]))


def _count_matching_ids(rows: pa.Table, condition: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> int:
    """Count the text ids of users and items for which a condition holds."""
    texts = [rows[name] for name in (schema.USER_ID, schema.ITEM_ID) if pa.types.is_string(rows[name].type)]
    return sum(int(pc.sum(condition(text)).as_py() or 0) for text in texts)


def _add_counts(totals: dict[str, int], column: pa.ChunkedArray) -> None:
    for entry in column.value_counts().to_pylist():
        totals[entry["values"]] = totals.get(entry["values"], 0) + entry["counts"]


def _write_counts(counts: list[pa.Table], path: Path) -> None:
    table = (
        pa.concat_tables(counts)
        if counts
        else pa.table({schema.ITEM_ID: [], "count_all": pa.array([], pa.int64())})
    )
    if counts:
        table = (
            table.group_by(schema.ITEM_ID)
            .aggregate([("count_all", "sum")])
            .rename_columns([schema.ITEM_ID, "count_all"])
        )
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def _write_quarantine(plan: PartitionPlan, group: RowGroup, invalid: pa.Table) -> None:
    if not len(invalid):
        return
    plan.quarantine.mkdir(parents=True, exist_ok=True)
    scratch = plan.quarantine / f".{group.number:06d}.{uuid.uuid4().hex[:8]}"
    pq.write_table(invalid.append_column("file", pa.array([group.file.uri] * len(invalid))), scratch)
    os.rename(scratch, plan.quarantine / f"{group.number:06d}.parquet")
