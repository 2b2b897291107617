"""Logged decisions: which of them off-policy estimates may use, and why the others are excluded."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray.config import PolicySettings
from recray.errors import RefusedError
from recray.events.rewards import SHOWN, Credits, Rewards
from recray.inference.modulation import log_density
from recray.inference.policy import OBSERVED

MIN_DECISIONS = 100
OTHER_BUNDLE, NOT_EXPLORED = "of another bundle", "not explored"
DISORDER_S = 60.0  # a decision may be written this much later than others of its time
REQUIRED_FIELDS = {
    "policy",
    "actions",
    "observation",
    "mean",
    "action",
    "log_density",
    "sigma",
}  # of a decision in the log


@dataclass(frozen=True)
class LoggedDecisions:
    """Decisions of one bundle.

    observation : [n, D]
    mean : [n, K], the action without exploration
    action : [n, K], the action that was served
    log_density : [n], of the action; NaN where nothing was explored
    sigma, reward : [n]
    user : [n], ids of any type
    bundle, policy : [n], digests
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

    def select(self, rows: np.ndarray) -> LoggedDecisions:
        """The decisions of a mask or of row numbers."""
        return LoggedDecisions(**{name: values[rows] for name, values in vars(self).items()})

    @classmethod
    def concat(cls, logs: Sequence[LoggedDecisions]) -> LoggedDecisions:
        """Several logs, one after the other."""
        return cls(**{name: np.concatenate([getattr(log, name) for log in logs]) for name in vars(logs[0])})

    @property
    def user_codes(self) -> np.ndarray:
        """Users as numbers from 0, int64 [n]."""
        return np.unique(self.user, return_inverse=True)[1]


ExclusionCounts = Counter[str]
"""Number of excluded decisions by reason."""


@dataclass(frozen=True)
class MatureDecisions:
    """Decisions whose attribution window has ended.

    rounds : oldest first
    excluded : number of excluded decisions by reason
    newest_s : time of the newest decision; minus infinity if there are none
    """

    rounds: list[LoggedDecisions]
    excluded: ExclusionCounts
    newest_s: float


def count_fresh(
    folders: Sequence[Path],
    options: PolicySettings,
    *,
    after_s: float,
    until_s: float,
    bound: float | None = None,
) -> int:
    """Number of mature, explored decisions later than `after_s`. Parameters as in `read_rounds`, but older
    folders are not read.
    """
    count = 0
    for file in reversed(_existing_files(folders, "decisions")):
        if _newest_s(file) < after_s - DISORDER_S:
            break
        rows = _read_decisions(file, options.actions, options.bound if bound is None else bound, until_s)
        count += sum(row.explored and row.at_s > after_s for row in rows)
    return count


def read_rounds(
    folders: Sequence[Path],
    options: PolicySettings,
    rewards: Rewards,
    *,
    until_s: float,
    bound: float | None = None,
) -> MatureDecisions:
    """The mature decisions of a policy or of exploration, in rounds.

    A round is a stretch of time. It is at least `round_s` long and has at least `round_decisions` explored
    decisions; the newest one ends at `until_s`. There are at most `rounds` of them, and the oldest may be
    shorter. The rounds do not depend on how often `recray collect` ran. The reward of a decision is the sum
    of its outcomes, whichever folder these are in.

    folders : of `recray collect`, oldest first
    until_s : later decisions wait for their outcomes
    bound : required bound of the decisions; None: `options.bound`
    """
    rows, cuts, first = _read_recent(folders, options, options.bound if bound is None else bound, until_s)
    recent = rows[: cuts[-1]]
    outcome_files = _existing_files(folders[max(first - 1, 0) :], "outcomes")
    reward_of, shown = _sum_outcomes(recent, outcome_files, rewards, shown_only=options.shown_only)
    if options.shown_only:
        recent = [
            row if row.reason or row.request_id in shown else replace(row, reason="not reported as shown")
            for row in recent
        ]
        rows = [*recent, *rows[len(recent) :]]
    excluded = ExclusionCounts(row.reason for row in recent if row.reason)
    rounds = [
        [row for row in rows[start:end] if not row.reason]
        for start, end in zip([0, *cuts], cuts, strict=False)
    ]
    return MatureDecisions(
        [_to_log(round_rows[::-1], reward_of) for round_rows in rounds[::-1] if round_rows],
        excluded,
        rows[0].at_s if rows else -math.inf,
    )


