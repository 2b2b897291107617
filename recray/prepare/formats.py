"""Parquet, CSV and JSON lines as tables: columns, row counts, and batches of rows.

Parquet stores its types. The type of a text column follows from its values: int64 if every value is written
as a whole number (no leading zeros, 64 bits), float64 if some end in `.0`, else text. The meaning of a text
is then the same as in a text column of Parquet. Lines that cannot be parsed are reported, never dropped. All
text types become string, and a dictionary becomes its values.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from recray.errors import DataError
from recray.prepare.files import InputFile, resolve_uri

BLOCK = 16 << 20  # bytes of text per read: a row must fit
LINES = 1 << 16  # JSON lines per batch
LONG_ROW = 20  # a row with more lines gets a note
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}  # first bytes
INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
POINT_ZERO = r"\.0+$"  # how pandas ends whole numbers once one is missing
NULL_WORDS = [
    "",
    "null",
    "NULL",
    "NaN",
    "nan",
    "NA",
    "N/A",
    "None",
    "<NA>",
    "\\N",
]  # stand for null in columns that are not text
NULL_IDS = [
    "null",
    "NULL",
    "NaN",
    "nan",
    "None",
    "<NA>",
    "\\N",
]  # null in columns of ids, where NA may be an id


@dataclass
class Tally:
    """Counts of the values of a text column by how they are written.

    integers : 7
    integral_floats : 7.0, as pandas writes whole numbers once one is missing
    other : anything else, with one as `example`
    """

    integers: int = 0
    integral_floats: int = 0
    other: int = 0
    example: str = ""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.integers + other.integers,
            self.integral_floats + other.integral_floats,
            self.other + other.other,
            self.example or other.example,
        )

    @property
    def arrow_type(self) -> pa.DataType:
        """int64, float64 if some have a point, string if any is something else, null if there is no value."""
        if not self.integers + self.integral_floats + self.other:
            return pa.null()
        return pa.string() if self.other else pa.float64() if self.integral_floats else pa.int64()


@dataclass(frozen=True)
class Batch:
    """Rows, and the lines that could not be parsed.

    invalid_values : by column name, bool [rows]: where there is a list, an object or half a character instead
        of a single value
    """

    rows: pa.Table
    invalid_lines: Sequence[str] = ()
    invalid_values: Mapping[str, np.ndarray] = field(default_factory=dict)


class TableFile:
    """An open input file. Columns from the names of its folders (`InputFile.partitions`) are columns like the
    others.
    """

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.notes: list[str] = []
        self._partitions = {name: value for name, value in file.partitions if name not in self._own_names}

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""

    @property
    def _own_names(self) -> list[str]:
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        return [*self._own_names, *self._partitions]

    def type_of(self, name: str) -> pa.DataType:
        """Arrow type of a column."""
        if name in self._partitions:
            return tally_texts(pa.chunked_array([pa.array([self._partitions[name]], pa.string())])).arrow_type
        return to_plain_type(self._own_type(name))

    def _own_type(self, name: str) -> pa.DataType:
        raise NotImplementedError

    def tally(self, name: str) -> Tally | None:
        """How the values of a text column are written; None for a file with stored types."""
        return None

    def sizes(self) -> list[int]:
        """Rows of each part that can be read by itself."""
        raise NotImplementedError

    def batches(self, part: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Batches of a part with at most `rows` rows each. Raises DataError."""
        names = self.names if columns is None else list(dict.fromkeys(columns))
        for batch in self._own_batches(part, rows, [name for name in names if name not in self._partitions]):
            table = batch.rows  # its row count also holds without a column
            for position, (name, stored_type) in enumerate(
                zip(table.schema.names, table.schema.types, strict=True)
            ):
                if (plain_type := to_plain_type(stored_type)) != stored_type:
                    table = table.set_column(position, name, pc.cast(table[position], plain_type))
            for name in names:
                if name in self._partitions:
                    table = table.append_column(
                        name, pa.repeat(pa.scalar(self._partitions[name], pa.string()), len(table))
                    )  # as text, like a column of a text file
            yield Batch(table.select(names), batch.invalid_lines, batch.invalid_values)

    def _own_batches(self, part: int, rows: int, columns: list[str]) -> Iterator[Batch]:
        raise NotImplementedError

    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows. Raises DataError, also for a line that cannot be parsed."""
        tables = []
        for part in range(len(self.sizes())):
            for batch in self.batches(part, 1 << 20, columns):
                if batch.invalid_lines:
                    raise DataError(
                        f"{self.file.uri}: {len(batch.invalid_lines)} lines are not valid rows, for example "
                        f"{batch.invalid_lines[0]!r}",
                        "fix them",
                    )
                tables.append(batch.rows)
        if not tables:
            return pa.table({name: pa.array([], self.type_of(name)) for name in columns})
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except (
            pa.ArrowInvalid,
            pa.ArrowTypeError,
        ):  # JSON lines with lists in one batch and single values in another
            return pa.concat_tables([_nested_to_json(table) for table in tables])


def open_file(file: InputFile) -> TableFile:
    """Open a file for reading. Raises DataError if it cannot be read, or is not of the format that its name
    says.
    """
    return {"parquet": _Parquet, "csv": _Csv, "jsonl": _JsonLines}[file.format](file)


class _Parquet(TableFile):
    def __init__(self, file: InputFile) -> None:
        filesystem, path = resolve_uri(file.uri)
        try:
            self._file = pq.ParquetFile(filesystem.open_input_file(path))
        except PermissionError as error:
            raise DataError(f"{file.uri} cannot be read: {error}", "check its permissions") from None
        except (pa.ArrowInvalid, OSError) as error:
            with filesystem.open_input_stream(path, compression=None) as stream:
                head = stream.read(4)
            codec = next(
                (name for magic, name in MAGIC.items() if head.startswith(magic) and name != "Parquet"), ""
            )
            fix = (
                f"the whole file is compressed by {codec}: unpack it"
                if codec
                else "write it again: it may be truncated"
            )
            raise DataError(f"{file.uri} is not a readable Parquet file: {error}", fix) from None
        self._schema = self._file.schema_arrow
        super().__init__(file)

    def close(self) -> None:
        self._file.close()

    @property
    def _own_names(self) -> list[str]:
        return list(self._schema.names)

    def _own_type(self, name: str) -> pa.DataType:
        return self._schema.field(name).type

    def sizes(self) -> list[int]:
        return [
            self._file.metadata.row_group(group).num_rows
            for group in range(self._file.metadata.num_row_groups)
        ]

    def _own_batches(self, part: int, rows: int, columns: list[str]) -> Iterator[Batch]:
        try:
            for batch in self._file.iter_batches(rows, row_groups=[part], columns=columns):
                yield Batch(pa.table(batch))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{self.file.uri}: row group {part} cannot be read: {error}", "write the file again"
            ) from None


class _Text(TableFile):
    """A text file: one part, read as text. Its types come from reading it once."""

    def _stream(self) -> pa.NativeFile:
        filesystem, path = resolve_uri(self.file.uri)
        stream = filesystem.open_input_stream(path, compression=None)
        return stream if self.file.codec is None else pa.CompressedInputStream(stream, self.file.codec)

    def _own_batches(self, part: int, rows: int, columns: list[str]) -> Iterator[Batch]:
        try:
            yield from self._read(columns)
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            problem = (
                "is not UTF-8"
                if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError)
                else f"cannot be read: {error}"
            )
            raise DataError(
                f"{self.file.uri} {problem}", f"write it again as UTF-8 {self.file.format}, or as Parquet"
            ) from None

    def _read(self, columns: list[str]) -> Iterator[Batch]:
        raise NotImplementedError

    @cached_property
    def _summary(self) -> tuple[int, dict[str, Tally], dict[str, pa.DataType]]:
        """Row count (invalid lines included), tallies of the text columns, and types of the other columns."""
        count, tallies, types = 0, {name: Tally() for name in self._own_names}, dict[str, pa.DataType]()
        for batch in self._own_batches(0, 0, self._own_names):
            count += len(batch.rows) + len(batch.invalid_lines)
            for name in tallies:
                if pa.types.is_string((column := batch.rows[name]).type):
                    tallies[name] += tally_texts(
                        column.filter(pa.array(~batch.invalid_values[name]))
                        if name in batch.invalid_values
                        else column
                    )
                else:
                    types[name] = common_type(types.get(name, pa.null()), column.type)
        return count, tallies, types

    def _own_type(self, name: str) -> pa.DataType:
        _, tallies, types = self._summary
        text_type = tallies[name].arrow_type
        return types.get(name, pa.null()) if pa.types.is_null(text_type) else text_type

    def tally(self, name: str) -> Tally | None:
        return self._summary[1].get(name)

    def sizes(self) -> list[int]:
        return [self._summary[0]]


class _Csv(_Text):
    """The first line names the columns and shows the delimiter: a comma, a semicolon, a tab or |."""

    @cached_property
    def _header(self) -> tuple[list[str], str]:
        try:
            with self._stream() as stream:
                head = stream.read(1 << 16)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{self.file.uri} is UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8")
            if codec := next((name for magic, name in MAGIC.items() if head.startswith(magic)), ""):
                raise DataError(
                    f"{self.file.uri} is not CSV: its first bytes are those of {codec}",
                    "rename it to match (.csv.gz, .parquet), or unpack it",
                )
            first_line = head.lstrip(b"\xef\xbb\xbf\r\n").replace(b"\r", b"\n").partition(b"\n")[0]
            lines = [first_line.decode()] if first_line else []
        except UnicodeDecodeError:
            raise DataError(
                f"{self.file.uri} is not UTF-8: its first line is {first_line!r}",
                "convert it to UTF-8: iconv -t UTF-8",
            ) from None
        except OSError as error:
            raise DataError(
                f"{self.file.uri} cannot be read: {error}",
                "check its permissions, and that its compression is the one its name says",
            ) from None
        if not lines:
            raise DataError(
                f"{self.file.uri} is empty: a CSV file begins with the names of its columns",
                "write the column names, or remove the file",
            )
        try:
            delimiter = csv.Sniffer().sniff(lines[0], ",;\t|").delimiter
        except csv.Error:  # one column
            delimiter = ","

        delimiter = max(",;\t|", key=lines[0].count) if lines[0].count(delimiter) == 0 else delimiter
        return next(csv.reader([lines[0]], delimiter=delimiter)), delimiter

    @property
    def _own_names(self) -> list[str]:
        names, _ = self._header
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{self.file.uri}: the first line names {repeated!r} twice",
                "give each column its own name in the first line",
            )
        return names

    def sizes(self) -> list[int]:
        return [self._rows]

    @cached_property
    def _rows(self) -> int:
        """Row count, after a check of the quotes."""
        (rows,) = super().sizes()
        if self._has_multiline_rows(rows):
            self._check_quotes()
        return rows

    def _has_multiline_rows(self, rows: int) -> bool:
        """Whether a row may span several lines: there are quotes, and more lines than rows."""
        lines = returns = quotes = 0
        last = b"\n"
        with self._stream() as stream:
            while block := stream.read(BLOCK):
                lines, returns, quotes = (
                    lines + block.count(b"\n"),
                    returns + block.count(b"\r"),
                    quotes + block.count(b'"'),
                )
                last = block[-1:]
        return quotes > 0 and max(lines, returns) + (last not in b"\r\n") > rows + 1  # and the header line

    def _check_quotes(self) -> None:
        """Check the rows that span several lines, and note a row of very many lines.

        Raises DataError where a stray quote merged rows: text goes on after the closing quote, or each line
        looks like a row.
        """
        _, delimiter = self._header
        lines: list[str] = []

        def remember_lines(text: io.TextIOWrapper) -> Iterator[str]:
            for line in text:
                lines.append(line)
                yield line

        csv.field_size_limit(BLOCK)
        line_number, shape, longest = 1, "", (0, 0)
        with self._stream() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
            rows = csv.reader(remember_lines(text), delimiter=delimiter, strict=True)
            while True:
                lines.clear()
                try:
                    if next(rows, None) is None:
                        break
                except csv.Error as error:
                    self._raise_stray_quote(line_number, lines, str(error))
                if line_number > 1 and len(lines) == 1:
                    shape = _line_shape(lines[0], delimiter)
                elif line_number > 1 and _has_row_shapes(
                    lines, shape or _line_shape(lines[-1], delimiter), delimiter
                ):
                    self._raise_stray_quote(line_number, lines, "most of them look like rows")
                longest = max(longest, (len(lines), line_number))
                line_number += len(lines)
        if longest[0] > LONG_ROW:
            self.notes.append(
                f"{self.file.uri}: the row in line {longest[1]} spans {longest[0]} lines; is a quote missing "
                "there?"
            )

    def _raise_stray_quote(self, line_number: int, lines: list[str], reason: str) -> None:
        if len(lines) > 1:
            raise DataError(
                f"{self.file.uri}: a quote in line {line_number} opens a text of {len(lines)} lines: "
                f"{reason}",
                'double each quote within a text ("") and put the text in quotes, or write the file as '
                "Parquet",
            )

    def _read(self, columns: list[str]) -> Iterator[Batch]:
        invalid_lines: list[str] = []

        def skip_invalid(row: Any) -> str:
            invalid_lines.append(row.text)
            return "skip"

        names, delimiter = self._header
        with self._stream() as stream:
            try:
                reader = pacsv.open_csv(
                    stream,
                    pacsv.ReadOptions(block_size=BLOCK, use_threads=False),
                    pacsv.ParseOptions(
                        delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip_invalid
                    ),
                    pacsv.ConvertOptions(
                        column_types=dict.fromkeys(names, pa.string()),
                        include_columns=columns or None,
                        strings_can_be_null=False,
                    ),
                )
            except pa.ArrowInvalid as error:
                if "Empty CSV" in str(error):  # a header without an end of line, and no rows
                    return
                raise
            for batch in reader:
                yield Batch(pa.table(batch), invalid_lines[:])
                invalid_lines.clear()
        if invalid_lines:
            yield Batch(pa.table({name: pa.array([], pa.string()) for name in columns}), invalid_lines)


class _JsonLines(_Text):
    """One object per line. A name that a line lacks is null there."""

    @cached_property
    def _own_names(self) -> list[str]:
        names: dict[str, None] = {}
        first_invalid = ""
        for objects, invalid_lines in self._iter_objects():
            first_invalid = first_invalid or next(iter(invalid_lines), "")
            for record in objects:
                names |= dict.fromkeys(name for name in record if _is_unicode(name))
        if not names:
            is_array = first_invalid.startswith("[")
            content = (
                "one JSON array"
                if is_array
                else "nothing"
                if not first_invalid
                else f"no JSON object per line, but {first_invalid[:60]!r}"
            )
            raise DataError(
                f"{self.file.uri} holds {content}",
                "write one object per line" + (": convert it with jq -c '.[]'" if is_array else ""),
            )
        return list(names)

    def _iter_objects(self) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
        """Objects and invalid lines, at most LINES at once."""
        rest = b""
        objects: list[dict[str, Any]] = []
        invalid_lines: list[str] = []
        with self._stream() as stream:
            while block := stream.read(BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._parse(line, objects, invalid_lines)
                    if len(objects) + len(invalid_lines) >= LINES:
                        yield objects, invalid_lines
                        objects, invalid_lines = [], []
        self._parse(rest, objects, invalid_lines)
        yield objects, invalid_lines

    @staticmethod
    def _parse(line: bytes, objects: list[dict[str, Any]], invalid_lines: list[str]) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            objects.append(record)
        else:
            invalid_lines.append(line.decode("utf-8", "replace").strip())

    def _read(self, columns: list[str]) -> Iterator[Batch]:
        for objects, invalid_lines in self._iter_objects():
            columns_and_masks = {
                name: _to_column([record.get(name) for record in objects]) for name in columns
            }
            rows = (
                pa.table({name: column for name, (column, _) in columns_and_masks.items()})
                if columns
                else pa.table({"": pa.nulls(len(objects))})
            )
            yield Batch(
                rows,
                invalid_lines,
                {name: mask for name, (_, mask) in columns_and_masks.items() if mask is not None},
            )


def _to_column(values: list[Any]) -> tuple[pa.Array, np.ndarray | None]:
    """JSON values as a column, with a mask of invalid values (None: all are valid).

    Lists and objects stay as they are if all values are such; text stays text; numbers keep their spelling. A
    list or object among single values becomes its JSON and is invalid, as is text with half a character.
    """
    is_nested = np.array([isinstance(value, list | dict) for value in values], bool)
    if is_nested.any() and all(value is None for value in itertools.compress(values, ~is_nested)):
        try:
            return pa.array(values), None
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            return pa.array(
                [None if value is None else json.dumps(value) for value in values], pa.string()
            ), is_nested
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    try:
        return pa.array(texts, pa.string()), is_nested if is_nested.any() else None
    except UnicodeEncodeError:
        has_half_character = np.array([text is not None and not _is_unicode(text) for text in texts], bool)
        return pa.array(
            [None if text is None else _replace_half_characters(text) for text in texts], pa.string()
        ), is_nested | has_half_character


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _replace_half_characters(text: str) -> str:
    """Text with a replacement character for each half of a character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _nested_to_json(table: pa.Table) -> pa.Table:
    """A table whose lists and objects are written as JSON."""
    for position, column in enumerate(table.columns):
        if pa.types.is_nested(column.type):
            as_json = pa.array(
                [None if value is None else json.dumps(value) for value in column.to_pylist()], pa.string()
            )
            table = table.set_column(position, table.field(position).name, as_json)
    return table


