"""Commands that inspect a workspace: its bundles, and the privacy budget of its users."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypedDict

from rich.table import Table

from recray.bundle import Bundle
from recray.config import Settings
from recray.errors import ArtifactError, SettingsError, TrackingError
from recray.pipeline import hold_workspace, open_dataset
from recray.privacy import tables
from recray.privacy.ledger import Ledger
from recray.privacy.results import AuditResults
from recray.release import Release, list_bundles
from recray.stages import AsOf, JobContext, JobResult, to_date
from recray.stages.train import audit
from recray.storage import Storage

if TYPE_CHECKING:
    from recray.pipeline.terminal import Reporter

MODEL_COLUMNS = ("bundle", "as of", "validation NDCG", "roles", "MLflow version")


class ModelRow(TypedDict):
    """A bundle in the result of `recray models`.

    bundle : run key
    as_of : UTC date of the end of its data
    validation_ndcg : None of untrained weights
    version : of the model in MLflow; None: it has none, or MLflow is unavailable
    """

    bundle: str
    as_of: str
    validation_ndcg: float | None
    roles: list[str]
    version: str | None


def show_models(settings: Settings, reporter: Reporter) -> JobResult:
    """Show the bundles of the workspace, oldest first, with their roles and their versions in MLflow."""
    started = time.monotonic()
    context = JobContext(settings, Storage(settings.root()), reporter.progress)
    release = Release.read(context.storage)
    opened = []
    for path in list_bundles(context.storage):
        try:
            opened.append(Bundle.open(path))
        except ArtifactError as error:
            context.warn(error.message)

    table = Table(*MODEL_COLUMNS, title=f"{context.storage.root}", title_justify="left")
    rows: list[ModelRow] = []
    for bundle in sorted(opened, key=lambda bundle: (bundle.as_of_s, bundle.key)):
        row: ModelRow = {
            "bundle": bundle.key,
            "as_of": to_date(bundle.as_of_s),
            "validation_ndcg": bundle.metrics.get("best_ndcg"),
            "roles": release.list_roles(bundle.key),
            "version": _find_version(context, bundle.key),
        }
        rows.append(row)
        ndcg = "–" if row["validation_ndcg"] is None else f"{row['validation_ndcg']:.4f}"
        roles = ", ".join(row["roles"]) or "–"
        table.add_row(row["bundle"], row["as_of"], ndcg, roles, row["version"] or "–")
    reporter.show(table)
    seconds = round(time.monotonic() - started, 2)
    return JobResult("models", "ok", metrics={"models": rows}, seconds=seconds, warnings=context.warnings)


def _find_version(context: JobContext, key: str) -> str | None:
    if any("MLflow" in warning for warning in context.warnings):
        return None  # MLflow was unavailable before
    try:
        registered = context.outbox.tracking.version(key)
    except TrackingError as error:
        context.warn(error.message)
        return None
    return None if registered is None else str(registered.version)


def run_privacy(
    settings: Settings,
    action: str,
    as_of: AsOf,
    reporter: Reporter,
    *,
    days: int = 30,
    training: str | None = None,
) -> JobResult:
    """Run an action on the privacy ledger.

    action : status, the ε that the population has spent, by training; plan, the ε of training intervals and
        shards of users; close, end a training that will not continue; audit, how much of its ε a training
        reveals
    """
    started = time.monotonic()
    result = JobResult("privacy", "ok")
    if action == "close":
        _close(settings, training, reporter)
    if action == "audit":
        with hold_workspace("audit", settings, reporter.progress) as context:
            results, file = audit(context, open_dataset(settings, as_of))
        result.outputs["audit"], result.warnings = str(file), context.warnings
        table, result.metrics = tables.audit(results)
        _judge_audit(results, result)
    elif action == "plan":
        table, result.metrics = tables.plan(settings, days)
    else:
        table, result.metrics = tables.status(settings)
    reporter.show(table)
    result.seconds = round(time.monotonic() - started, 2)
    return result


def _close(settings: Settings, training: str | None, reporter: Reporter) -> None:
    if training is None:
        raise SettingsError(
            "recray privacy close needs a training", "--training KEY; recray privacy status lists the keys"
        )
    with hold_workspace("privacy close", settings, reporter.progress):  # no training of this workspace runs
        Ledger.read(settings.ledger_url(), settings.privacy.population).commit(training)


def _judge_audit(results: AuditResults, result: JobResult) -> None:
    """Fail a job whose audit refuted a claim, failed a check, or did not refute its control."""
    failures = [
        f"{check['name']} (training {check['training']}): {check['text']}"
        for check in results["checks"]
        if not check["passed"]
    ]
    for claim in results["claims"]:
        name = f"ε {claim['claim']:.3g}"
        if claim["verdict"] == "refuted":
            failures.insert(0, f"{name} is refuted")
        elif claim["verdict"] == "cannot tell":
            result.warnings.append(
                f"{name}: {results['canaries']} canaries do not suffice; raise privacy.audit_canaries or "
                "lower privacy.delta"
            )
        elif not claim["control_caught"]:
            failures.append(
                f"{name} was not refuted without noise either, so the audit is not conclusive; raise "
                "privacy.steps"
            )
    if failures:
        result.status, result.reason = "failed", f"{'; '.join(failures)}; release nothing of this training"
