"""How often experiments of equal variants end, and how soon worse ones do: simulated responses and outcomes, read by the test that is served."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recray.serving.experiment import Experiment
from recray.stages import Say
from recray.state.log import Entry
from recray.state.rewards import Rewards

RUNS, RESPONSES = 500, 20_000
WORSE_RUNS, WITHIN = 100, 500  # of the challenger's own responses
SHARES = (0.05, 0.1, 0.5)
USERS, CLICKED = 5_000, 0.05
LOOKS = 20  # responses between two looks
BURST, EVERY, SERVICE_MS, WAITING = 120, 1_000, 2.0, 16
"""An overload: so many at once, after so many responses; each waits for those of its variant before it, and more than may wait are refused.
They are logged as they are responded to: those that are refused at once, then the others as their turn comes."""


@dataclass(frozen=True)
class Cell:
    """One kind of traffic. failing: share of the responses that fail; latency: draws n milliseconds.

    more_failing, slower : what is wrong with the challenger
    """

    failing: float
    latency: Callable[[np.random.Generator, int], np.ndarray]
    share: float
    bursts: bool = False
    more_failing: float = 0.0
    slower: float = 1.0


def _log_normal(random: np.random.Generator, n: int) -> np.ndarray:
    return 5.0 * random.lognormal(0.0, 0.7, n)


def _bimodal(random: np.random.Generator, n: int) -> np.ndarray:
    return np.where(random.random(n) < 0.9, 4.0, 60.0) * random.lognormal(0.0, 0.1, n)


def _pareto(random: np.random.Generator, n: int) -> np.ndarray:
    return 3.0 * (1.0 + random.pareto(1.5, n))


def _sometimes_slow(share: float, random: np.random.Generator, n: int) -> np.ndarray:
    return np.where(random.random(n) < share, 25.0, 5.0) * random.lognormal(0.0, 0.2, n)


LATENCIES = {"log-normal": _log_normal, "bimodal": _bimodal, "Pareto": _pareto}


def equals() -> dict[str, Cell]:
    """Cells in which the variants are alike."""
    kinds: dict[str, tuple[float, Callable[[np.random.Generator, int], np.ndarray], bool]] = {
        **{f"{share:.0%} failing": (share, _log_normal, False) for share in (0.01, 0.03, 0.05)},
        **{f"{share:.0%} slow at 5 x": (0.0, partial(_sometimes_slow, share), False) for share in (0.03, 0.05)},
        **{name: (0.0, latency, False) for name, latency in LATENCIES.items()},
        "bursts of 120": (0.01, _log_normal, True),
    }
    return {f"{name}, share {share:g}": Cell(*kind[:2], share, kind[2]) for name, kind in kinds.items() for share in SHARES}


def worse() -> dict[str, Cell]:
    """Cells whose challenger is three times slower, or fails five points more."""
    cells = {
        f"3 x slower, {name}, share {share:g}": Cell(0.01, latency, share, slower=3.0) for name, latency in LATENCIES.items() for share in SHARES
    }
    failing = {
        f"5 points more than {base:.0%}, share {share:g}": Cell(base, _log_normal, share, more_failing=0.05)
        for base in (0.0, 0.01, 0.03)
        for share in SHARES
    }
    return cells | failing


def run(cell: Cell, seed: int, responses: int, within: int | None = None) -> int | None:
    """After how many of the challenger's responses the experiment ended; None if it did not, within so many of them."""
    random = np.random.default_rng([seed, int(1000 * cell.share)])
    experiment = Experiment("c", cell.share, shadow=False, rewards=Rewards({"click": 1.0}, 1.0))
    sides = random.random(USERS) < cell.share
    user = random.integers(0, USERS, responses)
    is_challenger = sides[user]
    ms = cell.latency(random, responses) * np.where(is_challenger, cell.slower, 1.0)
    failed = random.random(responses) < cell.failing + cell.more_failing * is_challenger
    clicked = random.random(responses) < CLICKED
    order = _overload(ms, failed, is_challenger) if cell.bursts else np.arange(responses)
    own: int = 0
    columns = (column[order].tolist() for column in (user, is_challenger, ms, failed, clicked))
    for number, (who, of_challenger, took, broke, click) in enumerate(zip(*columns, strict=True)):
        own += of_challenger
        body: dict[str, Any] = {"trial": "c", "share": cell.share, "arm": "challenger" if of_challenger else "champion", "items": ()}
        experiment.read(Entry("decision", str(number), str(who), 0.0, {**body, "degraded": ("model",) if broke else (), "model_ms": took}))
        if click:
            experiment.read(Entry("outcome", str(number), None, 0.0, {"request_id": str(number), "outcome": "click", "item_id": None, "value": 1.0}))
        if number % LOOKS == 0 and experiment.reason_to_end():
            return own
        if within is not None and own >= within:
            return own if experiment.reason_to_end() else None
    return own if experiment.reason_to_end() else None


def _overload(ms: np.ndarray, failed: np.ndarray, is_challenger: np.ndarray) -> np.ndarray:
    """Let some come at once; the order in which all are responded to."""
    order = np.arange(len(ms))
    for first in range(0, len(ms) - BURST, EVERY):
        turn = np.zeros(BURST, np.int64)
        for side in (True, False):
            places = np.flatnonzero(is_challenger[first : first + BURST] == side)
            turn[places] = np.arange(len(places))
        ms[first : first + BURST] += SERVICE_MS * turn
        refused = turn >= WAITING
        failed[first : first + BURST] |= refused
        order[first : first + BURST] = first + np.argsort(np.where(refused, -1, turn), kind="stable")
    return order


def measure_experiments(_: Path, say: Say, runs: int = RUNS, responses: int = RESPONSES, worse_runs: int = WORSE_RUNS) -> dict[str, Any]:
    """`ended_most`: of so many experiments of equals, how many ended in the worst cell; `found_least`: the share of worse challengers that were
    found within `WITHIN` of their responses, by the base of what fails."""
    table: list[list[Any]] = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def each(cell: Cell, n: int, within: int | None) -> list[int | None]:
            most = responses if within is None else int(3 * within / cell.share)
            return list(pool.map(partial(run, cell, responses=most, within=within), range(n), chunksize=max(1, n // 16)))

        for name, cell in equals().items():
            ended = sum(own is not None for own in each(cell, runs, None))
            table.append([name, ended, runs])
            say(f"equals, {name}: {ended} of {runs} ended")
        for name, cell in worse().items():
            n_found = sum(own is not None for own in each(cell, worse_runs, WITHIN))
            table.append([name, n_found, worse_runs])
            say(f"{name}: {n_found} of {worse_runs} ended within {WITHIN} of the challenger's responses")
    n = len(equals())
    return {
        "runs": runs,
        "responses": responses,
        "ended_most": max(row[1] for row in table[:n]),
        "found_least": min(row[1] for row in table[n:]) / worse_runs,
        "table": table,
    }
