"""HTTP routes of a `Service`, its problem documents, and the limit of bodies. Any ASGI server runs it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, RedirectResponse, Response
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
    ImpressionsRequest,
    ImpressionsResponse,
    ItemsRequest,
    ItemsResponse,
    ListQuery,
    ModelsResponse,
    RecommendRequest,
    RecommendResponse,
    SampleUsersResponse,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    SearchResponse,
    SimilarRequest,
    SimilarResponse,
    UsersResponse,
)
from recray.serving.guard import REQUIRED_SCOPES, Guard
from recray.serving.lists import cache_control, rank_list
from recray.serving.problems import MEDIA_TYPE, FieldError, make_problem, to_field_errors
from recray.serving.service import Service
from recray.serving.traces import trace_app
from recray.version import __version__

CONSOLE = Path(__file__).parent / "console.html"
RETRY_AFTER = {"Retry-After": "1"}
FIELD = re.compile(r"([a-z_]+(?:\.\w+)*): ")  # at the start of an error
READ_S = 10.0  # timeout of a body
MOST_ERRORS = 100  # of a body that are listed
DOCS_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors "
    "'none'",
    "X-Content-Type-Options": "nosniff",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' https: http: data:; "
    "frame-ancestors 'none'",  # pictures of items may be anywhere
    "X-Content-Type-Options": "nosniff",
}


def create_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    limited = BodyLimit(_build_api(service), service.options.max_body_bytes)
    return trace_app(Guard(limited, service.options), service.traces)


def openapi() -> str:
    """The OpenAPI document as JSON, without an endpoint."""
    return json.dumps(_build_api(None).openapi(), indent=2)  # type: ignore[arg-type]


def _build_api(service: Service) -> FastAPI:
    api = FastAPI(
        title="recray",
        version=__version__,
        description="Recommendations from the published run, its model, and the events since.",
        responses=PROBLEMS,
        docs_url=None,
        redoc_url=None,
    )
    api.router.route_class = JsonRoute
    api.add_exception_handler(RequestError, _to_request_problem)
    api.add_exception_handler(UnavailableError, _to_unavailable_problem)
    api.add_exception_handler(RequestValidationError, _to_query_problem)
    api.add_exception_handler(HTTPException, _to_http_problem)
    api.add_exception_handler(Exception, _to_server_problem)
    _add_recommendation_routes(api, service)
    _add_list_route(api, service)
    _add_event_store_routes(api, service)
    _add_item_routes(api, service)
    _add_operation_routes(api, service)
    _add_pages(api)

    describe = api.openapi
    api.openapi = lambda: _add_problems(describe())  # type: ignore[method-assign]
    return api


def _add_recommendation_routes(api: FastAPI, service: Service) -> None:
    tags: list[Any] = ["recommendations"]

    @api.post("/v1/recommend", summary="Recommend items", tags=tags, response_model_exclude_none=True)
    async def recommend(request: RecommendRequest) -> RecommendResponse | UsersResponse:
        """For a user of the event log, a history in the request, an unknown user, or many users at once."""
        if request.users is not None:
            return await service.recommend_users(request)
        return await service.recommend(request)

    @api.post("/v1/score", summary="Score candidates", tags=tags)
    async def score(request: ScoreRequest) -> ScoreResponse:
        """The model's scores of candidate items."""
        return await service.score(request)

    @api.post("/v1/history", summary="Read a user's history", tags=tags)
    async def history(request: HistoryRequest) -> HistoryResponse:
        """The last events behind a user's recommendations, including those since the published run."""
        return await service.history(request)

    @api.post("/v1/similar", summary="Find similar items", tags=tags, response_model_exclude_none=True)
    async def similar(request: SimilarRequest) -> SimilarResponse:
        """The items with the most similar vectors."""
        return await service.catalogue.similar(request)

    @api.post("/v1/search", summary="Find items by text", tags=tags, response_model_exclude_none=True)
    async def search(request: SearchRequest) -> SearchResponse:
        """By a part of their title or id."""
        return await service.catalogue.search(request)

    @api.get("/v1/users", summary="Name a few users to look at", tags=tags)
    async def users() -> SampleUsersResponse:
        """Users with a history, the same ones for a run."""
        return await service.catalogue.sample_users()


