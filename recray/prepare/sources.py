"""What the input consists of: files, their parts and columns, checked before any row is staged.

What the columns mean is decided here, once for all files: ids are whole numbers if they are so in every file, else text; a column that is
null in a whole file is null there; times have one rule (`recray.prepare.times`).
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import schema
from recray.config import DataSettings
from recray.dataset.context import CLOCK
from recray.errors import DataError, Problems, RecrayError
from recray.prepare.files import InputFile
from recray.prepare.formats import NULL_IDS, NULL_WORDS, POINT_ZERO, TableFile, Tally, joined_type, open_file
from recray.prepare.texts import see_separator, values_of
from recray.prepare.times import (
    ENOUGH,
    OUTSIDE,
    PLAUSIBLE_US,
    SAMPLE,
    UNDER_US,
    WORDS,
    TimeRule,
    has_zone,
    numbers_in,
    refuse_unit,
    see_unit,
    signed,
)

LATEST_S = 253_402_300_800  # the end of the year 9999: what lies further from 1970 is no number of seconds
YEAR_S = 365 * 86_400  # a catalogue of 1970 alone is one of years, or of dates as numbers
MANY_ODD = 0.5  # of the whole numbers among ids, to make these text that happens to look so
IDS = (schema.USER_ID, schema.ITEM_ID, schema.BASKET)
NAMES = (*IDS, schema.EVENT, schema.EVENT_ID)


@dataclass(frozen=True)
class RowGroup:
    """One unit of reading: a row group of a Parquet file, or a text file. `number` orders all of them.

    live : whether it was collected from the endpoint (`schema.LIVE_EVENTS`), not written by the owner
    """

    number: int
    file: InputFile
    part: int
    rows: int
    live: bool = False


@dataclass(frozen=True)
class EventSource:
    """The event files, in the order that breaks ties, and the owner's names of the columns that are there.

    notes : what a person should know of how they are read
    pointed : names of ids that text files write as 7.0
    loses : whether rows that differ may look alike once they are staged (see `partition.ROW`)
    """

    files: tuple[InputFile, ...]
    columns: dict[str, str]
    types: dict[str, pa.DataType]
    row_groups: tuple[RowGroup, ...]
    clock: str
    times: TimeRule
    notes: tuple[str, ...] = ()
    loses: bool = False
    pointed: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


def inspect_events(data: DataSettings, files: tuple[InputFile, ...], live: tuple[InputFile, ...] = ()) -> EventSource:
    """Look into the owner's event files and decide how to read them; `live` files come after them, whatever the owner's look like.

    Raises DataError for a missing column, a wrong type, files that disagree, or no rows at all.
    """
    groups: list[RowGroup] = []
    columns: dict[str, str] = {}
    types: dict[str, pa.DataType] = {}
    clocks, problems = _Clocks(data), Problems()
    held: dict[InputFile, dict[str, str]] = {}
    written: dict[str, Tally] = {}
    noted: list[str] = []
    loses = bool(data.context)
    for file in files:
        table = problems.of(partial(open_file, file))
        if table is None:
            continue
        with table:
            found = problems.of(partial(_columns, table, data))
            if not found:
                continue
            held[file] = found
            columns |= found
            for name, column in found.items():
                given = table.type_of(column) if sum(table.sizes()) else pa.null()
                if (name in NAMES or name.startswith(schema.CONTEXT)) and (tally := table.tally(column)) is not None:
                    written[name] = written.get(name, Tally()) + tally
                    given = pa.int64() if pa.types.is_floating(given) else given
                kind = problems.of(partial(_kind, given, name, file.uri, text=file.format != "parquet"))
                types[name] = joined_type(types.get(name, pa.null()), kind or pa.null())
                loses |= _loses(given, name)
            if schema.TIMESTAMP in found and not problems.found:
                problems.of(partial(clocks.see, table, found[schema.TIMESTAMP]))
            groups += _groups(table, len(groups), live=False)
            noted += table.notes
    for file, found in held.items():
        if missing := [name for name in columns if name not in found and file.format != "jsonl"]:  # there, what a line lacks is null
            problems.found.append(
                DataError(f"{file.uri} has no column for {', '.join(missing)}, other files of data.events have one", "write all files alike")
            )
    problems.found = _once(problems.found, files)
    problems.raise_all()
    for file in live:
        with open_file(file) as table:
            if not {field.name for field in schema.LIVE_EVENTS} - {schema.EVENT_ID} <= set(table.names):
                raise DataError(f"{file.uri} was not written by recray collect", "move its folder away")
            groups += _groups(table, len(groups), live=True)
    if not sum(group.rows for group in groups):
        raise DataError(f"{files[0].uri}{' and the other files' if len(files) > 1 else ''} have no rows", "check data.events")
    for name, kind in types.items():
        if pa.types.is_null(kind):
            types[name] = pa.string() if name in IDS else _STAGED.get(name, pa.string())
    clock = schema.TIMESTAMP if schema.TIMESTAMP in columns else schema.POSITION if schema.POSITION in columns else "file_order"
    pointed = tuple(name for name, tally in written.items() if tally.pointed > tally.other)
    notes = [*clocks.notes(), *noted]
    for name, tally in written.items():
        numbers = tally.whole + tally.pointed
        if name in pointed:
            notes.append(f"{columns[name]}: {tally.pointed} values such as 7.0, as pandas writes whole numbers, are read as 7")
        if name in IDS and 0 < tally.other < MANY_ODD * numbers:
            what = f"{tally.other} of {numbers + tally.other} ids are no whole numbers, for example {tally.example!r}"
            notes.append(f"{columns[name]}: {what}; so all are read as text: if that is a bad row, mend it")
    return EventSource((*files, *live), columns, types, tuple(groups), clock, clocks.rule, tuple(notes), loses or clocks.loses, pointed)


def _once(errors: list[RecrayError], files: tuple[InputFile, ...]) -> list[RecrayError]:
    """The errors, one for all files of which the same is to be said, which names the first."""
    same: dict[str, list[RecrayError]] = {}
    for error in errors:
        uri = next((file.uri for file in files if file.uri in error.what), "")
        same.setdefault(error.what.replace(uri, "") if uri else error.what, []).append(error)
    for first, *others in same.values():
        if others:
            first.what += f"; {len(others)} more files of data.events are alike"
    return [errors[0] for errors in same.values()]


def _groups(table: TableFile, first: int, *, live: bool) -> list[RowGroup]:
    sizes = [(part, rows) for part, rows in enumerate(table.sizes()) if rows]
    return [RowGroup(first + i, table.file, part, rows, live) for i, (part, rows) in enumerate(sizes)]


class _Clocks:
    """What the files say of their times: the unit of numbers, and whether they name a zone."""

    def __init__(self, data: DataSettings) -> None:
        self.asked, self.zone = data.time_unit, data.timezone
        self.unit: str | None = None
        self.first = ""
        self.naive: list[str] = []
        self.zoned = 0
        self._fine = False

    @property
    def rule(self) -> TimeRule:
        if self.asked != "auto":
            return TimeRule(self.asked, self.zone or "UTC")
        return TimeRule(self.unit or "s", self.zone or "UTC", PLAUSIBLE_US)

    @property
    def loses(self) -> bool:
        """Whether some say more than a microsecond holds."""
        return self._fine or self.rule.unit == "ns"

    def see(self, table: TableFile, column: str) -> None:
        kind, uri = table.type_of(column), table.file.uri
        naive, zoned, numbers, share = pa.types.is_date(kind), False, np.zeros(0, np.int64), 0.0
        if pa.types.is_timestamp(kind):
            naive, zoned = kind.tz is None, kind.tz is not None
        elif not naive:
            sample = _sample(table, column)
            numbers = numbers_in(sample)
            share = len(numbers) / max(len(sample), 1)
            if pa.types.is_string(sample.type):
                self._refuse_text(sample, uri, column)
                zones = has_zone(sample)
                naive, zoned = bool((zones == 0).any()), bool((zones == 1).any())
                self._fine |= bool(pc.any(pc.match_substring_regex(sample, UNDER_US)).as_py())
        if self.asked == "auto" and len(numbers):
            self._see_unit(numbers, share, uri, column)
        naive |= len(numbers) > 0 and self.rule.unit == "date"
        self.zoned += zoned
        self.naive += [uri] * naive

    def _see_unit(self, numbers: np.ndarray, share: float, uri: str, column: str) -> None:
        unit = see_unit(numbers)
        if unit is None:
            if share > 1 - ENOUGH:  # a few are bad rows
                raise refuse_unit(numbers, f"{uri}: {column}")
        elif self.unit not in (None, unit):
            raise DataError(f"{uri}: {column} holds {WORDS[unit]}, {self.first} {WORDS[str(self.unit)]}", "write all files alike")
        else:
            self.unit, self.first = unit, uri

    def _refuse_text(self, text: pa.ChunkedArray, uri: str, column: str) -> None:
        read = self.rule.read(text)
        wrong = np.zeros(len(text), bool) if read.unreadable is None else read.unreadable
        if len(text) and wrong.mean() > 1 - ENOUGH:
            example = text.filter(pa.array(wrong))[0].as_py()
            raise DataError(
                f"{uri}: {column} holds text such as {example!r}, which is no time",
                "write ISO 8601 (2024-03-01 10:00:00), or map another column: data.columns.timestamp=YOUR_COLUMN",
            )

    def notes(self) -> tuple[str, ...]:
        found = []
        if self.unit not in (None, "s"):
            found.append(f"times are read as {WORDS[str(self.unit)]}; data.time_unit={self.unit} says so without this note")
        if self.naive and self.zoned and self.zone is None:
            found.append(f"times without a zone in {len(self.naive)} of the files, with one in {self.zoned}; those without are UTC: data.timezone")
        return tuple(found)


def _sample(table: TableFile, column: str) -> pa.ChunkedArray:
    """The first values of a column that say something, at most about SAMPLE."""
    found: list[pa.ChunkedArray] = []
    for part in range(len(table.sizes())):
        for batch in table.batches(part, SAMPLE, [column]):
            values = pc.drop_null(batch.rows[column]).slice(0, SAMPLE)
            if pa.types.is_string(values.type):
                values = values.filter(pc.invert(pc.is_in(pc.utf8_trim_whitespace(values), pa.array(NULL_WORDS))))
            found.append(values)
            if sum(map(len, found)) >= SAMPLE // 2:
                break
        if sum(map(len, found)) >= SAMPLE:
            break
    return pa.chunked_array([chunk for one in found for chunk in one.chunks], found[0].type) if found else pa.chunked_array([], pa.string())


def _columns(table: TableFile, data: DataSettings) -> dict[str, str]:
    chosen = {}
    names, problems = table.names, Problems()
    has = f"it has {', '.join(name if name == name.strip() else repr(name) for name in names)}"
    mapping: dict[str, str | None] = {str(name): column for name, column in data.columns.items()}
    for name in schema.EVENT_COLUMNS:
        column = mapping.get(name, name)
        if column is not None and names.count(column) > 1:
            problems.found.append(DataError(f"{table.file.uri} has {names.count(column)} columns called {column!r}", "call each by another name"))
        elif column in names:
            chosen[name] = str(column)
        elif column is not None and (name in mapping or name in (schema.USER_ID, schema.ITEM_ID)):
            alike = {other.casefold(): other for other in names}
            close = difflib.get_close_matches(str(column).casefold(), alike, n=1)
            fix = f"name your column: data.columns.{name}={alike[close[0]] if close else 'YOUR_COLUMN'}"
            problems.found.append(DataError(f"{table.file.uri} has no column {column!r} for {name}; {has}", fix))
        elif column is not None and (other := next((one for one in names if one.casefold() == column), None)) is not None:
            table.notes.append(f"{table.file.uri}: the column {other!r} is not read; data.columns.{name}={other} takes it for {name}")
    for name in data.context:
        if name in names:
            chosen[schema.CONTEXT + name] = name
        elif name not in CLOCK:
            problems.found.append(DataError(f"{table.file.uri} has no column {name!r} for data.context; {has}", "name a column, hour or weekday"))
    problems.raise_all()
    return chosen


_STAGED = {
    schema.TIMESTAMP: pa.timestamp("us", tz="UTC"),
    schema.POSITION: pa.int64(),
    schema.EVENT: pa.string(),
    schema.EVENT_ID: pa.string(),
    schema.VALUE: pa.float32(),
}
_WANTED = {
    schema.TIMESTAMP: "a timestamp, a date, ISO 8601 text or whole numbers",
    schema.POSITION: "whole numbers",
    schema.EVENT: "text or whole numbers",
    schema.EVENT_ID: "text or whole numbers",
    schema.VALUE: "numbers",
}


def _loses(found: pa.DataType, name: str) -> bool:
    """Whether the type in which a column is staged holds less than it says."""
    if name == schema.TIMESTAMP:
        return bool(pa.types.is_timestamp(found) and found.unit == "ns")
    return bool(name == schema.VALUE and not (pa.types.is_float32(found) or pa.types.is_boolean(found) or pa.types.is_null(found)))


def _kind(found: pa.DataType, name: str, uri: str, *, text: bool = False) -> pa.DataType:
    """The type in which a column is staged, null for one that says nothing. Raises DataError if it cannot hold what the name says.

    text : of a text file, whose numbers are text
    """
    is_int, is_real = pa.types.is_integer(found), pa.types.is_floating(found) or pa.types.is_decimal(found)
    is_text = pa.types.is_string(found) or (text and is_real)
    if pa.types.is_null(found):
        return pa.null()
    if name in IDS and (is_text or is_int):
        return pa.string() if is_text else pa.int64()
    fits = {
        schema.TIMESTAMP: pa.types.is_timestamp(found) or pa.types.is_date(found) or is_int or is_text or pa.types.is_floating(found),
        schema.POSITION: is_int or (text and is_real),
        schema.EVENT: is_text or is_int,
        schema.EVENT_ID: is_text or is_int,
        schema.VALUE: is_int or is_real or is_text or pa.types.is_boolean(found),
    }
    if fits.get(name):
        return _STAGED[name]
    if name.startswith(schema.CONTEXT):
        if is_text or is_int or pa.types.is_boolean(found):
            return pa.string()
        field = name.removeprefix(schema.CONTEXT)
        raise DataError(
            f"{uri}: context {field} has type {found}, not text, whole numbers or booleans", f"cast it, or leave {field} out of data.context"
        )
    raise DataError(
        f"{uri}: column for {name} has type {found}, not {_WANTED.get(name, 'whole numbers or text')}",
        f"cast it, or map another column: data.columns.{name}=YOUR_COLUMN",
    )


def read_items(data: DataSettings, files: tuple[InputFile, ...]) -> tuple[pa.Table | None, list[str]]:
    """The item table of its files: `item_id` first, then the feature columns, and what a person should know of how it was read.

    None if none is configured. Raises DataError.
    """
    if data.items is None:
        if named := [*data.features, *([data.released] if data.released else [])]:
            raise DataError(f"data.features or data.released names {', '.join(named)}, but data.items is null", "name the item table in data.items")
        return None, []
    problems, kind = Problems(), pa.null()
    read: list[tuple[InputFile, str, pa.Table]] = []
    for file in files:
        if (rows := problems.of(partial(_item_rows, data, file, alone=len(files) == 1))) is not None:
            read.append((file, *rows))
            kind = joined_type(kind, problems.of(partial(_kind, rows[1].schema.field(0).type, schema.ITEM_ID, file.uri)) or pa.null())
    problems.raise_all()
    if pa.types.is_null(kind):
        raise DataError(f"{files[0].uri}: no item has an item_id", "fill them, or name the column: data.columns.item_id=YOUR_COLUMN")
    signs, notes = _separators(data, [rows for _, _, rows in read])
    tables: list[pa.Table | None] = []
    for file, column, rows in read:
        columns = {schema.ITEM_ID: problems.of(partial(as_id, rows[0], kind, f"{file.uri}: {column}", text=file.format != "parquet"))}
        for name, feature in data.features.items():
            columns[name] = problems.of(partial(_feature, rows[name], name, feature, signs.get(name), file))
        if data.released is not None:
            columns[schema.RELEASED] = problems.of(partial(_released, rows[data.released], data, file.uri))
        tables.append(None if problems.found else pa.table(columns))
    problems.raise_all()
    try:
        found = pa.concat_tables(_alike([table for table in tables if table is not None]), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{files[0].uri} and the other item files differ: {error}", "write all files alike") from None
    missing = found[0].null_count + (int(pc.sum(is_blank(found[0])).as_py() or 0) if pa.types.is_string(kind) else 0)
    if missing:
        problems.found.append(DataError(f"{files[0].uri}: {missing} items have no item_id", "fill or drop them"))
    if twice := len(found) - len(found[0].unique()):
        counts = found[0].value_counts()
        example = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
        problems.found.append(DataError(f"{files[0].uri}: {twice} item ids occur more than once, for example {example}", "keep one row an item"))
    for column, feature in data.features.items():
        problems.of(partial(_check_feature, found[column].type, column, feature, files[0].uri))
        if pa.types.is_null(found[column].type):
            found = found.set_column(found.schema.get_field_index(column), column, found[column].cast(_EMPTY[feature]))
    problems.raise_all()
    return found, notes


def _alike(tables: list[pa.Table]) -> list[pa.Table]:
    """Tables whose fractions have the widest type of each column, a number as it is written in its own: 0.85 of 32 bits is 0.85 of 64."""
    for place, name in enumerate(tables[0].column_names):
        kinds = {table[name].type for table in tables if pa.types.is_floating(table[name].type)}
        if pa.float64() in kinds and len(kinds) > 1:
            for number, table in enumerate(tables):
                if table[name].type in (pa.float32(), pa.float16()):
                    column = table[name].to_numpy()
                    written = pa.array([float(str(one)) for one in column], pa.float64(), mask=table[name].is_null().to_numpy())
                    tables[number] = table.set_column(place, name, written)
    return tables


_EMPTY = {
    **dict.fromkeys(("categorical", "text", "sentence"), pa.string()),
    "numeric": pa.float64(),
    "multi": pa.list_(pa.string()),
    "vector": pa.list_(pa.float32()),
}


def _item_rows(data: DataSettings, file: InputFile, *, alone: bool) -> tuple[str, pa.Table]:
    """The name of the id column of an item file, and its rows with the id first. `alone`: there is no other file. Raises DataError."""
    with open_file(file) as table:
        id_column = data.columns.get("item_id") or schema.ITEM_ID
        id_column = id_column if id_column in table.names else schema.ITEM_ID
        wanted = [id_column, *data.features, *([data.released] if data.released else [])]
        missing = [column for column in wanted if column not in table.names]
        if missing and (alone or file.format != "jsonl" or id_column in missing):  # there, what a file lacks is null
            raise DataError(
                f"{file.uri} has no column {', '.join(map(repr, missing))}; it has {', '.join(table.names)}",
                "check data.items, data.columns, data.features and data.released",
            )
        rows = table.read([column for column in wanted if column not in missing])
        for column in missing:
            rows = rows.append_column(column, pa.nulls(len(rows)))
        if pa.types.is_integer(given := table.type_of(id_column)) or (pa.types.is_floating(given) and file.format != "parquet"):
            rows = rows.set_column(0, id_column, as_id(rows[0], pa.int64(), f"{file.uri}: {id_column}", text=file.format != "parquet"))
        return id_column, rows


def _separators(data: DataSettings, tables: list[pa.Table]) -> tuple[dict[str, str | None], list[str]]:
    """What stands between the values of each `multi` feature that is text, and what a person should know of it."""
    signs, notes = {}, []
    for name, feature in data.features.items():
        texts = [text for table in tables if pa.types.is_string(table[name].type) for text in table[name].to_pylist()]
        if feature != "multi" or not texts:
            continue
        signs[name] = data.separator
        if data.separator is None:
            signs[name], note = see_separator(texts)
            notes += [f"feature {name}: {note}"] if note else []
    return signs, notes


def is_blank(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where text is empty or nothing but blanks; false where it is null."""
    return pc.fill_null(pc.or_(pc.utf8_is_space(text), pc.equal(text, "")), False)


