"""OpenTelemetry traces of requests, where they are asked for: one span a request, one for each wait for the log and for the model.

Where they go is what the standard variables say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, …). No span names a user.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import NoOpTracer, Tracer

from recray.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from starlette.types import ASGIApp

VARIABLES = "OTEL_"
SECRET = "HEADERS"  # in the name of a variable that may hold a token
QUIET: dict[str, Any] = {"record_exception": False, "set_status_on_exception": False}  # what an exception says may name a user


def provider(share: float) -> TracerProvider | None:
    """What makes and sends spans: of this share of the requests, and of those that came with a sampled trace; None for none.

    Raises SettingsError where recray was installed without traces.
    """
    if not share:
        return None
    try:
        import opentelemetry.instrumentation.asgi  # noqa: F401
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError:
        raise SettingsError("serve.traces needs the OpenTelemetry exporter", "pip install recray[traces]") from None
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    named = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "recray")})
    made = TracerProvider(sampler=ParentBasedTraceIdRatio(share), resource=named)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def tracer(made: TracerProvider | None) -> Tracer:
    """For spans within a request; one that does nothing where there are no traces."""
    return NoOpTracer() if made is None else made.get_tracer("recray")


def traced(app: ASGIApp, made: TracerProvider | None) -> ASGIApp:
    """The application with a span around each request, which goes on with the caller's trace (`traceparent`)."""
    if made is None:
        return app
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    wrapped: ASGIApp = OpenTelemetryMiddleware(app, tracer_provider=made, exclude_spans=["send", "receive"], excluded_urls="healthz,readyz")
    return wrapped
