"""Parquet, CSV and JSON lines as tables: columns, how many rows, and batches of them.

Parquet says its types. Text does not: a column of CSV or JSON lines is whole numbers if every value is one as it is written (no leading
zeros, 64 bits), fractions if some end in `.0`, else text, and what it stands for is read off the text as off a text column of Parquet. A line
that is no row is told apart, never dropped. Whatever a file calls text is plain text here, and a dictionary is its values.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from recray.errors import DataError
from recray.prepare.files import InputFile, resolve

BLOCK = 16 << 20  # bytes of text at once: a row must fit
LINES = 1 << 16  # JSON lines at once
INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
POINT_ZERO = r"\.0+$"  # as pandas ends whole numbers, as soon as one is missing
NULL_WORDS = ["", "null", "NULL", "NaN", "nan", "NA", "N/A", "None", "<NA>", "\\N"]  # in columns that are not text
NULL_IDS = ["null", "NULL", "NaN", "nan", "None", "<NA>", "\\N"]  # in columns of ids, which may be called NA


@dataclass(frozen=True)
class Batch:
    """Rows, and lines that are none."""

    rows: pa.Table
    broken: Sequence[str] = ()


class TableFile:
    """A file of the input, opened. Columns that its folders give it (`InputFile.partitions`) are columns like the others."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
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
            return _type_of([self._partitions[name]])
        return _plain(self._own_type(name))

    def _own_type(self, name: str) -> pa.DataType:
        raise NotImplementedError

    def sizes(self) -> list[int]:
        """Rows of each part that can be read by itself."""
        raise NotImplementedError

    def batches(self, part: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """A part, so many rows at a time. Raises DataError."""
        wanted = self.names if columns is None else list(dict.fromkeys(columns))
        for batch in self._own_batches(part, rows, [name for name in wanted if name not in self._partitions]):
            table = batch.rows  # which has rows also where it has no column
            for place, field in enumerate(table.schema):
                if (kind := _plain(field.type)) != field.type:
                    table = table.set_column(place, field.name, pc.cast(table[place], kind))
            for name in wanted:
                if name in self._partitions:
                    table = table.append_column(name, pa.repeat(pa.scalar(self._partitions[name], pa.string()), len(table)))  # text, as a text file's
            yield Batch(table.select(wanted), batch.broken)

    def _own_batches(self, part: int, rows: int, columns: list[str]) -> Iterator[Batch]:
        raise NotImplementedError

    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows. Raises DataError, also for a line that is none."""
        tables = []
        for part in range(len(self.sizes())):
            for batch in self.batches(part, 1 << 20, columns):
                if batch.broken:
                    raise DataError(f"{self.file.uri}: {len(batch.broken)} lines are no rows, for example {batch.broken[0]!r}", "mend them")
                tables.append(batch.rows)
        return pa.concat_tables(tables) if tables else pa.table({name: pa.array([], self.type_of(name)) for name in columns})


def open_file(file: InputFile) -> TableFile:
    """A file opened for reading. Raises DataError for one that cannot be, or is not what it is called."""
    return {"parquet": _Parquet, "csv": _Csv, "jsonl": _Lines}[file.format](file)


class _Parquet(TableFile):
    def __init__(self, file: InputFile) -> None:
        filesystem, path = resolve(file.uri)
        try:
            self._file = pq.ParquetFile(filesystem.open_input_file(path))
        except PermissionError as error:
            raise DataError(f"{file.uri} cannot be read: {error}", "check its permissions") from None
        except (pa.ArrowInvalid, OSError) as error:
            with filesystem.open_input_stream(path, compression=None) as stream:
                head = stream.read(4)
            packed = next(
                (name for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")) if head.startswith(magic)), ""
            )
            fix = f"the file as a whole is compressed by {packed}: unpack it" if packed else "write it again; it may be truncated"
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
        return [self._file.metadata.row_group(group).num_rows for group in range(self._file.metadata.num_row_groups)]

    def _own_batches(self, part: int, rows: int, columns: list[str]) -> Iterator[Batch]:
        try:
            for batch in self._file.iter_batches(rows, row_groups=[part], columns=columns):
                yield Batch(pa.table(batch))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.file.uri}: row group {part} cannot be read: {error}", "write the file again") from None


class _Text(TableFile):
    """A text file: one part, read as text; its types come from reading it once."""

    def _stream(self) -> pa.NativeFile:
        filesystem, path = resolve(self.file.uri)
        stream = filesystem.open_input_stream(path, compression=None)
        return stream if self.file.codec is None else pa.CompressedInputStream(stream, self.file.codec)

    def _own_batches(self, part: int, rows: int, columns: list[str]) -> Iterator[Batch]:
        try:
            yield from self._read(columns)
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            what = "is not UTF-8" if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError) else f"cannot be read: {error}"
            raise DataError(f"{self.file.uri} {what}", f"write it again as UTF-8 {self.file.format}, or as Parquet") from None

    def _read(self, columns: list[str]) -> Iterator[Batch]:
        raise NotImplementedError

    @cached_property
    def _seen(self) -> tuple[int, dict[str, pa.DataType]]:
        """How many rows, lines that are none counted, and the type of each column."""
        rows, types = 0, dict.fromkeys(self._own_names, pa.null())
        for batch in self._own_batches(0, 0, self._own_names):
            rows += len(batch.rows) + len(batch.broken)
            types = {name: joined_type(types[name], _type_of(batch.rows[name])) for name in types}
        return rows, types

    def _own_type(self, name: str) -> pa.DataType:
        return self._seen[1][name]

    def sizes(self) -> list[int]:
        return [self._seen[0]]


class _Csv(_Text):
    """The first line names the columns; what is between them is seen in it: a comma, a semicolon, a tab or |."""

    @cached_property
    def _header(self) -> tuple[list[str], str]:
        try:
            with self._stream() as stream:
                head = stream.read(1 << 16)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{self.file.uri} is UTF-16", "write it again as UTF-8: iconv -f UTF-16 -t UTF-8")
            first = head.lstrip(b"\xef\xbb\xbf\r\n").replace(b"\r", b"\n").partition(b"\n")[0]
            line = [first.decode()] if first else []
        except UnicodeDecodeError:
            raise DataError(f"{self.file.uri} is not UTF-8: its first line is {first!r}", "write it again as UTF-8: iconv -t UTF-8") from None
        except OSError as error:
            raise DataError(
                f"{self.file.uri} cannot be read: {error}", "check its permissions, and whether it is compressed as its name says"
            ) from None
        if not line:
            raise DataError(f"{self.file.uri} is empty: a CSV file begins with the names of its columns", "write them, or move the file away")
        try:
            between = csv.Sniffer().sniff(line[0], ",;\t|").delimiter
        except csv.Error:  # one column
            between = ","
        between = max(",;\t|", key=line[0].count) if line[0].count(between) == 0 else between
        return next(csv.reader([line[0]], delimiter=between)), between

    @property
    def _own_names(self) -> list[str]:
        names, _ = self._header
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{self.file.uri}: the first line names {twice!r} twice", "the first line of a CSV file names its columns: write one")
        return names

    def sizes(self) -> list[int]:
        (rows,) = super().sizes()
        if self._has_long_rows(rows):
            self._check_quotes()
        return [rows]

    def _has_long_rows(self, rows: int) -> bool:
        """Whether a row may have several lines: there are quotes, and more lines than rows."""
        lines = quotes = 0
        last = b""
        with self._stream() as stream:
            while block := stream.read(BLOCK):
                lines, quotes, last = lines + block.count(b"\n"), quotes + block.count(b'"'), block
        return quotes > 0 and lines + (not last.endswith(b"\n")) - 1 > rows

    def _check_quotes(self) -> None:
        """Raises DataError where a stray quote makes one row of many: text goes on after the one that closes it, or each line is a row."""
        names, between = self._header
        lines: list[str] = []

        def remembered(text: io.TextIOWrapper) -> Iterator[str]:
            for line in text:
                lines.append(line)
                yield line

        csv.field_size_limit(BLOCK)
        with self._stream() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
            rows = csv.reader(remembered(text), delimiter=between, strict=True)
            try:
                for _ in rows:
                    if len(lines) > 1 and len(names) > 1 and all(line.count(between) == len(names) - 1 for line in lines):
                        raise csv.Error("each of them is a row by itself")
                    lines.clear()
            except csv.Error as error:
                raise DataError(
                    f"{self.file.uri}: a quote in line {rows.line_num - len(lines) + 1} opens a text of {len(lines)} lines: {error}",
                    'write a quote within a text twice ("") and the text between quotes, or write the file as Parquet',
                ) from None

    def _read(self, columns: list[str]) -> Iterator[Batch]:
        broken: list[str] = []

        def no_row(row: Any) -> str:
            broken.append(row.text)
            return "skip"

        names, between = self._header
        with self._stream() as stream:
            reader = pacsv.open_csv(
                stream,
                pacsv.ReadOptions(block_size=BLOCK, use_threads=False),
                pacsv.ParseOptions(delimiter=between, newlines_in_values=True, invalid_row_handler=no_row),
                pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=columns or None, strings_can_be_null=False),
            )
            for batch in reader:
                yield Batch(pa.table(batch), broken[:])
                broken.clear()
        if broken:
            yield Batch(pa.table({name: pa.array([], pa.string()) for name in columns}), broken)


class _Lines(_Text):
    """An object a line; a name that a line lacks is null in it."""

    @cached_property
    def _own_names(self) -> list[str]:
        names: dict[str, None] = {}
        first = ""
        for some, broken in self._objects():
            first = first or next(iter(broken), "")
            for one in some:
                names |= dict.fromkeys(one)
        if not names:
            array = first.startswith("[")
            what = "one JSON array" if array else "nothing" if not first else f"no object a line, but {first[:60]!r}"
            raise DataError(f"{self.file.uri} holds {what}", "write an object a line" + (": jq -c '.[]' does" if array else ""))
        return list(names)

    def _objects(self) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
        """Objects, and lines that are none, some at a time."""
        rest = b""
        found: list[dict[str, Any]] = []
        broken: list[str] = []
        with self._stream() as stream:
            while block := stream.read(BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._parse(line, found, broken)
                    if len(found) + len(broken) >= LINES:
                        yield found, broken
                        found, broken = [], []
        self._parse(rest, found, broken)
        yield found, broken

    @staticmethod
    def _parse(line: bytes, found: list[dict[str, Any]], broken: list[str]) -> None:
        if not line.strip():
            return
        try:
            one = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            one = None
        if isinstance(one, dict):
            found.append(one)
        else:
            broken.append(line.decode("utf-8", "replace").strip())

    def _read(self, columns: list[str]) -> Iterator[Batch]:
        for found, broken in self._objects():
            rows = (
                pa.table({name: _column([one.get(name) for one in found]) for name in columns}) if columns else pa.table({"": pa.nulls(len(found))})
            )
            yield Batch(rows, broken)


def _column(values: list[Any]) -> pa.Array:
    """Values of JSON as a column: of lists and objects as they are, of texts as text, numbers in their own writing; of all at once as JSON."""
    if any(isinstance(value, list | dict) for value in values):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values], pa.string())


def _type_of(values: Any) -> pa.DataType:
    """int64 where every value is a whole number as it is written, float64 where some of these end in .0, null where none says anything,
    text else."""
    column = pa.chunked_array([pa.array(values, pa.string())]) if isinstance(values, list) else values
    if not pa.types.is_string(column.type):
        return column.type
    said = column.filter(pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, pa.array(["", *NULL_IDS])))))
    if not len(said):
        return pa.null()
    whole = pc.replace_substring_regex(said, POINT_ZERO, "")
    if pc.all(pc.match_substring_regex(whole, INTEGER)).as_py():
        try:
            whole.cast(pa.int64())
            return pa.int64() if whole.equals(said) else pa.float64()
        except pa.ArrowInvalid:  # more than 64 bits
            pass
    return pa.string()


def _plain(found: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary; all text is a string."""
    if pa.types.is_dictionary(found):
        return _plain(found.value_type)
    if pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return pa.string()
    return found


def joined_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """What holds both: numbers and text are text, whole numbers and fractions fractions; null is anything."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string() if pa.string() in (one, other) and {one, other} <= {pa.int64(), pa.float64(), pa.string()} else other
