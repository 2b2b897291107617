"""Reports to MLflow: one run per trained model bundle, identified by its run key, and one version of the
registered model.

All calls are idempotent. MLflow counts a metric with a new timestamp as a new value, so a repeated call gives
the same timestamp, or leaves out what is there. All errors of MLflow are raised as TrackingError.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

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
PARENT = "mlflow.parentRunId"
MOST_METRICS = 500  # of a request; MLflow takes 1,000


class DatasetInput(TypedDict):
    """The data of a run: name and digest, the files that it was made of, and counts."""

    name: str
    digest: str
    sources: list[str]
    profile: dict[str, Any]


class Tracking:
    """A connection to MLflow, opened at the first use.

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

        for logger in ("mlflow", "mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        if not self.settings.uri:
            self._make_database()
        return MlflowClient(self.uri, self.uri)

    def _make_database(self) -> None:
        """Create MLflow's sqlite database under a temporary name, then rename it.

        A database that a kill left half migrated cannot be opened.
        """
        from mlflow import MlflowClient

        database = self.storage.tracking / "mlflow.db"
        if database.exists():
            return
        self.storage.tracking.mkdir(parents=True, exist_ok=True)
        for scratch_file in self.storage.tracking.glob(".making-*"):
            scratch_file.unlink()
        scratch = database.with_name(f".making-{uuid.uuid4().hex[:8]}.db")
        MlflowClient(sqlite_url(scratch)).search_experiments(max_results=1)
        os.replace(scratch, database)

    @cached_property
    def _experiment(self) -> str:
        experiment = self._client.get_experiment_by_name(self.settings.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None if self.settings.uri else (self.storage.tracking / "artifacts").as_uri()
        return str(self._client.create_experiment(self.settings.experiment, artifact_location=location))

    @contextlib.contextmanager
    def _tracking_errors(self) -> Iterator[None]:
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:  # requests, sqlalchemy and mlflow have unrelated exception types
            first = (str(error).strip().splitlines() or [""])[0]
            is_silent = "ConnectionPool" in first or "timed out" in first
            problem = (
                "does not respond"
                if is_silent
                else f"rejected the request: {type(error).__name__}: {first[:300]}"
            )
            raise TrackingError(
                f"MLflow at {self.uri} {problem}",
                "check that MLflow is running and check tracking.uri; recray doctor tests both",
            ) from error

    def ping(self) -> None:
        """Raises TrackingError if MLflow does not respond."""
        with self._tracking_errors():
            self._client.get_experiment(self._experiment)

    def run(self, run_key: str, name: str) -> str:
        """Id of the run of a run key; creates a missing run."""
        with self._tracking_errors():
            runs = self._client.search_runs(
                [self._experiment], f"tags.`{RUN_KEY}` = '{run_key}'", max_results=1
            )
            if runs:
                return str(runs[0].info.run_id)
            return str(
                self._client.create_run(self._experiment, tags={RUN_KEY: run_key}, run_name=name).info.run_id
            )

    def log_settings(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Log settings as parameters `section.field`."""
        from mlflow.entities import Param

        pairs = [
            (f"{section}.{field}", json.dumps(value))
            for section, fields in settings.items()
            for field, value in fields.items()
        ]
        with self._tracking_errors():
            self._client.log_batch(run_id, params=[Param(name, value) for name, value in pairs])

    def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        with self._tracking_errors():
            self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Log the data of a run; MLflow keeps one of the same name and digest."""
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as MlflowInput

        entity = Dataset(
            dataset["name"], dataset["digest"], "local", json.dumps({"uri": dataset["sources"]}),
            profile=json.dumps(dataset["profile"]),
        )  # fmt: skip
        with self._tracking_errors():
            self._client.log_inputs(
                run_id, [MlflowInput(entity, [InputTag("mlflow.data.context", "training")])]
            )

    def log_metrics(self, run_id: str, values: Mapping[str, float], step: int, at_ms: int) -> None:
        """Log values at a step and a time, milliseconds since 1970."""
        from mlflow.entities import Metric

        entries = [
            Metric(name.replace("@", "_at_"), float(value), at_ms, step) for name, value in values.items()
        ]
        with self._tracking_errors():
            for first in range(0, len(entries), MOST_METRICS):
                self._client.log_batch(run_id, metrics=entries[first : first + MOST_METRICS])

    def log_curve(self, run_id: str, lines: Sequence[Mapping[str, Any]], at_ms: int) -> None:
        """Log the lines of a learning curve, by epoch, that MLflow does not have yet."""
        if not lines:
            return
        with self._tracking_errors():
            logged = {metric.step for metric in self._client.get_metric_history(run_id, "validation_ndcg")}
        for line in lines:
            if line["epoch"] not in logged:
                values = {"loss": line["loss"]} if "loss" in line else {}
                values["validation_ndcg"] = line["validation_ndcg"]
                self.log_metrics(run_id, values, line["epoch"], at_ms)

    def log_document(self, run_id: str, content: Any, path: str) -> None:
        """Log a JSON document as an artifact."""
        with self._tracking_errors():
            self._client.log_dict(run_id, content, path)

    def log_folder(self, run_id: str, folder: Path, path: str) -> None:
        """Log a folder as an artifact, once: a marker file, sent last, shows that it is complete."""
        with self._tracking_errors():
            if any(
                entry.path == f"{path}/{folder.name}.sent"
                for entry in self._client.list_artifacts(run_id, path)
            ):
                return
            self._client.log_artifacts(run_id, str(folder), path)
            self._client.log_text(run_id, "complete\n", f"{path}/{folder.name}.sent")

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run."""
        with self._tracking_errors():
            self._client.set_terminated(run_id, status)

    def register(self, run_id: str, bundle: Path, tags: dict[str, str]) -> None:
        """Register a model version for the run's bundle, which was logged as `bundle`, once."""
        from mlflow.exceptions import MlflowException

        from recray.bundle import Bundle
        from recray.tracking.pyfunc import write_model_files

        with self._tracking_errors():
            if self.version(tags[RUN_KEY]) is not None:
                return
            with tempfile.TemporaryDirectory(prefix="recray-mlmodel-") as folder:
                write_model_files(Bundle.open(bundle), Path(folder))
                self._client.log_artifacts(run_id, folder, "bundle")
            with contextlib.suppress(MlflowException):  # it exists
                self._client.create_registered_model(self.settings.model)
            source = f"{self._client.get_run(run_id).info.artifact_uri}/bundle"
            self._client.create_model_version(self.settings.model, source, run_id, tags=tags)

    def version(self, run_key: str) -> ModelVersion | None:
        """The registered model version of a bundle; None: it has none."""
        with self._tracking_errors():
            versions = self._client.search_model_versions(f"name = '{self.settings.model}'")
            return next((version for version in versions if version.tags.get(RUN_KEY) == run_key), None)

    def aliases(self) -> dict[str, str]:
        """Version numbers by alias."""
        with self._tracking_errors():
            models = self._client.search_registered_models(f"name = '{self.settings.model}'")
            return {
                alias: str(version_number)
                for model in models
                for alias, version_number in model.aliases.items()
            }

    def find_mismatch(self, run_key: str, dataset: str, digest: str) -> str | None:
        """Why the registered model conflicts with this bundle or this workspace; None if it does not."""
        with self._tracking_errors():
            model = self.settings.model
            registered = self._client.search_model_versions(f"name = '{model}'")
            versions = {str(version.version): version for version in registered}
            for version in versions.values():
                if version.tags.get(RUN_KEY) == run_key and (
                    version.tags.get(DATASET),
                    version.tags.get(DIGEST),
                ) != (dataset, digest):
                    return (
                        f"version {version.version} of model {model} registers bundle {run_key} under "
                        f"dataset {version.tags.get(DATASET)} "
                        f"(digest {str(version.tags.get(DIGEST))[:12]}), but it was trained on {dataset} "
                        f"(digest {digest[:12]}); delete that version"
                    )
            version_number = self.aliases().get("champion")
            if version_number is None:
                return None
            if version_number not in versions:
                return (
                    f"alias champion of model {model} points at version {version_number}, which does not "
                    "exist; delete the alias, and the next promotion sets it"
                )
            registered_key = versions[version_number].tags.get(RUN_KEY, "")
            champion = Release.read(self.storage).champion
            if not self.storage.bundle(registered_key).exists() and (
                champion is None or champion.run_key != registered_key
            ):
                return (
                    f"alias champion of model {model} points at version {version_number}, bundle "
                    f"{registered_key} of dataset {versions[version_number].tags.get(DATASET)}, "
                    f"which is not in {self.storage.root}; another workspace uses this model name: set "
                    "tracking.model to another name"
                )
            return None

    def sync_aliases(self, release: Release) -> None:
        """Set the aliases as in RELEASE.json. Raises TrackingError if a bundle has no model version."""
        with self._tracking_errors():
            current = self.aliases()
            for alias in ("champion", "challenger"):
                member = getattr(release, alias)
                version = self.version(member.run_key) if member else None
                if member and version is None:
                    raise TrackingError(
                        f"MLflow at {self.uri}: model {self.settings.model} has no version of {alias} "
                        f"{member.run_key}, so the alias cannot be set",
                        "it was registered in another MLflow: restore that tracking.uri and tracking.model, "
                        "or promote a new bundle",
                    )
                if version is not None and current.get(alias) != str(version.version):
                    self._client.set_registered_model_alias(self.settings.model, alias, str(version.version))
                elif member is None and alias in current:
                    self._client.delete_registered_model_alias(self.settings.model, alias)