def _feature(column: pa.ChunkedArray, name: str, kind: str, separator: str | None, file: InputFile) -> pa.ChunkedArray:
    """A feature column as it is kept: lists, also where they are text, and numbers, also where a text file has them as text. Raises DataError."""
    if not pa.types.is_string(column.type):
        return column
    if kind in ("multi", "vector"):
        return _lists(column, name, kind, separator, file)
    if file.format == "parquet" and name not in dict(file.partitions):
        return column
    if kind == "categorical":
        return pc.if_else(pc.is_in(column, pa.array(NULL_IDS)), pa.scalar(None, pa.string()), column)
    if kind != "numeric":
        return column
    text = pc.utf8_trim_whitespace(column)
    try:
        return pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text).cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{file.uri}: feature {name} is no number: {error}", f"mend it, or declare another kind: data.features.{name}=…") from None


def _lists(column: pa.ChunkedArray, name: str, kind: str, separator: str | None, file: InputFile) -> pa.ChunkedArray:
    """Text as lists: JSON, or values with a separator between them."""
    texts = [None if text is None or not text.strip() else text.strip() for text in column.to_pylist()]
    if kind == "vector":
        try:
            return pa.chunked_array([pa.array([None if text is None else json.loads(text) for text in texts], pa.list_(pa.float32()))])
        except (ValueError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"{file.uri}: feature {name} holds text that is no JSON list of numbers: {error}", "write [0.1, 0.2]") from None
    return pa.chunked_array([pa.array([None if text is None else values_of(text, separator) for text in texts], pa.list_(pa.string()))])


