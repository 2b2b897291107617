"""Logged decisions, checked: what an off-policy estimate may be made of, and what was set aside and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray.errors import RefusedError
from recray.inference.policy import OBSERVED, log_density

LEAST = 100  # decisions that can say anything
OTHER_BUNDLE, NOT_EXPLORED = "of another bundle", "not explored"
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


def matured(folders: Sequence[Path], until_s: float) -> int:
    """How many decisions of the folders do not wait for their outcomes any more."""
    times = (pq.read_table(file, columns=["timestamp"])["timestamp"] for file in _files(folders, "decisions"))
    return sum(int((column.cast(pa.int64()).to_numpy() <= until_s * 1e6).sum()) for column in times)


def read(folders: Sequence[Path], actions: tuple[str, ...], *, until_s: float, bound: float = 1.0) -> tuple[list[Logged], Aside]:
    """The decisions that a policy or exploration made, a round a folder of `recray collect`, oldest first, and how many were set aside;
    rounds without any are left out.

    A decision's reward is the sum of its outcomes, in whatever folder these are. actions, bound : what decisions have to turn, and how far;
    until_s : later decisions wait for their outcomes
    """
    aside: Aside = Counter()
    rounds = [rows for file in _files(folders, "decisions") if (rows := _decisions(file, actions, bound, until_s, aside))]
    worth = dict.fromkeys((row["request_id"] for rows in rounds for row in rows), 0.0)
    for file in _files(folders, "outcomes"):
        for batch in pq.ParquetFile(file).iter_batches(columns=["request_id", "value", "set_aside"]):
            for row in batch.to_pylist():
                if row["request_id"] in worth and not row["set_aside"]:
                    worth[row["request_id"]] += row["value"]
    return [_logged(rows, worth) for rows in rounds], aside


def _files(folders: Sequence[Path], kind: str) -> list[Path]:
    return [file for folder in folders if (file := folder / f"{kind}.parquet").exists()]


def _decisions(file: Path, actions: tuple[str, ...], bound: float, until_s: float, aside: Aside) -> list[dict[str, Any]]:
    found = []
    for batch in pq.ParquetFile(file).iter_batches(columns=["request_id", "user_id", "timestamp", "bundle", "more"]):
        for row in batch.to_pylist():
            told = json.loads(row.pop("more") or "{}").get("decision")
            if told is None or row["timestamp"].timestamp() > until_s:
                continue
            if not told.keys() >= TOLD:
                aside["without " + ", ".join(sorted(TOLD - told.keys()))] += 1
            elif tuple(told["actions"]) != actions or told.get("bound", 1.0) != bound:
                aside["turned other controls, or as far as another bound"] += 1
            elif [len(told[name]) for name in ("observation", "mean", "action")] != [len(OBSERVED), len(actions), len(actions)]:
                aside["seen by another version of recray"] += 1
            else:
                found.append({**row, **told})
    return found


def _logged(rows: list[dict[str, Any]], worth: dict[str, float]) -> Logged:
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    return Logged(
        column("observation").astype(np.float32),
        column("mean").astype(np.float32),
        column("action").astype(np.float32),
        np.array([np.nan if row["log_density"] is None else row["log_density"] for row in rows]),
        column("sigma").astype(np.float64),
        np.array([worth[row["request_id"]] for row in rows]),
        np.array([row["user_id"] or row["request_id"] for row in rows]),
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
