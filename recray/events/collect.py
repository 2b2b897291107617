"""Collects the event store into Parquet: immutable folders that each hold the next entries, every entry
once.

The names of the folders tell how far the store was collected. A collect that is killed leaves nothing behind,
and the next one does its work. A folder holds `events.parquet` (`schema.LIVE_EVENTS`, input of prepare),
`decisions.parquet` (impressions), `outcomes.parquet` and `access.parquet` (whose history was read, with which
key), if there are such entries.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray.dataset import schema
from recray.errors import StateError
from recray.events.log import Entry, Log
from recray.events.rewards import SHOWN, Credits, Rewards
from recray.storage import Storage, immutable_directory, read_json

KIND = "collected"
BATCH_ENTRIES = 50_000
_INVALID_METRIC = re.compile(r"[^\w\-./ ]")  # not allowed in names of MLflow metrics
DAY_S = 86_400

_DECISIONS = pa.schema(
    [
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")),
        ("items", pa.list_(pa.string())),
        ("source", pa.string()),
        ("night", pa.string()),
        ("bundle", pa.string()),
        ("degraded", pa.list_(pa.string())),
        ("ms", pa.float32()),
        ("more", pa.string()),
    ]
)
_ACCESS = pa.schema(
    [
        ("user_id", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")),
        ("by", pa.string()),
        ("what", pa.string()),
    ]
)
_OUTCOMES = pa.schema(
    [
        ("request_id", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")),
        ("outcome", pa.string()),
        ("item_id", pa.string()),
        ("value", pa.float32()),
        ("set_aside", pa.bool_()),
    ]
)


def collect(storage: Storage, log: Log) -> tuple[Path | None, dict[str, int]]:
    """Write the entries that no folder holds yet; None if there are none. Returns the number of entries by
    kind.

    Raises StateError, and the error of a disk that cannot be written.
    """
    first = collected_through(storage).get(log.identity, 0) + 1
    key = f"{log.identity[:8]}-{first:020d}"
    counts: Counter[str] = Counter()
    end = log.last()  # later entries belong to the next folder
    if end < first - 1:
        problem = (
            f"the event store ends at {end}, but was collected up to {first - 1}: it was restored from an "
            "older copy"
        )
        raise StateError(problem, "restore the newer copy, or start with an empty store")
    entries = _read_batch(log, first - 1, end)
    if not entries:
        return None, {}
    fields: dict[str, Any] = {"log": log.identity, "first": first, "collected_at_s": int(time.time())}
    path = storage.collected / key
    with immutable_directory(path, KIND, key, fields) as folder:
        with _ParquetWriters(folder) as writers:
            while entries:
                writers.write(entries)
                counts.update(entry.kind for _, entry in entries)
                fields["last"] = entries[-1][0]
                entries = _read_batch(log, fields["last"], end)
        fields["counts"] = dict(sorted(counts.items()))
    return path, fields["counts"]


def _read_batch(log: Log, after: int, end: int) -> list[tuple[int, Entry]]:
    """The next entries. An outcome that was set aside becomes an ordinary one if its impression arrived
    later.
    """
    entries = log.read(after, BATCH_ENTRIES) if after < end else []
    return [
        (number, replace(entry, kind="outcome") if _has_late_decision(log, entry) else entry)
        for number, entry in entries
        if number <= end
    ]


def _has_late_decision(log: Log, entry: Entry) -> bool:
    """Whether an outcome was set aside and its impression arrived later."""
    if entry.kind != "set_aside" or not log.has("decision", entry.body["request_id"]):
        return False
    return not log.has("outcome", entry.key)  # it may have been reported again


def collected_folders(storage: Storage) -> list[Path]:
    """The folders with impressions or outcomes, oldest first."""
    paths = [
        path
        for path in storage.collected.glob("[!.]*")
        if any((path / f"{kind}.parquet").exists() for kind in ("decisions", "outcomes"))
    ]
    manifests = {path: read_json(path / "manifest.json") for path in paths}
    return sorted(paths, key=lambda path: (manifests[path]["collected_at_s"], manifests[path]["first"]))


def collected_through(storage: Storage) -> dict[str, int]:
    """The last collected number of each event store, by identity."""
    last_numbers: dict[str, int] = {}
    for path in storage.collected.glob("[!.]*"):
        manifest = read_json(path / "manifest.json")
        last_numbers[manifest["log"]] = max(last_numbers.get(manifest["log"], 0), manifest["last"])
    return last_numbers


def drop_collected(storage: Storage, log: Log, keep_days: float, published: int) -> int:
    """Drop entries from the store that were collected more than `keep_days` ago and that the published run
    contains (up to number `published`).

    Returns the last number dropped, 0 for none.
    """
    collected_before_s = time.time() - keep_days * DAY_S
    old_manifests = [
        manifest
        for path in storage.collected.glob("[!.]*")
        if (manifest := read_json(path / "manifest.json"))["collected_at_s"] < collected_before_s
    ]
    through = max(
        (
            manifest["last"]
            for manifest in old_manifests
            if manifest["log"] == log.identity and manifest["last"] <= published
        ),
        default=0,
    )
    if through:
        log.drop_through(through)
    return int(through)


def summarize(
    folder: Path, rewards: Rewards, mask_users: Callable[[pa.Array], np.ndarray] | None = None
) -> dict[str, float]:
    """Metrics of a collected folder: responses by source and bundle, latency, unavailable parts, outcomes per
    response, and outcomes without a reward by reason.

    mask_users : which of some user ids may be reported, bool [n]; then anonymous responses, and outcomes of
        responses in other folders, are left out too; None: all may
    """
    metrics: dict[str, float] = {}
    response_count = 0
    variant_of: dict[str, str] = {}
    request_ids: set[str] | None = None if mask_users is None else set()
    credits = Credits(rewards, limit=None)
    if (folder / "decisions.parquet").exists():
        table = _filter_users(pq.read_table(folder / "decisions.parquet"), mask_users)
        request_ids = None if request_ids is None else set(table["request_id"].to_pylist())
        for key, items in zip(table["request_id"].to_pylist(), table["items"].to_pylist(), strict=True):
            credits.add_response(key, items)
        details = [json.loads(detail) if detail else {} for detail in table["more"].to_pylist()]
        responses = table.filter(
            pa.array([detail.get("arm") != "shadow" and "asked" not in detail for detail in details])
        )  # responses of /v1/recommend
        variant_of = {
            key: detail["arm"]
            for key, detail in zip(table["request_id"].to_pylist(), details, strict=True)
            if "arm" in detail
        }
        response_count = len(responses)
        metrics |= _summarize_responses(responses)

    if (folder / "outcomes.parquet").exists():
        rows = [
            row
            for row in pq.read_table(folder / "outcomes.parquet").to_pylist()
            if request_ids is None or row["request_id"] in request_ids
        ]
        metrics |= _summarize_outcomes(rows, credits, response_count, variant_of)

    if (folder / "events.parquet").exists():
        events = pq.read_table(folder / "events.parquet", columns=[schema.USER_ID])
        metrics["events"] = len(_filter_users(events, mask_users))
    return {_INVALID_METRIC.sub("_", name): value for name, value in metrics.items()}


def _summarize_responses(responses: pa.Table) -> dict[str, float]:
    metrics: dict[str, float] = {"answers": len(responses)}
    for column in ("source", "bundle"):
        counts = Counter(responses[column].to_pylist())
        metrics |= {f"answers/{column}/{name}": count for name, count in counts.items()}
    metrics |= {
        f"degraded/{part}": count / max(len(responses), 1)
        for part, count in Counter(sum(responses["degraded"].to_pylist(), [])).items()
    }
    ms = responses["ms"].drop_null().to_numpy()
    metrics |= {
        f"latency_ms/p{percent}": float(np.percentile(ms, percent)) for percent in (50, 95, 99) if len(ms)
    }
    return metrics


def _summarize_outcomes(
    rows: Sequence[Mapping[str, Any]], credits: Credits, response_count: int, variant_of: dict[str, str]
) -> dict[str, float]:
    """Metrics of outcomes. variant_of : variant of each impression of an experiment, by request id"""
    metrics: dict[str, float] = {"outcomes/set_aside": sum(row["set_aside"] for row in rows)}
    reports = [row for row in rows if row["outcome"] == SHOWN and not row["set_aside"]]
    if reports:
        shown = {row["request_id"] for row in reports}
        metrics |= {"shown/answers": len(shown), "shown/items": len(reports)}
        for row in reports:
            credits.add_outcome(row["request_id"], SHOWN, row["item_id"], row["value"])
    counted = [row for row in rows if row["outcome"] != SHOWN and not row["set_aside"]]
    metrics |= {
        f"outcomes/{name}/an_answer": count / max(response_count, 1)
        for name, count in Counter(row["outcome"] for row in counted).items()
    }

    rejections = Counter[str]()
    for row in counted:
        if row["request_id"] in credits:
            rejections[credits.rejection_reason(row["request_id"], row["outcome"], row["item_id"])] += 1
            credits.add_outcome(row["request_id"], row["outcome"], row["item_id"], row["value"])
    metrics |= {f"outcomes/count_nothing/{reason}": count for reason, count in rejections.items() if reason}

    impressions = Counter(variant_of.values())
    outcomes = Counter(variant_of[row["request_id"]] for row in counted if row["request_id"] in variant_of)
    metrics |= {
        f"outcomes/{variant}/an_answer": count / impressions[variant] for variant, count in outcomes.items()
    }
    return metrics


def _filter_users(table: pa.Table, mask_users: Callable[[pa.Array], np.ndarray] | None) -> pa.Table:
    if mask_users is None:
        return table
    table = table.filter(pc.is_valid(table[schema.USER_ID]))
    return table.filter(pa.array(mask_users(table[schema.USER_ID].combine_chunks()), pa.bool_()))


class _ParquetWriters:
    """One Parquet file per kind, created with its first row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers_by_name: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> _ParquetWriters:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.writers_by_name.values():
            writer.close()

    def write(self, entries: list[tuple[int, Entry]]) -> None:
        by_kind: dict[str, list[tuple[int, Entry]]] = {}
        for number, entry in entries:
            by_kind.setdefault("outcome" if entry.kind == "set_aside" else entry.kind, []).append(
                (number, entry)
            )
        if "event" in by_kind:
            self._add(
                "events",
                pa.Table.from_pylist(
                    [_event_row(number, entry) for number, entry in by_kind["event"]], schema.LIVE_EVENTS
                ),
            )
        if "decision" in by_kind:
            self._add(
                "decisions",
                pa.Table.from_pylist([_decision_row(entry) for _, entry in by_kind["decision"]], _DECISIONS),
            )
        if "access" in by_kind:
            rows = [
                {"user_id": entry.user, "timestamp": _microseconds(entry), **entry.body}
                for _, entry in by_kind["access"]
            ]
            self._add("access", pa.Table.from_pylist(rows, _ACCESS))
        if "outcome" in by_kind:
            self._add(
                "outcomes",
                pa.Table.from_pylist([_outcome_row(entry) for _, entry in by_kind["outcome"]], _OUTCOMES),
            )

    def _add(self, name: str, table: pa.Table) -> None:
        if name not in self.writers_by_name:
            self.writers_by_name[name] = pq.ParquetWriter(
                self.folder / f"{name}.parquet", table.schema, compression="zstd"
            )
        self.writers_by_name[name].write_table(table)