def _released(column: pa.ChunkedArray, data: DataSettings, uri: str) -> pa.ChunkedArray:
    """The release of each item in seconds, null where it is not known. Raises DataError for a column that holds no times."""
    name, kind = str(data.released), column.type
    if pa.types.is_null(kind):
        return column.cast(pa.int64())
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or is_number or pa.types.is_string(kind)):
        raise DataError(f"{uri}: data.released {name} has type {kind}, not a timestamp, a date or integer seconds", "cast it")
    rule = TimeRule("s", data.timezone or "UTC")
    if is_number or pa.types.is_string(kind):
        numbers = numbers_in(column)
        unit = _unit_of_release(numbers[numbers != 0], name, uri)
        if is_number and unit == "s":
            return _floor(column) if pa.types.is_floating(kind) else signed(column) if pa.types.is_uint64(kind) else column.cast(pa.int64())
        rule = TimeRule(unit, data.timezone or "UTC")
    found = rule.read(column)
    if found.unreadable is not None and found.unreadable.any():
        first = column.filter(pa.array(found.unreadable))[0]
        raise DataError(f"{uri}: data.released {name} is no date: {first}", "write it as ISO 8601, 2024-03-01")
    us = found.us if not (is_number or pa.types.is_string(kind)) else pc.if_else(pc.equal(found.us, OUTSIDE), pa.scalar(None, pa.int64()), found.us)
    return pc.divide(pc.subtract(us, pc.if_else(pc.less(us, 0), 999_999, 0)), 1_000_000)  # floor


