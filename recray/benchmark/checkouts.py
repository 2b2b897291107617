"""This code beside another checkout of recray: the same work by each, in turns and in processes of their own."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

from recray.benchmark.peers import cache
from recray.errors import SettingsError
from recray.stages import Say


def beside(other: Path, package: str, rounds: int, measure: Callable[[Path], dict[str, float]], unit: str, say: Say) -> dict[str, float]:
    """The ratio of each of this checkout's measures to the other's, `NAME_ratio`: the median of the rounds, the lowest and the highest. `NAME_here`
    is the median of this one's. A measure without a name has no prefix.

    One round before them fills caches and counts for nothing. Raises SettingsError where the other folder has no such package of recray.
    """
    ours = Path(__file__).resolve().parents[2]
    if not (other / "recray" / package).is_dir():
        raise SettingsError(f"--against {other}: no checkout of recray", "git worktree add FOLDER COMMIT makes one")
    measured: list[tuple[dict[str, float], dict[str, float]]] = []
    for turn in range(-1, rounds):
        order = (other, ours) if turn % 2 else (ours, other)
        by = {checkout: measure(checkout) for checkout in order}
        if turn >= 0:
            measured.append((by[ours], by[other]))
            ratios = {name: here / by[other][name] for name, here in by[ours].items()}
            shown = [f"{name} {by[ours][name]:.4g} {unit} here, {by[other][name]:.4g} there: ratio {ratio:.3f}" for name, ratio in ratios.items()]
            say(f"round {turn + 1}: {'; '.join(shown)}")
    figures: dict[str, float] = {}
    for name in measured[0][0]:
        by_round, prefix = [here[name] / there[name] for here, there in measured], f"{name}_" if name else ""
        figures |= {f"{prefix}ratio": statistics.median(by_round), f"{prefix}lowest": min(by_round), f"{prefix}highest": max(by_round)}
        figures[f"{prefix}here"] = statistics.median(here[name] for here, _ in measured)
    return {name: round(value, 4) for name, value in figures.items()}


def environment_of(checkout: Path) -> dict[str, str]:
    """The environment of a process that runs a checkout's code; neither checkout has to compile anew what it imports, and neither is written to."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPATH": str(checkout.resolve()), "PYTHONPYCACHEPREFIX": str(cache().parent / "bytecode")}
