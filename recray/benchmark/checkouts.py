"""Compares this checkout of recray with another one: both do the same work, alternating, in separate
processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from recray.benchmark.peers import cache
from recray.errors import SettingsError, TrainingError
from recray.stages import ProgressLog

ROUNDS = 5


def compare_train(
    folder: Path, other: Path, data: str, overrides: list[str], progress: ProgressLog
) -> dict[str, float]:
    """Seconds of a training epoch, here and in another checkout (`recray benchmark train`)."""
    measure = partial(_run_benchmark, folder, ["train", "--data", data, *overrides], "epoch_s")
    return compare_checkouts(other, "training", ROUNDS, measure, "s", progress)


def compare_score(
    folder: Path, other: Path, data: str, overrides: list[str], progress: ProgressLog
) -> dict[str, float]:
    """Users a second of batch inference, here and in another checkout (`recray benchmark score`)."""
    measure = partial(_run_benchmark, folder, ["score", "--data", data, *overrides], "users_per_s")
    return compare_checkouts(other, "inference", ROUNDS, measure, "users/s", progress)


def _run_benchmark(folder: Path, words: list[str], metric: str, checkout: Path) -> dict[str, float]:
    """One metric of a benchmark of a checkout, run by that checkout's code."""
    code = "import sys; from recray.cli import main; sys.exit(main())"
    process = subprocess.run(
        [sys.executable, "-c", code, "benchmark", *words, "--out", str(folder / "results")],
        env=environment_of(checkout),
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise TrainingError(
            f"recray benchmark {words[0]} failed in {checkout}: {process.stderr.strip()[-600:]}",
            "run it there by hand",
        )
    return {"": float(json.loads(process.stdout.splitlines()[-1])["metrics"][metric])}


def compare_checkouts(
    other: Path,
    package: str,
    rounds: int,
    measure: Callable[[Path], dict[str, float]],
    unit: str,
    progress: ProgressLog,
) -> dict[str, float]:
    """Ratios of this checkout's measures to the other's: the median over rounds `NAME_ratio`, `NAME_lowest`
    and `NAME_highest`. `NAME_here` is the median of this checkout. A measure without a name has no prefix.

    A first round fills caches and is not counted. Raises SettingsError if the other folder does not have the
    package.

    package : name below `recray`
    measure : runs the work of a checkout
    """

    def measure_each(order: Sequence[Path]) -> dict[Path, dict[str, float]]:
        return {checkout: measure(checkout) for checkout in order}

    return compare_side_by_side(other, package, rounds, measure_each, unit, progress)


def compare_side_by_side(
    other: Path,
    package: str,
    rounds: int,
    measure: Callable[[Sequence[Path]], dict[Path, dict[str, float]]],
    unit: str,
    progress: ProgressLog,
) -> dict[str, float]:
    """As `compare_checkouts`, with a `measure` that runs the work of all checkouts, in an order."""
    own = Path(__file__).resolve().parents[2]
    if not (other / "recray" / package).is_dir():
        raise SettingsError(
            f"--against {other}: no checkout of recray and no baseline library",
            "git worktree add FOLDER COMMIT makes a checkout; libraries are implicit and rectools",
        )
    measured: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(-1, rounds):
        order = (other, own) if number % 2 else (own, other)
        measures = measure(order)
        if number >= 0:
            measured.append((measures[own], measures[other]))
            ratios = {name: here / measures[other][name] for name, here in measures[own].items()}
            lines = [
                f"{name} {measures[own][name]:.4g} {unit} here, {measures[other][name]:.4g} there: "
                f"ratio {ratio:.3f}"
                for name, ratio in ratios.items()
            ]
            progress(f"round {number + 1}: {'; '.join(lines)}")
    figures: dict[str, float] = {}
    for name in measured[0][0]:
        ratios_by_round = [here[name] / there[name] for here, there in measured]
        prefix = f"{name}_" if name else ""
        figures |= {
            f"{prefix}ratio": statistics.median(ratios_by_round),
            f"{prefix}lowest": min(ratios_by_round),
            f"{prefix}highest": max(ratios_by_round),
        }
        figures[f"{prefix}here"] = statistics.median(here[name] for here, _ in measured)
    return {name: round(value, 4) for name, value in figures.items()}


def environment_of(checkout: Path) -> dict[str, str]:
    """The environment of a process that runs a checkout's code. Bytecode is cached outside the checkout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {
        **inherited,
        "PYTHONPATH": str(checkout.resolve()),
        "PYTHONPYCACHEPREFIX": str(cache().parent / "bytecode"),
    }
