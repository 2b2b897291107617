"""Parquet, CSV and JSON lines as tables: columns, how many rows, and batches of them.

Parquet says its types. Text does not: a column of CSV or JSON lines is whole numbers if every value is one as it is written (no leading
zeros, 64 bits), fractions if some end in `.0`, else text, and what it stands for is read off the text as off a text column of Parquet. A line
that is no row is told apart, never dropped. Whatever a file calls text is plain text here, and a dictionary is its values.
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
from recray.prepare.files import InputFile, resolve

BLOCK = 16 << 20  # bytes of text at once: a row must fit
LINES = 1 << 16  # JSON lines at once
LONG_ROW = 20  # lines of a row, to be worth a note
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"PAR1": "Parquet"}  # first bytes
INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
POINT_ZERO = r"\.0+$"  # as pandas ends whole numbers, as soon as one is missing
NULL_WORDS = ["", "null", "NULL", "NaN", "nan", "NA", "N/A", "None", "<NA>", "\\N"]  # in columns that are not text
NULL_IDS = ["null", "NULL", "NaN", "nan", "None", "<NA>", "\\N"]  # in columns of ids, which may be called NA


@dataclass
class Tally:
    """How the values of a column of text are written: as whole numbers, as these with a point and zeros, otherwise (with an example)."""

    whole: int = 0
    pointed: int = 0
    other: int = 0
    example: str = ""

    def __add__(self, more: Tally) -> Tally:
        return Tally(self.whole + more.whole, self.pointed + more.pointed, self.other + more.other, self.example or more.example)

    @property
    def kind(self) -> pa.DataType:
        """Its type: int64, float64 if some have a point, text where any is neither, null where none says anything."""
        if not self.whole + self.pointed + self.other:
            return pa.null()
        return pa.string() if self.other else pa.float64() if self.pointed else pa.int64()


@dataclass(frozen=True)
class Batch:
    """Rows, and lines that are none.

    odd : where a column that holds single values has none, but a list, an object or half a character, bool [rows], by its name
    """

    rows: pa.Table
    broken: Sequence[str] = ()
    odd: Mapping[str, np.ndarray] = field(default_factory=dict)


class TableFile:
    """A file of the input, opened. Columns that its folders give it (`InputFile.partitions`) are columns like the others."""

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
            return tally_of(pa.chunked_array([pa.array([self._partitions[name]], pa.string())])).kind
        return _plain(self._own_type(name))

    def _own_type(self, name: str) -> pa.DataType:
        raise NotImplementedError

    def tally(self, name: str) -> Tally | None:
        """How a column of a text file is written; None for another file's, whose types say it."""
        return None

    def sizes(self) -> list[int]:
        """Rows of each part that can be read by itself."""
        raise NotImplementedError

    def batches(self, part: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """A part, so many rows at a time. Raises DataError."""
        wanted = self.names if columns is None else list(dict.fromkeys(columns))
        for batch in self._own_batches(part, rows, [name for name in wanted if name not in self._partitions]):
            table = batch.rows  # which has rows also where it has no column
            for place, (name, given) in enumerate(zip(table.schema.names, table.schema.types, strict=True)):
                if (kind := _plain(given)) != given:
                    table = table.set_column(place, name, pc.cast(table[place], kind))
            for name in wanted:
                if name in self._partitions:
                    table = table.append_column(name, pa.repeat(pa.scalar(self._partitions[name], pa.string()), len(table)))  # text, as a text file's
            yield Batch(table.select(wanted), batch.broken, batch.odd)

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
        if not tables:
            return pa.table({name: pa.array([], self.type_of(name)) for name in columns})
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # of JSON lines, lists here and something else there
            return pa.concat_tables([_spelled(table) for table in tables])


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
            packed = next((name for magic, name in MAGIC.items() if head.startswith(magic) and name != "Parquet"), "")
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
    def _seen(self) -> tuple[int, dict[str, Tally], dict[str, pa.DataType]]:
        """How many rows, lines that are none counted; how each column of text is written; and the types of those that are none."""
        rows, tallies, others = 0, {name: Tally() for name in self._own_names}, dict[str, pa.DataType]()
        for batch in self._own_batches(0, 0, self._own_names):
            rows += len(batch.rows) + len(batch.broken)
            for name in tallies:
                if pa.types.is_string((column := batch.rows[name]).type):
                    tallies[name] += tally_of(column.filter(pa.array(~batch.odd[name])) if name in batch.odd else column)
                else:
                    others[name] = joined_type(others.get(name, pa.null()), column.type)
        return rows, tallies, others

    def _own_type(self, name: str) -> pa.DataType:
        _, tallies, others = self._seen
        kind = tallies[name].kind
        return others.get(name, pa.null()) if pa.types.is_null(kind) else kind

    def tally(self, name: str) -> Tally | None:
        return self._seen[1].get(name)

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
            if packed := next((name for magic, name in MAGIC.items() if head.startswith(magic)), ""):
                raise DataError(f"{self.file.uri} is no CSV, but {packed}, by its first bytes", "call it so (.csv.gz, .parquet), or unpack it")
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
        return [self._rows]

    @cached_property
    def _rows(self) -> int:
        """How many rows, once their quotes were looked at."""
        (rows,) = super().sizes()
        if self._has_long_rows(rows):
            self._check_quotes()
        return rows

    def _has_long_rows(self, rows: int) -> bool:
        """Whether a row may have several lines: there are quotes, and more lines than rows."""
        lines = returns = quotes = 0
        last = b"\n"
        with self._stream() as stream:
            while block := stream.read(BLOCK):
                lines, returns, quotes = lines + block.count(b"\n"), returns + block.count(b"\r"), quotes + block.count(b'"')
                last = block[-1:]
        return quotes > 0 and max(lines, returns) + (last not in b"\r\n") > rows + 1  # the names are a line

    def _check_quotes(self) -> None:
        """Look at the rows of several lines. Raises DataError where a stray quote made one row of many: where text goes on after the quote
        that ends it, or where each line looks like a row. A row of very many lines is noted."""
        _, between = self._header
        lines: list[str] = []

        def remembered(text: io.TextIOWrapper) -> Iterator[str]:
            for line in text:
                lines.append(line)
                yield line

        csv.field_size_limit(BLOCK)
        at, shape, longest = 1, "", (0, 0)
        with self._stream() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
            rows = csv.reader(remembered(text), delimiter=between, strict=True)
            while True:
                lines.clear()
                try:
                    if next(rows, None) is None:
                        break
                except csv.Error as error:
                    self._refuse_quotes(at, lines, str(error))
                if at > 1 and len(lines) == 1:
                    shape = _shape(lines[0], between)
                elif at > 1 and _look_like_rows(lines, shape or _shape(lines[-1], between), between):
                    self._refuse_quotes(at, lines, "most of them look like rows")
                longest = max(longest, (len(lines), at))
                at += len(lines)
        if longest[0] > LONG_ROW:
            self.notes.append(f"{self.file.uri}: the row in line {longest[1]} has {longest[0]} lines; is a quote missing there?")

    def _refuse_quotes(self, first: int, lines: list[str], why: str) -> None:
        if len(lines) > 1:
            raise DataError(
                f"{self.file.uri}: a quote in line {first} opens a text of {len(lines)} lines: {why}",
                'write a quote within a text twice ("") and the text between quotes, or write the file as Parquet',
            )

    def _read(self, columns: list[str]) -> Iterator[Batch]:
        broken: list[str] = []

        def no_row(row: Any) -> str:
            broken.append(row.text)
            return "skip"

        names, between = self._header
        with self._stream() as stream:
            try:
                reader = pacsv.open_csv(
                    stream,
                    pacsv.ReadOptions(block_size=BLOCK, use_threads=False),
                    pacsv.ParseOptions(delimiter=between, newlines_in_values=True, invalid_row_handler=no_row),
                    pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=columns or None, strings_can_be_null=False),
                )
            except pa.ArrowInvalid as error:
                if "Empty CSV" in str(error):  # names without an end of line, and no row
                    return
                raise
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
                names |= dict.fromkeys(name for name in one if _is_unicode(name))
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
            made = {name: _column([one.get(name) for one in found]) for name in columns}
            rows = pa.table({name: column for name, (column, _) in made.items()}) if columns else pa.table({"": pa.nulls(len(found))})
            yield Batch(rows, broken, {name: odd for name, (_, odd) in made.items() if odd is not None})


