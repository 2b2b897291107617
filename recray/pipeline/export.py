"""Exports what is stored about one user as JSON lines, for an operator who answers the user's request.

Of datasets and published recommendation lists it contains the newest with the user: older ones hold a part of
these. The event log of the operator (`data.events`) is not copied, except for what a dataset took from it.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray.dataset.ids import to_typed_id
from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import Dataset
from recray.dataset.schema import ITEM_ID, USER_ID
from recray.errors import ArtifactError, MissingArtifactError, SettingsError
from recray.events.log import Entry, Log
from recray.snapshot.reader import Snapshot
from recray.snapshot.writer import KIND as SNAPSHOT
from recray.storage import Storage, open_immutable
from recray.storage.opt_out import OptOut


def export(storage: Storage, user_id: str, log: Log | None, file: Path) -> Counter[str]:
    """Write all records about a user to a new file that only its owner may read, one per line; returns their
    number by kind.

    Each record names its source (`where`: a path below the workspace, or `log`). The export is logged, like
    any read of a history.

    Raises SettingsError for a file that exists or cannot be written, StateError, DamagedArtifactError,
    MissingArtifactError.
    """
    try:
        records = list(_iter_records(storage, user_id, log))
    except FileNotFoundError as error:
        raise MissingArtifactError(
            f"{error.filename} was removed meanwhile", "repeat the export: a nightly run has just ended"
        ) from None
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        if file.exists():
            raise FileExistsError(errno.EEXIST, "it exists")
        with open(
            os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        ) as lines:
            lines.writelines(
                json.dumps(record, ensure_ascii=False, default=_to_json_value) + "\n" for record in records
            )
        os.link(scratch, file)  # fails if the file was created meanwhile
    except OSError as error:
        raise SettingsError(
            f"--out {file}: {error.strerror or error}", "name a new file in a folder that can be written"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
    if log is not None and records:
        log.append(
            [
                Entry(
                    "access",
                    uuid.uuid4().hex,
                    user_id,
                    time.time(),
                    {"by": "recray export", "what": "export"},
                )
            ]
        )
    return Counter(record["kind"] for record in records)


def _iter_records(storage: Storage, user_id: str, log: Log | None) -> Iterator[Mapping[str, Any]]:
    if user_id in OptOut.of(storage.root):
        yield {"where": "forgotten.json", "kind": "opted_out"}
    for _, entry in log.read_user(user_id) if log is not None else ():
        yield {
            "where": "log",
            "kind": entry.kind,
            "time": _to_iso(entry.at_s),
            "name": entry.external_id,
            **entry.body,
        }
    for folder in sorted(storage.collected.glob("[!.]*")):
        yield from _iter_table_rows(storage, folder, user_id)
    for folder in sorted((storage.root / "quarantine").glob("[!.]*")):
        yield from _iter_table_rows(storage, folder, user_id)
    yield from _iter_history(storage, user_id)
    yield from _iter_list(storage, user_id)


def _iter_table_rows(storage: Storage, folder: Path, user_id: str) -> Iterator[Mapping[str, Any]]:
    """Rows of the Parquet files of a folder that name the user, or a request of the user."""
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


def _iter_history(storage: Storage, user_id: str) -> Iterator[Mapping[str, Any]]:
    """Events of the newest dataset with the user."""
    for path in _newest_first(storage.root / "datasets", "*", DATASET):
        dataset = Dataset.open(path)
        dataset_id = to_typed_id(user_id, is_integral=dataset.user_type != pa.string())
        history = None if dataset_id is None else dataset.user_history(dataset_id)
        if history is None:
            continue
        items, types = dataset.items[ITEM_ID], dataset.manifest["event_types"]
        for item, event, timestamp, value in zip(*(column.tolist() for column in history), strict=True):
            time_field: dict[str, str | int] = (
                {"time": _to_iso(timestamp)} if dataset.has_time else {"position": timestamp}
            )
            record = {
                "kind": "learned_event",
                **time_field,
                "item_id": items[item - 1].as_py(),
                "event": types[event],
                "value": value,
            }
            yield {"where": str(path.relative_to(storage.root)), **record}
        return


def _iter_list(storage: Storage, user_id: str) -> Iterator[Mapping[str, Any]]:
    """The newest published recommendation list of the user."""
    for path in _newest_first(storage.scores, "dt=*/*", SNAPSHOT):
        published = Snapshot(path, open_immutable(path, SNAPSHOT, verify=False)).find(user_id)
        if published is not None:
            lists = {
                "item_ids": published.item_ids,
                "scores": published.scores,
                "source": published.source,
                "state": published.state,
            }
            yield {"where": str(path.relative_to(storage.root)), "kind": "published_list", **lists}
            return


def _newest_first(folder: Path, pattern: str, kind: str) -> list[Path]:
    """Complete artifacts of a folder, the one with the latest as-of first."""
    artifacts = []
    for path in folder.glob(pattern):
        if not path.name.startswith("."):
            with contextlib.suppress(ArtifactError):
                artifacts.append((open_immutable(path, kind, verify=False)["as_of_s"], path.name, path))
    return [path for *_, path in sorted(artifacts, reverse=True)]


def _to_iso(at_s: float) -> str:
    return dt.datetime.fromtimestamp(at_s, dt.UTC).isoformat()


def _to_json_value(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.date) else str(value)
