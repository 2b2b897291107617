"""How often a policy without a gain passes the promotion criteria of `recray adapt`: in one round, and in any
of many. Simulated logs whose users differ in how often they come and how often they click.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from policies import gate, ope
from policies.gate import Criteria, spend_level
from policies.logs import LoggedDecisions
from policies.rewards import SyntheticRewards, draw_clicks
from recray.benchmark import Result
from recray.inference.modulation import explore
from recray.inference.policy import ObservationNormalizer
from recray.stages import ProgressLog

LOGS, CONTROL_LOGS, ROUNDS = 1_000, 100, 200
SIGMA = 0.5  # standard deviation of the logged exploration
RATES = (0.005, 0.05)  # mean clicks a decision
LIKING = 2.0  # shape of the gamma distribution of the users' own rates
ZIPF = 1.3  # exponent of the number of decisions by user
SIZES = ((3_000, 400), (10_000, 2_000))  # decisions of a log, users they are drawn from
GAIN = 1.0  # of the control: the action changes a user's rate by up to this share


@dataclass(frozen=True)
class Cell:
    """One kind of log.

    rate : mean clicks a decision
    zipf : exponent of the number of decisions by user; 0: all are equally likely
    gain : effect of the action on a user's rate, as a share; 0: none, so that no policy gains anything
    """

    rate: float
    zipf: float
    decisions: int
    users: int
    gain: float = 0.0


class LengthPolicy:
    """A policy whose action follows the length of the history, around 0."""

    def __init__(self, observation: np.ndarray) -> None:
        self.normalizer = ObservationNormalizer.of(observation)

    def act(self, observation_ND: np.ndarray, /) -> np.ndarray:
        return np.asarray(0.6 * np.tanh(observation_ND[:, :1] - 3), np.float32)


def make_cells() -> dict[str, Cell]:
    """Cells without a gain, and each of them with one."""
    return {
        f"{'gain' if gain else 'no gain'}, click rate {rate:g}, {users} users, {decisions:,} decisions": Cell(
            rate, zipf, decisions, n_users, gain
        )
        for gain in (0.0, GAIN)
        for rate in RATES
        for users, zipf in (("even", 0.0), ("Zipf", ZIPF))
        for decisions, n_users in SIZES
    }


def draw_log(cell: Cell, random: np.random.Generator) -> tuple[LoggedDecisions, LengthPolicy]:
    """A log that explored around action 0, and a policy that it evaluates."""
    weight = np.arange(1, cell.users + 1) ** -cell.zipf
    user = random.choice(cell.users, cell.decisions, p=weight / weight.sum())
    observation = SyntheticRewards().draw(cell.users, random)[0]
    own_rate = cell.rate * random.gamma(LIKING, 1 / LIKING, cell.users)

    policy = LengthPolicy(observation)
    observation, mean = observation[user], np.zeros((cell.decisions, 1), np.float32)
    action, density = explore(mean, SIGMA, random)
    effect = 1 + cell.gain * (action * np.sign(policy.act(observation)))[:, 0]
    reward = draw_clicks(np.clip(own_rate[user] * effect, 0.0, 1.0), random)
    n = cell.decisions
    log = LoggedDecisions(
        observation, mean, action, density, np.full(n, SIGMA), reward, user, np.full(n, ""), np.full(n, "")
    )
    return log, policy


def judge_log(seed: int, cell: Cell) -> tuple[bool, bool, np.ndarray]:
    """Whether the lower bound of the gain is above 0 and whether all criteria pass, at the default level, and
    whether the bound is above 0 at the level of each round, [ROUNDS].
    """
    random = np.random.default_rng([seed, cell.users, round(1000 * cell.rate), round(10 * cell.zipf)])
    log, policy = draw_log(cell, random)
    verdict = gate.judge(log, policy)
    terms, codes = gate.estimate(log, policy, Criteria()).differences(log.reward), log.user_codes
    above = [ope.lower_bound(terms, codes, spend_level(number)) > 0 for number in range(1, ROUNDS + 1)]
    return verdict.figures["dr_surely"] > 0, verdict.passed, np.array(above)


def measure_rounds(
    _: Path, progress: ProgressLog, logs: int = LOGS, control_logs: int = CONTROL_LOGS
) -> Result:
    """Of the cells without a gain, `level_most`, the largest share of the logs whose lower bound is above 0
    at level .025, and `any_most`, the largest probability that the bound of any of 200 rounds is above 0 at
    the level of the round. Each round has a log drawn from those of the cell, with replacement.
    `control_least`: the smallest share of the logs with a gain whose bound is above 0.
    """
    table: list[list[Any]] = []
    cells = make_cells()
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), initializer=threadpool_limits, initargs=(1,)
    ) as pool:
        for name, cell in cells.items():
            n = control_logs if cell.gain else logs
            results = list(pool.map(partial(judge_log, cell=cell), range(n), chunksize=4))
            above, passed = (float(np.mean([result[column] for result in results])) for column in (0, 1))
            any_round = 1.0 - float(np.prod(1.0 - np.mean([by_round for *_, by_round in results], 0)))
            table.append([name, round(above, 4), round(passed, 4), round(any_round, 4)])
            progress(
                f"{name}: bound above 0 in {above:.1%} of {n} logs, all criteria passed in {passed:.1%}; "
                f"in any of {ROUNDS} rounds {any_round:.1%}"
            )
    without = [row for row, cell in zip(table, cells.values(), strict=True) if not cell.gain]
    return {
        "logs": logs,
        "rounds": ROUNDS,
        "level_most": max(row[1] for row in without),
        "passed_most": max(row[2] for row in without),
        "any_most": max(row[3] for row in without),
        "control_least": min(row[1] for row in table[len(without) :]),
        "table": table,
    }
