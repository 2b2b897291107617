"""What the input consists of: files, their parts and columns, checked before any row is staged.

The types of columns are decided here, once for all files. Ids are whole numbers if they are so in every file,
else text. A column that is null in a whole file is null there. Times follow one rule
(`recray.prepare.times`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config import DataSettings
from recray.dataset import schema
from recray.dataset.context import CLOCK
from recray.errors import DataError, Problems, RecrayError
from recray.prepare.files import InputFile
from recray.prepare.formats import NULL_IDS, NULL_WORDS, POINT_ZERO, TableFile, Tally, common_type, open_file
from recray.prepare.texts import infer_separator, split_values
from recray.prepare.times import (
    MIN_SHARE,
    OUT_OF_RANGE,
    PLAUSIBLE_US,
    SAMPLE_SIZE,
    SUB_MICROSECOND,
    UNIT_WORDS,
    TimeRule,
    detect_zones,
    extract_numbers,
    infer_unit,
    to_signed,
    unit_error,
)

LATEST_S = 253_402_300_800  # the end of the year 9999: numbers beyond it are not seconds
YEAR_S = 365 * 86_400  # if all dates fall into 1970, the numbers are years, or dates as digits
MAX_OTHER_SHARE = 0.5  # other ids per whole number; above it, a mix of both is normal and gets no note
IDS = (schema.USER_ID, schema.ITEM_ID, schema.BASKET)
NAMES = (*IDS, schema.EVENT, schema.EVENT_ID)


@dataclass(frozen=True)
class RowGroup:
    """One unit of reading: a row group of a Parquet file, or a text file. `number` orders all of them.

    live : whether the endpoint collected it (`schema.LIVE_EVENTS`); false for files of `data.events`
    """

    number: int
    file: InputFile
    part: int
    rows: int
    live: bool = False


@dataclass(frozen=True)
class EventSource:
    """The event files, in the order that breaks ties, and the mapped columns: name in the schema to name in
    the files.

    notes : what the user should know about how they are read
    is_lossy : whether distinct rows may be equal once they are staged (see `partition.ROW`)
    integral_float_ids : id columns that text files write as 7.0
    """

    files: tuple[InputFile, ...]
    columns: dict[str, str]
    types: dict[str, pa.DataType]
    row_groups: tuple[RowGroup, ...]
    clock: str
    times: TimeRule
    notes: tuple[str, ...] = ()
    is_lossy: bool = False
    integral_float_ids: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


def inspect_events(
    data: DataSettings, files: tuple[InputFile, ...], collected: tuple[InputFile, ...] = ()
) -> EventSource:
    """Inspect the event files and decide how to read them. `collected` files of the endpoint come after them
    and do not influence the decision.

    Raises DataError for a missing column, a wrong type, files that disagree, or no rows at all.
    """
    groups: list[RowGroup] = []
    columns: dict[str, str] = {}
    types: dict[str, pa.DataType] = {}
    time_inspector, problems = _TimeInspector(data), Problems()
    columns_by_file: dict[InputFile, dict[str, str]] = {}
    tallies: dict[str, Tally] = {}
    file_notes: list[str] = []
    is_lossy = bool(data.context)

    for file in files:
        table = problems.collect(partial(open_file, file))
        if table is None:
            continue
        with table:
            mapped = problems.collect(partial(_map_columns, table, data))
            if not mapped:
                continue
            columns_by_file[file] = mapped
            columns |= mapped
            for name, column in mapped.items():
                stored_type = table.type_of(column) if sum(table.sizes()) else pa.null()
                if (name in NAMES or name.startswith(schema.CONTEXT)) and (
                    tally := table.tally(column)
                ) is not None:
                    tallies[name] = tallies.get(name, Tally()) + tally
                    stored_type = pa.int64() if pa.types.is_floating(stored_type) else stored_type
                staged_type = problems.collect(
                    partial(_staged_type, stored_type, name, file.uri, is_text_file=file.format != "parquet")
                )
                types[name] = common_type(types.get(name, pa.null()), staged_type or pa.null())
                is_lossy |= _is_lossy(stored_type, name)
            if schema.TIMESTAMP in mapped and not problems.errors:
                problems.collect(partial(time_inspector.inspect, table, mapped[schema.TIMESTAMP]))
            groups += _to_row_groups(table, len(groups), is_live=False)
            file_notes += table.notes
    problems.errors += _check_same_columns(columns_by_file, columns)
    problems.errors = _merge_alike(problems.errors, files)
    problems.raise_all()

    for file in collected:
        with open_file(file) as table:
            if not {field.name for field in schema.LIVE_EVENTS} - {schema.EVENT_ID} <= set(table.names):
                raise DataError(f"{file.uri} was not written by recray collect", "move its folder elsewhere")
            groups += _to_row_groups(table, len(groups), is_live=True)
    if not sum(group.rows for group in groups):
        raise DataError(
            f"{files[0].uri}{' and the other files' if len(files) > 1 else ''} have no rows",
            "check data.events",
        )

    for name, staged_type in types.items():
        if pa.types.is_null(staged_type):
            types[name] = pa.string() if name in IDS else _STAGED_TYPES.get(name, pa.string())
    clock = (
        schema.TIMESTAMP
        if schema.TIMESTAMP in columns
        else schema.POSITION
        if schema.POSITION in columns
        else "file_order"
    )
    integral_float_ids = tuple(name for name, tally in tallies.items() if tally.integral_floats > tally.other)
    notes = [*time_inspector.notes(), *file_notes, *_describe_ids(tallies, columns, integral_float_ids)]
    return EventSource(
        (*files, *collected),
        columns,
        types,
        tuple(groups),
        clock,
        time_inspector.rule,
        tuple(notes),
        is_lossy or time_inspector.is_lossy,
        integral_float_ids,
    )


def _check_same_columns(
    columns_by_file: dict[InputFile, dict[str, str]], columns: dict[str, str]
) -> Iterator[RecrayError]:
    """An error for each file that lacks a column of other files. A name that a JSON line lacks is null."""
    for file, mapped in columns_by_file.items():
        if missing := [name for name in columns if name not in mapped and file.format != "jsonl"]:
            yield DataError(
                f"{file.uri} has no column for {', '.join(missing)}, other files of data.events have one",
                "write all files with the same columns",
            )


def _describe_ids(
    tallies: dict[str, Tally], columns: dict[str, str], integral_float_ids: tuple[str, ...]
) -> Iterator[str]:
    """Notes about how ids of text files are read."""
    for name, tally in tallies.items():
        numbers = tally.integers + tally.integral_floats
        if name in integral_float_ids:
            yield (
                f"{columns[name]}: {tally.integral_floats} values such as 7.0, as pandas writes whole "
                "numbers, are read as 7"
            )
        if name in IDS and 0 < tally.other < MAX_OTHER_SHARE * numbers:
            yield (
                f"{columns[name]}: {tally.other} of {numbers + tally.other} ids are not whole numbers, for "
                f"example {tally.example!r}, so all are read as text: fix these rows if they are invalid"
            )


def _merge_alike(errors: list[RecrayError], files: tuple[InputFile, ...]) -> list[RecrayError]:
    """The errors, with one in place of all that differ only in the file; it names the first file."""
    by_text: dict[str, list[RecrayError]] = {}
    for error in errors:
        uri = next((file.uri for file in files if file.uri in error.message), "")
        by_text.setdefault(error.message.replace(uri, "") if uri else error.message, []).append(error)
    for first, *repeats in by_text.values():
        if repeats:
            first.message += f"; {len(repeats)} more files of data.events have the same problem"
    return [errors[0] for errors in by_text.values()]


def _to_row_groups(table: TableFile, first_number: int, *, is_live: bool) -> list[RowGroup]:
    sizes = [(part, rows) for part, rows in enumerate(table.sizes()) if rows]
    return [
        RowGroup(first_number + i, table.file, part, rows, is_live) for i, (part, rows) in enumerate(sizes)
    ]


class _TimeInspector:
    """Decides how times are read: infers the unit of numbers, and counts files with and without a time
    zone.
    """

    def __init__(self, data: DataSettings) -> None:
        self.time_unit, self.timezone = data.time_unit, data.timezone
        self.unit: str | None = None
        self.first_uri = ""
        self.naive_uris: list[str] = []
        self.zoned_files = 0
        self._has_nanoseconds = False

    @property
    def rule(self) -> TimeRule:
        if self.time_unit != "auto":
            return TimeRule(self.time_unit, self.timezone or "UTC")
        return TimeRule(self.unit or "s", self.timezone or "UTC", PLAUSIBLE_US)

    @property
    def is_lossy(self) -> bool:
        """Whether some times are finer than a microsecond."""
        return self._has_nanoseconds or self.rule.unit == "ns"

    def inspect(self, table: TableFile, column: str) -> None:
        arrow_type, uri = table.type_of(column), table.file.uri
        naive, zoned, numbers, share = pa.types.is_date(arrow_type), False, np.zeros(0, np.int64), 0.0
        if "%" in self.time_unit and not pa.types.is_string(arrow_type):
            raise DataError(
                f"{uri}: {column} has type {arrow_type}, but data.time_unit is {self.time_unit!r}, a pattern "
                "of text",
                "omit data.time_unit",
            )
        if pa.types.is_timestamp(arrow_type):
            naive, zoned = arrow_type.tz is None, arrow_type.tz is not None
        elif not naive:
            sample = _sample_values(table, column)
            numbers = extract_numbers(sample)
            share = len(numbers) / max(len(sample), 1)
            if pa.types.is_string(sample.type):
                self._check_text(sample, uri, column)
                zones = detect_zones(sample)
                naive, zoned = bool((zones == 0).any()), bool((zones == 1).any())
                self._has_nanoseconds |= bool(
                    pc.any(pc.match_substring_regex(sample, SUB_MICROSECOND)).as_py()
                )
        if self.time_unit == "auto" and len(numbers):
            self._infer_unit(numbers, share, uri, column)
        naive |= len(numbers) > 0 and self.rule.unit == "date"
        self.zoned_files += zoned
        self.naive_uris += [uri] * naive

    def _infer_unit(self, numbers: np.ndarray, share: float, uri: str, column: str) -> None:
        unit = infer_unit(numbers)
        if unit is None:
            if share > 1 - MIN_SHARE:  # a few are just invalid rows
                raise unit_error(numbers, f"{uri}: {column}")
        elif self.unit not in (None, unit):
            raise DataError(
                f"{uri}: {column} holds {UNIT_WORDS[unit]}, {self.first_uri} {UNIT_WORDS[str(self.unit)]}",
                "write all files in the same unit",
            )
        else:
            self.unit, self.first_uri = unit, uri

    def _check_text(self, text: pa.ChunkedArray, uri: str, column: str) -> None:
        times = self.rule.read(text)
        is_unreadable = np.zeros(len(text), bool) if times.unreadable is None else times.unreadable
        if len(text) and is_unreadable.mean() > 1 - MIN_SHARE:
            example = text.filter(pa.array(is_unreadable))[0].as_py()
            raise DataError(
                f"{uri}: {column} holds text such as {example!r}, which is not a time",
                "write ISO 8601 (2024-03-01 10:00:00), or map another column: "
                "data.columns.timestamp=YOUR_COLUMN",
            )

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.unit not in (None, "s"):
            notes.append(
                f"times are read as {UNIT_WORDS[str(self.unit)]}; set data.time_unit={self.unit} to confirm "
                "it and silence this note"
            )
        if self.naive_uris and self.zoned_files and self.timezone is None:
            notes.append(
                f"{len(self.naive_uris)} files have times without a zone, {self.zoned_files} with one; those "
                "without are read as UTC: set data.timezone"
            )
        return tuple(notes)


def _sample_values(table: TableFile, column: str) -> pa.ChunkedArray:
    """The first values of a column that are not null, about SAMPLE_SIZE at most."""
    chunks: list[pa.ChunkedArray] = []
    for part in range(len(table.sizes())):
        for batch in table.batches(part, SAMPLE_SIZE, [column]):
            values = pc.drop_null(batch.rows[column]).slice(0, SAMPLE_SIZE)
            if pa.types.is_string(values.type):
                values = values.filter(
                    pc.invert(pc.is_in(pc.utf8_trim_whitespace(values), pa.array(NULL_WORDS)))
                )
            chunks.append(values)
            if sum(map(len, chunks)) >= SAMPLE_SIZE // 2:
                break
        if sum(map(len, chunks)) >= SAMPLE_SIZE:
            break
    return (
        pa.chunked_array([chunk for values in chunks for chunk in values.chunks], chunks[0].type)
        if chunks
        else pa.chunked_array([], pa.string())
    )


def _map_columns(table: TableFile, data: DataSettings) -> dict[str, str]:
    columns = {}
    names, problems = table.names, Problems()
    available = f"it has {', '.join(name if name == name.strip() else repr(name) for name in names)}"
    configured: dict[str, str | None] = {str(name): column for name, column in data.columns.items()}
    for name in schema.EVENT_COLUMNS:
        column = configured.get(name, name)
        if column is not None and names.count(column) > 1:
            problems.errors.append(
                DataError(
                    f"{table.file.uri} has {names.count(column)} columns called {column!r}",
                    "give each column its own name",
                )
            )
        elif column in names:
            columns[name] = str(column)
        elif column is not None and (name in configured or name in (schema.USER_ID, schema.ITEM_ID)):
            by_casefold = {other.casefold(): other for other in names}
            matches = difflib.get_close_matches(str(column).casefold(), by_casefold, n=1)
            suggestion = by_casefold[matches[0]] if matches else "YOUR_COLUMN"
            fix = f"name your column: data.columns.{name}={suggestion}"
            problems.errors.append(
                DataError(f"{table.file.uri} has no column {column!r} for {name}; {available}", fix)
            )
        elif (
            column is not None
            and (similar := next((other for other in names if other.casefold() == column), None)) is not None
        ):
            table.notes.append(
                f"{table.file.uri}: the column {similar!r} is not read; to use it as {name}, set "
                f"data.columns.{name}={similar}"
            )
    for name in data.context:
        if name in names:
            columns[schema.CONTEXT + name] = name
        elif name not in CLOCK:
            problems.errors.append(
                DataError(
                    f"{table.file.uri} has no column {name!r} for data.context; {available}",
                    "name a column of data.events, hour or weekday",
                )
            )
    problems.raise_all()
    return columns


_STAGED_TYPES = {
    schema.TIMESTAMP: pa.timestamp("us", tz="UTC"),
    schema.POSITION: pa.int64(),
    schema.EVENT: pa.string(),
    schema.EVENT_ID: pa.string(),
    schema.VALUE: pa.float32(),
}
_EXPECTED = {
    schema.TIMESTAMP: "a timestamp, a date, ISO 8601 text or whole numbers",
    schema.POSITION: "whole numbers",
    schema.EVENT: "text or whole numbers",
    schema.EVENT_ID: "text or whole numbers",
    schema.VALUE: "numbers",
}


def _is_lossy(stored_type: pa.DataType, name: str) -> bool:
    """Whether the staged type of a column holds less than its stored type."""
    if name == schema.TIMESTAMP:
        return bool(pa.types.is_timestamp(stored_type) and stored_type.unit == "ns")
    return bool(
        name == schema.VALUE
        and not (
            pa.types.is_float32(stored_type)
            or pa.types.is_boolean(stored_type)
            or pa.types.is_null(stored_type)
        )
    )


def _staged_type(stored_type: pa.DataType, name: str, uri: str, *, is_text_file: bool = False) -> pa.DataType:
    """The type in which a column is staged, null for one without values. Raises DataError for a type that
    does not fit the column.

    is_text_file : whether numbers come from the text of a text file
    """
    is_int, is_float = (
        pa.types.is_integer(stored_type),
        pa.types.is_floating(stored_type) or pa.types.is_decimal(stored_type),
    )
    is_text = pa.types.is_string(stored_type) or (is_text_file and is_float)
    if pa.types.is_null(stored_type):
        return pa.null()
    if name in IDS and (is_text or is_int):
        return pa.string() if is_text else pa.int64()
    fits = {
        schema.TIMESTAMP: pa.types.is_timestamp(stored_type)
        or pa.types.is_date(stored_type)
        or is_int
        or is_text
        or pa.types.is_floating(stored_type),
        schema.POSITION: is_int or (is_text_file and is_float),
        schema.EVENT: is_text or is_int,
        schema.EVENT_ID: is_text or is_int,
        schema.VALUE: is_int or is_float or is_text or pa.types.is_boolean(stored_type),
    }
    if fits.get(name):
        return _STAGED_TYPES[name]
    if name.startswith(schema.CONTEXT):
        if is_text or is_int or pa.types.is_boolean(stored_type):
            return pa.string()
        field = name.removeprefix(schema.CONTEXT)
        raise DataError(
            f"{uri}: context {field} has type {stored_type}, not text, whole numbers or booleans",
            f"cast it, or leave {field} out of data.context",
        )
    raise DataError(
        f"{uri}: column for {name} has type {stored_type}, not "
        f"{_EXPECTED.get(name, 'whole numbers or text')}",
        f"cast it, or map another column: data.columns.{name}=YOUR_COLUMN",
    )


def read_items(
    data: DataSettings, files: tuple[InputFile, ...], *, tolerates_ids: bool = False
) -> tuple[pa.Table | None, list[str]]:
    """The item table: `item_id` first, then the feature columns; and notes about how it was read. The table
    is None if `data.items` is null.

    tolerates_ids : leave out rows with a missing or repeated id, instead of raising

    Raises DataError.
    """
    if data.items is None:
        if named := _list_item_columns(data):
            names = ", ".join(named)
            raise DataError(
                f"data.features, data.display or data.available_from names {names}, but data.items is null",
                "name the item table in data.items",
            )
        return None, []

    problems, id_type = Problems(), pa.null()
    loaded: list[tuple[InputFile, str, pa.Table]] = []
    for file in files:
        if (
            rows := problems.collect(partial(_read_item_file, data, file, is_only_file=len(files) == 1))
        ) is not None:
            loaded.append((file, *rows))
            stored_type = rows[1].schema.field(0).type
            file_type = problems.collect(partial(_staged_type, stored_type, schema.ITEM_ID, file.uri))
            id_type = common_type(id_type, file_type or pa.null())
    problems.raise_all()
    if pa.types.is_null(id_type):
        raise DataError(
            f"{files[0].uri}: no item has an item_id",
            "fill the column, or map another: data.columns.item_id=YOUR_COLUMN",
        )

    separators, notes = _infer_separators(data, [rows for _, _, rows in loaded])
    tables: list[pa.Table | None] = []
    for file, column, rows in loaded:
        columns = {
            schema.ITEM_ID: problems.collect(
                partial(
                    to_id_column,
                    rows[0],
                    id_type,
                    f"{file.uri}: {column}",
                    is_text_file=file.format != "parquet",
                )
            )
        }
        for name, feature in data.features.items():
            columns[name] = problems.collect(
                partial(_convert_feature, rows[name], name, feature, separators.get(name), file)
            )
        for use, name in data.display.items():
            columns[schema.DISPLAY + use] = problems.collect(partial(_to_text, rows[name], name, file))
        if data.available_from is not None:
            columns[schema.AVAILABLE_FROM] = problems.collect(
                partial(_to_release_seconds, rows[data.available_from], data, file.uri)
            )
        tables.append(None if problems.errors else pa.table(columns))
    problems.raise_all()
    items = _concat_items([table for table in tables if table is not None], files[0].uri)

    if tolerates_ids:
        items = _keep_first_rows(items)
    problems.errors += _check_item_ids(items[0], files[0].uri)
    for column, feature in data.features.items():
        problems.collect(partial(_check_feature, items[column].type, column, feature, files[0].uri))
        if pa.types.is_null(items[column].type):
            items = items.set_column(
                items.schema.get_field_index(column), column, items[column].cast(_NULL_TYPES[feature])
            )
    problems.raise_all()
    return items, notes


def _concat_items(tables: list[pa.Table], uri: str) -> pa.Table:
    """The tables of all item files as one. Raises DataError if their columns do not fit together."""
    try:
        return pa.concat_tables(_widen_floats(tables), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{uri} and the other item files differ: {error}",
            "write all files with the same columns and types",
        ) from None


def _keep_first_rows(items: pa.Table) -> pa.Table:
    """The first row of each id, without rows that have none."""
    is_valid = items[0].is_valid()
    if pa.types.is_string(items[0].type):
        is_valid = pc.and_(is_valid, pc.invert(is_blank(items[0])))
    items = items.filter(is_valid)
    first = np.unique(items[0].combine_chunks().dictionary_encode().indices.to_numpy(), return_index=True)[1]
    return items.take(pa.array(np.sort(first)))


def _check_item_ids(ids: pa.ChunkedArray, uri: str) -> Iterator[RecrayError]:
    """Errors for missing and repeated item ids."""
    blank = int(pc.sum(is_blank(ids)).as_py() or 0) if pa.types.is_string(ids.type) else 0
    if missing := ids.null_count + blank:
        yield DataError(f"{uri}: {missing} items have no item_id", "fill or drop them")
    if duplicates := len(ids) - len(ids.unique()):
        counts = ids.value_counts()
        example = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
        yield DataError(
            f"{uri}: {duplicates} item ids occur more than once, for example {example}",
            "keep one row per item",
        )


def _widen_floats(tables: list[pa.Table]) -> list[pa.Table]:
    """Tables in which each float column has its widest type. A number keeps its decimal spelling: 0.85 in
    float32 becomes 0.85 in float64.
    """
    for position, name in enumerate(tables[0].column_names):
        types = {table[name].type for table in tables if pa.types.is_floating(table[name].type)}
        if pa.float64() in types and len(types) > 1:
            for number, table in enumerate(tables):
                if table[name].type in (pa.float32(), pa.float16()):
                    column = table[name].to_numpy()
                    widened = pa.array(
                        [float(str(value)) for value in column],
                        pa.float64(),
                        mask=table[name].is_null().to_numpy(),
                    )
                    tables[number] = table.set_column(position, name, widened)
    return tables


_NULL_TYPES = {
    **dict.fromkeys(("categorical", "text", "sentence"), pa.string()),
    "numeric": pa.float64(),
    "multi": pa.list_(pa.string()),
    "vector": pa.list_(pa.float32()),
}


def _list_item_columns(data: DataSettings) -> list[str]:
    """The columns of the item table that are read beside the id; some may be named twice."""
    return [*data.features, *data.display.values(), *([data.available_from] if data.available_from else [])]


def _to_text(column: pa.ChunkedArray, name: str, file: InputFile) -> pa.ChunkedArray:
    """A column that people see, as text. Raises DataError for one that is none."""
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise DataError(
            f"{file.uri}: column {name} of data.display holds {column.type}, not text", "name another column"
        ) from None


def _read_item_file(data: DataSettings, file: InputFile, *, is_only_file: bool) -> tuple[str, pa.Table]:
    """The name of the id column of an item file, and its rows with the id first. Raises DataError.

    is_only_file : whether there is no other item file
    """
    with open_file(file) as table:
        id_column = data.columns.get("item_id") or schema.ITEM_ID
        id_column = id_column if id_column in table.names else schema.ITEM_ID
        columns = list(dict.fromkeys([id_column, *_list_item_columns(data)]))
        missing = [column for column in columns if column not in table.names]
        if missing and (
            is_only_file or file.format != "jsonl" or id_column in missing
        ):  # a name that a JSON file lacks is null
            raise DataError(
                f"{file.uri} has no column {', '.join(map(repr, missing))}; it has {', '.join(table.names)}",
                "check data.items, data.columns, data.features, data.display and data.available_from",
            )
        rows = table.read([column for column in columns if column not in missing])
        for column in missing:
            rows = rows.append_column(column, pa.nulls(len(rows)))
        if pa.types.is_integer(id_type := table.type_of(id_column)) or (
            pa.types.is_floating(id_type) and file.format != "parquet"
        ):
            rows = rows.set_column(
                0,
                id_column,
                to_id_column(
                    rows[0], pa.int64(), f"{file.uri}: {id_column}", is_text_file=file.format != "parquet"
                ),
            )
        return id_column, rows


def _infer_separators(data: DataSettings, tables: list[pa.Table]) -> tuple[dict[str, str | None], list[str]]:
    """The separator of each `multi` feature that is text, and notes about those that were inferred."""
    separators, notes = {}, []
    for name, feature in data.features.items():
        texts = [
            text
            for table in tables
            if pa.types.is_string(table[name].type)
            for text in table[name].to_pylist()
        ]
        if feature != "multi" or not texts:
            continue
        separators[name] = data.separator
        if data.separator is None:
            separators[name], note = infer_separator(texts)
            notes += [f"feature {name}: {note}"] if note else []
    return separators, notes


def is_blank(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where text is empty or only whitespace; false where it is null."""
    return pc.fill_null(pc.or_(pc.utf8_is_space(text), pc.equal(text, "")), False)


