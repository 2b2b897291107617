"""Metrics of the endpoint, on Ray's metrics port (Prometheus adds `ray_` to the names).

A request only adds to plain numbers, because Ray's counters cost more than a look-up. The watch passes them
to Ray about once a second.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

HOUR_S = 3600.0
MOST_VALUES = 10_000  # of one kind between two flushes; the last ones are kept
LATENCY_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
BATCH = (1, 2, 4, 8, 16, 32, 64)
LAG_S = (1, 10, 60, 600, 3600, 6 * 3600, 86_400)


@dataclass
class Telemetry:
    """Numbers since the last `flush`, which resets them."""

    responses: Tally[tuple[str, str, str]] = field(default_factory=Tally)  # source, bundle, variant
    degraded: Tally[str] = field(default_factory=Tally)
    refused: Tally[str] = field(default_factory=Tally)
    kept: Tally[str] = field(default_factory=Tally)
    latency_ms: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=MOST_VALUES))
    batches: deque[int] = field(default_factory=lambda: deque(maxlen=MOST_VALUES))
    lags_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_VALUES))
    actions: deque[tuple[str, float]] = field(
        default_factory=lambda: deque(maxlen=MOST_VALUES)
    )  # control, -1 to 1
    shown: set[Any] = field(default_factory=set)
    _since: float = field(default_factory=time.monotonic)

    def count_response(
        self, source: str, bundle: str, variant: str, degraded: Iterable[str], ms: float, items: Iterable[Any]
    ) -> None:
        """Count a response of /v1/recommend."""
        self.responses[source, bundle, variant] += 1
        self.degraded.update(degraded)
        self.latency_ms.append((source, ms))
        self.shown.update(items)

    def measure_coverage(self, items: int) -> float:
        """Share of the catalogue that was recommended in the running hour."""
        coverage = min(len(self.shown) / max(items, 1), 1.0)
        if time.monotonic() > self._since + HOUR_S:
            self.shown, self._since = set(), time.monotonic()
        return coverage

    def flush(self, state: dict[str, float], serving: dict[str, str]) -> None:
        """Pass the numbers on, and reset them.

        state : current values of the gauges
        serving : labels of the deployment
        """
        self.responses, self.degraded, self.refused, self.kept = Tally(), Tally(), Tally(), Tally()
        self.latency_ms, self.batches, self.lags_s, self.actions = (
            deque(maxlen=MOST_VALUES) for _ in range(4)
        )


class RayTelemetry(Telemetry):
    """Telemetry in Ray's metrics, for a process that is connected to Ray."""

    def __init__(self) -> None:
        super().__init__()
        from ray.util.metrics import Counter, Gauge, Histogram

        self._responses = Counter(
            "recray_answers_total", "responses of /v1/recommend", ("source", "bundle", "arm")
        )
        self._degraded = Counter("recray_degraded_total", "responses with an unavailable part", ("part",))
        self._refused = Counter("recray_refused_total", "refused requests", ("why",))
        self._kept = Counter("recray_kept_total", "entries that the event store acknowledged", ("kind",))
        self._latency = Histogram(
            "recray_latency_ms",
            "latency of responses of /v1/recommend, in the replica",
            list(LATENCY_MS),
            ("source",),
        )
        self._batch = Histogram("recray_batch_size", "requests in one pass of the model", list(BATCH))
        self._lag = Histogram(
            "recray_feedback_lag_s", "seconds from an event or outcome to its acknowledgement", list(LAG_S)
        )
        self._action = Gauge(
            "recray_action", "mean of an attention control's action in the last second, -1 to 1", ("control",)
        )
        self._gauges = {
            "waiting": Gauge("recray_waiting", "requests that wait for the model"),
            "coverage": Gauge(
                "recray_coverage", "share of the catalogue that was recommended in the running hour"
            ),
            "lost": Gauge("recray_decisions_lost", "impressions that could not be written, since the start"),
            "set_aside": Gauge(
                "recray_outcomes_set_aside", "outcomes without a known impression, since the start"
            ),
            "away": Gauge("recray_parts_away", "unavailable parts"),
            "run_age_s": Gauge("recray_run_age_s", "seconds since the as-of of the published run"),
        }
        self._serving = Gauge(
            "recray_serving", "1 for the current deployment", ("as_of", "bundle", "challenger")
        )
        self._served: dict[str, str] = {}

    def flush(self, state: dict[str, float], serving: dict[str, str]) -> None:
        responses, degraded, refused, kept = self.responses, self.degraded, self.refused, self.kept
        latency_ms, batches, lags_s, actions = self.latency_ms, self.batches, self.lags_s, self.actions
        super().flush(state, serving)  # first: numbers from now on belong to the next flush
        for (source, bundle, variant), count in list(responses.items()):
            self._responses.inc(count, {"source": source, "bundle": bundle, "arm": variant})
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
        values_by_control: dict[str, list[float]] = {}
        for control, value in list(actions):
            values_by_control.setdefault(control, []).append(value)
        for control, values in values_by_control.items():
            self._action.set(sum(values) / len(values), {"control": control})
        for name, gauge in self._gauges.items():
            gauge.set(state[name])
        if self._served and self._served != serving:
            self._serving.set(0, self._served)
        self._serving.set(1, serving)
        self._served = serving
