"""How often experiments of equal variants end, and how soon those of worse challengers do: simulated
responses and outcomes, read by the test that the endpoint uses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recray.benchmark import Result
from recray.events.log import Entry
from recray.events.rewards import Rewards
from recray.serving.experiment import Experiment
from recray.stages import ProgressLog

RUNS, RESPONSES = 500, 20_000
WORSE_RUNS, WITHIN = 100, 500  # of the challenger's own responses
SHARES = (0.05, 0.1, 0.5)
USERS, CLICKED = 5_000, 0.05
CHECK_EVERY = 20  # responses
BURST, EVERY, SERVICE_MS, WAITING = 120, 1_000, 2.0, 16
"""An overload: BURST simultaneous requests, once in EVERY responses. Each waits for those of its variant
before it, and those beyond WAITING are refused. They are logged in the order of the responses: first the
refused ones, then the others.
"""


@dataclass(frozen=True)
class Cell:
    """One kind of traffic.

    failing : share of the responses that fail
    latency : draws n latencies in milliseconds
    added_failures, slower : added failures and latency factor of the challenger
    """

    failing: float
    latency: Callable[[np.random.Generator, int], np.ndarray]
    share: float
    bursts: bool = False
    added_failures: float = 0.0
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


def make_equal_cells() -> dict[str, Cell]:
    """Cells whose variants are equal."""
    kinds: dict[str, tuple[float, Callable[[np.random.Generator, int], np.ndarray], bool]] = {
        **{f"{share:.0%} failing": (share, _log_normal, False) for share in (0.01, 0.03, 0.05)},
        **{
            f"{share:.0%} slow at 5 x": (0.0, partial(_sometimes_slow, share), False)
            for share in (0.03, 0.05)
        },
        **{name: (0.0, latency, False) for name, latency in LATENCIES.items()},
        "bursts of 120": (0.01, _log_normal, True),
    }
    return {
        f"{name}, share {share:g}": Cell(*kind[:2], share, kind[2])
        for name, kind in kinds.items()
        for share in SHARES
    }


def make_worse_cells() -> dict[str, Cell]:
    """Cells whose challenger is three times slower, or fails five percentage points more."""
    cells = {
        f"3 x slower, {name}, share {share:g}": Cell(0.01, latency, share, slower=3.0)
        for name, latency in LATENCIES.items()
        for share in SHARES
    }
    failing = {
        f"5 points more than {base:.0%}, share {share:g}": Cell(base, _log_normal, share, added_failures=0.05)
        for base in (0.0, 0.01, 0.03)
        for share in SHARES
    }
    return cells | failing


def run_experiment(cell: Cell, seed: int, responses: int, within: int | None = None) -> int | None:
    """Number of the challenger's responses when the experiment ended; None if it did not.

    within : stop after this many of the challenger's responses; None: after all
    """
    random = np.random.default_rng([seed, int(1000 * cell.share)])
    experiment = Experiment("c", cell.share, shadow=False, rewards=Rewards({"click": 1.0}, 1.0))
    is_challenger_user = random.random(USERS) < cell.share
    user = random.integers(0, USERS, responses)
    is_challenger = is_challenger_user[user]
    ms = cell.latency(random, responses) * np.where(is_challenger, cell.slower, 1.0)
    failed = random.random(responses) < cell.failing + cell.added_failures * is_challenger
    clicked = random.random(responses) < CLICKED
    order = _add_bursts(ms, failed, is_challenger) if cell.bursts else np.arange(responses)
    challenger_responses: int = 0
    columns = (column[order].tolist() for column in (user, is_challenger, ms, failed, clicked))
    for number, (user_id, is_challenger, elapsed_ms, has_failed, has_click) in enumerate(
        zip(*columns, strict=True)
    ):
        challenger_responses += is_challenger
        body = {
            "trial": "c",
            "share": cell.share,
            "arm": "challenger" if is_challenger else "champion",
            "items": (),
            "degraded": ("model",) if has_failed else (),
            "model_ms": elapsed_ms,
        }
        experiment.add_entry(Entry("decision", str(number), str(user_id), 0.0, body))
        if has_click:
            experiment.add_entry(
                Entry(
                    "outcome",
                    str(number),
                    None,
                    0.0,
                    {"request_id": str(number), "outcome": "click", "item_id": None, "value": 1.0},
                )
            )
        if number % CHECK_EVERY == 0 and experiment.find_reason_to_end():
            return challenger_responses
        if within is not None and challenger_responses >= within:
            return challenger_responses if experiment.find_reason_to_end() else None
    return challenger_responses if experiment.find_reason_to_end() else None


def _add_bursts(ms: np.ndarray, failed: np.ndarray, is_challenger: np.ndarray) -> np.ndarray:
    """Add the waiting times and refusals of simultaneous requests; the order of the responses."""
    order = np.arange(len(ms))
    for first in range(0, len(ms) - BURST, EVERY):
        queue_position = np.zeros(BURST, np.int64)
        for variant in (True, False):
            rows = np.flatnonzero(is_challenger[first : first + BURST] == variant)
            queue_position[rows] = np.arange(len(rows))
        ms[first : first + BURST] += SERVICE_MS * queue_position
        refused = queue_position >= WAITING
        failed[first : first + BURST] |= refused
        order[first : first + BURST] = first + np.argsort(
            np.where(refused, -1, queue_position), kind="stable"
        )
    return order


def measure_experiments(
    _: Path, progress: ProgressLog, runs: int = RUNS, responses: int = RESPONSES, worse_runs: int = WORSE_RUNS
) -> Result:
    """`ended_most`: how many experiments of equal variants ended in the worst cell; `found_least`: the
    minimum share of worse challengers that were rolled back within `WITHIN` of their responses.
    """
    table: list[list[Any]] = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def run_all(cell: Cell, n: int, within: int | None) -> list[int | None]:
            limit = responses if within is None else int(3 * within / cell.share)
            return list(
                pool.map(
                    partial(run_experiment, cell, responses=limit, within=within),
                    range(n),
                    chunksize=max(1, n // 16),
                )
            )

        for name, cell in make_equal_cells().items():
            ended = sum(count is not None for count in run_all(cell, runs, None))
            table.append([name, ended, runs])
            progress(f"equal variants, {name}: {ended} of {runs} ended")
        for name, cell in make_worse_cells().items():
            ended = sum(count is not None for count in run_all(cell, worse_runs, WITHIN))
            table.append([name, ended, worse_runs])
            progress(f"{name}: {ended} of {worse_runs} ended within {WITHIN} of the challenger's responses")
    n = len(make_equal_cells())
    return {
        "runs": runs,
        "responses": responses,
        "ended_most": max(row[1] for row in table[:n]),
        "found_least": min(row[1] for row in table[n:]) / worse_runs,
        "table": table,
    }
