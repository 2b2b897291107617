"""Logged decisions, checked: what an off-policy estimate may be made of, and what was set aside and why."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray.config import PolicySettings
from recray.errors import RefusedError
from recray.inference.modulation import log_density
from recray.inference.policy import OBSERVED
from recray.state.rewards import Credits, Rewards

LEAST = 100  # decisions that can say anything
OTHER_BUNDLE, NOT_EXPLORED = "of another bundle", "not explored"
DISORDER_S = 60.0  # how much later than others of its time a decision may have been written
TOLD = {"policy", "actions", "observation", "mean", "action", "log_density", "sigma"}  # of a decision, in the log


@dataclass(frozen=True)
class Logged:
    """Decisions of one bundle.

    observation [n, D]; mean [n, K]: what was served without exploration; action [n, K]; log_density [n] of the action, NaN where
    nothing was explored; sigma [n]; reward [n]; user [n] any ids; bundle and policy [n]: digests.
    """

    observation: np.ndarray
    mean: np.ndarray
    action: np.ndarray
    log_density: np.ndarray
    sigma: np.ndarray
    reward: np.ndarray
    user: np.ndarray
    bundle: np.ndarray
    policy: np.ndarray

    def __len__(self) -> int:
        return len(self.reward)

    def rows(self, chosen: np.ndarray) -> Logged:
        """Those of a mask or of places."""
        return Logged(**{name: value[chosen] for name, value in vars(self).items()})

    @classmethod
    def joined(cls, logs: Sequence[Logged]) -> Logged:
        """One after the other."""
        return cls(**{name: np.concatenate([getattr(log, name) for log in logs]) for name in vars(logs[0])})

    @property
    def codes(self) -> np.ndarray:
        """Users as numbers from 0, int64 [n]."""
        found: np.ndarray = np.unique(self.user, return_inverse=True)[1]
        return found


Aside = Counter[str]
"""How many decisions were set aside, by reason."""


@dataclass(frozen=True)
class Ripe:
    """Decisions whose outcomes are in.

    rounds : oldest first
    aside : how many were set aside, by reason
    newest_s : when the newest of them was made; minus infinity where there are none
    """

    rounds: list[Logged]
    aside: Aside
    newest_s: float


def count_fresh(folders: Sequence[Path], options: PolicySettings, *, after_s: float, until_s: float, bound: float | None = None) -> int:
    """How many ripe decisions that explored are newer than a moment; as `read`, without reading what is older."""
    count = 0
    for file in reversed(_files(folders, "decisions")):
        if _newest_s(file) < after_s - DISORDER_S:
            break
        rows = _decisions(file, options.actions, options.bound if bound is None else bound, until_s)
        count += sum(row.explored and row.at_s > after_s for row in rows)
    return count


def read(folders: Sequence[Path], options: PolicySettings, rewards: Rewards, *, until_s: float, bound: float | None = None) -> Ripe:
    """The ripe decisions that a policy or exploration made, in rounds.

    A round is a stretch of time: at least `round_s` long, with at least `round_decisions` that explored, the newest one up to `until_s`; there
    are `rounds` of them at most, and the oldest may be shorter. How often was collected changes nothing of it. A decision's reward is the sum of
    its outcomes, in whatever folder these are.

    folders : of `recray collect`, oldest first
    until_s : later decisions wait for their outcomes
    bound : how far decisions have to turn; None: as the options say
    """
    rows: list[_Row] = []
    cuts: list[int] = []
    first = len(folders)
    for place, folder in reversed(list(enumerate(folders))):
        file = folder / "decisions.parquet"
        if not file.exists():
            continue
        rows += _decisions(file, options.actions, options.bound if bound is None else bound, until_s)
        first = place
        if len(rows) >= options.rounds * options.round_decisions:
            rows.sort(key=_moment, reverse=True)
            cuts = _cuts(rows, options)
            if len(cuts) == options.rounds and _newest_s(file) < rows[cuts[-1] - 1].at_s - DISORDER_S:
                break
    rows.sort(key=_moment, reverse=True)
    cuts = _cuts(rows, options)
    if len(cuts) < options.rounds and (not cuts or cuts[-1] < len(rows)):
        cuts.append(len(rows))
    recent = rows[: cuts[-1]]
    credits, worth = Credits(rewards, limit=None), dict[str, float]()
    for row in recent:
        worth[row.request_id] = credits.add_response(row.request_id, row.items)
    for file in _files(folders[max(first - 1, 0) :], "outcomes"):
        for batch in pq.ParquetFile(file).iter_batches(columns=["request_id", "outcome", "item_id", "value"]):
            for outcome in batch.to_pylist():
                key = outcome["request_id"]
                if key in worth:
                    worth[key] += credits.add_outcome(key, outcome["outcome"], outcome["item_id"], outcome["value"])
    aside = Aside(row.reason for row in recent if row.reason)
    rounds = [[row for row in rows[start:end] if not row.reason] for start, end in zip([0, *cuts], cuts, strict=False)]
    return Ripe([_logged(some[::-1], worth) for some in rounds[::-1] if some], aside, rows[0].at_s if rows else -math.inf)


@dataclass(frozen=True)
class _Row:
    """A decision of a folder; `reason`: why it is set aside, empty where it is not."""

    at_s: float
    request_id: str
    items: list[str]
    reason: str
    values: dict[str, Any]

    @property
    def explored(self) -> bool:
        return not self.reason and self.values["log_density"] is not None


def _moment(row: _Row) -> tuple[float, str]:
    return row.at_s, row.request_id


def _cuts(rows: Sequence[_Row], options: PolicySettings) -> list[int]:
    """Where whole rounds of rows, newest first, end."""
    cuts, start, explored = [], 0, 0
    for place, row in enumerate(rows):
        explored += row.explored
        if explored >= options.round_decisions and rows[start].at_s - row.at_s >= options.round_s:
            cuts.append(place + 1)
            start, explored = place + 1, 0
            if len(cuts) == options.rounds:
                break
    return cuts


def _newest_s(file: Path) -> float:
    """When the last decision of a file was made."""
    newest = pc.max(pq.read_table(file, columns=["timestamp"])["timestamp"]).as_py()
    return -math.inf if newest is None else float(newest.timestamp())


def digest(rounds: Sequence[Logged]) -> str:
    """Names what was read."""
    sha = hashlib.sha256()
    for log in rounds:
        for values in vars(log).values():
            sha.update(np.ascontiguousarray(values).tobytes() if values.dtype != object else "\0".join(map(str, values)).encode())
    return sha.hexdigest()


def _files(folders: Sequence[Path], kind: str) -> list[Path]:
    return [file for folder in folders if (file := folder / f"{kind}.parquet").exists()]


def _decisions(file: Path, actions: tuple[str, ...], bound: float, until_s: float) -> list[_Row]:
    rows = []
    for batch in pq.ParquetFile(file).iter_batches(columns=["request_id", "user_id", "timestamp", "items", "bundle", "more"]):
        for row in batch.to_pylist():
            decision = json.loads(row["more"] or "{}").get("decision")
            at_s = row["timestamp"].timestamp()
            if decision is None or at_s > until_s:
                continue
            reason = ""
            if not decision.keys() >= TOLD:
                reason = "without " + ", ".join(sorted(TOLD - decision.keys()))
            elif tuple(decision["actions"]) != actions or decision.get("bound", 1.0) != bound:
                reason = "turned other controls, or as far as another bound"
            elif [len(decision[name]) for name in ("observation", "mean", "action")] != [len(OBSERVED), len(actions), len(actions)]:
                reason = "seen by another version of recray"
            values = {"user_id": row["user_id"], "bundle": row["bundle"], **decision}
            rows.append(_Row(at_s, row["request_id"], row["items"], reason, values))
    return rows


def _logged(rows: list[_Row], worth: dict[str, float]) -> Logged:
    def column(name: str) -> np.ndarray:
        return np.array([row.values[name] for row in rows])

    return Logged(
        column("observation").astype(np.float32),
        column("mean").astype(np.float32),
        column("action").astype(np.float32),
        np.array([np.nan if (density := row.values["log_density"]) is None else density for row in rows]),
        column("sigma").astype(np.float64),
        np.array([worth[row.request_id] for row in rows]),
        np.array([row.values["user_id"] or row.request_id for row in rows]),
        column("bundle"),
        column("policy"),
    )


def usable(log: Logged, bundle_digest: str, policies: set[str]) -> tuple[Logged, Aside]:
    """The decisions that can be used, and how many were set aside for which reason; as `checked`, which refuses."""
    finite = np.isfinite(log.observation).all(1) & np.isfinite(log.action).all(1) & np.isfinite(log.mean).all(1)
    recomputed = np.full(len(log), np.nan)
    explored = ~np.isnan(log.log_density) & (log.sigma > 0)
    impossible = explored & np.isinf(log.log_density)
    known = finite & explored & ~impossible
    recomputed[known] = log_density(log.action[known], log.mean[known], log.sigma[known, None])
    reasons = {
        OTHER_BUNDLE: log.bundle != bundle_digest,
        "of a policy that is not known": ~np.isin(log.policy, sorted(policies)),
        NOT_EXPLORED: ~explored,
        "not finite": ~finite,
        "reward is not finite": ~np.isfinite(log.reward),
        "of propensity zero or infinite": impossible,
        "density is not that of the action": np.abs(recomputed - log.log_density) > 1e-3,
    }
    left, aside = np.ones(len(log), bool), Aside()
    for reason, bad in reasons.items():
        if count := int((left & bad).sum()):
            aside[reason] = count
        left &= ~bad
    return log.rows(left), aside


def checked(log: Logged, bundle_digest: str, policies: set[str]) -> tuple[Logged, Aside]:
    """The decisions that can be used, and how many were set aside for which reason.

    policies : digests of the policies that may have decided, "" for none
    Raises RefusedError where no decision was explored, where another bundle decided most, or where too few are left.
    """
    left, aside = usable(log, bundle_digest, policies)
    told = "; ".join(f"{count} {reason}" for reason, count in aside.items())
    if aside[NOT_EXPLORED] and not (~np.isnan(log.log_density) & (log.sigma > 0)).any():
        raise RefusedError("no decision of this log was explored: it says nothing of other actions", "set policy.sigma above 0 for a share of users")
    if aside[OTHER_BUNDLE] > len(log) / 2:
        raise RefusedError(f"most of this log is of another bundle: {told}", "evaluate on decisions of this one")
    if len(left) < LEAST:
        raise RefusedError(f"{len(left)} of {len(log)} decisions can be used, of {LEAST} at least: {told}", "wait for more")
    return left, aside
