"""Which files an input consists of: what is read and in which order, and what is left out and why.

A folder is read at every depth, through links too. Names that begin with `_` or `.` are those of a writer at work and are passed by, as
pyarrow, Spark and Hive do. What the name does not tell (`000000_0`) the first bytes do. Folders called `column=value` give that column to
the files below (Hive's partitions).
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
    **dict.fromkeys((".csv", ".tsv", ".tab"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
}
CODECS = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
NAMED = 5  # files that a note names
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_SAMPLE_DIR = Path(__file__).resolve().parent.parent / "dataset" / "online_retail"


@dataclass(frozen=True)
class InputFile:
    """A file to read. `codec`: how a text file is compressed as a whole; `partitions`: columns that its folders give it, null for None."""

    uri: str
    format: Format = "parquet"
    codec: str | None = None
    partitions: Partitions = ()


@dataclass(frozen=True)
class Listing:
    """The files behind a setting, in the order in which they are read, and what a person should know of the others."""

    files: tuple[InputFile, ...] = ()
    notes: tuple[str, ...] = ()


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a local path or an object-store URI. Raises DataError."""
    try:
        if "://" in uri:
            found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(uri)
            return found
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    except (pa.ArrowInvalid, OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        raise DataError(f"{uri} cannot be opened: {error}", "use a path or a URI that pyarrow.fs knows: s3://, gs://, hdfs://, file://") from None


def list_files(paths: tuple[str, ...], setting: str = "data.events", without: Path = Path(os.devnull)) -> Listing:
    """What is behind the paths, folders and URIs of a setting: a path after the other, a folder's files in natural order of their names
    (part-2 before part-10), each file once. Raises DataError for a path with nothing to read.

    without : a folder below them that is passed by, where recray itself writes
    """
    files: dict[str, InputFile] = {}  # by what the file is, however it was named
    left_out: dict[str, list[str]] = {}
    again: list[str] = []
    for uri in paths:
        if uri == SAMPLE:
            uri = str(_SAMPLE_DIR / ("items.parquet" if setting == "data.items" else "events.parquet"))
        before = len(files) + len(again)
        for found, identity in _behind(uri, setting, os.path.realpath(without)):
            if isinstance(found, str):
                left_out.setdefault(found, []).append(identity)
            elif identity in files:
                again.append(found.uri)
            else:
                files[identity] = found
        if len(files) + len(again) == before:
            others = "; ".join(f"{_some(names)}: {why}" for why, names in left_out.items())
            raise DataError(
                f"{uri} holds no file to read{f' ({others})' if others else ''}", f"check {setting}: Parquet, CSV and JSON lines are read"
            )
    notes = [f"{setting}: {_some(names)} left out: {why}" for why, names in left_out.items()]
    if again:
        notes.append(f"{setting} names {_some(again)} more than once; each file is read once")
    return Listing(tuple(files.values()), tuple(notes))


def collected_files(root: Path) -> tuple[InputFile, ...]:
    """Events that were collected from the endpoint (`recray.state.collect`), in the order of its log."""
    return tuple(InputFile(str(path)) for path in sorted(Storage(root).collected.glob("[!.]*/events.parquet")))


def digest_files(files: tuple[InputFile, ...]) -> list[str]:
    """sha256 of what each file says, in order: its content, and what its folders and its name add. Raises DataError if one cannot be read."""
    digests = []
    for file in files:
        filesystem, path = resolve(file.uri)
        state = hashlib.sha256(repr((file.format, file.codec, file.partitions)).encode() if file != InputFile(file.uri) else b"")
        try:
            with filesystem.open_input_stream(path, compression=None) as stream:
                while block := stream.read(1 << 22):
                    state.update(block)
        except OSError as error:
            raise DataError(f"{file.uri} cannot be read: {error}", "check its permissions and its disk") from None
        digests.append(state.hexdigest())
    return digests


def natural(name: str) -> tuple[object, ...]:
    """Sort key of a path: a folder after the other, numbers in names by their size; names that differ in nothing else by their text."""
    return (*(tuple(_piece(text) for text in re.split("([0-9]+)", part) if text) for part in name.split("/")), ((2, 0, name),))


def _piece(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if re.fullmatch("[0-9]+", text) else (1, 0, text)


def _behind(uri: str, setting: str, without: str) -> Iterator[tuple[InputFile | str, str]]:
    """The files of one path in order: (file, what it is), or (why it is left out, its name). Raises DataError."""
    filesystem, path = resolve(uri)
    if not _is_text(path):
        raise DataError(f"{_shown(uri)} is no name in UTF-8", f"rename it, and name it anew in {setting}")
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{uri} does not exist", f"check {setting}")
        found_there = {"": info.size} if info.type == fs.FileType.File else dict(_inside(filesystem, path, without))
        for name in sorted(found_there, key=natural):
            where = f"{path}/{name}" if name else path
            below = _below(uri, name) if name else uri
            size = found_there[name]
            found: InputFile | str
            if size is None:
                found = "no regular file"
            elif size < 0:
                found = _MISSED[size]
            elif not size and name:
                found = "empty"
            else:
                found = _recognise(filesystem, where, below, _partitions(path, name), named=not name)
            identity = os.path.realpath(where) if isinstance(filesystem, fs.LocalFileSystem) else f"{filesystem.type_name}:{where}"
            yield found, _shown(below) if isinstance(found, str) else identity
    except OSError as error:
        raise DataError(f"{uri} cannot be listed: {error}", "check the address and the credentials") from None


_NOWHERE, _AGAIN, _TABLE_LOG = -1, -2, -3
_MISSED = {
    _NOWHERE: "a link to nothing",
    _AGAIN: "a folder that is read under another name too",
    _TABLE_LOG: "the log of a table: the files that it says were removed are read all the same; write those of today as Parquet alone",
}


def _inside(filesystem: fs.FileSystem, folder: str, without: str) -> Iterator[tuple[str, int | None]]:
    """Names of the files below a folder, relative to it, without those that a writer hides; and their bytes (`_size`), or why they are
    left out (`_MISSED`). `without`: a folder that is passed by."""
    if not isinstance(filesystem, fs.LocalFileSystem):  # has no links
        for info in filesystem.get_file_info(fs.FileSelector(folder, recursive=True)):
            name = info.path.removeprefix(folder).lstrip("/")
            if info.type == fs.FileType.File and not any(map(_is_hidden, name.split("/"))):
                yield name, info.size
        return
    visited = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(here)
        if real in visited or (real == without and here != folder):
            folders.clear()
            if real in visited and here != folder and not folder.startswith(real):
                yield os.path.relpath(here, folder), _AGAIN
            continue
        visited.add(real)
        if "_delta_log" in folders:
            yield os.path.relpath(os.path.join(here, "_delta_log"), folder), _TABLE_LOG
        folders[:] = sorted((name for name in folders if not _is_hidden(name)), key=natural)
        for name in names:
            if not _is_hidden(name):
                yield os.path.relpath(os.path.join(here, name), folder), _size(os.path.join(here, name))


def _size(path: str) -> int | None:
    """Bytes of a regular file, None for what is none, _NOWHERE for a link to nothing, or to itself."""
    try:
        found = os.stat(path)
    except OSError:
        return _NOWHERE
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _raise(error: OSError) -> None:
    raise error


def _is_text(name: str) -> bool:
    """Whether a name is what it looks like: Python reads bytes that are no UTF-8 as surrogates, which nobody else takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _shown(name: str) -> str:
    """A name for a person, whatever its bytes are."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _recognise(filesystem: fs.FileSystem, path: str, uri: str, partitions: Partitions, *, named: bool) -> InputFile | str:
    """A file to read, or why it is none. `named`: by the settings themselves, not found in a folder."""
    if not _is_text(path):
        return "the name is not UTF-8: rename it"
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    codec = CODECS.get(suffix)
    kind = FORMATS.get(os.path.splitext(stem)[1] if codec else suffix)
    if kind in ("csv", "jsonl") and (suffix != ".json" or named):
        return InputFile(uri, kind, codec, partitions)
    if kind == "parquet":  # .parquet.gzip too: some writers name the codec of the pages
        return InputFile(uri, "parquet", None, partitions)
    with filesystem.open_input_stream(path, compression=None) as stream:
        head = stream.read(1 << 16)
    if head[:4] == b"PAR1":
        return InputFile(uri, "parquet", None, partitions)
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        return "an archive or a spreadsheet: write it as CSV or Parquet"
    if suffix == ".json":
        return InputFile(uri, "jsonl", None, partitions) if _is_lines(head) else "one JSON document, not an object a line (jq -c '.[]' writes those)"
    return "neither Parquet, CSV nor JSON lines, by its name and its first bytes"


def _is_lines(head: bytes) -> bool:
    """Whether a .json file holds an object a line, not one document."""
    first, ends, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    return first[:1] == b"{" and (first.rstrip()[-1:] == b"}" or not ends)


def _partitions(path: str, name: str) -> Partitions:
    """What the folders say of a file `name` below the path that was named: those on the way, and the last ones of the path itself."""
    parts = (path.split("/") if name else path.split("/")[:-1])[::-1]
    above = list(itertools.takewhile(lambda part: "=" in part, parts))[::-1]
    pairs = [part.partition("=") for part in (*above, *name.split("/")[:-1])]
    found = {unquote(name): None if value == _HIVE_NULL else unquote(value) for name, equals, value in pairs if name and equals}
    return tuple(found.items())


def _below(uri: str, name: str) -> str:
    """The path or URI of a file below a folder; a URI keeps its host and options (`?region=…`)."""
    if "://" not in uri:
        return str(Path(uri) / name)
    folder, question, options = uri.partition("?")
    return f"{folder.rstrip('/')}/{quote(name)}{question}{options}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return f"{len(names)} file{'s' if len(names) > 1 else ''} ({shown}{', …' if len(names) > NAMED else ''})"
