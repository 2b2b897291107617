"""What the input consists of: files, their parts and columns, checked before any row is staged.

What the columns mean is decided here, once for all files: ids are whole numbers if they are so in every file, else text; a column that is
null in a whole file is null there; times have one rule (`recray.prepare.times`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import schema
from recray.config import DataSettings
from recray.dataset.context import CLOCK
from recray.errors import DataError, Problems
from recray.prepare.files import InputFile
from recray.prepare.formats import TableFile, joined_type, open_file
from recray.prepare.times import ENOUGH, SAMPLE, WORDS, TimeRule, refuse_unit, see_unit

LATEST_S = 253_402_300_800  # the end of the year 9999: what lies further from 1970 is no number of seconds
YEAR_S = 365 * 86_400  # a catalogue of 1970 alone is one of years, or of dates as numbers
IDS = (schema.USER_ID, schema.ITEM_ID, schema.BASKET)


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
    """

    files: tuple[InputFile, ...]
    columns: dict[str, str]
    types: dict[str, pa.DataType]
    row_groups: tuple[RowGroup, ...]
    clock: str
    times: TimeRule
    notes: tuple[str, ...] = ()

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
    for file in files:
        table = problems.of(partial(open_file, file))
        if table is None:
            continue
        with table:
            found = problems.of(partial(_columns, table, data))
            if not found:
                continue
            if columns and found != columns:
                missing = [name for name in columns if name not in found] or [name for name in found if name not in columns]
                whose = files[0].uri if missing[0] in found else file.uri
                problems.found.append(
                    DataError(f"{whose} has no column for {missing[0]}, other files of data.events have one", "write all files alike")
                )
                continue
            columns = found
            for name, column in found.items():
                kind = problems.of(partial(_kind, table.type_of(column), name, file.uri))
                types[name] = joined_type(types.get(name, pa.null()), kind or pa.null())
            if schema.TIMESTAMP in found and not problems.found:
                problems.of(partial(clocks.see, table, found[schema.TIMESTAMP]))
            groups += _groups(table, len(groups), live=False)
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
    return EventSource((*files, *live), columns, types, tuple(groups), clock, clocks.rule, clocks.notes())


def _groups(table: TableFile, first: int, *, live: bool) -> list[RowGroup]:
    sizes = [(part, rows) for part, rows in enumerate(table.sizes()) if rows]
    return [RowGroup(first + i, table.file, part, rows, live) for i, (part, rows) in enumerate(sizes)]


class _Clocks:
    """What the files say of their times: the unit of whole numbers, and whether they name a zone."""

    def __init__(self, data: DataSettings) -> None:
        self.asked, self.zone = data.time_unit, data.timezone
        self.unit: str | None = None
        self.first = ""
        self.naive: list[str] = []
        self.zoned = 0

    @property
    def rule(self) -> TimeRule:
        return TimeRule(self.asked if self.asked != "auto" else self.unit or "s", self.zone or "UTC")

    def see(self, table: TableFile, column: str) -> None:
        kind, uri = _plain(table.type_of(column)), table.file.uri
        if pa.types.is_timestamp(kind) and kind.tz is not None:
            self.zoned += 1
        elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            self.naive.append(uri)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            self._see_text(table, column)
        if self.asked != "auto" or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return
        numbers = _numbers(table, column)
        if not len(numbers):
            return
        unit = see_unit(numbers)
        if unit is None:
            raise refuse_unit(numbers, f"{uri}: {column}")
        if self.unit not in (None, unit):
            raise DataError(f"{uri}: {column} holds {WORDS[unit]}, {self.first} {WORDS[str(self.unit)]}", "write all files alike")
        self.unit, self.first = unit, uri

    def _see_text(self, table: TableFile, column: str) -> None:
        text = _sample(table, column)
        read = self.rule.read(text)
        wrong = np.zeros(len(text), bool) if read.unreadable is None else read.unreadable
        if len(text) and wrong.mean() > 1 - ENOUGH:
            example = text.filter(pa.array(wrong))[0].as_py()
            raise DataError(
                f"{table.file.uri}: {column} holds text such as {example!r}, which is no time",
                "write ISO 8601 (2024-03-01 10:00:00), or map another column: data.columns.timestamp=YOUR_COLUMN",
            )

    def notes(self) -> tuple[str, ...]:
        found = []
        if self.unit not in (None, "s"):
            found.append(f"times are read as {WORDS[str(self.unit)]}; data.time_unit={self.unit} says so without this note")
        if self.naive and self.zoned and self.zone is None:
            found.append(f"{len(self.naive)} files have times without a zone, {self.zoned} with one; those without are UTC: data.timezone")
        return tuple(found)


