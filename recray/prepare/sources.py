"""What the input consists of: files, row groups and columns, checked from their footers before any row is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from recray import schema
from recray.config import SAMPLE, DataSettings
from recray.dataset.context import CLOCK
from recray.errors import DataError
from recray.storage import Storage

LATEST_S = 253_402_300_800  # the end of the year 9999: what lies further from 1970 is no number of seconds
YEAR_S = 365 * 86_400  # a catalogue of 1970 alone is one of years, or of dates as numbers
_SAMPLE_DIR = Path(__file__).resolve().parent.parent / "dataset" / "online_retail"


@dataclass(frozen=True)
class RowGroup:
    """One unit of reading: a row group of a file. `number` orders all of them.

    live : whether it was collected from the endpoint (`schema.LIVE_EVENTS`), not written by the owner
    """

    number: int
    uri: str
    row_group: int
    rows: int
    live: bool = False


@dataclass(frozen=True)
class EventSource:
    """The event files, in the order that breaks ties, and the owner's names of the columns that are there."""

    files: tuple[str, ...]
    columns: dict[str, str]
    types: dict[str, pa.DataType]
    row_groups: tuple[RowGroup, ...]
    clock: str

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a local path or an object-store URI. Raises DataError."""
    try:
        if "://" in uri:
            found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(uri)
            return found
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri} cannot be opened: {error}", "use a path or a URI that pyarrow.fs knows: s3://, gs://, hdfs://, file://") from None


def list_files(paths: tuple[str, ...], sample: str = "events.parquet") -> tuple[str, ...]:
    """The Parquet files behind paths, folders (files in order of name) and URIs. Raises DataError for a path with none."""
    found: list[str] = []
    for uri in paths:
        if uri == SAMPLE:
            uri = str(_SAMPLE_DIR / sample)
        filesystem, path = resolve(uri)
        try:
            info = filesystem.get_file_info(path)
            if info.type == fs.FileType.Directory:
                inside = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
                inside = [f.path for f in inside if f.type == fs.FileType.File and f.path.endswith((".parquet", ".pq"))]
                names = sorted(_below(uri, name.removeprefix(path).lstrip("/")) for name in inside)
            else:
                names = [uri] if info.type == fs.FileType.File else []
        except OSError as error:
            raise DataError(f"{uri} cannot be listed: {error}", "check the address and the credentials") from None
        if not names:
            problem = "does not exist" if info.type == fs.FileType.NotFound else "holds no Parquet file"
            raise DataError(f"{uri} {problem}", "check data.events and data.items")
        found += names
    return tuple(found)


def _below(uri: str, name: str) -> str:
    """The path or URI of a file below a folder; a URI keeps its host and options (`?region=…`)."""
    if "://" not in uri:
        return str(Path(uri) / name)
    folder, question, options = uri.partition("?")
    return f"{folder.rstrip('/')}/{quote(name)}{question}{options}"


def collected_files(root: Path) -> tuple[str, ...]:
    """Events that were collected from the endpoint (`recray.state.collect`), in the order of its log."""
    return tuple(str(path) for path in sorted(Storage(root).collected.glob("[!.]*/events.parquet")))


def digest_files(files: tuple[str, ...]) -> list[str]:
    """sha256 of each file's content, in order. Raises DataError for a file that cannot be read."""
    digests = []
    for uri in files:
        filesystem, path = resolve(uri)
        state = hashlib.sha256()
        try:
            with filesystem.open_input_stream(path) as stream:
                while block := stream.read(1 << 22):
                    state.update(block)
        except OSError as error:
            raise DataError(f"{uri} cannot be read: {error}", "check its permissions and its disk") from None
        digests.append(state.hexdigest())
    return digests


def open_parquet(uri: str) -> pq.ParquetFile:
    """A Parquet file opened for reading. Raises DataError for a truncated or foreign file."""
    filesystem, path = resolve(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri} is not a readable Parquet file: {error}", "write it again; it may be truncated") from None