def _convert_feature(
    column: pa.ChunkedArray, name: str, kind: str, separator: str | None, file: InputFile
) -> pa.ChunkedArray:
    """A feature column in the type that the dataset stores: text is parsed as lists and numbers where its
    kind says so. Raises DataError.
    """
    if not pa.types.is_string(column.type):
        return column
    if kind in ("multi", "vector"):
        return _parse_lists(column, name, kind, separator, file)
    if file.format == "parquet" and name not in dict(file.partitions):
        return column
    if kind == "categorical":
        return pc.if_else(pc.is_in(column, pa.array(NULL_IDS)), pa.scalar(None, pa.string()), column)
    if kind != "numeric":
        return column
    text = pc.utf8_trim_whitespace(column)
    try:
        return pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text).cast(
            pa.float64()
        )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{file.uri}: feature {name} is not a number: {error}",
            f"fix it, or declare another kind: data.features.{name}=…",
        ) from None


def _parse_lists(
    column: pa.ChunkedArray, name: str, kind: str, separator: str | None, file: InputFile
) -> pa.ChunkedArray:
    """Text as lists: JSON, or values with a separator between them."""
    texts = [None if text is None or not text.strip() else text.strip() for text in column.to_pylist()]
    if kind == "vector":
        try:
            return pa.chunked_array(
                [
                    pa.array(
                        [None if text is None else json.loads(text) for text in texts], pa.list_(pa.float32())
                    )
                ]
            )
        except (ValueError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"{file.uri}: feature {name} holds text that is not a JSON list of numbers: {error}",
                "write lists such as [0.1, 0.2]",
            ) from None
    return pa.chunked_array(
        [
            pa.array(
                [None if text is None else split_values(text, separator) for text in texts],
                pa.list_(pa.string()),
            )
        ]
    )


