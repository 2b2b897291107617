"""This code beside another checkout of recray: the same work by each, in turns and in processes of their own."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

from recray.benchmark.peers import cache
from recray.errors import SettingsError
from recray.stages import Say


def beside(other: Path, package: str, rounds: int, measure: Callable[[Path], float], unit: str, say: Say) -> dict[str, float]:
    """The ratio of this checkout's measure to the other's: the median of the rounds, the lowest and the highest. `here` is the median of this one's.

    One round before them fills caches and counts for nothing. Raises SettingsError where the other folder has no such package of recray.
    """
    mine = Path(__file__).resolve().parents[2]
    if not (other / "recray" / package).is_dir():
        raise SettingsError(f"--against {other}: no checkout of recray", "git worktree add FOLDER COMMIT makes one")
    ratios, measured = [], []
    for turn in range(-1, rounds):
        order = (other, mine) if turn % 2 else (mine, other)
        by = {checkout: measure(checkout) for checkout in order}
        if turn >= 0:
            ratios.append(by[mine] / by[other])
            measured.append(by[mine])
            say(f"round {turn + 1}: {by[mine]:.4g} {unit} here, {by[other]:.4g} there: ratio {ratios[-1]:.3f}")
    figures = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "here": statistics.median(measured)}
    return {name: round(value, 4) for name, value in figures.items()}


def environment_of(checkout: Path) -> dict[str, str]:
    """The environment of a process that runs a checkout's code; neither checkout has to compile anew what it imports, and neither is written to."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(checkout.resolve()), "PYTHONPYCACHEPREFIX": str(cache().parent / "bytecode")}
