"""Requests and responses of the endpoint, with the examples of its OpenAPI page."""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from recray.dataset.schema import LONGEST_ID
from recray.serving.cursor import MOST_LETTERS
from recray.serving.problems import Problem

Text = Annotated[str, StringConstraints(max_length=200)]
Id = (
    Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
    | Annotated[str, StringConstraints(max_length=LONGEST_ID)]
)
Number = Annotated[float, Field(ge=-3e38, le=3e38, allow_inf_nan=False)]  # the range of float32


FIRST_S = 631_152_000  # the year 1990; a smaller number is hardly a time in seconds
LAST_S = 7_258_118_400  # the year 2200
MOST_EVENTS = 1000
MOST_ITEMS = 10_000
MAX_K = 1000
MOST_USERS = 1000

_DATETIME: TypeAdapter[dt.datetime] = TypeAdapter(dt.datetime)


def _to_utc(value: Any, _: ValidatorFunctionWrapHandler) -> dt.datetime:
    if not isinstance(value, str | dt.datetime):
        raise ValueError("write ISO 8601 as text, 2024-03-01T10:00:00Z")
    moment = _DATETIME.validate_python(value)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    if not 0 <= moment.timestamp() < LAST_S:
        raise ValueError("lies outside 1970 to 2200")
    is_number = isinstance(value, str) and re.fullmatch(r"\s*[-+]?[0-9._]+\s*", value)
    if is_number and moment.timestamp() < FIRST_S:  # digits of a date, or days
        raise ValueError("as seconds since 1970 lies before 1990: write ISO 8601, 2024-03-01T10:00:00Z")
    return moment


Moment = Annotated[dt.datetime, WrapValidator(_to_utc)]


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


Bound = Annotated[int | Number, BeforeValidator(_refuse_bool)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": list(bodies)})


class Event(_Closed):
    """A user's interaction with an item."""

    item_id: Id = Field(description="the item, as in the item table", examples=["85123A"])
    timestamp: Moment | None = Field(
        None, description="when, UTC unless an offset is given; null: at the moment of the request"
    )
    event: Text | None = Field(
        None,
        description="event type; null: data.default_event, or the most frequent one of the log. A type that "
        "the model does not know yet is kept for the next run in /v1/events, and refused elsewhere",
        examples=["purchase"],
    )
    value: Number = Field(1.0, description="rating, quantity, dwell …")


class Range(_Closed):
    """Numbers between two bounds, both included."""

    min: Bound | None = None
    max: Bound | None = None


class _BaseRequest(_Closed):
    """The user, their events and the query time."""

    user_id: Id | None = Field(
        None, description="a user of the event log; an unknown user gets the popularity fallback"
    )
    history: list[Event] | None = Field(
        None, max_length=MOST_EVENTS, description="the user's events, instead of the stored history"
    )
    events: list[Event] = Field(
        [], max_length=MOST_EVENTS, description="events after the stored history, for this response alone"
    )
    context: dict[Text, Text | int | bool] = Field(
        {}, max_length=64, description="context of the request: fields of data.context, as in the event log"
    )
    now: Moment | None = Field(
        None,
        description="query time; null: just after the as-of of the published run, or after the last event",
    )


class RecommendRequest(_BaseRequest):
    """A recommendation list for a user or a history."""

    model_config = _examples(
        {"user_id": 17850, "k": 5},
        {"history": [{"item_id": "85123A", "timestamp": "2011-12-08T10:00:00"}], "k": 5, "filter_seen": True},
        {"user_id": "somebody new", "k": 5},
        {"users": [17850, 13047], "k": 5},
    )

    users: list[Id] | None = Field(
        None,
        min_length=1,
        max_length=MOST_USERS,
        description="many users at once, instead of user_id: the response has one for each in `responses`",
    )
    k: int = Field(10, ge=1, le=MAX_K, description="how many items")
    cursor: Annotated[str, StringConstraints(max_length=MOST_LETTERS)] | None = Field(
        None,
        description="page by page, without repeats: empty for the first page, then the last response's "
        "cursor; null: a single page",
    )
    mode: Literal["auto", "batch", "realtime"] = Field(
        "auto",
        description="auto: the batch recommendations when nothing is new for the user, else the model now; "
        "batch: the batch recommendations alone; realtime: the model",
    )
    controls: dict[Text, Annotated[float, Field(ge=-1, le=1)]] | None = Field(
        None,
        max_length=8,
        description="attention controls, -1 to 1 each: temperature, recency, event.TYPE, "
        "weight.FEATURE; null: as the policy decides, {}: no modulation",
        examples=[{"temperature": 0.5}],
    )
    surface: Text | None = Field(
        None, description="place of the product, one of serve.surfaces; it fills in what the request lacks"
    )
    variant: Literal["champion", "challenger", "popular"] | None = Field(
        None,
        description="to compare what serves: this variant responds, and the response counts in no "
        "experiment; null: as the experiment decides",
    )
    describe: bool = Field(False, description="return title, image, link and price, as data.display says")
    explain: bool = Field(
        False,
        description="return the past events that carried each recommendation, and their shares; costs "
        "several passes of the model",
    )
    filter_seen: bool = Field(False, description="seen-item filter: leave out the items of the history")
    seen_events: list[Text] | None = Field(
        None,
        max_length=64,
        description="event types whose items the filter leaves out; null: as in score.seen_events, []: all",
    )
    seen_days: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="days for which the filter leaves an item out; null: as in score.seen_days"
    )
    allow: list[Id] | None = Field(None, max_length=MOST_ITEMS, description="recommend only these items")
    deny: list[Id] = Field([], max_length=MOST_ITEMS, description="items that must not be recommended")
    where: dict[Text, Annotated[list[Text | int | Number | bool], Field(max_length=1000)] | Range] = Field(
        {},
        max_length=16,
        description="columns of the item table: values of which an item must have one, or bounds",
        examples=[{"price": {"max": 5}}],
    )

    @model_validator(mode="after")
    def _check_users(self) -> RecommendRequest:
        if self.users is not None:
            sent = {
                "cursor": self.cursor is not None,
                "user_id": self.user_id is not None,
                "history": self.history is not None,
                "events": bool(self.events),
                "explain": self.explain,
            }
            if alone := [name for name, value in sent.items() if value]:
                raise ValueError(f"users: not together with {', '.join(alone)}, which are of one user")
        return self


