"""The stage `train`, from dataset to bundle, and the audit of a private training."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recray import cluster
from recray.bundle import KIND, Bundle, CurveLine, find_latest_bundle, settings_key
from recray.dataset.reader import Dataset
from recray.errors import MissingArtifactError, RefusedError, TrackingError
from recray.evaluation.criteria import explain_incomparable
from recray.stages.context import JobContext, Record, StageReport, name_run, to_date, to_day
from recray.storage import is_complete, lease, read_json, write_json
from recray.tracking import runs
from recray.tracking.outbox import Entry
from recray.training import audit as auditing
from recray.training import trainer
from recray.training.plan import bundle_settings
from recray.version import __version__


def train(context: JobContext, dataset: Dataset) -> StageReport:
    """Train a bundle on the dataset, or reopen it."""
    settings, plan = context.settings, context.training_plan(dataset)
    path = context.storage.bundle(plan.key)
    is_new = not is_complete(path, KIND, plan.key)
    if is_new:
        curve = LiveCurve(context, plan.key, name_run(dataset.as_of_s))
        cluster.start()
        _announce(context, dataset)
        try:
            trainer.train(settings, plan, dataset, curve)
        except Exception:
            curve.fail()
            raise
    bundle = Bundle.open(path) if is_new else trainer.train(settings, plan, dataset)

    tags = {runs.RUN_KEY: plan.key, runs.DATASET: bundle.manifest["dataset"], runs.DIGEST: bundle.digest}
    is_private = settings.privacy.enabled
    entry: Entry = {
        "tags": {"recray.as_of": to_date(bundle.as_of_s), "recray.version": __version__, **_git_tags()},
        "dataset": {
            "name": dataset.key,
            "digest": bundle.manifest["dataset_digest"][:16],
            "sources": list(settings.data.events),
            "profile": {"items": dataset.n_items} | ({} if is_private else {"events": dataset.n_events}),
        },
        "settings": bundle_settings(settings),
        "curve": bundle.metrics["curve"],
        "folders": {"bundle": context.relative(str(path))},
        "register": tags,
        "finished": True,
    }
    metrics = {
        "validation_ndcg": bundle.metrics["best_ndcg"],
        "epochs": bundle.metrics["epoch"],
        "best_epoch": bundle.metrics["best_epoch"],
    }
    context.progress(
        f"bundle {plan.key}: best epoch {metrics['best_epoch']}, "
        f"validation ndcg {metrics['validation_ndcg']:.4f}"
    )
    record = Record(bundle, bundle.as_of_s, entry)
    return StageReport(plan.key, {"bundle": str(path)}, metrics, is_new, record=record)


def _git_tags() -> dict[str, str]:
    """The commit of the checkout that recray runs from, as MLflow names it; empty without a checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return {"mlflow.source.git.commit": done.stdout.strip()}
    return {}


def _announce(context: JobContext, dataset: Dataset) -> None:
    """Log the plan of a training."""
    settings, plan = context.settings, context.training_plan(dataset)
    mechanism = trainer.mechanism_for(settings, dataset, plan.key)
    users = f"{dataset.n_users}" if mechanism is None else f"about {mechanism.users}"
    stop = f"stops {settings.train.patience} epochs after the best"
    if settings.privacy.enabled:
        stop = f"{settings.privacy.steps} steps, no early stop"
    context.progress(f"training on {users} users, {settings.train.workers} worker(s); {stop}")
    for line in () if mechanism is None else mechanism.summary_lines():
        context.progress(line)
    if plan.parent is not None:
        context.progress(f"starts from the weights of bundle {plan.parent.key}")
    elif settings.train.warm_start:
        context.progress("starts from random weights: there is no earlier champion to start from")


