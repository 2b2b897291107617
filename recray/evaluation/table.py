"""The evaluation as a table for the terminal."""

from __future__ import annotations

from rich.table import Table as RichTable

from recray.evaluation.evaluate import MODEL, Row, Table

TITLES = {"with_repeats": "without seen-item filter", "filter_seen": "with seen-item filter"}


def render_table(table: Table, k: int) -> RichTable:
    """Model and baselines under both protocols at `k`, with the model's paired NDCG difference to each."""
    out = RichTable(
        caption="recray minus row: NDCG of the same users, with its 95 % bootstrap interval",
        caption_justify="left",
    )
    out.add_column("")
    for name in (f"HR@{k}", f"NDCG@{k}", f"MRR@{k}", f"Recall@{k}", "coverage", "top 10 %"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("recray minus row", justify="right", no_wrap=True)
    for protocol, rows in table.items():
        users = f"{rows[MODEL].get('users', 0)} users" + " with unseen targets" * (protocol == "filter_seen")
        out.add_row(f"{TITLES[protocol]}, {users}", style="italic")
        for name, row in rows.items():
            out.add_row(f"  {name}", *format_cells(row, k), style="bold" if name == MODEL else None)
        out.add_section()
    for reason in sorted(
        {
            f"{name}: skipped, {row['skipped']}"
            for rows in table.values()
            for name, row in rows.items()
            if "skipped" in row
        }
    ):
        out.caption = f"{out.caption}\n{reason}"
    return out


def format_cells(row: Row, k: int) -> list[str]:
    """Metrics of a row, and the paired difference if the row has one; dashes for a skipped row."""
    if "skipped" in row:
        return ["–"] * 7
    shown = [f"{row[f'{metric}@{k}']:.4f}" for metric in ("hr", "ndcg", "mrr", "recall")]
    shown += [f"{row[f'{name}@{k}']:.1%}" for name in ("coverage", "popularity_share")]
    if "model_lead" in row:
        shown.append(
            f"{row['model_lead']:+.4f} [{row['model_lead_low']:+.4f}, {row['model_lead_high']:+.4f}]"
        )
    return shown
