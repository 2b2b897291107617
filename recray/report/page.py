"""The report of a nightly run: a self-contained HTML page, the same in Markdown, and the plots as SVG.

An immutable artifact. It holds no path and no wall-clock time, so the same run always has the same report.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Environment, PackageLoader, StrictUndefined

from recray.bundle import Bundle, PrivacyStatement
from recray.config import Settings
from recray.config.formats import RESULTS_SINCE
from recray.dataset.reader import Dataset
from recray.errors import MissingArtifactError
from recray.evaluation.evaluate import KIND as EVALUATION
from recray.evaluation.evaluate import MODEL, Row, Table, evaluate_key, read_table
from recray.evaluation.promotion import Decision
from recray.evaluation.statement import Line, describe_audits, describe_training, load_audits
from recray.evaluation.table import TITLES, format_cells
from recray.release import Published, Release, list_bundles
from recray.report import plots
from recray.report.drift import compare_inputs
from recray.report.runs import Run, find_previous_as_of, list_runs, sample_invalid_rows, sample_lists
from recray.snapshot.reader import Snapshot
from recray.storage import Storage, immutable_directory, is_complete, key_of, read_json
from recray.version import __version__

KIND = "report"
LAYOUT = 2  # raised when reports show something else
PAGE = "report.html"
CELLS = 7  # of a row


def write_report(settings: Settings, dataset: Dataset, bundle: Bundle) -> tuple[str, Path, bool]:
    """Write the report of a dataset and its bundle; return its run key, its folder and whether it existed.

    Raises MissingArtifactError if the bundle was not evaluated.
    """
    storage = Storage(settings.root())
    evaluation_key = evaluate_key(settings, dataset, bundle)
    if not is_complete(storage.evaluation(evaluation_key), EVALUATION, evaluation_key):
        raise MissingArtifactError(
            f"bundle {bundle.key} was not evaluated on dataset {dataset.key}", "run `recray evaluate` first"
        )
    release = Release.read(storage)
    decision_key, decision = _find_decision(storage, release, dataset, bundle)
    snapshot = Published.read(storage)
    if snapshot is not None and snapshot.dataset_digest != dataset.digest:
        snapshot = None  # it is of another dataset
    runs = list_runs(storage, settings.evaluate.protocol, settings.evaluate.k[0], dataset.as_of_s)
    previous_as_of_s = find_previous_as_of(storage, dataset)
    key = key_of(
        "report",
        evaluation_key,
        decision_key,
        snapshot and snapshot.run_key,
        release.champion and release.champion.digest,
        [vars(run) for run in runs],
        previous_as_of_s,
        LAYOUT,
        RESULTS_SINCE,
    )
    path = storage.report(key)
    if is_complete(path, KIND, key):
        return key, path, True

    table, k = read_table(storage.evaluation(evaluation_key)), settings.evaluate.k[0]
    privacy = bundle.privacy if bundle.privacy["differential_privacy"] else None
    figures = _draw_figures(table, bundle, k)
    if len(runs) > 1:
        figures.append(_draw_runs(runs, k, is_private=privacy is not None))
    if privacy is not None:
        figures.append(_draw_privacy_spent(storage, privacy))
    better_baselines = describe_better_baselines(table, k)
    facts = {
        "date": _to_date(dataset.as_of_s),
        "dataset": dataset.manifest,
        "bundle": bundle,
        "champion": release.champion and release.champion.run_key,
        "decision": decision,
        "is_below_baseline": bool(better_baselines),
        "notices": [
            *_describe_fallback(snapshot),
            *better_baselines,
            *([] if privacy else dataset.manifest.get("notes", [])),
        ],
        "privacy": privacy,
        "privacy_lines": _privacy_lines(storage, bundle) if privacy else [],
        "snapshot": snapshot and snapshot.manifest,
        "samples": []
        if snapshot is None
        else sample_lists(
            Snapshot(storage.read_latest()[0], dict(snapshot.manifest)),
            dataset,
            holdout_only=privacy is not None,
        ),
        "inputs": None
        if previous_as_of_s is None
        else compare_inputs(dataset, previous_as_of_s, holdout_only=privacy is not None),
        "invalid_rows": [] if privacy else _describe_invalid_rows(storage, dataset),
        "segments": _to_segments(table),
        "to_date": _to_date,
        "protocols": {
            protocol: {"title": TITLES[protocol], "rows": _to_rows(rows, k)}
            for protocol, rows in table.items()
        },
        "headlines": _headlines(table, settings.evaluate.protocol, k),
        "k": k,
        "confidence": settings.evaluate.confidence,
        "figures": figures,
        "version": __version__,
    }
    _write_pages(path, key, dataset, bundle, facts)
    return key, path, False


def _write_pages(path: Path, key: str, dataset: Dataset, bundle: Bundle, facts: Mapping[str, Any]) -> None:
    html = Environment(
        loader=PackageLoader("recray.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    markdown = html.overlay(autoescape=False)
    with immutable_directory(path, KIND, key, {"dataset": dataset.key, "bundle": bundle.key}) as folder:
        (folder / PAGE).write_text(html.get_template("report.html").render(facts))
        (folder / "report.md").write_text(markdown.get_template("report.md").render(facts))
        for figure in facts["figures"]:
            (folder / f"{figure['name']}.svg").write_text(figure["svg"])


def _privacy_lines(storage: Storage, bundle: Bundle) -> list[Line]:
    audits = load_audits(storage.root, bundle.manifest["settings_key"])
    return [*describe_training(bundle.privacy), describe_audits(audits)]


def _draw_figures(table: Table, bundle: Bundle, k: int) -> list[dict[str, str]]:
    drawn = [
        ("metrics", "Ranking quality", f"NDCG@{k} over the whole catalogue. Whiskers: bootstrap interval "
                                       "over users.", plots.plot_metrics(table, k)),
        ("segments", "Segments", "By length of the history, and for warm targets (seen in training) and cold "
                                 "ones, beside the best baseline. Number of users in brackets.",
         plots.plot_segments(table, k)),
        ("breadth", "Catalogue coverage", "Share of the catalogue that is shown, and share of the shown "
                                          "items that belong to the top 10 % by popularity.",
         plots.plot_coverage(table, k)),
    ]  # fmt: skip
    curve = bundle.metrics.get("curve")
    if curve:
        text = "Loss on the training histories and NDCG of the validation users. The best epoch is kept."
        svg = plots.plot_learning_curve(curve, bundle.metrics["best_epoch"], k)
        drawn.append(("curve", "Learning curve", text, svg))
    return [dict(zip(("name", "title", "text", "svg"), figure, strict=True)) for figure in drawn]


def _draw_runs(runs: list[Run], k: int, *, is_private: bool) -> dict[str, str]:
    text = "Published runs: NDCG of the test users and share of the catalogue that lists show"
    text += "." if is_private else "; events and users of the data set."
    svg = plots.plot_runs(runs, k, with_volume=not is_private)
    return {"name": "runs", "title": "Runs", "text": text, "svg": svg}


def _describe_invalid_rows(storage: Storage, dataset: Dataset) -> list[dict[str, Any]]:
    """Invalid rows by reason, the most frequent first, each with an example."""
    reasons = dataset.manifest.get("reasons", {})
    examples = sample_invalid_rows(storage.quarantine(dataset.key)) if reasons else {}
    return [
        {"reason": reason, "count": count, "example": examples.get(reason, "")}
        for reason, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


def _to_segments(table: Table) -> list[dict[str, Any]]:
    """NDCG of the model by segment of users and targets, for each protocol."""
    shown = []
    for protocol, rows in table.items():
        segments = rows[MODEL].get("segments", {})
        for name, segment in segments.items():
            if segment["users"]:
                shown.append({"protocol": TITLES[protocol], "name": name, **segment})
    return shown


def _draw_privacy_spent(storage: Storage, privacy: PrivacyStatement) -> dict[str, str]:
    """The ε spent by the trainings of a population, by the dates of its private bundles."""
    statements = [(bundle.as_of_s, bundle.privacy) for bundle in map(Bundle.open, list_bundles(storage))]
    points = sorted(
        (_to_date(as_of_s), statement["epsilon_of_all_trainings"])
        for as_of_s, statement in statements
        if statement.get("population") == privacy["population"] and "epsilon_of_all_trainings" in statement
    )
    return {
        "name": "spent",
        "title": "Privacy spent",
        "text": "Total ε of a user in all trainings of the population up to each bundle, at the last δ.",
        "svg": plots.plot_privacy_spent(points, privacy.get("cap")),
    }


class _ShownRow(TypedDict):
    """A row of a table as text cells. `reason`: why its ranker was skipped, empty if it was not."""

    name: str
    cells: list[str]
    is_model: bool
    reason: str


def _to_rows(rows: dict[str, Row], k: int) -> list[_ShownRow]:
    """The table of a protocol as text cells."""
    shown: list[_ShownRow] = []
    for name, row in rows.items():
        cells = format_cells(row, k)
        cells += [""] * (CELLS - len(cells))  # the model has no difference to itself
        reason = row.get("skipped", "")
        shown.append({"name": name, "cells": cells, "is_model": name == MODEL, "reason": reason})
    return shown


def _headlines(table: Table, protocol: str, k: int) -> list[dict[str, str]]:
    """The figures at the top of the report."""
    row = table[protocol][MODEL]
    if "skipped" in row:
        return []
    best = plots.find_best_baseline(table[protocol], k)
    baseline_row = table[protocol][best]
    difference = baseline_row["model_lead"]
    return [
        {
            "name": f"NDCG@{k}, {TITLES[protocol]}",
            "value": f"{row[f'ndcg@{k}']:.4f}",
            "note": f"[{row[f'ndcg@{k}_low']:.4f}, {row[f'ndcg@{k}_high']:.4f}]",
            "style": "",
        },
        {
            "name": f"paired difference to {best}",
            "value": f"{difference:+.4f}",
            "note": f"[{baseline_row['model_lead_low']:+.4f}, {baseline_row['model_lead_high']:+.4f}]",
            "style": "notice" if difference < 0 else "",
        },
        {
            "name": f"hit rate@{k}",
            "value": f"{row[f'hr@{k}']:.1%}",
            "note": f"of {row['users']} test users",
            "style": "",
        },
        {
            "name": f"coverage@{k}",
            "value": f"{row[f'coverage@{k}']:.1%}",
            "note": "of the catalogue",
            "style": "",
        },
    ]


def _describe_fallback(snapshot: Published | None) -> list[str]:
    if snapshot is None or not snapshot.popular_only:
        return []
    return [
        "no model was promoted yet: everybody gets the popularity fallback (promotion.first_run: fallback)"
    ]


def describe_better_baselines(table: Table, k: int) -> list[str]:
    """The baselines whose NDCG is above the model's, as text."""
    texts = []
    for protocol, rows in table.items():
        for name, row in rows.items():
            if row.get("model_lead", 0.0) < 0:
                interval = f"[{row['model_lead_low']:+.4f}, {row['model_lead_high']:+.4f}]"
                is_significant = row["model_lead_high"] < 0
                verdict = "which is significantly better" if is_significant else "not significant"
                texts.append(
                    f"{TITLES[protocol]}: NDCG@{k} is {row['model_lead']:+.4f} {interval} against {name}, "
                    f"{verdict}"
                )
    return texts


def _find_decision(
    storage: Storage, release: Release, dataset: Dataset, bundle: Bundle
) -> tuple[str, Decision | None]:
    """Run key and content of the promotion of this bundle on this dataset, preferring the current one; "" and
    None without one.
    """
    decisions = []
    for path in sorted((storage.root / "promotions").glob("[!.]*/decision.json")):
        decision = read_json(path)
        if (decision["dataset"], decision["challenger"]) == (dataset.key, bundle.key):
            is_current = path.parent.name == release.decision or decision["champion"] == (
                release.champion and release.champion.run_key
            )
            decisions.append((is_current, path.parent.name, decision))
    if not decisions:
        return "", None
    _, key, decision = max(decisions, key=lambda entry: entry[:2])
    return key, decision


def _to_date(as_of_s: int) -> str:
    return str(dt.datetime.fromtimestamp(as_of_s, dt.UTC).date())