@dataclass(frozen=True)
class _Row:
    """A decision of a folder; `reason`: why it is excluded, empty if it is not."""

    at_s: float
    request_id: str
    items: list[str]
    reason: str
    values: Mapping[str, Any]

    @property
    def explored(self) -> bool:
        return not self.reason and self.values["log_density"] is not None


def _read_recent(
    folders: Sequence[Path], options: PolicySettings, bound: float, until_s: float
) -> tuple[list[_Row], list[int], int]:
    """Decisions, newest first, as far back as the rounds need; where the rounds end in them; and the index of
    the oldest folder that was read.
    """
    rows: list[_Row] = []
    cuts: list[int] = []
    first = len(folders)
    for index, folder in reversed(list(enumerate(folders))):
        file = folder / "decisions.parquet"
        if not file.exists():
            continue
        rows += _read_decisions(file, options.actions, bound, until_s)
        first = index
        if len(rows) >= options.rounds * options.round_decisions:
            rows.sort(key=_sort_key, reverse=True)
            cuts = _cut_rounds(rows, options)
            if len(cuts) == options.rounds and _newest_s(file) < rows[cuts[-1] - 1].at_s - DISORDER_S:
                break
    rows.sort(key=_sort_key, reverse=True)
    cuts = _cut_rounds(rows, options)
    if len(cuts) < options.rounds and (not cuts or cuts[-1] < len(rows)):
        cuts.append(len(rows))
    return rows, cuts, first


def _sum_outcomes(
    rows: Sequence[_Row], files: Sequence[Path], rewards: Rewards, *, shown_only: bool
) -> tuple[dict[str, float], set[str]]:
    """The reward of each decision by request id, from its outcomes in any of the files; and the decisions of
    which an item was reported as shown, where that is asked for (`shown_only`) or changes rewards.
    """
    credits, reward_of = Credits(rewards, limit=None), dict[str, float]()
    for row in rows:
        reward_of[row.request_id] = credits.add_response(row.request_id, row.items)
    needs_reports = bool(rewards.position_bias) or shown_only
    for is_report in (True, False) if needs_reports else (False,):  # positions first, whenever reported
        for outcome in _read_outcomes(files):
            key = outcome["request_id"]
            if key in reward_of and (outcome["outcome"] == SHOWN) == is_report:
                reward_of[key] += credits.add_outcome(
                    key, outcome["outcome"], outcome["item_id"], outcome["value"]
                )
    return reward_of, {key for key in reward_of if credits.was_shown(key)}


def _read_outcomes(files: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["request_id", "outcome", "item_id", "value"]):
            yield from batch.to_pylist()


def _sort_key(row: _Row) -> tuple[float, str]:
    return row.at_s, row.request_id


def _cut_rounds(rows: Sequence[_Row], options: PolicySettings) -> list[int]:
    """The ends of complete rounds in rows, newest first."""
    cuts, start, explored = [], 0, 0
    for index, row in enumerate(rows):
        explored += row.explored
        if explored >= options.round_decisions and rows[start].at_s - row.at_s >= options.round_s:
            cuts.append(index + 1)
            start, explored = index + 1, 0
            if len(cuts) == options.rounds:
                break
    return cuts


def _newest_s(file: Path) -> float:
    """Time of the last decision of a file."""
    newest = pc.max(pq.read_table(file, columns=["timestamp"])["timestamp"]).as_py()
    return -math.inf if newest is None else float(newest.timestamp())


def digest(rounds: Sequence[LoggedDecisions]) -> str:
    """SHA-256 of the decisions, in hexadecimal."""
    sha = hashlib.sha256()
    for log in rounds:
        for values in vars(log).values():
            sha.update(
                np.ascontiguousarray(values).tobytes()
                if values.dtype != object
                else "\0".join(map(str, values)).encode()
            )
    return sha.hexdigest()


def _existing_files(folders: Sequence[Path], kind: str) -> list[Path]:
    return [file for folder in folders if (file := folder / f"{kind}.parquet").exists()]


