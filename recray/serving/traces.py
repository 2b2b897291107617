"""OpenTelemetry traces, with `serve.traces`: spans of a request, and of its waits for event store and model.

The standard variables set the destination (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, …). No span names
a user.
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
SECRET = "HEADERS"  # in the name of a variable that may contain a token
# the text of an exception may name a user
QUIET: dict[str, Any] = {"record_exception": False, "set_status_on_exception": False}


def make_provider(share: float) -> TracerProvider | None:
    """Creates and sends spans of a share of the requests, and of requests with a sampled trace; None for no
    share.

    Raises SettingsError where recray was installed without traces.
    """
    if not share:
        return None
    try:
        import opentelemetry.instrumentation.asgi  # noqa: F401
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError:
        raise SettingsError(
            "serve.traces needs the OpenTelemetry exporter", "pip install recray[traces]"
        ) from None
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    resource = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "recray")})
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(share), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def make_tracer(provider: TracerProvider | None) -> Tracer:
    """A tracer for spans within a request; without traces it does nothing."""
    return NoOpTracer() if provider is None else provider.get_tracer("recray")


def trace_app(app: ASGIApp, provider: TracerProvider | None) -> ASGIApp:
    """The application with a span per request, which continues the caller's trace (`traceparent`)."""
    if provider is None:
        return app
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    result: ASGIApp = OpenTelemetryMiddleware(
        app, tracer_provider=provider, exclude_spans=["send", "receive"], excluded_urls="healthz,readyz"
    )
    return result
