"""The report of a night: one HTML page that needs nothing else, the same in Markdown, and the figures as SVG.

A sealed directory. It holds no path and no time of the machine, so that the same night has the same report.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import MissingArtifactError
from recray.evaluation import plots
from recray.evaluation.evaluate import KIND as EVALUATION
from recray.evaluation.evaluate import MODEL, Table, evaluate_key, read_table
from recray.evaluation.statement import audited, audits, lines
from recray.evaluation.table import TITLES
from recray.release import Release, bundles
from recray.storage import Storage, is_sealed, key_of, read_json, sealed_directory
from recray.version import __version__

KIND = "report"
PAGE = "report.html"


def write(settings: Settings, dataset: Dataset, bundle: Bundle) -> tuple[str, Path, bool]:
    """Write the report of a dataset's night and its bundle; returns its run key, its folder and whether it was there.

    Raises MissingArtifactError if the night was not evaluated.
    """
    storage = Storage(settings.root())
    evaluated = evaluate_key(settings, dataset, bundle)
    if not is_sealed(storage.evaluation(evaluated), EVALUATION, evaluated):
        raise MissingArtifactError(f"bundle {bundle.key} was not evaluated on dataset {dataset.key}", "run `recray evaluate` first")
    release = Release.read(storage)
    decided, decision = _decision(storage, release, dataset, bundle)
    snapshot = _snapshot(storage, dataset)
    key = key_of("report", evaluated, decided, snapshot and snapshot["run_key"], release.champion and release.champion.digest, __version__)
    path = storage.report(key)
    if is_sealed(path, KIND, key):
        return key, path, True
    table, k = read_table(storage.evaluation(evaluated)), settings.evaluate.k[0]
    privacy = bundle.privacy if bundle.privacy["differential_privacy"] else None
    figures = _figures(table, bundle, k) + ([] if privacy is None else [_spent(storage, privacy)])
    facts = {
        "date": _date(dataset.as_of_s),
        "dataset": dataset.manifest,
        "bundle": bundle,
        "champion": release.champion and release.champion.run_key,
        "decision": decision,
        "below": bool(below := _below(table, k)),
        "looks": [*_meanwhile(snapshot), *below, *([] if privacy else dataset.manifest.get("notes", []))],
        "privacy": privacy,
        "privacy_lines": [*lines(privacy), audited(audits(storage.root, bundle.manifest["settings_key"]))] if privacy else [],
        "snapshot": snapshot,
        "settings": {setting: {"title": TITLES[setting], "rows": _rows(rows, k)} for setting, rows in table.items()},
        "headlines": _headlines(table, settings.evaluate.primary_setting, k),
        "k": k,
        "confidence": settings.evaluate.confidence,
        "figures": figures,
        "version": __version__,
    }
    pages = Environment(loader=PackageLoader("recray.evaluation"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    plain = pages.overlay(autoescape=False)
    with sealed_directory(path, KIND, key, {"dataset": dataset.key, "bundle": bundle.key}) as folder:
        (folder / PAGE).write_text(pages.get_template("report.html").render(facts))
        (folder / "report.md").write_text(plain.get_template("report.md").render(facts))
        for figure in figures:
            (folder / f"{figure['name']}.svg").write_text(figure["svg"])
    return key, path, False


def _figures(table: Table, bundle: Bundle, k: int) -> list[dict[str, str]]:
    drawn = [
        ("metrics", "Ranking quality", f"NDCG@{k} over the whole catalogue; whiskers: bootstrap interval over users.", plots.metric_bars(table, k)),
        ("segments", "For whom", "By length of the history and by whether training ever saw the target; users in brackets; beside the best baseline.",
         plots.segments(table, k)),
        ("breadth", "Breadth", "How much of the catalogue is shown, and how much of what is shown is popular anyway.", plots.breadth(table, k)),
    ]  # fmt: skip
    curve = bundle.metrics.get("curve")
    if curve:
        text = "Loss on the training histories and NDCG of the validation users, whose best epoch is kept."
        drawn.append(("curve", "Learning curve", text, plots.learning_curve(curve, bundle.metrics["best_epoch"], k)))
    return [dict(zip(("name", "title", "text", "svg"), figure, strict=True)) for figure in drawn]


def _spent(storage: Storage, privacy: dict[str, Any]) -> dict[str, str]:
    """What the trainings of a population spent, by the dates of the private bundles that are there."""
    statements = [(bundle.as_of_s, bundle.privacy) for bundle in map(Bundle.open, bundles(storage))]
    mine = [(as_of_s, said) for as_of_s, said in statements if said.get("population") == privacy["population"]]
    points = sorted((_date(as_of_s), said["epsilon_of_all_trainings"]) for as_of_s, said in mine if "epsilon_of_all_trainings" in said)
    text = "ε at the δ of the last training, of a user in all trainings of the population up to each bundle."
    return {"name": "spent", "title": "Privacy spent", "text": text, "svg": plots.spent(points, privacy.get("cap"))}


def _rows(rows: dict[str, Any], k: int) -> list[dict[str, Any]]:
    """A setting's table as text cells."""
    shown = []
    for name, row in rows.items():
        cells = ["–"] * 7
        if "skipped" not in row:
            cells = [f"{row[f'{metric}@{k}']:.4f}" for metric in ("hr", "ndcg", "mrr", "recall")]
            cells += [f"{row[f'{share}@{k}']:.1%}" for share in ("coverage", "popularity_share")]
            cells.append(f"{row['model_lead']:+.4f} [{row['model_lead_low']:+.4f}, {row['model_lead_high']:+.4f}]" if "model_lead" in row else "")
        shown.append({"name": name, "cells": cells, "mine": name == MODEL, "why": row.get("skipped", "")})
    return shown


