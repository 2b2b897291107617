"""An experiment: which users the challenger serves, and when it is rolled back.

Users are assigned by a hash of the challenger and the user, so that one keeps to a variant for the whole experiment and the next experiment
assigns anew. A challenger is rolled back automatically where its responses fail or take too long, or where its outcomes are significantly worse:
three tests that are valid however often they are looked at, and together end an experiment of equal variants with probability `LEVEL` at most.
All replicas read the same event store, so that they come to the same decision. Nothing but `reason_to_end` decides; the flip is
`recray.promotion.end_trial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import xxhash

from recray.serving.health import ALONE, ERRORS, LATENCY, ErrorTest, LatencyTest
from recray.serving.outcomes import WORSE, OutcomeTest
from recray.serving.sequential import DAY_S
from recray.state.log import Entry
from recray.state.rewards import Rewards

LEVEL = 0.05  # of ending where the variants are equal; the three tests take less than it
assert ERRORS + ALONE + LATENCY + WORSE <= LEVEL


def is_in_share(user: str, challenger: str, share: float) -> bool:
    """Whether a challenger serves a user at this share."""
    return float(xxhash.xxh64_intdigest(f"{challenger}\0{user}".encode())) / 2.0**64 < share


@dataclass
class Experiment:
    """The experiment with a challenger (its run key) at a share of the users, or with shadow traffic, whose responses nobody sees.

    since_s : when it began; what was logged before is of another experiment
    rewards : what outcomes count
    refused : users of whose refused requests this replica has logged one
    counted : whose requests and outcomes it is judged by
    """

    challenger: str
    share: float
    shadow: bool
    since_s: float = 0.0
    rewards: Rewards = field(default_factory=lambda: Rewards({}, 1.0))
    counted: Callable[[str], bool] = lambda user: True
    refused: set[str] = field(default_factory=set)
    errors: ErrorTest = field(init=False)
    latency: LatencyTest = field(init=False)
    outcomes: OutcomeTest = field(init=False)

    def __post_init__(self) -> None:
        share = 0.5 if self.shadow else min(max(self.share, 1e-6), 1 - 1e-6)  # a shadow and the champion are asked the same
        self.errors, self.latency, self.outcomes = ErrorTest(share), LatencyTest(share), OutcomeTest(self.share, self.rewards)

    def serves(self, user: str | None) -> bool:
        """Whether the challenger serves this user."""
        return user is not None and not self.shadow and is_in_share(user, self.challenger, self.share)

    def labels(self, user: str | None) -> dict[str, Any]:
        """What an impression is recorded with, for `read` to know it by."""
        variant = "shadow" if self.shadow else "challenger" if self.serves(user) else "champion"
        return {"trial": self.challenger, "share": self.share, "arm": variant}

    def read(self, entry: Entry) -> None:
        """Take in an entry of the log: a response to a request of this experiment, or an outcome."""
        body = entry.body
        if entry.kind in ("outcome", "set_aside"):
            if not self.shadow and "request_id" in body and "outcome" in body:
                self.outcomes.add_outcome(body["request_id"], body["outcome"], body.get("item_id"), float(body.get("value", 1.0)))
        elif entry.kind == "decision" and (body.get("trial"), body.get("share")) == (self.challenger, self.share):
            if entry.user is None or entry.at_s < self.since_s or not self.counted(entry.user):
                return
            day = max(int((entry.at_s - self.since_s) / DAY_S), 0) if self.since_s else 0
            if body["arm"] == "shadow":
                if "beside" in body:
                    self._judge(entry.user, day, body["beside"], of_challenger=False)
                    self._judge(entry.user, day, body, of_challenger=True)
                return
            of_challenger = body["arm"] == "challenger"
            if "model_ms" in body and body.get("listed"):
                self.errors.read_alone(entry.user, day, failed="model" in body["degraded"])
            elif "model_ms" in body:
                self._judge(entry.user, day, body, of_challenger=of_challenger)
            if "asked" not in body:  # else nobody saw a response
                self.outcomes.add_response(entry.key, entry.user, body["items"], of_challenger=of_challenger)

    def _judge(self, user: str, day: int, body: dict[str, Any], *, of_challenger: bool) -> None:
        """A response by the model, of a variant where the other one would have asked its model too."""
        failed = bool(body.get("refused")) or "model" in body["degraded"]
        self.errors.read(user, day, of_challenger=of_challenger, failed=failed)
        self.latency.read(user, day, math.inf if failed else body["model_ms"], of_challenger=of_challenger)

    def reason_to_end(self) -> str | None:
        """Why the challenger has to be rolled back; None if the experiment may go on."""
        return self.errors.reason() or self.latency.reason() or self.outcomes.reason()

    def has_won(self) -> bool:
        """Whether the challenger's outcomes are significantly better."""
        return self.outcomes.is_better()