class ListQuery(_Closed):
    """Parameters of a list."""

    k: int = Field(10, ge=1, le=MAX_K, description="how many items")
    surface: Text | None = Field(None, description="place of the product, one of serve.surfaces")
    filter_seen: bool = Field(False, description="seen-item filter: leave out the items of the history")
    describe: bool = Field(False, description="return title, image, link and price, as data.display says")


class ScoreRequest(_BaseRequest):
    """Candidates to score."""

    model_config = _examples({"user_id": 17850, "items": ["22423", "85123A"]})

    items: list[Id] = Field(min_length=1, max_length=MOST_ITEMS, description="the candidates")


class HistoryRequest(_Closed):
    """The last events of a user."""

    model_config = _examples({"user_id": 17850, "last": 20})

    user_id: Id = Field(description="a user of the event log")
    last: int = Field(50, ge=1, le=MOST_EVENTS, description="how many of the last events")


class SimilarRequest(_Closed):
    """Items that are similar to an item, by the cosine of their vectors."""

    model_config = _examples({"item_id": "85123A", "k": 5})

    item_id: Id = Field(description="the item to compare with")
    k: int = Field(10, ge=1, le=MAX_K, description="how many items")
    describe: bool = Field(False, description="return title, image, link and price, as data.display says")


class SearchRequest(_Closed):
    """Items by text."""

    model_config = _examples({"text": "lantern", "k": 5})

    text: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        description="part of a title or of an id, in any case"
    )
    k: int = Field(10, ge=1, le=100, description="how many items")


class LoggedEvent(Event):
    """An event for the event store."""

    event_id: Text | None = Field(
        None, min_length=1, description="your id; a second event with the same id is not kept"
    )


class EventsRequest(_Closed):
    """New events of a user."""

    model_config = _examples(
        {
            "user_id": 17850,
            "events": [{"item_id": "85123A", "event": "purchase", "event_id": "order 7, line 1"}],
        }
    )

    user_id: Id = Field(description="the user")
    events: list[LoggedEvent] = Field(min_length=1, max_length=MOST_EVENTS, description="oldest first")
    context: dict[Text, Text | int | bool] = Field(
        {}, max_length=64, description="fields of data.context, as in the event log"
    )


class FeedbackRequest(_Closed):
    """An outcome of a response."""

    model_config = _examples(
        {"request_id": "0192f0c1", "outcome": "click", "item_id": "22423", "feedback_id": "click 99"}
    )

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        description="of the response"
    )
    outcome: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")] = Field(
        description="click, purchase, skip …: `serve.outcomes` names them"
    )
    item_id: Id | None = Field(None, description="the item of the response; null: the response as a whole")
    value: Number = Field(
        1.0,
        description="factor of the reward that `serve.outcomes` declares, from 0 to `serve.outcome_bound`",
    )
    timestamp: Moment | None = Field(None, description="when, UTC unless an offset is given; null: now")
    feedback_id: Text | None = Field(
        None, min_length=1, description="your id; a second outcome with the same id is not kept"
    )