def _sample(table: TableFile, column: str) -> pa.ChunkedArray:
    """The first values of a column that are not null or blank, at most about SAMPLE."""
    found: list[pa.ChunkedArray] = []
    for part in range(len(table.sizes())):
        for batch in table.batches(part, SAMPLE, [column]):
            values = pc.drop_null(decoded(batch.rows[column])).slice(0, SAMPLE)
            found.append(values.filter(pc.invert(is_blank(values))) if pa.types.is_string(values.type) else values)
            if sum(map(len, found)) >= SAMPLE // 2:
                break
    return pa.chunked_array([chunk for one in found for chunk in one.chunks], found[0].type) if found else pa.chunked_array([], pa.string())


def _numbers(table: TableFile, column: str) -> np.ndarray:
    """Some of the numbers of a column, int64."""
    values = _sample(table, column)
    if pa.types.is_floating(values.type):
        numbers = values.to_numpy().astype(np.float64)
        found: np.ndarray = numbers[np.abs(numbers) < 2.0**63].astype(np.int64)
    else:
        found = values.cast(pa.int64(), safe=pa.types.is_string(values.type)).to_numpy()
    return found


def _columns(table: TableFile, data: DataSettings) -> dict[str, str]:
    chosen = {}
    names, problems = table.names, Problems()
    has = f"it has {', '.join(names)}"
    mapping: dict[str, str | None] = {str(name): column for name, column in data.columns.items()}
    for name in schema.EVENT_COLUMNS:
        column = mapping.get(name, name)
        if column in names:
            chosen[name] = str(column)
        elif column is not None and (name in mapping or name in (schema.USER_ID, schema.ITEM_ID)):
            fix = f"name your column: data.columns.{name}=YOUR_COLUMN"
            problems.found.append(DataError(f"{table.file.uri} has no column {column!r} for {name}; {has}", fix))
    for name in data.context:
        if name in names:
            chosen[schema.CONTEXT + name] = name
        elif name not in CLOCK:
            problems.found.append(DataError(f"{table.file.uri} has no column {name!r} for data.context; {has}", "name a column, hour or weekday"))
    problems.raise_all()
    return chosen


def _plain(found: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary, or the type itself."""
    return found.value_type if pa.types.is_dictionary(found) else found


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without its dictionary."""
    return pc.cast(column, column.type.value_type) if pa.types.is_dictionary(column.type) else column


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


def _kind(found: pa.DataType, name: str, uri: str) -> pa.DataType:
    """The type in which a column is staged, null for one that says nothing. Raises DataError if it cannot hold what the name says."""
    plain = _plain(found)
    is_text = pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)
    is_int, is_real = pa.types.is_integer(plain), pa.types.is_floating(plain) or pa.types.is_decimal(plain)
    if pa.types.is_null(plain):
        return pa.null()
    if name in IDS and (is_text or is_int):
        return pa.string() if is_text else pa.int64()
    fits = {
        schema.TIMESTAMP: pa.types.is_timestamp(plain) or pa.types.is_date(plain) or is_int or is_text or pa.types.is_floating(plain),
        schema.POSITION: is_int,
        schema.EVENT: is_text or is_int,
        schema.EVENT_ID: is_text or is_int,
        schema.VALUE: is_int or is_real or is_text or pa.types.is_boolean(plain),
    }
    if fits.get(name):
        return _STAGED[name]
    if name.startswith(schema.CONTEXT):
        if is_text or is_int or pa.types.is_boolean(plain):
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
    id_column = data.columns.get("item_id") or schema.ITEM_ID
    tables, kind = [], pa.null()
    signs: dict[str, str | None] = {}
    for file in files:
        with open_file(file) as table:
            item_column = id_column if id_column in table.names else schema.ITEM_ID
            for column in (item_column, *data.features, *([data.released] if data.released else [])):
                if column not in table.names:
                    raise DataError(
                        f"{file.uri} has no column {column!r}; it has {', '.join(table.names)}",
                        "check data.items, data.columns, data.features and data.released",
                    )
            kind = joined_type(kind, _kind(table.type_of(item_column), schema.ITEM_ID, file.uri))
            rows = table.read([item_column, *data.features, *([data.released] if data.released else [])])
            columns = {schema.ITEM_ID: decoded(rows[item_column])}
            for name, feature in data.features.items():
                if feature == "multi" and data.separator is None and pa.types.is_string(_plain(rows[name].type)):
                    signs[name] = signs.get(name) or see_separator(rows[name].to_pylist())
                columns[name] = _feature(rows[name], name, feature, signs.get(name, data.separator), file)
            if data.released is not None:
                columns[schema.RELEASED] = _released(rows[data.released], data, file.uri)
            tables.append(pa.table(columns))
    kind = pa.string() if pa.types.is_null(kind) else kind
    tables = [table.set_column(0, schema.ITEM_ID, as_id(table[0], kind, file.uri)) for table, file in zip(tables, files, strict=True)]
    try:
        found = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{files[0].uri} and the other item files differ: {error}", "write all files alike") from None
    missing = found[0].null_count + (int(pc.sum(is_blank(found[0])).as_py() or 0) if pa.types.is_string(kind) else 0)
    if missing:
        raise DataError(f"{files[0].uri}: {missing} items have no item_id", "fill or drop them")
    if len(found[0].unique()) < len(found):
        raise DataError(f"{files[0].uri}: {len(found) - len(found[0].unique())} item ids occur more than once", "keep one row an item")
    for column, feature in data.features.items():
        _check_feature(found[column].type, column, feature, files[0].uri)
    notes = [
        f"feature {name}: {sign!r} is taken for what separates its values; data.separator says so"
        for name, sign in signs.items()
        if sign in (";", ",")
    ]
    return found, notes


