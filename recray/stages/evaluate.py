"""The stages `evaluate`, a bundle beside the baselines, and `report`, the page of a nightly run."""

from __future__ import annotations

from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.evaluation import evaluate as evaluation
from recray.plugins import list_plugins
from recray.report import page as reporting
from recray.stages.context import JobContext, Record, StageReport, to_date, to_day
from recray.stages.train import current_bundle
from recray.storage import is_complete
from recray.tracking.outbox import Entry

METRICS = ("hr", "ndcg", "mrr", "recall", "coverage", "popularity_share")


def evaluate(context: JobContext, dataset: Dataset) -> StageReport:
    """Evaluate the current bundle and the baselines on the dataset's test users."""
    settings, bundle = context.settings, current_bundle(context, dataset)
    key = evaluation.evaluate_key(settings, dataset, bundle)
    path = context.storage.evaluation(key)
    is_new = not is_complete(path, evaluation.KIND, key)
    table = evaluation.evaluate(settings, key, dataset, bundle)
    for protocol, rows in table.items():
        context.progress(f"{protocol}: {_summarize(rows[evaluation.MODEL], settings.evaluate.k[0])}")

    metrics = _select_headline(table, settings)
    entry: Entry = {
        "metrics": {
            "values": {**metrics, **_select_baselines(table, settings)},
            "step": to_day(dataset.as_of_s),
        },
        "documents": {f"evaluation/{to_date(dataset.as_of_s)}-{key}.json": table},
    }
    record = Record(bundle, dataset.as_of_s, entry)
    return StageReport(key, {"evaluation": str(path)}, metrics, is_new, record=record)


def _summarize(row: evaluation.Row, k: int) -> str:
    if "skipped" in row:
        return f"skipped, {row['skipped']}"
    segments = [(name, row["segments"][name]) for name in evaluation.SEGMENTS]
    shown = [f"{name} {part['ndcg']:.4f} ({part['users']})" for name, part in segments if part["users"]]
    return f"ndcg@{k} {row[f'ndcg@{k}']:.4f}; by segment (users): {', '.join(shown)}"


def _select_headline(table: evaluation.Table, settings: Settings) -> dict[str, float]:
    """The model's metrics at the first k of `evaluate.k`, by protocol: `with_repeats_ndcg@10`, …; none of a
    skipped protocol.
    """
    names = [f"{metric}@{settings.evaluate.k[0]}" for metric in (*METRICS, *list_plugins("metrics"))]
    rows = {protocol: rankers[evaluation.MODEL] for protocol, rankers in table.items()}
    return {
        f"{protocol}_{name}": row[name] for protocol, row in rows.items() for name in names if name in row
    }


def _select_baselines(table: evaluation.Table, settings: Settings) -> dict[str, float]:
    """Each baseline's NDCG, and the model's NDCG minus it with its confidence interval, for MLflow."""
    metric, values = f"ndcg@{settings.evaluate.k[0]}", dict[str, float]()
    for protocol, rows in table.items():
        for name, row in rows.items():
            if name == evaluation.MODEL or metric not in row or "model_lead" not in row:
                continue
            prefix = f"baselines/{name.replace(',', '')}/{protocol}"
            values[f"{prefix}_{metric}"] = row[metric]
            for suffix in ("", "_low", "_high"):
                values[f"{prefix}_difference{suffix}"] = row[f"model_lead{suffix}"]
    return values


def report(context: JobContext, dataset: Dataset) -> StageReport:
    """Write the page about the nightly run: what was promoted and why, metrics, plots."""
    bundle = current_bundle(context, dataset)
    key, path, was_there = reporting.write_report(context.settings, dataset, bundle)
    folder = f"reports/{to_date(dataset.as_of_s)}-{key}"
    context.progress(f"report: {path / reporting.PAGE}")
    record = Record(bundle, dataset.as_of_s, {"folders": {folder: context.relative(str(path))}})
    outputs = {"report": str(path / reporting.PAGE)}
    return StageReport(key, outputs, is_new=not was_there, record=record)