def _floor(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Seconds with a fraction as whole ones, null for none."""
    known = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return pc.floor(known).cast(pa.int64())


def _unit_of_release(numbers: np.ndarray, name: str, uri: str) -> str:
    """The unit of numbers that say when items can be met; seconds may lie before 1970, when films were made too. Raises DataError."""
    if not len(numbers):
        return "s"
    low, high = int(numbers.min()), int(numbers.max())
    if low > -LATEST_S and high < LATEST_S and (low < 0 or high >= YEAR_S) and see_unit(numbers) in (None, "s"):
        return "s"
    unit = see_unit(numbers)
    if unit is None:
        wrong = f"numbers from {low} to {high}, which are not seconds since 1970"
        raise DataError(f"{uri}: data.released {name} holds {wrong}", "cast it to a timestamp or a date; years are neither")
    return unit


def as_id(column: pa.ChunkedArray, kind: pa.DataType, where: str, *, text: bool = False, pointed: bool = False) -> pa.ChunkedArray:
    """A column of ids in the staged type. Raises DataError for numbers that 63 bits do not hold.

    text : of a text file, which writes nothing as a blank or a word, and maybe whole numbers with a point
    pointed : these are whole numbers also where all ids are text
    """
    if text and pa.types.is_string(column.type):
        nothing = ["", *NULL_IDS] if pa.types.is_integer(kind) else NULL_IDS
        column = pc.if_else(pc.is_in(column, pa.array(nothing)), pa.scalar(None, pa.string()), column)
        if pa.types.is_integer(kind) or pointed:
            column = pc.replace_substring_regex(column, rf"^(-?[0-9]+){POINT_ZERO}", r"\1")
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: an id does not fit into 64 bits with a sign: {error}", "write such ids as text") from None


def _check_feature(found: pa.DataType, column: str, kind: str, uri: str) -> None:
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    is_number = _is_number(found)
    is_text = pa.types.is_string(found)
    fits = {
        "numeric": is_number,
        "multi": is_list or is_text,
        "text": is_text,
        "sentence": is_text,
        "categorical": not is_list,
        "vector": is_list and _is_number(found.value_type),
    }[kind]
    if not fits and not pa.types.is_null(found):
        raise DataError(f"{uri}: feature {column} has type {found}, which is not {kind}", f"declare another kind: data.features.{column}=…")


def _is_number(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found))
