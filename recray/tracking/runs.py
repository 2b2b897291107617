"""What recray tells MLflow: one run per trained bundle, found again by its run key, so that repeating a job adds nothing.

The timestamp of a metric is its step, because MLflow takes a metric with another timestamp for another value.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

RUN_KEY = "recray.run_key"


class Tracking:
    """A connection to MLflow.

    Parameters
    ----------
    uri : tracking URI; None for sqlite and a folder under `folder`
    """

    def __init__(self, uri: str | None, experiment: str, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for noisy in ("mlflow", "mlflow.store.db.utils", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)

        folder.mkdir(parents=True, exist_ok=True)
        self.uri = uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            self.experiment = found.experiment_id
        else:
            location = None if uri else (folder / "artifacts").as_uri()
            self.experiment = self.client.create_experiment(experiment, artifact_location=location)

    def run(self, run_key: str, name: str) -> str:
        """Id of the run of a train key; made if there is none."""
        found = self.client.search_runs([self.experiment], f"tags.`{RUN_KEY}` = '{run_key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        return str(self.client.create_run(self.experiment, tags={RUN_KEY: run_key}, run_name=name).info.run_id)

    def settings(self, run_id: str, settings: dict[str, Any]) -> None:
        """Settings as parameters `section.field`."""
        from mlflow.entities import Param

        pairs = [(f"{section}.{field}", json.dumps(value)) for section, fields in settings.items() for field, value in fields.items()]
        self.client.log_batch(run_id, params=[Param(name, value) for name, value in pairs])

    def metrics(self, run_id: str, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        entries = [Metric(name.replace("@", "_at_"), float(value), step, step) for name, value in values.items()]
        self.client.log_batch(run_id, metrics=entries)

    def curve(self, run_id: str, lines: list[dict[str, float]]) -> None:
        """Lines of a learning curve, by epoch."""
        for line in lines:
            self.metrics(run_id, {name: line[name] for name in ("loss", "validation_ndcg")}, int(line["epoch"]))

    def document(self, run_id: str, content: Any, path: str) -> None:
        """A JSON document as an artifact."""
        self.client.log_dict(run_id, content, path)

    def folder(self, run_id: str, folder: Path, path: str) -> None:
        """A folder as an artifact, once."""
        if not self.client.list_artifacts(run_id, path):
            self.client.log_artifacts(run_id, str(folder), path)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        self.client.set_terminated(run_id, status)
