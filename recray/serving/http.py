"""HTTP in front of a `Service`: the routes, the problem documents, and the limit on what is read. Any ASGI server runs it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recray.errors import RequestError, UnavailableError, UnknownItemError
from recray.serving.api import (
    PROBLEMS,
    EventsRequest,
    EventsResponse,
    FeedbackRequest,
    FeedbackResponse,
    ForgetResponse,
    Health,
    HistoryRequest,
    HistoryResponse,
    ModelsResponse,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
    SimilarRequest,
    SimilarResponse,
)
from recray.serving.guard import RIGHTS, Guard
from recray.serving.problems import MEDIA_TYPE, FieldError, field_errors, problem
from recray.serving.service import Service
from recray.serving.traces import traced
from recray.version import __version__

RETRY_AFTER = {"Retry-After": "1"}
FIELD = re.compile(r"([a-z_]+(?:\.\w+)*): ")  # that an error begins with
READ_S = 10.0  # for a body to come
MOST_ERRORS = 100  # of a body, that are told one by one
DOCS_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'", "X-Content-Type-Options": "nosniff"}


def create_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    return traced(Guard(Limit(_routes(service), service.options.max_body_bytes), service.options), service.traces)


def openapi() -> str:
    """The OpenAPI document as JSON, without an endpoint."""
    return json.dumps(_routes(None).openapi(), indent=2)  # type: ignore[arg-type]


def _routes(service: Service) -> FastAPI:
    api = FastAPI(
        title="recray",
        version=__version__,
        description="Recommendations from the published night, the model behind it, and what users did since.",
        responses=PROBLEMS,
        docs_url=None,
        redoc_url=None,
    )
    api.router.route_class = JsonRoute
    api.add_exception_handler(RequestError, _refused)
    api.add_exception_handler(UnavailableError, _unavailable)
    api.add_exception_handler(HTTPException, _http)
    api.add_exception_handler(Exception, _broken)

    @api.post("/v1/recommend", summary="Recommend items", tags=["answers"], response_model_exclude_none=True)
    async def recommend(request: RecommendRequest) -> RecommendResponse:
        """For a user of the event log, for a history sent along, or for somebody unknown."""
        return await service.recommend(request)

    @api.post("/v1/score", summary="Score candidates", tags=["answers"])
    async def score(request: ScoreRequest) -> ScoreResponse:
        """What the model thinks of items that were found elsewhere."""
        return await service.score(request)

    @api.post("/v1/history", summary="What is known of a user", tags=["answers"])
    async def history(request: HistoryRequest) -> HistoryResponse:
        """The last events that answers are read from, those that the night does not know yet among them."""
        return await service.history(request)

    @api.post("/v1/similar", summary="Find similar items", tags=["answers"], response_model_exclude_none=True)
    async def similar(request: SimilarRequest) -> SimilarResponse:
        """Items that the model takes for alike."""
        return await service.similar(request)

    @api.post("/v1/events", summary="Tell what a user did", tags=["log"])
    async def events(request: EventsRequest) -> EventsResponse:
        """On disk when it answers; the next recommendation for the user knows of it."""
        return await service.intake.events(request)

    @api.post("/v1/feedback", summary="Tell what came of an answer", tags=["log"])
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:
        """On disk when it answers, after the answer that it is about."""
        return await service.intake.feedback(request)

    @api.delete("/v1/users/{user_id}", summary="Forget a user", tags=["log"])
    async def forget(user_id: str) -> ForgetResponse:
        """From now on nothing is kept of what the user does, and answers are those for nobody. `recray forget` drops what lies in files."""
        return await service.intake.forget(user_id)

    @api.get("/v1/models", summary="What is served", tags=["operation"])
    async def models() -> ModelsResponse:
        """Bundle, dataset and snapshot behind the answers."""
        return service.models()

    @api.get("/healthz", summary="Is the replica alive", tags=["operation"])
    async def health() -> Health:
        """Answers as long as the process does."""
        return Health(status="ok", night=service.state.date)

    @api.get("/readyz", summary="Is everything there", tags=["operation"])
    async def ready() -> Health:
        """503 while nightly lists or the log are away: then others answer, and say so in `degraded`."""
        away = service.unavailable_parts()
        if away:
            raise UnavailableError(f"away: {', '.join(away)}", "requests are answered all the same; see recray's log")
        return Health(status="ok", night=service.state.date)

    page = (Path(__file__).parent / "console.html").read_bytes()

    @api.get("/console", include_in_schema=False)
    async def console() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        names: Any = {
            "swagger_js_url": "docs/swagger-ui-bundle.js",
            "swagger_css_url": "docs/swagger-ui.css",
            "swagger_favicon_url": "docs/favicon.png",
        }
        return Response(get_swagger_ui_html(openapi_url="openapi.json", title="recray", **names).body, media_type="text/html", headers=DOCS_HEADERS)

    api.mount("/docs", StaticFiles(directory=str(resources.files("fastapi_offline") / "static")), name="docs")  # after its page

    described = api.openapi
    api.openapi = lambda: _with_problems(described())  # type: ignore[method-assign]
    return api


def _with_problems(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with refusals under their own media type, and with the keys that may be asked for, as FastAPI cannot be told."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "where `serve.keys` names any"}}
    for name, path in document["paths"].items():
        if name in RIGHTS:
            for operation in path.values():
                operation["security"] = [{"key": []}, {}]
                operation["description"] += f" Scope: {RIGHTS[name]}."
        for operation in path.values():
            for status, response in operation["responses"].items():
                if status >= "400" and "application/json" in response.get("content", {}):
                    response["content"][MEDIA_TYPE] = response["content"].pop("application/json")
    return document


class JsonRoute(APIRoute):
    """A route whose handler takes one model, the body, and returns one: read and written by pydantic, with nothing in between.

    FastAPI still describes it; its own way from a body to a handler costs more than a nightly look-up.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.body_field is None:
            return super().get_route_handler()
        model: Any = self.body_field.field_info.annotation
        answer = self.endpoint

        async def handle(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return problem(415, "the body is not application/json", "send Content-Type: application/json")  # no form of a web page can
            if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                return problem(415, "the body is encoded", "send it as it is, without Content-Encoding", headers={"Accept-Encoding": "identity"})
            try:
                asked = model.model_validate_json(await request.body(), strict=True)
            except ValidationError as error:
                if error.error_count() > MOST_ERRORS:
                    return problem(422, f"the body has {error.error_count()} errors", "see /docs")
                return _invalid(error.errors(include_url=False, include_context=False, include_input=False))
            return Response((await answer(asked)).model_dump_json(exclude_none=self.response_model_exclude_none), media_type="application/json")

        return handle


def _refused(_: Request, error: Any) -> JSONResponse:
    field = FIELD.match(error.what)
    errors = [] if field is None else [FieldError(field=f"body.{field[1]}", problem=error.what[field.end() :])]
    return problem(404 if isinstance(error, UnknownItemError) else 422, error.what, error.fix, errors)


def _unavailable(_: Request, error: Any) -> JSONResponse:
    return problem(503, error.what, error.fix, headers=RETRY_AFTER)


def _invalid(errors: Sequence[Any]) -> JSONResponse:
    found = field_errors(errors)
    return problem(422, "; ".join(f"{one.field}: {one.problem}" for one in found[:5]), "see /docs", found)


def _http(_: Request, error: Any) -> JSONResponse:
    return problem(error.status_code, str(error.detail), headers=error.headers)


def _broken(_: Request, error: Exception) -> JSONResponse:
    return problem(500, "the endpoint failed", "see its log")


class Limit:
    """ASGI middleware: a body that is too large is refused before all of it was read, and one that does not come is not waited for."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        try:
            async with asyncio.timeout(READ_S):
                while more and len(body) <= self.max_bytes:
                    message = await receive()
                    if message["type"] != "http.request":
                        return  # the client went away
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            await problem(408, f"the body did not come within {READ_S:g} seconds", "send it at once")(scope, receive, send)
            return
        if len(body) > self.max_bytes:
            refusal = problem(413, f"the body is larger than {self.max_bytes} bytes", "send less, or raise serve.max_body_bytes")
            await refusal(scope, receive, send)
            return
        await self.app(scope, _once(body, receive), send)


def _once(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A body that was read, then whatever the server still says."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
