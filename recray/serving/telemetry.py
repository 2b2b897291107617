"""What the endpoint counts, on Ray's metrics port (Prometheus adds `ray_` to the names).

Requests only add to plain numbers; the watch hands them to Ray about once a second, since Ray's own counters cost more than a look-up.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

HOUR_S = 3600.0
WAITING = 10_000  # values of one kind between two flushes; the last ones stay
LATENCY_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
BATCH = (1, 2, 4, 8, 16, 32, 64)
LAG_S = (1, 10, 60, 600, 3600, 6 * 3600, 86_400)


@dataclass
class Telemetry:
    """Numbers since the last `flush`; `flush` of this class drops them."""

    answers: Tally[tuple[str, str, str]] = field(default_factory=Tally)  # source, bundle, arm
    degraded: Tally[str] = field(default_factory=Tally)
    refused: Tally[str] = field(default_factory=Tally)
    kept: Tally[str] = field(default_factory=Tally)
    latency_ms: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=WAITING))
    batches: deque[int] = field(default_factory=lambda: deque(maxlen=WAITING))
    lags_s: deque[float] = field(default_factory=lambda: deque(maxlen=WAITING))
    actions: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=WAITING))  # control, -1 to 1
    shown: set[Any] = field(default_factory=set)
    _since: float = field(default_factory=time.monotonic)

    def answered(self, source: str, bundle: str, arm: str, degraded: Iterable[str], ms: float, items: Iterable[Any]) -> None:
        """An answer went out."""
        self.answers[source, bundle, arm] += 1
        self.degraded.update(degraded)
        self.latency_ms.append((source, ms))
        self.shown.update(items)

    def coverage(self, items: int) -> float:
        """Share of the catalogue that was shown in the running hour."""
        found = min(len(self.shown) / max(items, 1), 1.0)
        if time.monotonic() > self._since + HOUR_S:
            self.shown, self._since = set(), time.monotonic()
        return found

    def flush(self, state: dict[str, float], serving: dict[str, str]) -> None:
        """Hand over what was counted. `state`: gauges as they are now; `serving`: labels of what is served."""
        self.answers, self.degraded, self.refused, self.kept = Tally(), Tally(), Tally(), Tally()
        self.latency_ms, self.batches, self.lags_s, self.actions = (deque(maxlen=WAITING) for _ in range(4))


class RayTelemetry(Telemetry):
    """Into Ray's metrics; for a process that is connected to Ray."""

    def __init__(self) -> None:
        super().__init__()
        from ray.util.metrics import Counter, Gauge, Histogram

        self._answers = Counter("recray_answers_total", "answers of /v1/recommend", ("source", "bundle", "arm"))
        self._degraded = Counter("recray_degraded_total", "answers for which a part was away", ("part",))
        self._refused = Counter("recray_refused_total", "requests that were refused", ("why",))
        self._kept = Counter("recray_kept_total", "entries of the log that were acknowledged", ("kind",))
        self._latency = Histogram("recray_latency_ms", "of answers of /v1/recommend, in the replica", list(LATENCY_MS), ("source",))
        self._batch = Histogram("recray_batch_size", "requests that the model answered in one pass", list(BATCH))
        self._lag = Histogram("recray_feedback_lag_s", "from an event or outcome to its acknowledgement", list(LAG_S))
        self._action = Gauge("recray_action", "mean of what was decided about the attention in the last second, -1 to 1", ("control",))
        self._gauges = {
            "waiting": Gauge("recray_waiting", "requests that wait for the model"),
            "coverage": Gauge("recray_coverage", "share of the catalogue that was shown in the running hour"),
            "lost": Gauge("recray_decisions_lost", "decisions that the log could not take, since the start"),
            "set_aside": Gauge("recray_outcomes_set_aside", "outcomes whose decision nobody knew, since the start"),
            "away": Gauge("recray_parts_away", "parts that do not answer as they should"),
            "night_age_s": Gauge("recray_night_age_s", "since the as-of of the night that is served"),
        }
        self._serving = Gauge("recray_serving", "1 for what is served", ("night", "bundle", "challenger"))
        self._served: dict[str, str] = {}

    def flush(self, state: dict[str, float], serving: dict[str, str]) -> None:
        answers, degraded, refused, kept = self.answers, self.degraded, self.refused, self.kept
        latency_ms, batches, lags_s, actions = self.latency_ms, self.batches, self.lags_s, self.actions
        super().flush(state, serving)  # first: what comes meanwhile is the next one's
        for (source, bundle, arm), count in list(answers.items()):
            self._answers.inc(count, {"source": source, "bundle": bundle, "arm": arm})
        for counter, label, tally in (
            (self._degraded, "part", degraded), (self._refused, "why", refused), (self._kept, "kind", kept)
        ):  # fmt: skip
            for name, count in list(tally.items()):
                counter.inc(count, {label: name})
        for source, ms in list(latency_ms):
            self._latency.observe(ms, {"source": source})
        for size in list(batches):
            self._batch.observe(size)
        for lag in list(lags_s):
            self._lag.observe(max(lag, 0.0))
        decided: dict[str, list[float]] = {}
        for control, value in list(actions):
            decided.setdefault(control, []).append(value)
        for control, values in decided.items():
            self._action.set(sum(values) / len(values), {"control": control})
        for name, gauge in self._gauges.items():
            gauge.set(state[name])
        if self._served and self._served != serving:
            self._serving.set(0, self._served)
        self._serving.set(1, serving)
        self._served = serving
