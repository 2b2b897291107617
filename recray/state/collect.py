"""From the log to Parquet: every entry once, in sealed folders that each hold the next stretch of the log.

What was collected is read off the folders' names, so a collect that is killed leaves nothing and the next one does its work. A folder
holds `events.parquet` (`schema.LIVE_EVENTS`, read by prepare as the owner's), `decisions.parquet`, `outcomes.parquet` and `access.parquet` (whose
history was read, by which key), where there are any.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray import schema
from recray.errors import StateError
from recray.state.log import Entry, Log
from recray.state.rewards import Credits, Rewards
from recray.storage import Storage, read_json, sealed_directory

KIND = "collected"
AT_ONCE = 50_000
_UNNAMED = re.compile(r"[^\w\-./ ]")  # what MLflow has no name with
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
_ACCESS = pa.schema([("user_id", pa.string()), ("timestamp", pa.timestamp("us", "UTC")), ("by", pa.string()), ("what", pa.string())])
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
    """Write what the log has and no folder holds; None if there is nothing. Returns how many entries of each kind.

    Raises StateError, and what a disk that takes nothing raises.
    """
    first = collected_through(storage).get(log.identity, 0) + 1
    key = f"{log.identity[:8]}-{first:020d}"
    counts: Counter[str] = Counter()
    end = log.last()  # what comes meanwhile is the next one's
    if end < first - 1:
        what = f"the log ends at {end}, but was collected up to {first - 1}: it was restored from an older copy"
        raise StateError(what, "bring the newer one back, or begin a new one")
    entries = _stretch(log, first - 1, end)
    if not entries:
        return None, {}
    fields: dict[str, Any] = {"log": log.identity, "first": first, "collected_at_s": int(time.time())}
    path = storage.collected / key
    with sealed_directory(path, KIND, key, fields) as folder:
        with _Writers(folder) as writers:
            while entries:
                writers.write(entries)
                counts.update(entry.kind for _, entry in entries)
                fields["last"] = entries[-1][0]
                entries = _stretch(log, fields["last"], end)
        fields["counts"] = dict(sorted(counts.items()))
    return path, fields["counts"]


def _stretch(log: Log, after: int, end: int) -> list[tuple[int, Entry]]:
    """The next entries; an outcome that was set aside and whose decision came after all is one like the others."""
    found = [pair for pair in log.read(after, AT_ONCE) if pair[0] <= end] if after < end else []
    return [(number, replace(entry, kind="outcome") if _late(log, entry) else entry) for number, entry in found]


def _late(log: Log, entry: Entry) -> bool:
    if entry.kind != "set_aside" or not log.has("decision", entry.body["request_id"]):
        return False
    return not log.has("outcome", entry.key)  # told again since


def collected_folders(storage: Storage) -> list[Path]:
    """The folders with decisions or outcomes, oldest first."""
    paths = [path for path in storage.collected.glob("[!.]*") if any((path / f"{kind}.parquet").exists() for kind in ("decisions", "outcomes"))]
    manifests = {path: read_json(path / "manifest.json") for path in paths}
    return sorted(paths, key=lambda path: (manifests[path]["collected_at_s"], manifests[path]["first"]))


def collected_through(storage: Storage) -> dict[str, int]:
    """The last number that was collected, by the identity of a log."""
    found: dict[str, int] = {}
    for path in storage.collected.glob("[!.]*"):
        manifest = read_json(path / "manifest.json")
        found[manifest["log"]] = max(found.get(manifest["log"], 0), manifest["last"])
    return found


def forget(storage: Storage, log: Log, keep_days: float, published: int) -> int:
    """Drop from the log what was collected more than so many days ago and is in the published night, up to its number `published`.

    Returns the last number dropped, 0 for none.
    """
    before = time.time() - keep_days * DAY_S
    old = [manifest for path in storage.collected.glob("[!.]*") if (manifest := read_json(path / "manifest.json"))["collected_at_s"] < before]
    through = max((one["last"] for one in old if one["log"] == log.identity and one["last"] <= published), default=0)
    if through:
        log.forget(through)
    return int(through)


def summary(folder: Path, rewards: Rewards, among: Callable[[pa.Array], np.ndarray] | None = None) -> dict[str, float]:
    """What a collected folder says of the endpoint: answers by source and bundle, latency, what was away, outcomes an answer, and how many of them
    count nothing, by reason.

    among : which of some user ids may be told of, bool [n]; what nobody is named with, and outcomes of answers of another folder, are not
        either. None: all are
    """
    found: dict[str, float] = {}
    shown = 0
    arms: dict[str, str] = {}
    asked: set[str] | None = None if among is None else set()
    credits = Credits(rewards, limit=None)
    if (folder / "decisions.parquet").exists():
        table = _of(pq.read_table(folder / "decisions.parquet"), among)
        asked = None if asked is None else set(table["request_id"].to_pylist())
        for key, items in zip(table["request_id"].to_pylist(), table["items"].to_pylist(), strict=True):
            credits.add_response(key, items)
        more = [json.loads(told) if told else {} for told in table["more"].to_pylist()]
        seen = table.filter(pa.array([told.get("arm") != "shadow" and "asked" not in told for told in more]))  # answers of /v1/recommend
        arms = {key: told["arm"] for key, told in zip(table["request_id"].to_pylist(), more, strict=True) if "arm" in told}
        shown = len(seen)
        found["answers"] = shown
        for column in ("source", "bundle"):
            found |= {f"answers/{column}/{name}": count for name, count in Counter(seen[column].to_pylist()).items()}
        found |= {f"degraded/{part}": count / max(shown, 1) for part, count in Counter(sum(seen["degraded"].to_pylist(), [])).items()}
        ms = seen["ms"].drop_null().to_numpy()
        found |= {f"latency_ms/p{percent}": float(np.percentile(ms, percent)) for percent in (50, 95, 99) if len(ms)}
    if (folder / "outcomes.parquet").exists():
        rows = [row for row in pq.read_table(folder / "outcomes.parquet").to_pylist() if asked is None or row["request_id"] in asked]
        found["outcomes/set_aside"] = sum(row["set_aside"] for row in rows)
        counted = [row for row in rows if not row["set_aside"]]
        found |= {f"outcomes/{name}/an_answer": count / max(shown, 1) for name, count in Counter(row["outcome"] for row in counted).items()}
        nothing = Counter[str]()
        for row in counted:
            if row["request_id"] in credits:
                nothing[credits.why_not(row["request_id"], row["outcome"], row["item_id"])] += 1
                credits.add_outcome(row["request_id"], row["outcome"], row["item_id"], row["value"])
        found |= {f"outcomes/count_nothing/{why}": count for why, count in nothing.items() if why}
        sides = Counter(arms.values())
        by_side = Counter(arms[row["request_id"]] for row in counted if row["request_id"] in arms)
        found |= {f"outcomes/{side}/an_answer": count / sides[side] for side, count in by_side.items()}
    if (folder / "events.parquet").exists():
        found["events"] = len(_of(pq.read_table(folder / "events.parquet", columns=[schema.USER_ID]), among))
    return {_UNNAMED.sub("_", name): value for name, value in found.items()}


def _of(table: pa.Table, among: Callable[[pa.Array], np.ndarray] | None) -> pa.Table:
    if among is None:
        return table
    table = table.filter(pc.is_valid(table[schema.USER_ID]))
    return table.filter(pa.array(among(table[schema.USER_ID].combine_chunks()), pa.bool_()))


class _Writers:
    """One Parquet file a kind, begun with its first row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.open.values():
            writer.close()

    def write(self, entries: list[tuple[int, Entry]]) -> None:
        by_kind: dict[str, list[tuple[int, Entry]]] = {}
        for number, entry in entries:
            by_kind.setdefault("outcome" if entry.kind == "set_aside" else entry.kind, []).append((number, entry))
        if "event" in by_kind:
            self._add("events", pa.Table.from_pylist([_event(number, entry) for number, entry in by_kind["event"]], schema.LIVE_EVENTS))
        if "decision" in by_kind:
            self._add("decisions", pa.Table.from_pylist([_decision(entry) for _, entry in by_kind["decision"]], _DECISIONS))
        if "access" in by_kind:
            rows = [{"user_id": entry.user, "timestamp": _microseconds(entry), **entry.body} for _, entry in by_kind["access"]]
            self._add("access", pa.Table.from_pylist(rows, _ACCESS))
        if "outcome" in by_kind:
            self._add("outcomes", pa.Table.from_pylist([_outcome(entry) for _, entry in by_kind["outcome"]], _OUTCOMES))

    def _add(self, name: str, table: pa.Table) -> None:
        if name not in self.open:
            self.open[name] = pq.ParquetWriter(self.folder / f"{name}.parquet", table.schema, compression="zstd")
        self.open[name].write_table(table)