def _add_list_route(api: FastAPI, service: Service) -> None:
    headers = {name: {"schema": {"type": "string"}} for name in ("ETag", "Cache-Control")}
    responses: Any = {200: {"headers": headers}, 304: {"description": "The list is the one that you have."}}

    @api.get(
        "/v1/lists/{user_id:path}",
        summary="Read a user's list",
        tags=["recommendations"],
        response_model_exclude_none=True,
        responses=responses,
    )
    async def read_list(
        request: Request, user_id: str, query: Annotated[ListQuery, Query()]
    ) -> RecommendResponse:
        """As /v1/recommend, for clients that cache: an ETag, and 304 for a list that the client has. Such a
        response is no impression.
        """
        response, tag, has_it = await rank_list(service, user_id, query, request.headers.get("if-none-match"))
        sent_headers = {"ETag": tag, "Cache-Control": cache_control(service.options.list_cache_s, response)}
        if has_it:
            return Response(status_code=304, headers=sent_headers)  # type: ignore[return-value]
        content = response.model_dump_json(exclude_none=True)
        return Response(content, media_type="application/json", headers=sent_headers)  # type: ignore[return-value]


def _add_event_store_routes(api: FastAPI, service: Service) -> None:
    tags: list[Any] = ["event store"]

    @api.post("/v1/events", summary="Log events of a user", tags=tags)
    async def events(request: EventsRequest) -> EventsResponse:
        """On disk when it responds; the user's next recommendations include them."""
        return await service.intake.events(request)

    @api.post("/v1/feedback", summary="Log an outcome of a response", tags=tags)
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:
        """On disk when it responds, after the response that it is about."""
        return await service.intake.feedback(request)

    @api.post("/v1/impressions", summary="Log which items of a response were shown", tags=tags)
    async def impressions(request: ImpressionsRequest) -> ImpressionsResponse:
        """On disk when it responds. A page may report again while the user scrolls: each item counts once."""
        return await service.intake.impressions(request)

    @api.delete("/v1/users/{user_id:path}", summary="Forget a user", tags=tags)
    async def forget(user_id: str) -> ForgetResponse:
        """From now on nothing is stored of the user, and responses are those of an unknown user. `recray
        forget` erases the user from files.
        """
        return await service.intake.forget(user_id)


def _add_item_routes(api: FastAPI, service: Service) -> None:
    tags: list[Any] = ["items"]

    @api.put("/v1/items", summary="Change items", tags=tags)
    async def change_items(request: ItemsRequest) -> ItemsResponse:
        """Availability and attributes, or new items, without a nightly run: all of the request or nothing. A
        change holds until the next one of the item, or until it is deleted; filters, rules and titles use it.
        Vectors of items that the model was trained with stay.
        """
        return await service.catalogue.change_items(request)

    @api.delete("/v1/items/{item_id:path}", summary="Drop the changes of an item", tags=tags)
    async def restore_item(item_id: str) -> ItemsResponse:
        """The item is as in the item table of the published run again."""
        return await service.catalogue.restore_item(item_id)


def _add_operation_routes(api: FastAPI, service: Service) -> None:
    tags: list[Any] = ["operation"]

    @api.get("/v1/models", summary="Show what is served", tags=tags)
    async def models() -> ModelsResponse:
        """Bundle, dataset and snapshot of the responses."""
        return service.models()

    @api.get("/healthz", summary="Check that the replica is alive", tags=tags)
    async def health() -> Health:
        """Responds as long as the process runs."""
        return Health(status="ok", as_of=service.state.date)

    @api.get("/readyz", summary="Check that all parts are available", tags=tags)
    async def ready() -> Health:
        """503 while batch recommendations or the event store are unavailable. Fallbacks serve meanwhile, and
        responses name the parts in `degraded`.
        """
        if unavailable := service.unavailable_parts():
            raise UnavailableError(
                f"unavailable: {', '.join(unavailable)}", "fallbacks serve the requests; see recray's log"
            )
        return Health(status="ok", as_of=service.state.date)


