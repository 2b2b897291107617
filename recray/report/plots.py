"""The plots of a report, as SVG text. The same numbers give the same text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter

from recray.bundle import CurveLine
from recray.evaluation.evaluate import MODEL, SEGMENTS, Row, Table
from recray.evaluation.table import TITLES
from recray.report.runs import Run

BLUE, GREY, FAINT, INK = "#2456d6", "#9aa5b8", "#d9dee8", "#273043"
STYLE: Any = {
    "svg.hashsalt": "recray",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff5",
}


def plot_learning_curve(curve: list[CurveLine], best_epoch: int, k: int) -> str:
    """Loss and validation NDCG by epoch, with the selected epoch marked."""

    def draw(figure: Figure) -> None:
        left = figure.subplots()
        epochs = [line["epoch"] for line in curve]
        if all("loss" in line for line in curve):  # a private training has none
            left.plot(
                epochs,
                [line["loss"] for line in curve],
                color=GREY,
                marker="o",
                markersize=3,
                label="training loss",
            )
        left.set(xlabel="epoch", ylabel="training loss")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        right = left.twinx()
        right.grid(False)
        right.plot(
            epochs,
            [line["validation_ndcg"] for line in curve],
            color=BLUE,
            marker="o",
            markersize=3,
            label=f"validation NDCG@{k}",
        )
        right.set_ylabel(f"validation NDCG@{k}", color=BLUE)
        right.axvline(best_epoch, color=BLUE, linewidth=1, linestyle=":")
        alignment = "right" if 2 * best_epoch > len(curve) else "left"
        right.annotate(
            f" kept: epoch {best_epoch} ",
            (best_epoch, 0.04),
            xycoords=("data", "axes fraction"),
            color=BLUE,
            ha=alignment,
        )

    return _svg(draw, 9.2, 3.2)


def plot_privacy_spent(points: list[tuple[str, float]], cap: float | None) -> str:
    """Total ε of all trainings by the date of each private bundle, ascending, with the cap."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.step(
            range(len(points)),
            [epsilon for _, epsilon in points],
            where="post",
            color=BLUE,
            marker="o",
            markersize=4,
        )
        if cap is not None:
            axes.axhline(cap, color=INK, linewidth=1, linestyle=":")
            axes.annotate(f" cap {cap:g}", (0, cap), xycoords=("axes fraction", "data"), va="bottom")
        shown = sorted({0, len(points) // 2, len(points) - 1})
        axes.set_xticks(shown, [points[row][0] for row in shown])
        axes.set(
            ylabel="total ε of a user",
            ylim=(0, 1.15 * max(cap or 0.0, max(epsilon for _, epsilon in points))),
        )

    return _svg(draw, 9.2, 2.6)


def plot_utility(
    ndcg: dict[str, float], epsilons: list[float], trainings: Sequence[int], spent: dict[str, list[float]]
) -> str:
    """NDCG by ε, and total ε by the number of trainings.

    ndcg : by "method, ε 8" and "method, not private", which is drawn as a horizontal line
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        methods = list(dict.fromkeys(name.partition(", ")[0] for name in ndcg))
        colours = dict(zip(methods, (BLUE, "#12a594", "#e5484d", GREY), strict=False))
        for method in methods:
            left.plot(
                epsilons,
                [ndcg[f"{method}, ε {e:g}"] for e in epsilons],
                color=colours[method],
                marker="o",
                markersize=4,
                label=method,
            )
            if (reference := ndcg.get(f"{method}, not private")) is not None:
                left.axhline(reference, color=colours[method], linewidth=1, linestyle=":")
        left.set(
            xlabel="ε of one training (dotted: not private)", ylabel="NDCG@10", xscale="log", ylim=(0, None)
        )
        left.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        left.xaxis.set_minor_locator(NullLocator())
        left.legend(frameon=False)
        for name, values in spent.items():
            right.plot(trainings, values, marker="o", markersize=4, label=name)
        right.set(xlabel="trainings of all users", ylabel="total ε")
        right.legend(frameon=False)

    return _svg(draw, 9.2, 3.6)


def plot_metrics(table: Table, k: int) -> str:
    """NDCG of model and baselines with confidence intervals, one panel for each protocol."""

    def draw(figure: Figure) -> None:
        for axes, (protocol, rows) in zip(
            figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True
        ):
            shown = [(name, row) for name, row in rows.items() if "skipped" not in row][::-1]
            for position, (name, row) in enumerate(shown):
                value = row[f"ndcg@{k}"]
                error = [[value - row[f"ndcg@{k}_low"]], [row[f"ndcg@{k}_high"] - value]]
                axes.barh(
                    position,
                    value,
                    height=0.62,
                    color=BLUE if name == MODEL else GREY,
                    xerr=error,
                    ecolor=INK,
                    capsize=2,
                )
                axes.annotate(
                    f"{value:.4f}",
                    (row[f"ndcg@{k}_high"], position),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
            axes.set_yticks(range(len(shown)), [name for name, _ in shown])
            axes.set(title=TITLES[protocol], xlabel=f"NDCG@{k}")
            axes.margins(x=0.22)
            axes.grid(axis="y", visible=False)

    return _svg(draw, 9.2, 3.2)


def plot_segments(table: Table, k: int) -> str:
    """NDCG by history length and for warm and cold targets, beside the best baseline of the protocol."""

    def draw(figure: Figure) -> None:
        for axes, (protocol, rows) in zip(
            figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True
        ):
            axes.set_title(TITLES[protocol])
            if "skipped" in rows[MODEL]:
                continue
            best = find_best_baseline(rows, k)
            names = [name for name in SEGMENTS if rows[MODEL]["segments"][name]["users"]]
            _plot_grouped_bars(axes, names, rows, best)
            axes.set_ylabel(f"NDCG@{k}")
            axes.margins(y=0.3)

    return _svg(draw, 9.2, 3.4)


def plot_coverage(table: Table, k: int) -> str:
    """Catalogue coverage and share of the top 10 % items, by ranker."""

    def draw(figure: Figure) -> None:
        for axes, (protocol, rows) in zip(
            figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True
        ):
            shown = [(name, row) for name, row in rows.items() if "skipped" not in row][::-1]
            for offset, metric, colour, label in (
                (0.19, f"coverage@{k}", BLUE, f"catalogue coverage@{k}"),
                (-0.19, f"popularity_share@{k}", GREY, "share of the top 10 % items"),
            ):
                positions = [position + offset for position in range(len(shown))]
                axes.barh(
                    positions, [row[metric] for _, row in shown], height=0.36, color=colour, label=label
                )
            axes.set_yticks(range(len(shown)), [name for name, _ in shown])
            axes.set(title=TITLES[protocol], xlim=(0, 1))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(axis="y", visible=False)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
        )

    return _svg(draw, 9.2, 3.4)


def plot_runs(runs: Sequence[Run], k: int, *, with_volume: bool) -> str:
    """NDCG and catalogue coverage of the published runs, and the events and users behind them."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 1 + with_volume, squeeze=False)[0]
        series = [(panels[0], "ndcg", f"NDCG@{k}", BLUE), (panels[0], "coverage", "coverage@10", GREY)]
        if with_volume:
            series += [(panels[1], "events", "events", BLUE), (panels[1], "users", "users", GREY)]
        for axes, name, label, colour in series:
            points = [
                (row, value) for row, run in enumerate(runs) if (value := getattr(run, name)) is not None
            ]
            axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour, marker="o",
                      markersize=3, label=label)  # fmt: skip
        for axes in panels:
            shown = sorted({0, (len(runs) - 1) // 2, len(runs) - 1})
            axes.set_xticks(shown, [runs[row].date for row in shown])
            axes.set_ylim(0, None)
            axes.legend(frameon=False, fontsize=9)
        if with_volume:
            panels[1].yaxis.set_major_formatter(EngFormatter())

    return _svg(draw, 9.2, 2.8)


def plot_growth(trained: list[tuple[int, float]], scored: list[tuple[int, float]]) -> str:
    """Seconds by size of training (events) and of scoring (users), beside the line from zero to the largest
    size.
    """

    def draw(figure: Figure) -> None:
        for axes, points, label, unit in zip(
            figure.subplots(1, 2),
            (trained, scored),
            ("seconds of a training epoch", "seconds of the scores of all"),
            ("events", "users"),
            strict=True,
        ):
            sizes, seconds = zip(*points, strict=True)
            axes.plot([0, sizes[-1]], [0, seconds[-1]], color=GREY, linestyle=":", label="linear")
            axes.plot(sizes, seconds, color=BLUE, marker="o", label=label)
            axes.set(xlabel=unit, ylabel="seconds", xlim=(0, None), ylim=(0, None))
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.legend(frameon=False, fontsize=9)

    return _svg(draw, 9.2, 3.2)


def plot_gap_closed(
    closed: dict[str, list[float]], length: np.ndarray, best: np.ndarray, learned: np.ndarray
) -> str:
    """Share of the oracle's gain by method, with a dot for each seed; and the action of the oracle and of the
    learned policy by log(1 + history length).
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        names = sorted(closed, key=lambda name: sum(closed[name]) / len(closed[name]))
        left.barh(
            names,
            [sum(closed[name]) / len(closed[name]) for name in names],
            color=[BLUE if name == "ppo" else GREY for name in names],
        )
        for position, name in enumerate(names):
            left.plot(closed[name], [position] * len(closed[name]), ".", color=INK, markersize=3)
        left.set(title="share of the oracle's gain over the trained model")
        left.xaxis.set_major_formatter(PercentFormatter(1))
        left.grid(axis="y", visible=False)
        right.plot(length, best, ".", color=GREY, markersize=3, label="oracle")
        right.plot(length, learned, ".", color=BLUE, markersize=3, label="learned")
        right.set(title="action on the temperature", xlabel="log(1 + events of the user)")
        right.legend(frameon=False, fontsize=9, markerscale=3)

    return _svg(draw, 10.2, 3.4)


def find_best_baseline(rows: dict[str, Row], k: int) -> str:
    """Name of the baseline with the highest NDCG."""
    return max(
        (name for name, row in rows.items() if name != MODEL and "skipped" not in row),
        key=lambda name: rows[name][f"ndcg@{k}"],
    )


def _plot_grouped_bars(axes: Axes, names: list[str], rows: dict[str, Row], best: str) -> None:
    for offset, ranker, colour in ((-0.2, MODEL, BLUE), (0.2, best, GREY)):
        values = [rows[ranker]["segments"][name]["ndcg"] or 0.0 for name in names]
        axes.bar(
            [position + offset for position in range(len(names))],
            values,
            width=0.38,
            color=colour,
            label=ranker,
        )
    labels = [
        f"{name.replace(' ', chr(10), 1)}\n({rows[MODEL]['segments'][name]['users']})" for name in names
    ]
    axes.set_xticks(range(len(names)), labels, fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, fontsize=9)


def _svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True
        )
    return out.getvalue()[out.getvalue().index("<svg") :]