class ShownItem(_Closed):
    """An item that was shown, and where."""

    item_id: Id = Field(description="an item of the response")
    position: int = Field(ge=1, le=MAX_K, description="from 1, as the user saw it")


class ImpressionsRequest(_Closed):
    """The items of a response that were really shown."""

    model_config = _examples({"request_id": "0192f0c1", "items": [{"item_id": "22423", "position": 1}]})

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        description="of the response"
    )
    items: list[ShownItem] = Field(min_length=1, max_length=MAX_K, description="each item once")
    timestamp: Moment | None = Field(None, description="when, UTC unless an offset is given; null: now")

    @model_validator(mode="after")
    def _check_items(self) -> ImpressionsRequest:
        ids = [str(item.item_id) for item in self.items]
        if twice := sorted({item for item in ids if ids.count(item) > 1}):
            raise ValueError(f"items: {', '.join(twice[:3])} more than once")
        return self


Cell = Text | int | Number | bool | None


class ItemUpdate(_Closed):
    """What changes of an item. What is not named stays as it is."""

    item_id: Id = Field(description="the item, as in the item table; a new one with its attributes")
    available: bool | None = Field(
        None, description="false: not recommended, for instance sold out; true: recommended again"
    )
    attributes: dict[Text, Cell | Annotated[list[Cell], Field(max_length=1000)]] = Field(
        {}, max_length=256, description="new values of columns of the item table; null: none"
    )

    @model_validator(mode="after")
    def _check_content(self) -> ItemUpdate:
        if self.available is None and not self.attributes:
            raise ValueError("nothing changes: send available or attributes")
        return self


class ItemsRequest(_Closed):
    """Changes of items."""

    model_config = _examples({"items": [{"item_id": "85123A", "available": False}]})

    items: list[ItemUpdate] = Field(min_length=1, max_length=MOST_EVENTS, description="later ones win")


class Reason(BaseModel):
    """An event that carried a recommendation. `share`: its share of the contributions of all events;
    `attention`: its share of the attention.
    """

    item_id: Id
    event: str
    timestamp: dt.datetime | None
    share: float
    attention: float


class Item(BaseModel):
    """A recommended item. `explain` adds `title`, `why` and `text`; `describe` adds what `data.display`
    declares.
    """

    item_id: Id
    score: float
    title: str | None = None
    image: str | None = None
    link: str | None = None
    price: str | None = None
    why: list[Reason] | None = None
    text: str | None = None


Source = Literal["snapshot", "realtime", "popular"]
Part = Literal["state", "model", "snapshot"]


class BaseResponse(BaseModel):
    """`as_of`: the last day of the published run's data. `degraded`: parts that were unavailable, so that a
    fallback served.
    """

    request_id: str
    as_of: str
    bundle: str
    degraded: list[Part] = []


