"""The figures of a report, as SVG text that is the same for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter

from recray.evaluation.evaluate import MODEL, SEGMENTS, Table
from recray.evaluation.table import TITLES

MINE, OTHER, FAINT, INK = "#2456d6", "#9aa5b8", "#d9dee8", "#273043"
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


def learning_curve(curve: list[dict[str, float]], best_epoch: int, k: int) -> str:
    """Loss and validation NDCG by epoch, the epoch that was kept marked."""

    def draw(figure: Figure) -> None:
        left = figure.subplots()
        epochs = [line["epoch"] for line in curve]
        if all("loss" in line for line in curve):  # of a private training it is not known
            left.plot(epochs, [line["loss"] for line in curve], color=OTHER, marker="o", markersize=3, label="training loss")
        left.set(xlabel="epoch", ylabel="training loss")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        right = left.twinx()
        right.grid(False)
        right.plot(epochs, [line["validation_ndcg"] for line in curve], color=MINE, marker="o", markersize=3, label=f"validation NDCG@{k}")
        right.set_ylabel(f"validation NDCG@{k}", color=MINE)
        right.axvline(best_epoch, color=MINE, linewidth=1, linestyle=":")
        side = "right" if 2 * best_epoch > len(curve) else "left"
        right.annotate(f" kept: epoch {best_epoch} ", (best_epoch, 0.04), xycoords=("data", "axes fraction"), color=MINE, ha=side)

    return _svg(draw, 9.2, 3.2)


def spent(points: list[tuple[str, float]], cap: float | None) -> str:
    """ε of all trainings together by the date of each private bundle, ascending, below the cap."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.step(range(len(points)), [epsilon for _, epsilon in points], where="post", color=MINE, marker="o", markersize=4)
        if cap is not None:
            axes.axhline(cap, color=INK, linewidth=1, linestyle=":")
            axes.annotate(f" cap {cap:g}", (0, cap), xycoords=("axes fraction", "data"), va="bottom")
        shown = sorted({0, len(points) // 2, len(points) - 1})
        axes.set_xticks(shown, [points[place][0] for place in shown])
        axes.set(ylabel="ε spent of a user in all", ylim=(0, 1.15 * max(cap or 0.0, max(epsilon for _, epsilon in points))))

    return _svg(draw, 9.2, 2.6)


def utility(ndcg: dict[str, float], epsilons: list[float], nights: Sequence[int], spent: dict[str, list[float]]) -> str:
    """NDCG by ε (keys "method, ε 8" and "method, not private", the last drawn as a line across), and ε by nights."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        methods = list(dict.fromkeys(name.partition(", ")[0] for name in ndcg))
        colours = dict(zip(methods, (MINE, "#12a594", "#e5484d", OTHER), strict=False))
        for method in methods:
            left.plot(epsilons, [ndcg[f"{method}, ε {e:g}"] for e in epsilons], color=colours[method], marker="o", markersize=4, label=method)
            if (alone := ndcg.get(f"{method}, not private")) is not None:
                left.axhline(alone, color=colours[method], linewidth=1, linestyle=":")
        left.set(xlabel="ε of one training (dotted: not private)", ylabel="NDCG@10", xscale="log", ylim=(0, None))
        left.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        left.xaxis.set_minor_locator(NullLocator())
        left.legend(frameon=False)
        for name, values in spent.items():
            right.plot(nights, values, marker="o", markersize=4, label=name)
        right.set(xlabel="nights with a training of all users", ylabel="ε of all of them")
        right.legend(frameon=False)

    return _svg(draw, 9.2, 3.6)


def metric_bars(table: Table, k: int) -> str:
    """NDCG of model and baselines with their intervals, a panel a setting."""

    def draw(figure: Figure) -> None:
        for axes, (setting, rows) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
            shown = [(name, row) for name, row in rows.items() if "skipped" not in row][::-1]
            for place, (name, row) in enumerate(shown):
                value = row[f"ndcg@{k}"]
                error = [[value - row[f"ndcg@{k}_low"]], [row[f"ndcg@{k}_high"] - value]]
                axes.barh(place, value, height=0.62, color=MINE if name == MODEL else OTHER, xerr=error, ecolor=INK, capsize=2)
                axes.annotate(f"{value:.4f}", (row[f"ndcg@{k}_high"], place), (6, 0), textcoords="offset points", va="center", fontsize=9)
            axes.set_yticks(range(len(shown)), [name for name, _ in shown])
            axes.set(title=TITLES[setting], xlabel=f"NDCG@{k}")
            axes.margins(x=0.22)
            axes.grid(axis="y", visible=False)

    return _svg(draw, 9.2, 3.2)


def segments(table: Table, k: int) -> str:
    """NDCG by history length and by whether training saw the target, beside the best baseline of the setting."""

    def draw(figure: Figure) -> None:
        for axes, (setting, rows) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
            axes.set_title(TITLES[setting])
            if "skipped" in rows[MODEL]:
                continue
            best = best_baseline(rows, k)
            names = [name for name in SEGMENTS if rows[MODEL]["segments"][name]["users"]]
            _grouped(axes, names, rows, best)
            axes.set_ylabel(f"NDCG@{k}")
            axes.margins(y=0.3)

    return _svg(draw, 9.2, 3.4)


def breadth(table: Table, k: int) -> str:
    """Share of the catalogue shown, and share of places that go to the most popular tenth, by ranker."""

    def draw(figure: Figure) -> None:
        for axes, (setting, rows) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
            shown = [(name, row) for name, row in rows.items() if "skipped" not in row][::-1]
            for offset, figure_of, colour, label in (
                (0.19, f"coverage@{k}", MINE, f"catalogue shown @{k}"),
                (-0.19, f"popularity_share@{k}", OTHER, "places of the most popular tenth"),
            ):
                places = [place + offset for place in range(len(shown))]
                axes.barh(places, [row[figure_of] for _, row in shown], height=0.36, color=colour, label=label)
            axes.set_yticks(range(len(shown)), [name for name, _ in shown])
            axes.set(title=TITLES[setting], xlim=(0, 1))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(axis="y", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)

    return _svg(draw, 9.2, 3.4)


def growth(trained: list[tuple[int, float]], scored: list[tuple[int, float]]) -> str:
    """Seconds by size, a panel for training (events) and for scoring (users), beside the line through the largest size and zero."""

    def draw(figure: Figure) -> None:
        for axes, points, what, of in zip(
            figure.subplots(1, 2), (trained, scored), ("training epoch", "scores of all"), ("events", "users"), strict=True
        ):
            sizes, seconds = zip(*points, strict=True)
            axes.plot([0, sizes[-1]], [0, seconds[-1]], color=OTHER, linestyle=":", label="linear")
            axes.plot(sizes, seconds, color=MINE, marker="o", label=f"seconds of a {what}" if of == "events" else f"seconds of the {what}")
            axes.set(xlabel=of, ylabel="seconds", xlim=(0, None), ylim=(0, None))
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.legend(frameon=False, fontsize=9)

    return _svg(draw, 9.2, 3.2)


def gap_closed(closed: dict[str, list[float]], length: np.ndarray, best: np.ndarray, learned: np.ndarray) -> str:
    """Share of the oracle's lead by way, each seed a dot; and the oracle's and the learned action by log(1 + history length)."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        names = sorted(closed, key=lambda name: sum(closed[name]) / len(closed[name]))
        left.barh(names, [sum(closed[name]) / len(closed[name]) for name in names], color=[MINE if name == "ppo" else OTHER for name in names])
        for place, name in enumerate(names):
            left.plot(closed[name], [place] * len(closed[name]), ".", color=INK, markersize=3)
        left.set(title="share of the oracle's lead over the trained model")
        left.xaxis.set_major_formatter(PercentFormatter(1))
        left.grid(axis="y", visible=False)
        right.plot(length, best, ".", color=OTHER, markersize=3, label="oracle")
        right.plot(length, learned, ".", color=MINE, markersize=3, label="learned")
        right.set(title="action on the temperature", xlabel="log(1 + events of the user)")
        right.legend(frameon=False, fontsize=9, markerscale=3)

    return _svg(draw, 10.2, 3.4)


def best_baseline(rows: dict[str, Any], k: int) -> str:
    """The baseline of highest NDCG."""
    return max((name for name, row in rows.items() if name != MODEL and "skipped" not in row), key=lambda name: rows[name][f"ndcg@{k}"])


def _grouped(axes: Axes, names: list[str], rows: dict[str, Any], best: str) -> None:
    for offset, ranker, colour in ((-0.2, MODEL, MINE), (0.2, best, OTHER)):
        values = [rows[ranker]["segments"][name]["ndcg"] or 0.0 for name in names]
        axes.bar([place + offset for place in range(len(names))], values, width=0.38, color=colour, label=ranker)
    labels = [f"{name.replace(' ', chr(10), 1)}\n({rows[MODEL]['segments'][name]['users']})" for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, fontsize=9)


def _svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True)
    return out.getvalue()[out.getvalue().index("<svg") :]
