"""What MLflow is to be told, on disk until it was: so that MLflow may be away and a job may be killed anywhere.

A job puts one entry a run key. `deliver` tells MLflow everything that is pending, in order, and marks it told; an entry
that was told is not put again. Telling twice adds nothing, so a kill in between does no harm.
"""

from __future__ import annotations

from typing import Any

from recray.errors import DamagedArtifactError, TrackingError
from recray.release import Release
from recray.storage import Storage, read_json, write_json
from recray.tracking.runs import Tracking

Entry = dict[str, Any]
"""run_key and run_name of the MLflow run, `order` [as_of_s, stage], and any of: settings, curve, metrics (values, step),
documents (path: content), folders (path: path under storage.root), register (tags), finished."""


class Outbox:
    """The spool of one storage and the tracking that it goes to."""

    def __init__(self, storage: Storage, tracking: Tracking) -> None:
        self.storage, self.tracking = storage, tracking

    def put(self, key: str, entry: Entry) -> None:
        """Spool what the job `key` has to tell, unless that was done before."""
        path = self.storage.outbox / f"{key}.json"
        if not path.exists():
            write_json(path, entry)

    def pending(self) -> list[tuple[str, Entry]]:
        """Keys and entries that MLflow was not told, oldest first."""
        found = []
        for path in sorted(self.storage.outbox.glob("[!.]*.json")):
            try:
                entry = read_json(path)
            except DamagedArtifactError:
                continue
            if "run_id" not in entry:
                found.append((path.stem, entry))
        return sorted(found, key=lambda pair: (pair[1]["order"], pair[0]))

    def deliver(self) -> None:
        """Tell MLflow what is pending and let its aliases follow RELEASE.json. Raises TrackingError; what was not told stays spooled."""
        release = Release.read(self.storage)
        pending = self.pending()
        said = read_json(self._aliases) if self._aliases.exists() else None
        roles = {role: member and member.run_key for role, member in (("champion", release.champion), ("challenger", release.challenger))}
        wanted = {**roles, "uri": self.tracking.uri, "model": self.tracking.settings.model}
        refused: TrackingError | None = None
        for key, entry in pending:
            try:
                run = self._tell(entry)
            except TrackingError as error:
                self.tracking.ping()  # away: the rest can wait; else it is this entry that MLflow does not take
                refused = refused or error
                continue
            write_json(self.storage.outbox / f"{key}.json", {"order": entry["order"], "run_key": entry["run_key"], "run_id": run})
        if (pending or said != wanted) and any(roles.values()):
            self.tracking.follow(release)
            write_json(self._aliases, wanted)
        if refused is not None:
            raise refused

    @property
    def _aliases(self) -> Any:
        """The roles that MLflow's aliases were last set to."""
        return self.storage.outbox / ".aliases.json"

    def _tell(self, entry: Entry) -> str:
        tracking = self.tracking
        run = tracking.run(entry["run_key"], entry["run_name"])
        if "settings" in entry:
            tracking.settings_of(run, entry["settings"])
        tracking.curve(run, entry.get("curve", []))
        if "metrics" in entry:
            tracking.metrics(run, entry["metrics"]["values"], entry["metrics"]["step"])
        for path, content in entry.get("documents", {}).items():
            tracking.document(run, content, path)
        folders = {path: self.storage.root / folder for path, folder in entry.get("folders", {}).items()}
        there = {path: folder for path, folder in folders.items() if folder.exists()}  # the owner may have cleared old ones away
        for path, folder in there.items():
            tracking.folder(run, folder, path)
        if "register" in entry and there.keys() == folders.keys():
            tracking.register(run, entry["register"])
        if entry.get("finished"):
            tracking.finish(run)
        return run