class RecommendResponse(BaseResponse):
    """Items, best first. `source`: snapshot (batch recommendations), realtime (the model), popular
    (popularity fallback).
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": "0192f0c1",
                    "as_of": "2011-12-09",
                    "bundle": "1f0a3c5577d0e2b4",
                    "degraded": [],
                    "source": "snapshot",
                    "items": [{"item_id": "22423", "score": 5.31}, {"item_id": "85123A", "score": 5.02}],
                }
            ]
        }
    )

    policy: str | None = Field(None, description="the attention policy of the bundle")
    controls: dict[str, float] | None = Field(
        None, description="the policy's attention controls for this response, -1 to 1 each"
    )
    source: Source
    items: list[Item]
    cursor: str | None = Field(
        None, description="for the next page; null: there is none, or none was asked for"
    )


class UserResponse(RecommendResponse):
    """The response for one of many users."""

    user_id: Id


class UsersResponse(BaseModel):
    """The responses for `users`, in their order."""

    responses: list[UserResponse]


class ScoredItem(BaseModel):
    item_id: Id
    score: float | None = Field(description="null for an unknown item")


class ScoreResponse(BaseResponse):
    """The candidates in the order of the request."""

    source: Literal["realtime", "popular"]
    items: list[ScoredItem]


class KnownEvent(BaseModel):
    """An event of the history. `fresh`: the published run does not know it yet."""

    item_id: Id | None = Field(description="null for an item that the model does not know")
    title: str | None
    event: str
    timestamp: dt.datetime | None
    fresh: bool


class HistoryResponse(BaseModel):
    """Oldest first."""

    events: list[KnownEvent]
    degraded: list[Part] = []


class FoundItem(BaseModel):
    """An item as people see it, as far as `data.display` declares it."""

    item_id: Id
    title: str | None = None
    image: str | None = None
    link: str | None = None
    price: str | None = None
    available: bool = Field(description="false: not recommended, for instance sold out")


class SearchResponse(BaseModel):
    """Those with this id or title first, then by popularity."""

    items: list[FoundItem]


class SampleUsersResponse(BaseModel):
    """A few users of the published run with a history; with privacy holdout users."""

    users: list[Id]


class SimilarResponse(BaseResponse):
    """Most similar first; scores are cosines."""

    items: list[Item]


class EventsResponse(BaseModel):
    """The event store has it on disk."""

    kept: int = Field(description="events that are new")
    duplicates: int = Field(description="events that were kept before, with the same event_id and content")
    conflicts: int = Field(
        0,
        description="events whose event_id was kept before with another item, event, value or context; the "
        "first one stays",
    )
    unknown: int = Field(
        0,
        description="kept events whose item or type the model does not know yet; the next run may "
        "include them",
    )
    opted_out: int = Field(0, description="events of a user who opted out, which are not kept")


class ItemsResponse(BaseModel):
    """The changes are on disk; this replica serves with them, the others within two seconds."""

    changed: int = Field(description="items that the model knew")
    added: int = Field(description="new items, which the model knows by their features")


class ForgetResponse(BaseModel):
    """The opt-out is on disk: nothing of the user is kept or read from now on."""

    new: bool = Field(description="false: the user had opted out before")
    dropped: int = Field(description="entries erased from the event store: events, impressions, outcomes")


class FeedbackResponse(BaseModel):
    """The event store has it on disk."""

    kept: bool = Field(description="false: kept before under the same feedback_id")
    set_aside: bool = Field(
        description="true: no response of that request_id is known yet; the outcome counts if the response "
        "is in the event store when it is collected"
    )
    notes: list[str] = Field(
        default_factory=list,
        description="why its reward for experiments and policies is 0, or less than was sent",
    )


class ImpressionsResponse(BaseModel):
    """The event store has them on disk."""

    kept: int = Field(description="items that were not reported for this response before")
    duplicates: int = Field(description="items that were: their first position stays")
    set_aside: bool = Field(
        description="true: no response of that request_id is known yet; they count if the response is in the "
        "event store when it is collected"
    )


class Privacy(BaseModel):
    """The guarantee of the bundle's training, for each user with all events."""

    epsilon: float = Field(description="ε of this training")
    epsilon_of_all_trainings: float | None = Field(
        None, description="ε of all trainings of the population, when the bundle was written"
    )
    delta: float


class ModelsResponse(BaseModel):
    """The bundle, dataset and snapshot that serve."""

    bundle: str
    policy: str | None = Field(None, description="its attention policy")
    bundle_digest: str
    snapshot: str
    dataset: str
    as_of: str
    users: int | None = Field(description="null: with privacy, the number of users is not published")
    items: int
    controls: list[str] = Field([], description="attention controls that a request may set")
    privacy: Privacy | None = Field(None, description="null: the bundle was trained without privacy")
    popular_only: bool = Field(
        False,
        description="no model was promoted yet: the popularity fallback serves everybody "
        "(promotion.first_run: fallback)",
    )
    loaded_at: dt.datetime
    challenger: str | None = Field(None, description="bundle of the experiment, or BUNDLE+POLICY")
    share: float = Field(0.0, description="share of the users in the experiment")
    shadow: bool = Field(False, description="the challenger gets shadow traffic")


class Health(BaseModel):
    status: Literal["ok"]
    as_of: str | None


PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "No valid API key"},
    403: {"model": Problem, "description": "The key lacks the scope"},
    404: {"model": Problem, "description": "No such item or path"},
    408: {"model": Problem, "description": "The request did not arrive completely in time"},
    415: {"model": Problem, "description": "The body is not JSON"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Problem, "description": "The request is invalid; `errors` names the fields"},
    429: {"model": Problem, "description": "Too many requests; retry after Retry-After seconds"},
    503: {
        "model": Problem,
        "description": "Overloaded, or a part is unavailable; retry after Retry-After seconds",
    },
}
