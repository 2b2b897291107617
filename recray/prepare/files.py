"""Which files an input consists of, in which order they are read, and which are skipped and why.

A folder is listed recursively and through links. Names that begin with `_` or `.` belong to an unfinished
write and are skipped, as in pyarrow, Spark and Hive. If the name does not tell the format (`000000_0`), the
first bytes do. Folders called `column=value` (Hive partitions) add that column to the files below.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from recray.config import SAMPLE
from recray.errors import DataError
from recray.storage import Storage

Format = Literal["parquet", "csv", "jsonl"]
Partitions = tuple[tuple[str, str | None], ...]

FORMATS: dict[str, Format] = {
    **dict.fromkeys((".parquet", ".pq", ".parq"), "parquet"),
    **dict.fromkeys((".csv", ".tsv", ".tab", ".inter", ".item"), "csv"),  # the last two: RecBole's
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
}
CODECS = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
SHOWN_NAMES = 5  # file names that a note lists
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_SAMPLE_DIR = Path(__file__).resolve().parent.parent / "dataset" / "online_retail"


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    codec : compression of a text file as a whole
    partitions : columns from the names of its folders, None for null
    """

    uri: str
    format: Format = "parquet"
    codec: str | None = None
    partitions: Partitions = ()


@dataclass(frozen=True)
class Listing:
    """The files of a setting in reading order, and notes about skipped files."""

    files: tuple[InputFile, ...] = ()
    notes: tuple[str, ...] = ()


