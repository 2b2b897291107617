"""What recray tells MLflow: one run per trained bundle, found again by its run key, one version of the registered model.

Everything here may be repeated and adds nothing the second time. The timestamp of a metric is its step, because MLflow
takes a metric with another timestamp for another value. Whatever goes wrong between here and MLflow is a TrackingError.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recray.config import TrackingSettings, sqlite_url
from recray.errors import TrackingError
from recray.release import Release
from recray.storage import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

RUN_KEY = "recray.run_key"
DATASET = "recray.dataset"
DIGEST = "recray.digest"


class Tracking:
    """A connection to MLflow, made when first used.

    Parameters
    ----------
    settings : uri (None for sqlite and a folder under `storage.tracking`), names, and the limits of a request
    """

    def __init__(self, settings: TrackingSettings, storage: Storage) -> None:
        self.settings, self.storage = settings, storage
        self.uri = settings.uri or sqlite_url(storage.tracking / "mlflow.db")

    @cached_property
    def _client(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(self.settings.timeout_s)
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(self.settings.retries)
        from mlflow import MlflowClient

        for noisy in ("mlflow", "mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        if not self.settings.uri:
            self._make_database()
        return MlflowClient(self.uri, self.uri)

    def _make_database(self) -> None:
        """Make MLflow's sqlite beside its place and rename it: one that a kill left in the middle of its migrations never opens."""
        from mlflow import MlflowClient

        database = self.storage.tracking / "mlflow.db"
        if database.exists():
            return
        self.storage.tracking.mkdir(parents=True, exist_ok=True)
        for left in self.storage.tracking.glob(".making-*"):
            left.unlink()
        scratch = database.with_name(f".making-{uuid.uuid4().hex[:8]}.db")
        MlflowClient(sqlite_url(scratch)).search_experiments(max_results=1)
        os.replace(scratch, database)

    @cached_property
    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.settings.experiment)
        if found is not None:
            return str(found.experiment_id)
        location = None if self.settings.uri else (self.storage.tracking / "artifacts").as_uri()
        return str(self._client.create_experiment(self.settings.experiment, artifact_location=location))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:  # requests, sqlalchemy and mlflow each have a tree of their own
            first = (str(error).strip().splitlines() or [""])[0]
            silent = "ConnectionPool" in first or "timed out" in first
            what = "does not answer" if silent else f"did not take it: {type(error).__name__}: {first[:300]}"
            raise TrackingError(f"MLflow at {self.uri} {what}", "check that it runs and tracking.uri; recray doctor looks at it") from error

    def ping(self) -> None:
        """Raises TrackingError if MLflow does not answer."""
        with self._named():
            self._client.get_experiment(self._experiment)

    def run(self, run_key: str, name: str) -> str:
        """Id of the run of a train key; made if there is none."""
        with self._named():
            found = self._client.search_runs([self._experiment], f"tags.`{RUN_KEY}` = '{run_key}'", max_results=1)
            if found:
                return str(found[0].info.run_id)
            return str(self._client.create_run(self._experiment, tags={RUN_KEY: run_key}, run_name=name).info.run_id)

    def settings_of(self, run_id: str, settings: dict[str, Any]) -> None:
        """Settings as parameters `section.field`."""
        from mlflow.entities import Param

        pairs = [(f"{section}.{field}", json.dumps(value)) for section, fields in settings.items() for field, value in fields.items()]
        with self._named():
            self._client.log_batch(run_id, params=[Param(name, value) for name, value in pairs])

    def metrics(self, run_id: str, values: dict[str, float], step: int) -> None:
        """Values at a step."""
        from mlflow.entities import Metric

        entries = [Metric(name.replace("@", "_at_"), float(value), step, step) for name, value in values.items()]
        with self._named():
            self._client.log_batch(run_id, metrics=entries)

    def curve(self, run_id: str, lines: list[dict[str, float]]) -> None:
        """Lines of a learning curve, by epoch."""
        for line in lines:
            self.metrics(run_id, {name: line[name] for name in ("loss", "validation_ndcg") if name in line}, int(line["epoch"]))

    def document(self, run_id: str, content: Any, path: str) -> None:
        """A JSON document as an artifact."""
        with self._named():
            self._client.log_dict(run_id, content, path)

    def folder(self, run_id: str, folder: Path, path: str) -> None:
        """A folder as an artifact, once: a mark that is sent last says that it is complete."""
        with self._named():
            if any(entry.path == f"{path}/{folder.name}.sent" for entry in self._client.list_artifacts(run_id, path)):
                return
            self._client.log_artifacts(run_id, str(folder), path)
            self._client.log_text(run_id, "complete\n", f"{path}/{folder.name}.sent")

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run."""
        with self._named():
            self._client.set_terminated(run_id, status)

    def register(self, run_id: str, tags: dict[str, str]) -> None:
        """A version of the registered model for the run's bundle, once."""
        from mlflow.exceptions import MlflowException

        with self._named():
            if self.version(tags[RUN_KEY]) is not None:
                return
            with contextlib.suppress(MlflowException):  # it exists
                self._client.create_registered_model(self.settings.model)
            source = f"{self._client.get_run(run_id).info.artifact_uri}/bundle"
            self._client.create_model_version(self.settings.model, source, run_id, tags=tags)

    def version(self, run_key: str) -> ModelVersion | None:
        """The version of the registered model that holds this bundle."""
        with self._named():
            found = self._client.search_model_versions(f"name = '{self.settings.model}'")
            return next((version for version in found if version.tags.get(RUN_KEY) == run_key), None)

    def aliases(self) -> dict[str, str]:
        """Alias to version number."""
        with self._named():
            found = self._client.search_registered_models(f"name = '{self.settings.model}'")
            return {alias: str(number) for model in found for alias, number in model.aliases.items()}

    def foreign(self, run_key: str, dataset: str, digest: str) -> str | None:
        """Why the registered model does not fit this bundle or this storage; None if it does."""
        with self._named():
            model, found = self.settings.model, {str(v.version): v for v in self._client.search_model_versions(f"name = '{self.settings.model}'")}
            for version in found.values():
                if version.tags.get(RUN_KEY) == run_key and (version.tags.get(DATASET), version.tags.get(DIGEST)) != (dataset, digest):
                    return (
                        f"version {version.version} of model {model} registers bundle {run_key} under dataset {version.tags.get(DATASET)} "
                        f"(digest {str(version.tags.get(DIGEST))[:12]}), but it was trained on {dataset} (digest {digest[:12]}); delete that version"
                    )
            number = self.aliases().get("champion")
            if number is None:
                return None
            if number not in found:
                return f"alias champion of model {model} points at version {number}, which is gone; delete the alias, and it is set again"
            holder = found[number].tags.get(RUN_KEY, "")
            champion = Release.read(self.storage).champion
            if not self.storage.bundle(holder).exists() and (champion is None or champion.run_key != holder):
                return (
                    f"alias champion of model {model} points at version {number}, bundle {holder} of dataset {found[number].tags.get(DATASET)}, "
                    f"which {self.storage.root} does not have; another storage uses this name: set tracking.model to one of its own"
                )
            return None

    def follow(self, release: Release) -> None:
        """Move the aliases to where RELEASE.json has them. Raises TrackingError if a bundle has no version here."""
        with self._named():
            now = self.aliases()
            for alias in ("champion", "challenger"):
                member = getattr(release, alias)
                version = self.version(member.run_key) if member else None
                if member and version is None:
                    raise TrackingError(
                        f"MLflow at {self.uri}: model {self.settings.model} has no version of {alias} {member.run_key}, so the alias cannot be set",
                        "it was registered elsewhere: go back to that tracking.uri and tracking.model, or promote a new bundle",
                    )
                if version is not None and now.get(alias) != str(version.version):
                    self._client.set_registered_model_alias(self.settings.model, alias, str(version.version))
                elif member is None and alias in now:
                    self._client.delete_registered_model_alias(self.settings.model, alias)