def inspect_events(data: DataSettings, files: tuple[str, ...], live: tuple[str, ...] = ()) -> EventSource:
    """Read the footers of the owner's event files and decide how to read them; `live` files come after them, whatever the owner's look like.

    Raises DataError for a missing column, a wrong type, files that disagree, or no rows at all.
    """
    groups: list[RowGroup] = []
    columns: dict[str, str] = {}
    types: dict[str, pa.DataType] = {}
    for number, uri in enumerate(files):
        with open_parquet(uri) as file:
            found = _columns(file.schema_arrow, data, uri)
            found_types = {name: _kind(file.schema_arrow.field(column).type, name, uri) for name, column in found.items()}
            if number and (found != columns or found_types != types):
                raise DataError(f"{uri} has other columns or types than {files[0]}: {found_types} against {types}", "write all files alike")
            columns, types = found, found_types
            groups += _row_groups(file, uri, len(groups), live=False)
    for uri in live:
        with open_parquet(uri) as file:
            if not file.schema_arrow.equals(schema.LIVE_EVENTS):
                raise DataError(f"{uri} was not written by this version of recray collect", "move its folder away")
            groups += _row_groups(file, uri, len(groups), live=True)
    if not sum(group.rows for group in groups):
        raise DataError(f"{files[0]}{' and the other files' if len(files) > 1 else ''} have no rows", "check data.events")
    clock = schema.TIMESTAMP if schema.TIMESTAMP in columns else schema.POSITION if schema.POSITION in columns else "file_order"
    return EventSource((*files, *live), columns, types, tuple(groups), clock)


def _row_groups(file: pq.ParquetFile, uri: str, first: int, *, live: bool) -> list[RowGroup]:
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return [RowGroup(first + i, uri, group, rows, live) for i, (group, rows) in enumerate((g, n) for g, n in enumerate(sizes) if n)]


def _columns(found: pa.Schema, data: DataSettings, uri: str) -> dict[str, str]:
    chosen = {}
    mapping: dict[str, str | None] = {str(name): column for name, column in data.columns.items()}
    for name in schema.EVENT_COLUMNS:
        mapped = name in mapping
        column = mapping.get(name, name)
        if column is None:
            continue
        if column in found.names:
            chosen[name] = column
        elif mapped or name in (schema.USER_ID, schema.ITEM_ID):
            raise DataError(
                f"{uri} has no column {column!r} for {name}; it has {', '.join(found.names)}",
                f"name your column: data.columns.{name}=YOUR_COLUMN",
            )
    for name in data.context:
        if name not in (*found.names, *CLOCK):
            raise DataError(f"{uri} has no column {name!r} for data.context; it has {', '.join(found.names)}", "name a column, hour or weekday")
        if name not in CLOCK:
            chosen[schema.CONTEXT + name] = name
    return chosen


def _kind(found: pa.DataType, name: str, uri: str) -> pa.DataType:
    """The type in which a column is staged. Raises DataError if it cannot hold what the name says."""
    plain = found.value_type if pa.types.is_dictionary(found) else found
    is_text = pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)
    is_int = pa.types.is_integer(plain)
    if name in (schema.USER_ID, schema.ITEM_ID, schema.BASKET) and (is_text or is_int):
        return pa.string() if is_text else pa.int64()
    if name == schema.TIMESTAMP and (pa.types.is_timestamp(plain) or pa.types.is_date(plain) or is_int):
        return pa.timestamp("us", tz="UTC")
    if name == schema.POSITION and is_int:
        return pa.int64()
    if name == schema.EVENT and is_text:
        return pa.string()
    if name.startswith(schema.CONTEXT) and (is_text or is_int or pa.types.is_boolean(plain)):
        return pa.string()
    if name == schema.VALUE and (is_int or pa.types.is_floating(plain) or pa.types.is_decimal(plain)):
        return pa.float32()
    if name.startswith(schema.CONTEXT):
        field = name.removeprefix(schema.CONTEXT)
        raise DataError(
            f"{uri}: context {field} has type {found}, not strings, integers or booleans", f"cast it, or leave {field} out of data.context"
        )
    wanted = {
        schema.TIMESTAMP: "a timestamp, a date or integer seconds",
        schema.POSITION: "integers",
        schema.EVENT: "strings",
        schema.VALUE: "numbers",
    }
    raise DataError(
        f"{uri}: column for {name} has type {found}, not {wanted.get(name, 'integers or strings')}",
        f"cast it, or map another column: data.columns.{name}=YOUR_COLUMN",
    )