def _event(number: int, entry: Entry) -> dict[str, Any]:
    body = entry.body
    told = {"number": number, schema.USER_ID: entry.user, schema.ITEM_ID: str(body["item_id"]), schema.TIMESTAMP: _microseconds(entry)}
    context = json.dumps(body["context"], sort_keys=True) if body.get("context") else None
    return {**told, schema.EVENT: body.get("event"), schema.VALUE: body.get("value"), "context": context, schema.EVENT_ID: entry.named}


def _decision(entry: Entry) -> dict[str, Any]:
    known = {name: entry.body.get(name) for name in ("source", "night", "bundle", "degraded", "ms")}
    more = {name: value for name, value in entry.body.items() if name not in known and name != "items"}
    shown = [str(item) for item in entry.body["items"]]
    told = json.dumps(more, sort_keys=True) if more else None
    return {"request_id": entry.key, "user_id": entry.user, "timestamp": _microseconds(entry), "items": shown, "more": told, **known}


def _outcome(entry: Entry) -> dict[str, Any]:
    body = entry.body
    item = None if body.get("item_id") is None else str(body["item_id"])
    told = {"request_id": body["request_id"], "outcome": body["outcome"], "value": body.get("value")}
    return {**told, "timestamp": _microseconds(entry), "item_id": item, "set_aside": entry.kind == "set_aside"}


def _microseconds(entry: Entry) -> int:
    return round(entry.at_s * 1e6)