def _event_row(number: int, entry: Entry) -> Mapping[str, Any]:
    body = entry.body
    row = {
        "number": number,
        schema.USER_ID: entry.user,
        schema.ITEM_ID: str(body["item_id"]),
        schema.TIMESTAMP: _microseconds(entry),
    }
    context = json.dumps(body["context"], sort_keys=True) if body.get("context") else None
    return {
        **row,
        schema.EVENT: body.get("event"),
        schema.VALUE: body.get("value"),
        "context": context,
        schema.EVENT_ID: entry.external_id,
    }


def _decision_row(entry: Entry) -> Mapping[str, Any]:
    columns = {name: entry.body.get(name) for name in ("source", "night", "bundle", "degraded", "ms")}
    details = {name: value for name, value in entry.body.items() if name not in columns and name != "items"}
    item_ids = [str(item) for item in entry.body["items"]]
    details_json = json.dumps(details, sort_keys=True) if details else None
    return {
        "request_id": entry.key,
        "user_id": entry.user,
        "timestamp": _microseconds(entry),
        "items": item_ids,
        "more": details_json,
        **columns,
    }


def _outcome_row(entry: Entry) -> Mapping[str, Any]:
    body = entry.body
    item = None if body.get("item_id") is None else str(body["item_id"])
    row = {"request_id": body["request_id"], "outcome": body["outcome"], "value": body.get("value")}
    return {**row, "timestamp": _microseconds(entry), "item_id": item, "set_aside": entry.kind == "set_aside"}


def _microseconds(entry: Entry) -> int:
    return round(entry.at_s * 1e6)
