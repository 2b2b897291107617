"""Logged decisions, checked: what an off-policy estimate may be made of, and what was set aside and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from recray.errors import RefusedError
from recray.inference.policy import log_density

LEAST = 100  # decisions that can say anything


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


def read(folders: Sequence[Path], actions: tuple[str, ...], *, until_s: float) -> list[Logged]:
    """The decisions that a policy or exploration made, a round a folder of `recray collect`, oldest first; rounds without any are left out.

    A decision's reward is the sum of its outcomes, in whatever folder these are. actions : of decisions that turned others nothing is
    read; until_s : later decisions wait for their outcomes
    """
    worth: dict[str, float] = {}
    for folder in folders:
        if (folder / "outcomes.parquet").exists():
            table = pq.read_table(folder / "outcomes.parquet", filters=[("set_aside", "=", False)])
            for request, value in zip(table["request_id"].to_pylist(), table["value"].to_pylist(), strict=True):
                worth[request] = worth.get(request, 0.0) + value
    rounds = [_round(folder / "decisions.parquet", actions, worth, until_s) for folder in folders if (folder / "decisions.parquet").exists()]
    return [found for found in rounds if found is not None]


def _round(file: Path, actions: tuple[str, ...], worth: dict[str, float], until_s: float) -> Logged | None:
    rows = []
    table = pq.read_table(file, columns=["request_id", "user_id", "timestamp", "bundle", "more"])
    for row in table.to_pylist():
        told = json.loads(row["more"]).get("decision") if row["more"] else None
        if told is not None and tuple(told["actions"]) == actions and row["timestamp"].timestamp() <= until_s:
            rows.append((row, told))
    if not rows:
        return None

    def column(name: str) -> np.ndarray:
        return np.array([told[name] for _, told in rows])

    density = np.array([np.nan if told["log_density"] is None else told["log_density"] for _, told in rows])
    return Logged(
        column("observation").astype(np.float32),
        column("mean").astype(np.float32),
        column("action").astype(np.float32),
        density,
        column("sigma").astype(np.float64),
        np.array([worth.get(row["request_id"], 0.0) for row, _ in rows]),
        np.array([row["user_id"] or row["request_id"] for row, _ in rows]),
        np.array([row["bundle"] for row, _ in rows]),
        column("policy"),
    )


def checked(log: Logged, bundle_digest: str, policies: set[str]) -> tuple[Logged, dict[str, int]]:
    """The decisions that can be used, and how many were set aside for which reason.

    policies : digests of the policies that may have decided, "" for none
    Raises RefusedError where no decision was explored, where another bundle decided most, or where too few are left.
    """
    finite = np.isfinite(log.observation).all(1) & np.isfinite(log.action).all(1) & np.isfinite(log.mean).all(1)
    recomputed = np.full(len(log), np.nan)
    usable = finite & np.isfinite(log.log_density) & (log.sigma > 0)
    recomputed[usable] = log_density(log.action[usable], log.mean[usable], log.sigma[usable, None])
    reasons = {
        "of another bundle": log.bundle != bundle_digest,
        "of a policy that is not known": ~np.isin(log.policy, sorted(policies)),
        "not explored": ~np.isfinite(log.log_density) | (log.sigma <= 0),
        "not finite": ~finite,
        "reward is not finite": ~np.isfinite(log.reward),
        "density is not that of the action": np.abs(recomputed - log.log_density) > 1e-3,
    }
    left, aside = np.ones(len(log), bool), {}
    for reason, bad in reasons.items():
        if count := int((left & bad).sum()):
            aside[reason] = count
        left &= ~bad
    told = "; ".join(f"{count} {reason}" for reason, count in aside.items())
    if aside.get("not explored", 0) and not (np.isfinite(log.log_density) & (log.sigma > 0)).any():
        raise RefusedError("no decision of this log was explored: it says nothing of other actions", "set policy.sigma above 0 for a share of users")
    if aside.get("of another bundle", 0) > len(log) / 2:
        raise RefusedError(f"most of this log is of another bundle: {told}", "evaluate on decisions of this one")
    if left.sum() < LEAST:
        raise RefusedError(f"{int(left.sum())} of {len(log)} decisions can be used, of {LEAST} at least: {told}", "wait for more")
    return log.rows(left), aside