def _column(values: list[Any]) -> tuple[pa.Array, np.ndarray | None]:
    """Values of JSON as a column: lists and objects as they are, texts as text, numbers in their own writing. Lists and objects among the
    others are their JSON, and odd, as is text that is no Unicode (half a character)."""
    nested = np.array([isinstance(value, list | dict) for value in values], bool)
    if nested.any() and all(value is None for value in itertools.compress(values, ~nested)):
        try:
            return pa.array(values), None
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            return pa.array([None if value is None else json.dumps(value) for value in values], pa.string()), nested
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    try:
        return pa.array(texts, pa.string()), nested if nested.any() else None
    except UnicodeEncodeError:
        halved = np.array([text is not None and not _is_unicode(text) for text in texts], bool)
        return pa.array([None if text is None else _whole(text) for text in texts], pa.string()), nested | halved


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _whole(text: str) -> str:
    """Text with a sign of replacement for each half of a character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _spelled(table: pa.Table) -> pa.Table:
    """A table whose lists and objects are their JSON."""
    for place, column in enumerate(table.columns):
        if pa.types.is_nested(column.type):
            spelled = pa.array([None if value is None else json.dumps(value) for value in column.to_pylist()], pa.string())
            table = table.set_column(place, table.field(place).name, spelled)
    return table


def _look_like_rows(lines: list[str], shape: str, between: str) -> bool:
    """Whether lines that a quote holds together are rows: the first one, the last one, and most of what lies between. A text of several lines
    in one field has its first line without what comes after it, or its last one without what goes before."""
    first, *others = (_shape(line, between) == shape for line in lines)
    return "0" in shape and first and others[-1] and 2 * sum(others) >= len(others)


def _shape(line: str, between: str) -> str:
    """What kinds of fields a line seems to have, as if no quote held it together: numbers, dates, and others."""
    fields = [re.sub("[0-9]", "0", field.strip().strip('"')) for field in line.strip().split(between)]
    return between.join("0" if re.fullmatch("-?0+", field) else field if re.fullmatch("0000-00-00.*", field) else "" for field in fields)


def tally_of(column: pa.ChunkedArray) -> Tally:
    """How the texts of a column are written."""
    said = column.filter(pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, pa.array(["", *NULL_IDS])))))
    plain = pc.replace_substring_regex(said, POINT_ZERO, "")
    is_whole = pc.match_substring_regex(plain, INTEGER)
    if pc.any(is_whole).as_py():
        try:
            plain.filter(is_whole).cast(pa.int64())
        except pa.ArrowInvalid:  # some have more than 64 bits
            is_whole = pa.chunked_array([pa.array([text is not None and -(1 << 63) <= int(text) < 1 << 63 if fits else False
                                                   for text, fits in zip(plain.to_pylist(), is_whole.to_pylist(), strict=True)])])  # fmt: skip
    whole = int(pc.sum(is_whole).as_py() or 0)
    with_point = int(pc.sum(pc.and_(is_whole, pc.not_equal(plain, said))).as_py() or 0)
    others = said.filter(pc.invert(is_whole))
    return Tally(whole - with_point, with_point, len(others), others[0].as_py() if len(others) else "")


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