def _to_release_seconds(column: pa.ChunkedArray, data: DataSettings, uri: str) -> pa.ChunkedArray:
    """The release of each item in seconds since 1970, null where it is unknown. Raises DataError for a column
    without times.
    """
    name, arrow_type = str(data.available_from), column.type
    if pa.types.is_null(arrow_type):
        return column.cast(pa.int64())
    is_number = pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type)
    if not (
        pa.types.is_timestamp(arrow_type)
        or pa.types.is_date(arrow_type)
        or is_number
        or pa.types.is_string(arrow_type)
    ):
        raise DataError(
            f"{uri}: data.available_from {name} has type {arrow_type}, not a timestamp, a date or integer "
            "seconds",
            "cast it",
        )
    rule = TimeRule("s", data.timezone or "UTC")
    if is_number or pa.types.is_string(arrow_type):
        numbers = extract_numbers(column)
        unit = _infer_release_unit(numbers[numbers != 0], name, uri)
        if is_number and unit == "s":
            return (
                _floor_seconds(column)
                if pa.types.is_floating(arrow_type)
                else to_signed(column)
                if pa.types.is_uint64(arrow_type)
                else column.cast(pa.int64())
            )
        rule = TimeRule(unit, data.timezone or "UTC")
    times = rule.read(column)
    if times.unreadable is not None and times.unreadable.any():
        example = column.filter(pa.array(times.unreadable))[0]
        raise DataError(
            f"{uri}: data.available_from {name} is not a date: {example}", "write it as ISO 8601, 2024-03-01"
        )
    us = (
        times.us
        if not (is_number or pa.types.is_string(arrow_type))
        else pc.if_else(pc.equal(times.us, OUT_OF_RANGE), pa.scalar(None, pa.int64()), times.us)
    )
    return pc.divide(pc.subtract(us, pc.if_else(pc.less(us, 0), 999_999, 0)), 1_000_000)  # rounds down


