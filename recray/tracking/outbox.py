"""Outbox of reports to MLflow. Entries stay queued on disk until sent, so MLflow may be unavailable and jobs
may be killed at any time.

A job puts one entry per run key. `deliver` sends all pending entries in order and marks them as sent; a sent
entry is not queued again. Sending is idempotent, so a kill between sending and marking is harmless.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from recray.errors import DamagedArtifactError, TrackingError
from recray.release import Release
from recray.storage import Storage, read_json, write_json
from recray.tracking.runs import PARENT, DatasetInput, Tracking


class Metrics(TypedDict):
    """Metrics at a step, for example a day."""

    values: Mapping[str, float]
    step: int


class Entry(TypedDict, total=False):
    """A report to an MLflow run.

    run_key, run_name : of the run
    order : as_of_s, and the stage's position
    at_ms : when the entry was queued, milliseconds since 1970; the time of its metrics
    parent : run key and name of the run that it is a child of
    tags : of the run
    dataset : the data of the run
    settings : by section
    documents : content by path among the run's artifacts
    folders : path under `storage.root` by path among the run's artifacts
    register : tags of the model version
    finished : whether the run ends
    run_id : MLflow's id of the run, once the entry is sent; nothing but the order and the key remains with it
    """

    run_key: str
    run_name: str
    order: list[int]
    at_ms: int
    parent: Mapping[str, str]
    tags: Mapping[str, str]
    dataset: DatasetInput
    settings: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]
    metrics: Metrics
    documents: Mapping[str, Any]
    folders: dict[str, str]
    register: dict[str, str]
    finished: bool
    run_id: str


class Outbox:
    """The queue of one workspace and the tracking that it is sent to."""

    def __init__(self, storage: Storage, tracking: Tracking) -> None:
        self.storage, self.tracking = storage, tracking

    def put(self, key: str, entry: Entry) -> None:
        """Queue the entry of the job `key`, unless it was queued before."""
        path = self.storage.outbox / f"{key}.json"
        if not path.exists():
            write_json(path, {"at_ms": int(1000 * time.time()), **entry})

    def pending(self) -> list[tuple[str, Entry]]:
        """Keys and entries that are not sent yet, oldest first."""
        entries = []
        for path in sorted(self.storage.outbox.glob("[!.]*.json")):
            try:
                entry = read_json(path)
            except DamagedArtifactError:
                continue
            if "run_id" not in entry:
                entries.append((path.stem, entry))
        return sorted(entries, key=lambda pair: (pair[1]["order"], pair[0]))

    def deliver(self) -> None:
        """Send pending entries to MLflow and set its aliases as in RELEASE.json.

        Raises TrackingError; entries that were not sent stay queued.
        """
        release = Release.read(self.storage)
        pending = self.pending()
        current_aliases = read_json(self._aliases) if self._aliases.exists() else None
        roles = {
            role: member and member.run_key
            for role, member in (("champion", release.champion), ("challenger", release.challenger))
        }
        aliases = {**roles, "uri": self.tracking.uri, "model": self.tracking.settings.model}
        first_error: TrackingError | None = None
        for key, entry in pending:
            try:
                run = self._send(entry)
            except TrackingError as error:
                # ping raises if MLflow is unavailable, and the rest waits; else only this entry is invalid
                self.tracking.ping()
                first_error = first_error or error
                continue
            write_json(
                self.storage.outbox / f"{key}.json",
                {"order": entry["order"], "run_key": entry["run_key"], "run_id": run},
            )
        if (pending or current_aliases != aliases) and any(roles.values()):
            self.tracking.sync_aliases(release)
            write_json(self._aliases, aliases)
        if first_error is not None:
            raise first_error

    @property
    def _aliases(self) -> Any:
        """File with the aliases that MLflow was last set to."""
        return self.storage.outbox / ".aliases.json"

    def _send(self, entry: Entry) -> str:
        tracking = self.tracking
        run = tracking.run(entry["run_key"], entry["run_name"])
        if "parent" in entry:
            parent = tracking.run(entry["parent"]["run_key"], entry["parent"]["run_name"])
            tracking.log_tags(run, {PARENT: parent})
        if "settings" in entry:
            tracking.log_settings(run, entry["settings"])
        if "tags" in entry:
            tracking.log_tags(run, entry["tags"])
        if "dataset" in entry:
            tracking.log_dataset(run, entry["dataset"])
        at_ms = entry.get("at_ms", 0)  # entries of 0.1.0 have none
        tracking.log_curve(run, entry.get("curve", []), at_ms)
        if "metrics" in entry:
            tracking.log_metrics(run, entry["metrics"]["values"], entry["metrics"]["step"], at_ms)
        for path, content in entry.get("documents", {}).items():
            tracking.log_document(run, content, path)
        folders = {path: self.storage.root / folder for path, folder in entry.get("folders", {}).items()}
        # the operator may have deleted old folders
        existing = {path: folder for path, folder in folders.items() if folder.exists()}
        for path, folder in existing.items():
            tracking.log_folder(run, folder, path)
        if "register" in entry and existing.keys() == folders.keys():
            tracking.register(run, folders["bundle"], entry["register"])
        if entry.get("finished"):
            tracking.finish(run)
        return run