def is_train_due(context: JobContext, dataset: Dataset) -> bool:
    """Whether `train.every_days` have passed since the last bundle of these settings, or tonight's exists."""
    last = _latest_bundle(context, dataset)
    if last is None or explain_incomparable(dataset, last):
        return True
    if context.storage.bundle(context.training_plan(dataset).key).exists():
        return True
    age = to_day(dataset.as_of_s) - to_day(last.as_of_s)
    return not 0 < age < context.settings.train.every_days


def current_bundle(context: JobContext, dataset: Dataset) -> Bundle:
    """The challenger: the bundle trained on this dataset, or else the last one of these settings that was not
    trained on its test. Raises MissingArtifactError.
    """
    own = context.storage.bundle(context.training_plan(dataset).key)
    if own.exists():
        return Bundle.open(own)
    last = _latest_bundle(context, dataset)
    if last is None or explain_incomparable(dataset, last):
        bundles = context.storage.root / "bundles"
        raise MissingArtifactError(f"no bundle of these settings in {bundles}", "run `recray train` first")
    return last


def _latest_bundle(context: JobContext, dataset: Dataset) -> Bundle | None:
    key = settings_key(bundle_settings(context.settings))
    return find_latest_bundle(context.storage.root / "bundles", key, dataset.as_of_s)


class LiveCurve:
    """Logs the learning curve during training, here and in MLflow. The outbox delivers what MLflow missed at
    the end.
    """

    def __init__(self, context: JobContext, key: str, name: str) -> None:
        self._context, self._tracking, self._run = context, context.outbox.tracking, ""
        with self._if_available():
            self._run = self._tracking.run(key, name)

    def __call__(self, line: CurveLine) -> None:
        k = self._context.settings.evaluate.k[0]
        loss = f"loss {line['loss']:.4f}  " if "loss" in line else f"{line['steps']:.0f} steps  "
        shown = f"{loss}validation ndcg@{k} {line['validation_ndcg']:.4f}  {line['seconds']:.1f} s"
        self._context.progress(f"epoch {line['epoch']:.0f}  {shown}", **line)
        with self._if_available():
            if self._run:
                self._tracking.log_curve(self._run, [line], int(1000 * time.time()))

    def fail(self) -> None:
        """Mark the run as failed in MLflow, unless a later attempt took it over."""
        with contextlib.suppress(RefusedError), lease.commit(), self._if_available():
            if self._run:
                self._tracking.finish(self._run, "FAILED")

    @contextlib.contextmanager
    def _if_available(self) -> Iterator[None]:
        try:
            yield
        except TrackingError as error:
            self._run = ""
            self._context.warn_of_tracking(error)


def audit(context: JobContext, dataset: Dataset) -> tuple[auditing.AuditResults, Path]:
    """Audit how much of its ε a private training on the dataset reveals; returns the results and their file.

    The audit is an MLflow run of its own. Results of a stopped attempt and of a complete audit are reused:
    delete the file to repeat it.
    """
    settings = context.settings
    key = auditing.audit_key(settings, dataset)
    file = context.storage.audit(key)
    stored: Any = read_json(file) if file.exists() else {"runs": {}}
    results: auditing.AuditResults
    if "claims" in stored:
        results = stored
        context.progress(f"audit: reused; delete {file} to repeat it")
    else:
        cluster.start()
        results = auditing.audit(
            settings,
            dataset,
            context.progress,
            stored["runs"],
            lambda finished: write_json(file, {"runs": finished}),
        )
        write_json(file, results)

    values = {
        f"{name.replace('ε', 'epsilon')} {figure}".replace(" ", "_"): float(value)
        for name, figures in results["runs"].items()
        for figure, value in figures.items()
    }
    entry: Entry = {
        "run_key": key,
        "run_name": f"audit {to_date(dataset.as_of_s)}",
        "order": [dataset.as_of_s, 5],
        "settings": bundle_settings(settings),
        "metrics": {"values": values, "step": to_day(dataset.as_of_s)},
        "documents": {f"audit/{key}.json": results},
        "finished": True,
    }
    context.outbox.put(key, entry)
    context.deliver()
    return results, file
