"""A copy of what is kept of one user, as JSON lines: what a user may ask for, and an operator hands over.

Of datasets and published lists it has the newest that know the user: older ones hold what is in these. The event log that prepare reads
(`data.events`) is the operator's, and is not copied here beyond what a dataset took of it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray.dataset.ids import as_id
from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import Dataset
from recray.errors import ArtifactError, MissingArtifactError, SettingsError
from recray.optout import OptOut
from recray.schema import ITEM_ID, USER_ID
from recray.snapshot.reader import Snapshot
from recray.snapshot.writer import KIND as SNAPSHOT
from recray.state.log import Entry, Log
from recray.storage import Storage, open_sealed


def export(storage: Storage, user_id: str, log: Log | None, file: Path) -> Counter[str]:
    """Write what is kept of a user to a new file that nobody else may read, a record a line; how many records of each kind.

    Each record names where it lies (`where`, below the root, or `log`). That a copy was made is logged, as any reading of a history is.

    Raises SettingsError for a file that exists or cannot be written, StateError, DamagedArtifactError, MissingArtifactError.
    """
    try:
        records = list(_records(storage, user_id, log))
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{error.filename} was removed meanwhile", "repeat it: a night ended just now") from None
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        if file.exists():
            raise FileExistsError(errno.EEXIST, "it exists")
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record, ensure_ascii=False, default=_plain) + "\n" for record in records)
        os.link(scratch, file)  # unless it was made meanwhile
    except OSError as error:
        raise SettingsError(f"--out {file}: {error.strerror or error}", "name a new file in a folder that can be written") from None
    finally:
        scratch.unlink(missing_ok=True)
    if log is not None and records:
        log.append([Entry("access", uuid.uuid4().hex, user_id, time.time(), {"by": "recray export", "what": "export"})])
    return Counter(record["kind"] for record in records)


def _records(storage: Storage, user_id: str, log: Log | None) -> Iterator[dict[str, Any]]:
    if user_id in OptOut.of(storage.root):
        yield {"where": "forgotten.json", "kind": "opted_out"}
    for _, entry in log.of_user(user_id) if log is not None else ():
        yield {"where": "log", "kind": entry.kind, "time": _iso(entry.at_s), "name": entry.named, **entry.body}
    for folder in sorted(storage.collected.glob("[!.]*")):
        yield from _rows(storage, folder, user_id)
    for folder in sorted((storage.root / "quarantine").glob("[!.]*")):
        yield from _rows(storage, folder, user_id)
    yield from _history(storage, user_id)
    yield from _list(storage, user_id)


def _rows(storage: Storage, folder: Path, user_id: str) -> Iterator[dict[str, Any]]:
    """Rows of the Parquet files of a folder that name the user, or a request of the user's."""
    request_ids = pa.array([], pa.string())
    for path in sorted(folder.glob("[!.]*.parquet")):  # decisions before outcomes
        table = pq.read_table(path)
        if USER_ID in table.column_names:
            table = table.filter(pc.equal(table[USER_ID].cast(pa.string()), user_id))
        elif path.name == "outcomes.parquet":
            table = table.filter(pc.is_in(table["request_id"].cast(pa.string()), value_set=request_ids))
        elif "line" in table.column_names:
            table = table.filter(pc.match_substring(table["line"], user_id))
        else:
            continue
        if path.name == "decisions.parquet":
            request_ids = table["request_id"].cast(pa.string()).combine_chunks()
        kind = "bad_row" if folder.parent.name == "quarantine" else path.stem.rstrip("s")
        for row in table.to_pylist():
            yield {"where": str(path.relative_to(storage.root)), "kind": kind, **row}


def _history(storage: Storage, user_id: str) -> Iterator[dict[str, Any]]:
    """Events of the newest dataset that knows the user."""
    for path in _newest_first(storage.root / "datasets", "*", DATASET):
        dataset = Dataset.open(path)
        typed = as_id(user_id, integral=dataset.user_type != pa.string())
        history = None if typed is None else dataset.user_history(typed)
        if history is None:
            continue
        items, types = dataset.items[ITEM_ID], dataset.manifest["event_types"]
        for item, event, at, value in zip(*(column.tolist() for column in history), strict=True):
            when: dict[str, Any] = {"time": _iso(at)} if dataset.has_time else {"position": at}
            record = {"kind": "learned_event", **when, "item_id": items[item - 1].as_py(), "event": types[event], "value": value}
            yield {"where": str(path.relative_to(storage.root)), **record}
        return


def _list(storage: Storage, user_id: str) -> Iterator[dict[str, Any]]:
    """The newest list that was published for the user."""
    for path in _newest_first(storage.scores, "dt=*/*", SNAPSHOT):
        scored = Snapshot(path, open_sealed(path, SNAPSHOT, verify=False)).find(user_id)
        if scored is not None:
            lists = {"item_ids": scored.item_ids, "scores": scored.scores, "source": scored.source, "state": scored.state}
            yield {"where": str(path.relative_to(storage.root)), "kind": "published_list", **lists}
            return


def _newest_first(folder: Path, pattern: str, kind: str) -> list[Path]:
    """Whole artifacts of a folder by what they know, the newest first."""
    artifacts = []
    for path in folder.glob(pattern):
        if not path.name.startswith("."):
            with contextlib.suppress(ArtifactError):
                artifacts.append((open_sealed(path, kind, verify=False)["as_of_s"], path.name, path))
    return [path for *_, path in sorted(artifacts, reverse=True)]


def _iso(at_s: float) -> str:
    return dt.datetime.fromtimestamp(at_s, dt.UTC).isoformat()


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.date) else str(value)