def _headlines(table: Table, setting: str, k: int) -> list[dict[str, str]]:
    """The few figures that a person looks at first."""
    mine = table[setting][MODEL]
    if "skipped" in mine:
        return []
    best = plots.best_baseline(table[setting], k)
    lead = table[setting][best]
    interval = f"[{mine[f'ndcg@{k}_low']:.4f}, {mine[f'ndcg@{k}_high']:.4f}]"
    against = f"[{lead['model_lead_low']:+.4f}, {lead['model_lead_high']:+.4f}]"
    return [
        {"name": f"NDCG@{k}, {TITLES[setting]}", "value": f"{mine[f'ndcg@{k}']:.4f}", "note": interval, "look": ""},
        {"name": f"lead over {best}", "value": f"{lead['model_lead']:+.4f}", "note": against, "look": "look" if lead["model_lead"] < 0 else ""},
        {"name": f"hit rate@{k}", "value": f"{mine[f'hr@{k}']:.1%}", "note": f"of {mine['users']} test users", "look": ""},
        {"name": f"coverage@{k}", "value": f"{mine[f'coverage@{k}']:.1%}", "note": "of the catalogue", "look": ""},
    ]


def _meanwhile(snapshot: dict[str, Any] | None) -> list[str]:
    if snapshot is None or not snapshot.get("popular_only"):
        return []
    return ["no model was promoted yet: everybody gets the popular list (gates.first_run: fallback)"]


def _below(table: Table, k: int) -> list[str]:
    """The baselines whose NDCG is above the model's, in words."""
    found = []
    for setting, rows in table.items():
        for name, row in rows.items():
            if row.get("model_lead", 0.0) < 0:
                interval = f"[{row['model_lead_low']:+.4f}, {row['model_lead_high']:+.4f}]"
                how = "which is better" if row["model_lead_high"] < 0 else "which is not told apart from it"
                found.append(f"{TITLES[setting]}: NDCG@{k} is {row['model_lead']:+.4f} {interval} against {name}, {how}")
    return found


def _decision(storage: Storage, release: Release, dataset: Dataset, bundle: Bundle) -> tuple[str, dict[str, Any] | None]:
    """The promotion that decided about this bundle on this dataset."""
    found = []
    for path in sorted((storage.root / "promotions").glob("[!.]*/decision.json")):
        decision = read_json(path)
        if (decision["dataset"], decision["challenger"]) == (dataset.key, bundle.key):
            now = path.parent.name == release.decision or decision["champion"] == (release.champion and release.champion.run_key)
            found.append((now, path.parent.name, decision))
    if not found:
        return "", None
    _, key, decision = max(found, key=lambda entry: entry[:2])
    return key, decision


def _snapshot(storage: Storage, dataset: Dataset) -> dict[str, Any] | None:
    """The manifest of the published snapshot if it is of this dataset."""
    if not storage.latest.exists():
        return None
    manifest: dict[str, Any] = read_json(storage.root / read_json(storage.latest)["snapshot"] / "manifest.json")
    return manifest if manifest["dataset_digest"] == dataset.digest else None


def _date(as_of_s: int) -> str:
    return str(dt.datetime.fromtimestamp(as_of_s, dt.UTC).date())
