"""A challenger on trial: whom it answers, and when it has failed.

Users are drawn by a hash of the challenger and the user, so that one keeps to a variant for the whole trial and the next trial draws anew.
A trial ends by itself where the challenger's responses fail or take too long, or where its outcomes are worse: three tests, which may be
looked at all the time and together end a trial of equals with probability `LEVEL` at most. All replicas read the same event log, so that they
come to the same decision. Nothing but `ended` decides; the flip is `recray.promotion.end_trial`.
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

LEVEL = 0.05  # of ending where the variants are alike; the three tests take less than it
assert ERRORS + ALONE + LATENCY + WORSE <= LEVEL


def answers(user: str, challenger: str, share: float) -> bool:
    """Whether a challenger answers a user at this share."""
    return float(xxhash.xxh64_intdigest(f"{challenger}\0{user}".encode())) / 2.0**64 < share


@dataclass
class Trial:
    """The trial of a challenger (its run key) at a share of the users, or as a shadow, whose responses nobody sees.

    since_s : when it began; what was logged before is of another trial
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

    def answers(self, user: str | None) -> bool:
        """Whether the challenger answers this user."""
        return user is not None and not self.shadow and answers(user, self.challenger, self.share)

    def read(self, entry: Entry) -> None:
        """Take in an entry of the log: a response to a request of this trial, or an outcome."""
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

    def ended(self) -> str | None:
        """Why the trial has to end; None if it may go on."""
        return self.errors.reason() or self.latency.reason() or self.outcomes.reason()

    def won(self) -> bool:
        """Whether the challenger's outcomes are significantly better."""
        return self.outcomes.is_better()