def is_blank(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where text is empty or nothing but blanks; false where it is null."""
    return pc.fill_null(pc.or_(pc.utf8_is_space(text), pc.equal(text, "")), False)


def _feature(column: pa.ChunkedArray, name: str, kind: str, separator: str | None, file: InputFile) -> pa.ChunkedArray:
    """A feature column as it is kept: lists, also where they are text, and numbers, also where a text file has them as text. Raises DataError."""
    column = decoded(column)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    if kind in ("multi", "vector"):
        return _lists(column, name, kind, separator, file)
    if kind != "numeric" or file.format == "parquet":
        return column
    text = pc.utf8_trim_whitespace(column)
    try:
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text).cast(pa.float64())
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
    return pa.chunked_array([pa.array([None if text is None else _values(text, separator) for text in texts], pa.list_(pa.string()))])


def _values(text: str, between: str | None) -> list[str]:
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, list):
            return [one if isinstance(one, str) else json.dumps(one) for one in found if one is not None]
    return [part.strip() for part in (text.split(between) if between else [text]) if part.strip()]


def see_separator(texts: list[str | None]) -> str | None:
    """What stands between the values of a text: the first of | ; and , that any text has outside of JSON, None for none."""
    plain = [text for text in texts if text is not None and not text.lstrip().startswith("[")]
    return next((sign for sign in "|;," if any(sign in text for text in plain)), None)


def _released(column: pa.ChunkedArray, data: DataSettings, uri: str) -> pa.ChunkedArray:
    """The release of each item in seconds, null where it is not known. Raises DataError for a column that holds no times."""
    name = str(data.released)
    column = decoded(column)
    is_integer = pa.types.is_integer(column.type)
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type) or is_integer or pa.types.is_string(column.type)):
        raise DataError(f"{uri}: data.released {name} has type {column.type}, not a timestamp, a date or integer seconds", "cast it")
    if is_integer:
        return _released_numbers(column, name, uri)
    found = TimeRule("s", data.timezone or "UTC").read(column)
    if found.unreadable is not None and found.unreadable.any():
        first = column.filter(pa.array(found.unreadable))[0]
        raise DataError(f"{uri}: data.released {name} is no date: {first}", "write it as ISO 8601, 2024-03-01")
    return pc.divide(pc.subtract(found.us, pc.if_else(pc.less(found.us, 0), 999_999, 0)), 1_000_000)  # floor


def _released_numbers(column: pa.ChunkedArray, name: str, uri: str) -> pa.ChunkedArray:
    said = column.filter(pc.fill_null(pc.not_equal(column, 0), False))
    if len(said):
        low, high = pc.min_max(said).as_py().values()
        if not (low > -LATEST_S and high < LATEST_S and (low < 0 or high >= YEAR_S)):
            unit = see_unit(said.cast(pa.int64(), safe=False).to_numpy())
            if unit in (None, "s"):
                wrong = f"integers from {low} to {high}, which are not seconds since 1970"
                raise DataError(f"{uri}: data.released {name} holds {wrong}", "cast it to a timestamp or a date; years are neither")
            us = TimeRule(str(unit)).read(column).us
            return pc.divide(us, 1_000_000)
    return column.cast(pa.int64())


def as_id(column: pa.ChunkedArray, kind: pa.DataType, uri: str) -> pa.ChunkedArray:
    """A column of ids in the staged type. Raises DataError for numbers that 63 bits do not hold."""
    column = decoded(column)
    if pa.types.is_string(column.type) and pa.types.is_integer(kind):  # of a text file, whose blanks are nulls
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri}: an id does not fit into 64 bits with a sign: {error}", "write such ids as text") from None


def _check_feature(found: pa.DataType, column: str, kind: str, uri: str) -> None:
    plain = _plain(found)
    is_list = pa.types.is_list(plain) or pa.types.is_large_list(plain) or pa.types.is_fixed_size_list(plain)
    is_number = _is_number(plain)
    is_text = pa.types.is_string(plain) or pa.types.is_large_string(plain)
    fits = {
        "numeric": is_number,
        "multi": is_list or is_text,
        "text": is_text,
        "sentence": is_text,
        "categorical": not is_list,
        "vector": is_list and _is_number(plain.value_type),
    }[kind]
    if not fits and not pa.types.is_null(plain):
        raise DataError(f"{uri}: feature {column} has type {found}, which is not {kind}", f"declare another kind: data.features.{column}=…")


def _is_number(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found))