def _floor_seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Fractional seconds rounded down; null for NaN and infinity."""
    finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return pc.floor(finite).cast(pa.int64())


def _infer_release_unit(numbers: np.ndarray, name: str, uri: str) -> str:
    """The unit of numeric release dates. Seconds may lie before 1970: films do. Raises DataError."""
    if not len(numbers):
        return "s"
    low, high = int(numbers.min()), int(numbers.max())
    if (
        low > -LATEST_S
        and high < LATEST_S
        and (low < 0 or high >= YEAR_S)
        and infer_unit(numbers) in (None, "s")
    ):
        return "s"
    unit = infer_unit(numbers)
    if unit is None:
        problem = f"numbers from {low} to {high}, which are not seconds since 1970"
        raise DataError(
            f"{uri}: data.available_from {name} holds {problem}",
            "cast it to a timestamp or a date; years alone are not enough",
        )
    return unit


def to_id_column(
    column: pa.ChunkedArray,
    id_type: pa.DataType,
    where: str,
    *,
    is_text_file: bool = False,
    is_integral: bool = False,
) -> pa.ChunkedArray:
    """A column of ids in the staged type. Raises DataError for numbers that do not fit 63 bits.

    is_text_file : whether null is written as blank or a word, and whole numbers maybe with a point
    is_integral : whether 7.0 means 7 also where ids are text
    """
    if is_text_file and pa.types.is_string(column.type):
        null_words = ["", *NULL_IDS] if pa.types.is_integer(id_type) else NULL_IDS
        column = pc.if_else(pc.is_in(column, pa.array(null_words)), pa.scalar(None, pa.string()), column)
        if pa.types.is_integer(id_type) or is_integral:
            column = pc.replace_substring_regex(column, rf"^(-?[0-9]+){POINT_ZERO}", r"\1")
    try:
        return column.cast(id_type)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{where}: an id does not fit into a signed 64-bit integer: {error}", "write such ids as text"
        ) from None


def _check_feature(arrow_type: pa.DataType, column: str, kind: str, uri: str) -> None:
    is_list = (
        pa.types.is_list(arrow_type)
        or pa.types.is_large_list(arrow_type)
        or pa.types.is_fixed_size_list(arrow_type)
    )
    is_number = _is_number(arrow_type)
    is_text = pa.types.is_string(arrow_type)
    fits = {
        "numeric": is_number,
        "multi": is_list or is_text,
        "text": is_text,
        "sentence": is_text,
        "categorical": not is_list,
        "vector": is_list and _is_number(arrow_type.value_type),
    }[kind]
    if not fits and not pa.types.is_null(arrow_type):
        raise DataError(
            f"{uri}: feature {column} has type {arrow_type}, which is not {kind}",
            f"declare another kind: data.features.{column}=…",
        )


def _is_number(arrow_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type) or pa.types.is_decimal(arrow_type)
    )