def _add_pages(api: FastAPI) -> None:
    console_page = CONSOLE.read_bytes()

    @api.get("/", include_in_schema=False)
    async def start() -> Response:
        return RedirectResponse("console")

    @api.get("/console", include_in_schema=False)
    async def console() -> Response:
        return Response(console_page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        names: Any = {
            "swagger_js_url": "docs/swagger-ui-bundle.js",
            "swagger_css_url": "docs/swagger-ui.css",
            "swagger_favicon_url": "docs/favicon.png",
        }
        page = get_swagger_ui_html(openapi_url="openapi.json", title="recray", **names)
        return Response(page.body, media_type="text/html", headers=DOCS_HEADERS)

    # after the page of the same path
    static = str(resources.files("fastapi_offline") / "static")
    api.mount("/docs", StaticFiles(directory=static), name="docs")


def _add_problems(document: dict[str, Any]) -> dict[str, Any]:
    """Add to the OpenAPI document what FastAPI cannot express: the media type of problem documents, and the
    API keys.
    """
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "required with `serve.keys`"}
    }
    for name, path in document["paths"].items():
        if name in REQUIRED_SCOPES:
            for operation in path.values():
                operation["security"] = [{"key": []}, {}]
                operation["description"] += f" Scope: {REQUIRED_SCOPES[name]}."
        for operation in path.values():
            for status, response in operation["responses"].items():
                if status >= "400" and "application/json" in response.get("content", {}):
                    response["content"][MEDIA_TYPE] = response["content"].pop("application/json")
    return document


class JsonRoute(APIRoute):
    """A route whose handler takes a pydantic model, the body, and returns one.

    It bypasses FastAPI between body and handler, which costs more than a look-up of batch recommendations.
    FastAPI still describes the route.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.body_field is None:
            return super().get_route_handler()
        model: Any = self.body_field.field_info.annotation
        respond = self.endpoint

        async def handle(request: Request) -> Response:
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":  # forms of web pages cannot send it
                return make_problem(
                    415, "the body is not application/json", "send Content-Type: application/json"
                )
            if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                return make_problem(
                    415,
                    "the body is encoded",
                    "send it without Content-Encoding",
                    headers={"Accept-Encoding": "identity"},
                )
            try:
                body = model.model_validate_json(await request.body(), strict=True)
            except ValidationError as error:
                if error.error_count() > MOST_ERRORS:
                    return make_problem(422, f"the body has {error.error_count()} errors", "see /docs")
                errors = error.errors(include_url=False, include_context=False, include_input=False)
                return _to_invalid_problem(errors)
            return Response(
                (await respond(body)).model_dump_json(exclude_none=self.response_model_exclude_none),
                media_type="application/json",
            )

        return handle


def _to_request_problem(_: Request, error: Any) -> JSONResponse:
    field = FIELD.match(error.message)
    errors = (
        [] if field is None else [FieldError(field=f"body.{field[1]}", problem=error.message[field.end() :])]
    )
    return make_problem(404 if isinstance(error, UnknownItemError) else 422, error.message, error.fix, errors)


def _to_unavailable_problem(_: Request, error: Any) -> JSONResponse:
    return make_problem(503, error.message, error.fix, headers=RETRY_AFTER)


def _to_invalid_problem(errors: Sequence[Any]) -> JSONResponse:
    fields = to_field_errors(errors)
    detail = "; ".join(f"{error.field}: {error.problem}" for error in fields[:5])
    return make_problem(422, detail, "see /docs", fields)


def _to_query_problem(_: Request, error: Any) -> JSONResponse:
    return _to_invalid_problem([{**each, "loc": each["loc"][1:]} for each in error.errors()])


def _to_http_problem(_: Request, error: Any) -> JSONResponse:
    return make_problem(error.status_code, str(error.detail), headers=error.headers)


def _to_server_problem(_: Request, error: Exception) -> JSONResponse:
    return make_problem(500, "the endpoint failed", "see its log")


class BodyLimit:
    """ASGI middleware: refuses a body that is too large before it is read completely, or that is late."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        body, is_complete = b"", False
        try:
            async with asyncio.timeout(READ_S):
                while not is_complete and len(body) <= self.max_bytes:
                    message = await receive()
                    if message["type"] != "http.request":
                        return  # the client disconnected
                    body += message.get("body", b"")
                    is_complete = not message.get("more_body", False)
        except TimeoutError:
            refusal = make_problem(408, f"the body did not arrive within {READ_S:g} s", "send it at once")
            await refusal(scope, receive, send)
            return
        if len(body) > self.max_bytes:
            refusal = make_problem(
                413,
                f"the body is larger than {self.max_bytes} bytes",
                "send less, or raise serve.max_body_bytes",
            )
            await refusal(scope, receive, send)
            return
        await self.app(scope, _replay_body(body, receive), send)


def _replay_body(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Receives a body that was read before, then the server's messages."""
    was_sent = False

    async def receive_body() -> Message:
        nonlocal was_sent
        if was_sent:
            return await receive()
        was_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body
