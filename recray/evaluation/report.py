"""The evaluation as a table for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table as RichTable

from recray.evaluation.evaluate import MODEL, Table

TITLES = {"repeats": "repeats allowed", "new_only": "new items only"}


def render(table: Table, k: int) -> RichTable:
    """Model and baselines in both settings at `k`; the lead is the model's paired NDCG difference with its interval."""
    users = ", ".join(f"{rows[MODEL]['users']} ({TITLES[setting]})" for setting, rows in table.items())
    out = RichTable(title=f"test users: {users}", title_justify="left")
    out.add_column("setting")
    out.add_column("ranker")
    for name in ("HR", "NDCG", "MRR", "Recall"):
        out.add_column(f"{name}@{k}", justify="right")
    out.add_column("coverage", justify="right")
    out.add_column("popular share", justify="right")
    out.add_column("recray's NDCG lead", justify="right")
    for setting, rows in table.items():
        for name, row in rows.items():
            out.add_row(TITLES[setting], name, *_cells(row, k), style="bold" if name == MODEL else None)
        out.add_section()
    return out


def _cells(row: dict[str, Any], k: int) -> list[str]:
    if "skipped" in row:
        return [f"skipped: {row['skipped']}"]
    shown = [f"{row[f'{metric}@{k}']:.4f}" for metric in ("hr", "ndcg", "mrr", "recall")]
    shown += [f"{row[f'{name}@{k}']:.1%}" for name in ("coverage", "popularity_share")]
    if "model_lead" in row:
        shown.append(f"{row['model_lead']:+.4f} [{row['model_lead_low']:+.4f}, {row['model_lead_high']:+.4f}]")
    return shown