def read_items(data: DataSettings, files: tuple[str, ...]) -> pa.Table | None:
    """The item table of its files: `item_id` first, then the feature columns. None if none is configured. Raises DataError."""
    if data.items is None:
        if named := [*data.features, *([data.released] if data.released else [])]:
            raise DataError(f"data.features or data.released names {', '.join(named)}, but data.items is null", "name the item table in data.items")
        return None
    id_column = data.columns.get("item_id") or schema.ITEM_ID
    tables = []
    for uri in files:
        with open_parquet(uri) as file:
            names = file.schema_arrow.names
            item_column = id_column if id_column in names else schema.ITEM_ID
            for column in (item_column, *data.features, *([data.released] if data.released else [])):
                if column not in names:
                    raise DataError(
                        f"{uri} has no column {column!r}; it has {', '.join(names)}",
                        "check data.items, data.columns, data.features and data.released",
                    )
            item_type = _kind(file.schema_arrow.field(item_column).type, schema.ITEM_ID, uri)
            table = file.read(columns=[item_column, *data.features]).select([item_column, *data.features])
            table = table.rename_columns([schema.ITEM_ID, *data.features])
            table = table.set_column(0, schema.ITEM_ID, as_id(table[0], item_type, uri))
            tables.append(table if data.released is None else table.append_column(schema.RELEASED, _released(file, data.released, uri)))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{files[0]} and the other item files differ: {error}", "write all files alike") from None
    if table[0].null_count:
        raise DataError(f"{files[0]}: {table[0].null_count} items have no item_id", "fill or drop them")
    if len(table[0].unique()) < len(table):
        raise DataError(f"{files[0]}: {len(table) - len(table[0].unique())} item ids occur more than once", "keep one row an item")
    for column, kind in data.features.items():
        _check_feature(table[column].type, column, kind, files[0])
    return table


def _released(file: pq.ParquetFile, name: str, uri: str) -> pa.ChunkedArray:
    """The release of each item in seconds, null where it is not known. Raises DataError for a column that holds no times."""
    column = file.read(columns=[name])[name]
    is_integer = pa.types.is_integer(column.type)
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type) or is_integer):
        raise DataError(f"{uri}: data.released {name} has type {column.type}, not a timestamp, a date or integer seconds", "cast it")
    if is_integer and len(said := column.filter(pc.fill_null(pc.not_equal(column, 0), False))):
        low, high = pc.min_max(said).as_py().values()
        if not (low > -LATEST_S and high < LATEST_S and (low < 0 or high >= YEAR_S)):
            wrong = f"integers from {low} to {high}, which are not seconds since 1970"
            raise DataError(f"{uri}: data.released {name} holds {wrong}", "cast it to a timestamp or a date; milliseconds and years are neither")
    found = microseconds(column)
    return pc.divide(pc.subtract(found, pc.if_else(pc.less(found, 0), 999_999, 0)), 1_000_000)  # floor


def microseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of timestamps, dates or integer seconds as int64 microseconds since 1970, UTC."""
    if pa.types.is_integer(column.type):
        return pc.multiply(column.cast(pa.int64()), 1_000_000)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    return column.cast(pa.timestamp("us", tz=getattr(column.type, "tz", None)), safe=False).cast(pa.int64())


def as_id(column: pa.ChunkedArray, kind: pa.DataType, uri: str) -> pa.ChunkedArray:
    """A column of ids in the staged type. Raises DataError for numbers that 63 bits do not hold."""
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri}: an id does not fit into 64 bits with a sign: {error}", "write such ids as text") from None


def _check_feature(found: pa.DataType, column: str, kind: str, uri: str) -> None:
    plain = found.value_type if pa.types.is_dictionary(found) else found
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
    if not fits:
        raise DataError(f"{uri}: feature {column} has type {found}, which is not {kind}", f"declare another kind: data.features.{column}=…")


def _is_number(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found))
