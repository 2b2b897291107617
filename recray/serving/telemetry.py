"""Metrics of the endpoint, on Ray's metrics port (Prometheus adds `ray_` to the names).

A request only adds to plain numbers, because Ray's counters cost more than a look-up. The watch passes them
to Ray about once a second.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    stored: Tally[str] = field(default_factory=Tally)
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
        self.responses, self.degraded, self.refused, self.stored = Tally(), Tally(), Tally(), Tally()
        self.latency_ms, self.batches, self.lags_s, self.actions = (
            deque(maxlen=MOST_VALUES) for _ in range(4)
        )


class Metric(NamedTuple):
    """A metric of the endpoint: its kind in Prometheus, what it counts, its labels and, of a histogram, its
    buckets.
    """

    kind: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[int, ...] = ()


METRICS = {
    "recray_answers_total": Metric("counter", "responses of /v1/recommend", ("source", "bundle", "arm")),
    "recray_degraded_total": Metric("counter", "responses with an unavailable part", ("part",)),
    "recray_refused_total": Metric("counter", "refused requests", ("why",)),
    "recray_kept_total": Metric("counter", "entries that the event store acknowledged", ("kind",)),
    "recray_latency_ms": Metric(
        "histogram", "latency of responses of /v1/recommend, in the replica", ("source",), LATENCY_MS
    ),
    "recray_batch_size": Metric("histogram", "requests in one pass of the model", (), BATCH),
    "recray_feedback_lag_s": Metric(
        "histogram", "seconds from an event or outcome to its acknowledgement", (), LAG_S
    ),
    "recray_action": Metric(
        "gauge", "mean of an attention control's action in the last second, -1 to 1", ("control",)
    ),
    "recray_waiting": Metric("gauge", "requests that wait for the model"),
    "recray_coverage": Metric("gauge", "share of the catalogue that was recommended in the running hour"),
    "recray_decisions_lost": Metric("gauge", "impressions that could not be written, since the start"),
    "recray_outcomes_set_aside": Metric("gauge", "outcomes without a known impression, since the start"),
    "recray_parts_away": Metric("gauge", "unavailable parts"),
    "recray_run_age_s": Metric("gauge", "seconds since the as-of of the published run"),
    "recray_serving": Metric("gauge", "1 for the current deployment", ("as_of", "bundle", "challenger")),
}
"""Every metric of the endpoint by its name; the documents list them from here."""

STATE = {
    "waiting": "recray_waiting",
    "coverage": "recray_coverage",
    "lost": "recray_decisions_lost",
    "set_aside": "recray_outcomes_set_aside",
    "away": "recray_parts_away",
    "run_age_s": "recray_run_age_s",
}
"""Value of `Telemetry.flush`'s state -> its gauge."""


class RayTelemetry(Telemetry):
    """Telemetry in Ray's metrics, for a process that is connected to Ray."""

    def __init__(self) -> None:
        super().__init__()
        from ray.util.metrics import Counter, Gauge, Histogram

        makers: dict[str, Callable[..., Any]] = {
            "counter": Counter,
            "gauge": Gauge,
            "histogram": lambda name, text, labels: Histogram(
                name, text, list(METRICS[name].buckets), labels
            ),
        }
        self._metrics: dict[str, Any] = {
            name: makers[metric.kind](name, metric.description, metric.labels)
            for name, metric in METRICS.items()
        }
        self._served: dict[str, str] = {}

    def flush(self, state: dict[str, float], serving: dict[str, str]) -> None:
        responses, degraded, refused, stored = self.responses, self.degraded, self.refused, self.stored
        latency_ms, batches, lags_s, actions = self.latency_ms, self.batches, self.lags_s, self.actions
        super().flush(state, serving)  # first: numbers from now on belong to the next flush
        metrics = self._metrics
        for (source, bundle, variant), count in list(responses.items()):
            labels = {"source": source, "bundle": bundle, "arm": variant}
            metrics["recray_answers_total"].inc(count, labels)
        for counter, label, tally in (
            ("recray_degraded_total", "part", degraded),
            ("recray_refused_total", "why", refused),
            ("recray_kept_total", "kind", stored),
        ):
            for name, count in list(tally.items()):
                metrics[counter].inc(count, {label: name})

        for source, ms in list(latency_ms):
            metrics["recray_latency_ms"].observe(ms, {"source": source})
        for size in list(batches):
            metrics["recray_batch_size"].observe(size)
        for lag in list(lags_s):
            metrics["recray_feedback_lag_s"].observe(max(lag, 0.0))

        values_by_control: dict[str, list[float]] = {}
        for control, value in list(actions):
            values_by_control.setdefault(control, []).append(value)
        for control, values in values_by_control.items():
            metrics["recray_action"].set(sum(values) / len(values), {"control": control})
        for name, gauge in STATE.items():
            metrics[gauge].set(state[name])
        if self._served and self._served != serving:
            metrics["recray_serving"].set(0, self._served)
        metrics["recray_serving"].set(1, serving)
        self._served = serving