def _read_decisions(file: Path, actions: tuple[str, ...], bound: float, until_s: float) -> list[_Row]:
    rows = []
    for batch in pq.ParquetFile(file).iter_batches(
        columns=["request_id", "user_id", "timestamp", "items", "bundle", "more"]
    ):
        for row in batch.to_pylist():
            decision = json.loads(row["more"] or "{}").get("decision")
            at_s = row["timestamp"].timestamp()
            if decision is None or at_s > until_s:
                continue
            values = {"user_id": row["user_id"], "bundle": row["bundle"], **decision}
            rows.append(
                _Row(
                    at_s, row["request_id"], row["items"], _exclusion_reason(decision, actions, bound), values
                )
            )
    return rows


def _exclusion_reason(decision: Mapping[str, Any], actions: tuple[str, ...], bound: float) -> str:
    """Why a logged decision is excluded; empty if it is not."""
    if not decision.keys() >= REQUIRED_FIELDS:
        return "without " + ", ".join(sorted(REQUIRED_FIELDS - decision.keys()))
    if tuple(decision["actions"]) != actions or decision.get("bound", 1.0) != bound:
        return "of other controls or another bound"
    if [len(decision[name]) for name in ("observation", "mean", "action")] != [
        len(OBSERVED),
        len(actions),
        len(actions),
    ]:
        return "observed by another version of recray"
    return ""


def _to_log(rows: list[_Row], reward_of: dict[str, float]) -> LoggedDecisions:
    def column(name: str) -> np.ndarray:
        return np.array([row.values[name] for row in rows])

    return LoggedDecisions(
        column("observation").astype(np.float32),
        column("mean").astype(np.float32),
        column("action").astype(np.float32),
        np.array([np.nan if (density := row.values["log_density"]) is None else density for row in rows]),
        column("sigma").astype(np.float64),
        np.array([reward_of[row.request_id] for row in rows]),
        np.array([row.values["user_id"] or row.request_id for row in rows]),
        column("bundle"),
        column("policy"),
    )


def filter_usable(
    log: LoggedDecisions, bundle_digest: str, policies: set[str]
) -> tuple[LoggedDecisions, ExclusionCounts]:
    """The usable decisions, and the number of the others by reason. Parameters as in `require_usable`, but
    nothing is raised.
    """
    finite = (
        np.isfinite(log.observation).all(1) & np.isfinite(log.action).all(1) & np.isfinite(log.mean).all(1)
    )
    recomputed = np.full(len(log), np.nan)
    explored = ~np.isnan(log.log_density) & (log.sigma > 0)
    impossible = explored & np.isinf(log.log_density)
    is_computable = finite & explored & ~impossible
    recomputed[is_computable] = log_density(
        log.action[is_computable], log.mean[is_computable], log.sigma[is_computable, None]
    )
    reasons = {
        OTHER_BUNDLE: log.bundle != bundle_digest,
        "of an unknown policy": ~np.isin(log.policy, sorted(policies)),
        NOT_EXPLORED: ~explored,
        "not finite": ~finite,
        "reward is not finite": ~np.isfinite(log.reward),
        "of propensity zero or infinite": impossible,
        "density is not that of the action": np.abs(recomputed - log.log_density) > 1e-3,
    }

    usable, excluded = np.ones(len(log), bool), ExclusionCounts()
    for reason, mask in reasons.items():
        if count := int((usable & mask).sum()):
            excluded[reason] = count
        usable &= ~mask
    return log.select(usable), excluded


def require_usable(
    log: LoggedDecisions, bundle_digest: str, policies: set[str]
) -> tuple[LoggedDecisions, ExclusionCounts]:
    """The usable decisions, and the number of the others by reason.

    Raises RefusedError if no decision was explored, if most are of another bundle, or if too few are usable.

    policies : digests of the policies that may have decided, "" for none
    """
    usable, excluded = filter_usable(log, bundle_digest, policies)
    reasons = "; ".join(f"{count} {reason}" for reason, count in excluded.items())
    if excluded[NOT_EXPLORED] and not (~np.isnan(log.log_density) & (log.sigma > 0)).any():
        raise RefusedError(
            "no decision of this log was explored: it has no information on other actions",
            "set policy.exploration_scale above 0 for a share of users",
        )
    if excluded[OTHER_BUNDLE] > len(log) / 2:
        raise RefusedError(
            f"most of this log is of another bundle: {reasons}", "evaluate on decisions of this bundle"
        )
    if len(usable) < MIN_DECISIONS:
        raise RefusedError(
            f"{len(usable)} of {len(log)} decisions are usable, at least {MIN_DECISIONS} are needed: "
            f"{reasons}",
            "wait for more decisions",
        )
    return usable, excluded