def resolve_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a local path or an object-store URI. Raises DataError."""
    try:
        if "://" in uri:
            result: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(uri)
            return result
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    except (pa.ArrowInvalid, OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise DataError(
            f"{uri} cannot be opened: {error}",
            "use a path or a URI that pyarrow.fs supports: s3://, gs://, hdfs://, file://",
        ) from None


def list_files(
    paths: tuple[str, ...], setting: str = "data.events", excluded: Path = Path(os.devnull)
) -> Listing:
    """List the files behind the paths, folders and URIs of a setting, each file once: paths in the given
    order, files of a folder in natural order of their names (part-2 before part-10). Raises DataError for a
    path without a file to read.

    excluded : folder to skip: the workspace, where recray itself writes
    """
    files: dict[str, InputFile] = {}  # by identity: two names may lead to one file
    names_by_reason: dict[str, list[str]] = {}
    repeated: list[str] = []
    for uri in paths:
        if uri == SAMPLE:
            uri = str(_SAMPLE_DIR / ("items.parquet" if setting == "data.items" else "events.parquet"))

        count_before = len(files) + len(repeated)
        for file_or_reason, identity in _list_path(uri, setting, os.path.realpath(excluded)):
            if isinstance(file_or_reason, str):
                names_by_reason.setdefault(file_or_reason, []).append(identity)
            elif identity in files:
                repeated.append(file_or_reason.uri)
            else:
                files[identity] = file_or_reason

        if len(files) + len(repeated) == count_before:
            reasons = "; ".join(
                f"{_summarize_names(names)}: {reason}" for reason, names in names_by_reason.items()
            )
            raise DataError(
                f"{uri} holds no file to read{f' ({reasons})' if reasons else ''}",
                f"check {setting}: recray reads Parquet, CSV and JSON lines",
            )

    notes = [
        f"{setting}: {_summarize_names(names)} skipped: {reason}" for reason, names in names_by_reason.items()
    ]
    if repeated:
        notes.append(f"{setting} names {_summarize_names(repeated)} more than once; each file is read once")
    return Listing(tuple(files.values()), tuple(notes))


def list_collected_files(root: Path) -> tuple[InputFile, ...]:
    """Events collected from the endpoint (`recray.events.collect`), in the order of its event store."""
    return tuple(
        InputFile(str(path)) for path in sorted(Storage(root).collected.glob("[!.]*/events.parquet"))
    )


def digest_files(files: tuple[InputFile, ...]) -> list[str]:
    """sha256 of each file, in order: its content, and what its folders and its name add. Raises DataError for
    a file that cannot be read.
    """
    digests = []
    for file in files:
        filesystem, path = resolve_uri(file.uri)
        state = hashlib.sha256(
            repr((file.format, file.codec, file.partitions)).encode() if file != InputFile(file.uri) else b""
        )
        try:
            with filesystem.open_input_stream(path, compression=None) as stream:
                while block := stream.read(1 << 22):
                    state.update(block)
        except OSError as error:
            raise DataError(
                f"{file.uri} cannot be read: {error}", "check its permissions and its disk"
            ) from None
        digests.append(state.hexdigest())
    return digests


def natural_key(name: str) -> tuple[object, ...]:
    """Sort key of a path: folder by folder, with numbers in names compared by value. The text itself breaks
    ties.
    """
    return (
        *(
            tuple(_sort_piece(text) for text in re.split("([0-9]+)", part) if text)
            for part in name.split("/")
        ),
        ((2, 0, name),),
    )


def _sort_piece(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if re.fullmatch("[0-9]+", text) else (1, 0, text)


def _list_path(uri: str, setting: str, excluded: str) -> Iterator[tuple[InputFile | str, str]]:
    """The files of one path in order: (file, identity), or (reason for skipping it, its name). Raises
    DataError.
    """
    filesystem, path = resolve_uri(uri)
    if not _is_utf8(path):
        raise DataError(f"{_to_printable(uri)} is not valid UTF-8", f"rename it and update {setting}")

    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{uri} does not exist", f"check {setting}")
        sizes = (
            {"": info.size}
            if info.type == fs.FileType.File
            else dict(_walk_folder(filesystem, path, excluded))
        )
        for name in sorted(sizes, key=natural_key):
            file_path = f"{path}/{name}" if name else path
            file_uri = join_uri(uri, name) if name else uri
            size = sizes[name]
            file_or_reason: InputFile | str
            if size is None:
                file_or_reason = "not a regular file"
            elif size < 0:
                file_or_reason = _SKIP_REASONS[size]
            elif not size and name:
                file_or_reason = "empty"
            else:
                file_or_reason = _detect_format(
                    filesystem, file_path, file_uri, _parse_partitions(path, name), is_named=not name
                )
            identity = (
                os.path.realpath(file_path)
                if isinstance(filesystem, fs.LocalFileSystem)
                else f"{filesystem.type_name}:{file_path}"
            )
            yield file_or_reason, _to_printable(file_uri) if isinstance(file_or_reason, str) else identity
    except OSError as error:
        raise DataError(f"{uri} cannot be listed: {error}", "check the address and the credentials") from None


_BROKEN_LINK, _REPEATED_FOLDER, _TABLE_LOG = -1, -2, -3
_SKIP_REASONS = {
    _BROKEN_LINK: "a broken link",
    _REPEATED_FOLDER: "a folder that is already read under another name",
    _TABLE_LOG: "the log of a Delta table: files that it marks as removed are still read; export the current "
    "version of the table as plain Parquet",
}


def _walk_folder(filesystem: fs.FileSystem, folder: str, excluded: str) -> Iterator[tuple[str, int | None]]:
    """Names of the visible files below a folder, relative to it, with their size (`_file_size`) or the code
    of a reason for skipping them (`_SKIP_REASONS`).

    excluded : folder to skip
    """
    if not isinstance(filesystem, fs.LocalFileSystem):  # no links there
        for info in filesystem.get_file_info(fs.FileSelector(folder, recursive=True)):
            name = info.path.removeprefix(folder).lstrip("/")
            if info.type == fs.FileType.File and not any(map(_is_hidden, name.split("/"))):
                yield name, info.size
        return

    visited = set()
    for current, folders, names in os.walk(folder, followlinks=True, onerror=_raise_error):
        real_path = os.path.realpath(current)
        if real_path in visited or (real_path == excluded and current != folder):
            folders.clear()
            if real_path in visited and current != folder and not folder.startswith(real_path):
                yield os.path.relpath(current, folder), _REPEATED_FOLDER
            continue
        visited.add(real_path)
        if "_delta_log" in folders:
            yield os.path.relpath(os.path.join(current, "_delta_log"), folder), _TABLE_LOG
        folders[:] = sorted((name for name in folders if not _is_hidden(name)), key=natural_key)
        for name in names:
            if not _is_hidden(name):
                yield (
                    os.path.relpath(os.path.join(current, name), folder),
                    _file_size(os.path.join(current, name)),
                )


def _file_size(path: str) -> int | None:
    """Bytes of a regular file; None for anything else; _BROKEN_LINK for a link to nothing or to itself."""
    try:
        status = os.stat(path)
    except OSError:
        return _BROKEN_LINK
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _raise_error(error: OSError) -> None:
    raise error


def _is_utf8(name: str) -> bool:
    """Whether a name is valid UTF-8: Python reads other bytes as surrogates, which other programs refuse."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _to_printable(name: str) -> str:
    """A name that can be printed, whatever its bytes are."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _detect_format(
    filesystem: fs.FileSystem, path: str, uri: str, partitions: Partitions, *, is_named: bool
) -> InputFile | str:
    """A file to read, or the reason for skipping it.

    is_named : whether the settings name the file itself, not its folder
    """
    if not _is_utf8(path):
        return "the name is not UTF-8: rename it"

    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    codec = CODECS.get(suffix)
    file_format = FORMATS.get(os.path.splitext(stem)[1] if codec else suffix)
    if file_format in ("csv", "jsonl") and (suffix != ".json" or is_named):
        return InputFile(uri, file_format, codec, partitions)
    if file_format == "parquet":  # .parquet.gzip too: some writers name the codec of the pages
        return InputFile(uri, "parquet", None, partitions)

    with filesystem.open_input_stream(path, compression=None) as stream:
        head = stream.read(1 << 16)
    if head[:4] == b"PAR1":
        return InputFile(uri, "parquet", None, partitions)
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        return "an archive or a spreadsheet: write it as CSV or Parquet"
    if suffix == ".json":
        return (
            InputFile(uri, "jsonl", None, partitions)
            if _is_json_lines(head)
            else "one JSON document, not one object per line (convert it with jq -c '.[]')"
        )
    return "neither Parquet, CSV nor JSON lines, by its name and its first bytes"


def _is_json_lines(head: bytes) -> bool:
    """Whether a .json file holds one object per line, not one document."""
    first_line, newline, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    return first_line[:1] == b"{" and (first_line.rstrip()[-1:] == b"}" or not newline)


def _parse_partitions(path: str, name: str) -> Partitions:
    """Hive partitions of a file `name` below the path of the setting: its folders below that path, and the
    last folders of the path itself.
    """
    parts = (path.split("/") if name else path.split("/")[:-1])[::-1]
    parent_parts = list(itertools.takewhile(lambda part: "=" in part, parts))[::-1]
    pairs = [part.partition("=") for part in (*parent_parts, *name.split("/")[:-1])]
    partitions = {
        unquote(name): None if value == _HIVE_NULL else unquote(value)
        for name, equals, value in pairs
        if name and equals
    }
    return tuple(partitions.items())


def join_uri(uri: str, name: str) -> str:
    """Path or URI of a file below a folder. A URI keeps its host and options (`?region=…`)."""
    if "://" not in uri:
        return str(Path(uri) / name)
    base, separator, options = uri.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{separator}{options}"


def _summarize_names(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "")
    return f"{len(names)} file{'s' if len(names) > 1 else ''} ({shown})"
