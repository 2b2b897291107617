"""An experiment: assignment of users to variants, and automatic roll-back of the challenger.

Users are assigned by a hash of challenger and user: a user keeps a variant during an experiment, and the next
experiment assigns anew. A challenger is rolled back if its error rate or latency is too high, or if its
outcomes are significantly worse. The three tests may be checked continuously; together they end an experiment
of equal variants with probability `LEVEL` at most. All replicas read the same event store, so they come to
the same decision. `find_reason_to_end` decides; `recray.release.end_experiment` rolls back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import xxhash

from recray.events.log import Entry
from recray.events.rewards import Rewards
from recray.serving.health import ERROR_LEVEL, LATENCY_LEVEL, UNPAIRED_ERROR_LEVEL, ErrorTest, LatencyTest
from recray.serving.outcomes import LOSS_LEVEL, OutcomeTest
from recray.serving.sequential import DAY_S

LEVEL = 0.05  # maximum probability of an end with equal variants; sum of the three tests
assert ERROR_LEVEL + UNPAIRED_ERROR_LEVEL + LATENCY_LEVEL + LOSS_LEVEL <= LEVEL


def is_in_share(user: str, challenger: str, share: float) -> bool:
    """Whether a user is in the share of a challenger."""
    return float(xxhash.xxh64_intdigest(f"{challenger}\0{user}".encode())) / 2.0**64 < share


class Labels(TypedDict):
    """Labels of an impression in an experiment.

    trial : the challenger's name
    share : of the users whom it serves
    arm : `champion`, `challenger` or `shadow`, which responded
    """

    trial: str
    share: float
    arm: str


@dataclass
class Experiment:
    """The experiment with a challenger (its run key) at a share of the users, or with shadow traffic.

    since_s : its start; earlier entries belong to another experiment
    rewards : rewards of outcomes
    is_counted : whether a user's requests and outcomes are evaluated
    refused_users : of whom this replica has recorded a refused request
    """

    challenger: str
    share: float
    shadow: bool
    since_s: float = 0.0
    rewards: Rewards = field(default_factory=lambda: Rewards({}, 1.0))
    is_counted: Callable[[str], bool] = lambda user: True
    refused_users: set[str] = field(default_factory=set)
    errors: ErrorTest = field(init=False)
    latency: LatencyTest = field(init=False)
    outcomes: OutcomeTest = field(init=False)

    def __post_init__(self) -> None:
        # with shadow traffic, both variants get each request
        share = 0.5 if self.shadow else min(max(self.share, 1e-6), 1 - 1e-6)
        self.errors, self.latency, self.outcomes = (
            ErrorTest(share),
            LatencyTest(share),
            OutcomeTest(self.share, self.rewards),
        )

    def serves(self, user: str | None) -> bool:
        """Whether the challenger serves this user."""
        return user is not None and not self.shadow and is_in_share(user, self.challenger, self.share)

    def to_labels(self, user: str | None) -> Labels:
        """Labels of an impression, by which `add_entry` recognises it."""
        variant = "shadow" if self.shadow else "challenger" if self.serves(user) else "champion"
        return {"trial": self.challenger, "share": self.share, "arm": variant}

    def add_entry(self, entry: Entry) -> None:
        """Count an entry of the event store: a response of this experiment, or an outcome."""
        body = entry.body
        if entry.kind in ("outcome", "set_aside"):
            if not self.shadow and "request_id" in body and "outcome" in body:
                self.outcomes.add_outcome(
                    body["request_id"], body["outcome"], body.get("item_id"), float(body.get("value", 1.0))
                )
        elif entry.kind == "decision" and (body.get("trial"), body.get("share")) == (
            self.challenger,
            self.share,
        ):
            if entry.user is None or entry.at_s < self.since_s or not self.is_counted(entry.user):
                return
            day = max(int((entry.at_s - self.since_s) / DAY_S), 0) if self.since_s else 0
            if body["arm"] == "shadow":
                if "beside" in body:
                    self._count(entry.user, day, body["beside"], is_challenger=False)
                    self._count(entry.user, day, body, is_challenger=True)
                return
            is_challenger = body["arm"] == "challenger"
            if "model_ms" in body and body.get("listed"):
                self.errors.add_unpaired_response(entry.user, day, failed="model" in body["degraded"])
            elif "model_ms" in body:
                self._count(entry.user, day, body, is_challenger=is_challenger)
            if "asked" not in body:  # else no user saw the response
                self.outcomes.add_response(entry.key, entry.user, body["items"], is_challenger=is_challenger)

    def _count(self, user: str, day: int, body: Mapping[str, Any], *, is_challenger: bool) -> None:
        """Count a response of a model where the other variant would have run its model too."""
        failed = bool(body.get("refused")) or "model" in body["degraded"]
        self.errors.add_response(user, day, is_challenger=is_challenger, failed=failed)
        self.latency.add_response(
            user, day, math.inf if failed else body["model_ms"], is_challenger=is_challenger
        )

    def find_reason_to_end(self) -> str | None:
        """Why the challenger must be rolled back; None if the experiment may continue."""
        return self.errors.find_failure() or self.latency.find_failure() or self.outcomes.find_failure()

    def has_won(self) -> bool:
        """Whether the challenger's outcomes are significantly better."""
        return self.outcomes.is_better()