def _has_row_shapes(lines: list[str], shape: str, delimiter: str) -> bool:
    """Whether lines that a quote holds together look like rows: the first, the last, and most of those
    between.

    A field of several lines is different: its first line lacks the end of a row, or its last line the
    beginning.
    """
    first, *matches = (_line_shape(line, delimiter) == shape for line in lines)
    return "0" in shape and first and matches[-1] and 2 * sum(matches) >= len(matches)


def _line_shape(line: str, delimiter: str) -> str:
    """The kinds of fields that a line seems to have if quotes are ignored: numbers, dates, others."""
    fields = [re.sub("[0-9]", "0", field.strip().strip('"')) for field in line.strip().split(delimiter)]
    return delimiter.join(
        "0" if re.fullmatch("-?0+", field) else field if re.fullmatch("0000-00-00.*", field) else ""
        for field in fields
    )


def tally_texts(column: pa.ChunkedArray) -> Tally:
    """Count how the texts of a column are written."""
    texts = column.filter(
        pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, pa.array(["", *NULL_IDS]))))
    )
    plain = pc.replace_substring_regex(texts, POINT_ZERO, "")
    is_integer = pc.match_substring_regex(plain, INTEGER)
    if pc.any(is_integer).as_py():
        try:
            plain.filter(is_integer).cast(pa.int64())
        except pa.ArrowInvalid:  # some do not fit 64 bits
            pairs = zip(plain.to_pylist(), is_integer.to_pylist(), strict=True)
            is_integer = pa.chunked_array(
                [pa.array([bool(fits) and -(1 << 63) <= int(text) < 1 << 63 for text, fits in pairs])]
            )
    integers = int(pc.sum(is_integer).as_py() or 0)
    integral_floats = int(pc.sum(pc.and_(is_integer, pc.not_equal(plain, texts))).as_py() or 0)
    other_texts = texts.filter(pc.invert(is_integer))
    return Tally(
        integers - integral_floats,
        integral_floats,
        len(other_texts),
        other_texts[0].as_py() if len(other_texts) else "",
    )


def to_plain_type(arrow_type: pa.DataType) -> pa.DataType:
    """The value type of a dictionary; string for every text type."""
    if pa.types.is_dictionary(arrow_type):
        return to_plain_type(arrow_type.value_type)
    if pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type):
        return pa.string()
    return arrow_type


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """A type that holds both: text for numbers and text, float64 for integers and floats; null fits any
    type.
    """
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if {first, second} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return (
        pa.string()
        if pa.string() in (first, second) and {first, second} <= {pa.int64(), pa.float64(), pa.string()}
        else second
    )
