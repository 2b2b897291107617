"""Requests and answers of the endpoint, with the examples that its OpenAPI page shows."""

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
)

from recray.schema import LONGEST_ID
from recray.serving.problems import Problem

Text = Annotated[str, StringConstraints(max_length=200)]
Id = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)] | Annotated[str, StringConstraints(max_length=LONGEST_ID)]
Number = Annotated[float, Field(ge=-3e38, le=3e38, allow_inf_nan=False)]  # what 32 bits hold


FIRST_S = 631_152_000  # the year 1990: a smaller number is hardly one of seconds
LAST_S = 7_258_118_400  # the year 2200


_DATETIME: TypeAdapter[dt.datetime] = TypeAdapter(dt.datetime)


def _utc(given: Any, _: ValidatorFunctionWrapHandler) -> dt.datetime:
    if not isinstance(given, str | dt.datetime):
        raise ValueError("write ISO 8601 as text, 2024-03-01T10:00:00Z")
    moment = _DATETIME.validate_python(given)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    if not 0 <= moment.timestamp() < LAST_S:
        raise ValueError("lies outside 1970 to 2200")
    if moment.timestamp() < FIRST_S and isinstance(given, str) and re.fullmatch(r"\s*[-+]?[0-9._]+\s*", given):  # digits of a date, or days
        raise ValueError("as seconds since 1970 lies before 1990: write ISO 8601, 2024-03-01T10:00:00Z")
    return moment


Moment = Annotated[dt.datetime, WrapValidator(_utc)]

MOST_EVENTS = 1000
MOST_ITEMS = 10_000
MOST_ANSWERS = 1000


def _no_truth(given: Any) -> Any:
    if isinstance(given, bool):
        raise ValueError("a number is wanted")
    return given


Bound = Annotated[int | Number, BeforeValidator(_no_truth)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": list(bodies)})


class Event(_Closed):
    """Something that a user did."""

    item_id: Id = Field(description="the item, as in the item table", examples=["85123A"])
    timestamp: Moment | None = Field(None, description="when, UTC unless an offset is given; null: at the moment of the request")
    event: Text | None = Field(
        None,
        description="event type; null: data.default_event, or the most frequent one of the log. One that the log does not know yet is kept for the "
        "next night, and refused where an answer is to be read from it",
        examples=["purchase"],
    )
    value: Number = Field(1.0, description="rating, quantity, dwell …")


class Range(_Closed):
    """Numbers between two bounds, both included."""

    min: Bound | None = None
    max: Bound | None = None


class _Question(_Closed):
    """Who asks, in which moment, about which items."""

    user_id: Id | None = Field(None, description="a user of the event log; unknown users get the popular list")
    history: list[Event] | None = Field(None, max_length=MOST_EVENTS, description="the user's events; taken instead of the stored history")
    events: list[Event] = Field([], max_length=MOST_EVENTS, description="what came after the stored history, for this answer alone")
    context: dict[Text, Text | int | bool] = Field(
        {}, max_length=64, description="what is known of the request: fields of data.context, as in the log"
    )
    now: Moment | None = Field(None, description="the moment asked about; null: just after the night's as-of or the last event known")


class RecommendRequest(_Question):
    """Who asks, and for what."""

    model_config = _examples(
        {"user_id": 17850, "k": 5},
        {"history": [{"item_id": "85123A", "timestamp": "2011-12-08T10:00:00"}], "k": 5, "new_only": True},
        {"user_id": "somebody new", "k": 5},
    )

    k: int = Field(10, ge=1, le=MOST_ANSWERS, description="how many items")
    mode: Literal["auto", "batch", "realtime"] = Field(
        "auto", description="auto: the nightly list when nothing is new for the user, else the model now; batch: the list alone; realtime: the model"
    )
    controls: dict[Text, Annotated[float, Field(ge=-1, le=1)]] | None = Field(
        None,
        max_length=8,
        description="how the attention over the history is turned, -1 to 1 each: temperature, recency, event.TYPE, weight.FEATURE; "
        "null: as the policy decides, {}: not at all",
        examples=[{"temperature": 0.5}],
    )
    explain: bool = Field(False, description="say which past events carried each recommendation, and how much; takes the model some passes")
    new_only: bool = Field(False, description="leave out items of the history")
    allow: list[Id] | None = Field(None, max_length=MOST_ITEMS, description="answer none but these items")
    deny: list[Id] = Field([], max_length=MOST_ITEMS, description="items that must not be answered")
    where: dict[Text, Annotated[list[Text | int | Number | bool], Field(max_length=1000)] | Range] = Field(
        {}, max_length=16, description="columns of the item table: values of which an item must have one, or bounds", examples=[{"price": {"max": 5}}]
    )


class ScoreRequest(_Question):
    """Candidates that were found elsewhere."""

    model_config = _examples({"user_id": 17850, "items": ["22423", "85123A"]})

    items: list[Id] = Field(min_length=1, max_length=MOST_ITEMS, description="the candidates")


class HistoryRequest(_Closed):
    """Whose history."""

    model_config = _examples({"user_id": 17850, "last": 20})

    user_id: Id = Field(description="a user of the event log")
    last: int = Field(50, ge=1, le=MOST_EVENTS, description="how many of the last events")


class SimilarRequest(_Closed):
    """Items whose vectors point where another one's does."""

    model_config = _examples({"item_id": "85123A", "k": 5})

    item_id: Id = Field(description="the item to be like")
    k: int = Field(10, ge=1, le=MOST_ANSWERS, description="how many items")


class LoggedEvent(Event):
    """An event to keep."""

    event_id: Text | None = Field(None, min_length=1, description="yours; an event that was kept before under it is not kept twice")


class EventsRequest(_Closed):
    """What a user just did."""

    model_config = _examples({"user_id": 17850, "events": [{"item_id": "85123A", "event": "purchase", "event_id": "order 7, line 1"}]})

    user_id: Id = Field(description="who did it")
    events: list[LoggedEvent] = Field(min_length=1, max_length=MOST_EVENTS, description="oldest first")
    context: dict[Text, Text | int | bool] = Field({}, max_length=64, description="fields of data.context, as in the log")


class FeedbackRequest(_Closed):
    """What came of an answer."""

    model_config = _examples({"request_id": "0192f0c1", "outcome": "click", "item_id": "22423", "feedback_id": "click 99"})

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(description="of the answer")
    outcome: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_-]{1,64}$")] = Field(
        description="click, purchase, skip …: `serve.outcomes` names them"
    )
    item_id: Id | None = Field(None, description="of which item of the answer; null: of the answer as a whole")
    value: Number = Field(1.0, description="how much: times what `serve.outcomes` says, 0 at least and `serve.outcome_bound` at most")
    timestamp: Moment | None = Field(None, description="when, UTC unless an offset is given; null: now")
    feedback_id: Text | None = Field(None, min_length=1, description="yours; an outcome that was kept before under it is not kept twice")


class Reason(BaseModel):
    """An event that carried a recommendation. `share`: of what all events together carried; `attention`: how much of it the model saw."""

    item_id: Id
    event: str
    timestamp: dt.datetime | None
    share: float
    attention: float


class Item(BaseModel):
    """`title`, `why` and `text` are there where `explain` was asked."""

    item_id: Id
    score: float
    title: str | None = None
    why: list[Reason] | None = None
    text: str | None = None


Source = Literal["snapshot", "realtime", "popular"]
Part = Literal["state", "model", "snapshot"]


class Answer(BaseModel):
    """`degraded` names what was away, so that another part had to answer."""

    request_id: str
    night: str
    bundle: str
    degraded: list[Part] = []


class RecommendResponse(Answer):
    """Items best first. `source`: snapshot (the nightly list), realtime (the model ran now), popular (nothing is known)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": "0192f0c1",
                    "night": "2011-12-09",
                    "bundle": "1f0a3c5577d0e2b4",
                    "degraded": [],
                    "source": "snapshot",
                    "items": [{"item_id": "22423", "score": 5.31}, {"item_id": "85123A", "score": 5.02}],
                }
            ]
        }
    )

    policy: str | None = Field(None, description="the attention policy behind the bundle")
    controls: dict[str, float] | None = Field(None, description="how it turned the attention for this answer, -1 to 1 each")
    source: Source
    items: list[Item]


class ScoredItem(BaseModel):
    item_id: Id
    score: float | None = Field(description="null for an item that is not known")


class ScoreResponse(Answer):
    """The candidates in the order in which they were asked about."""

    source: Literal["realtime", "popular"]
    items: list[ScoredItem]


class KnownEvent(BaseModel):
    """An event that answers are read from. `fresh`: the night does not know it yet."""

    item_id: Id | None = Field(description="null for an item that the model does not know")
    title: str | None
    event: str
    timestamp: dt.datetime | None
    fresh: bool


class HistoryResponse(BaseModel):
    """Oldest first."""

    events: list[KnownEvent]
    degraded: list[Part] = []


class SimilarResponse(Answer):
    """Most alike first; scores are cosines."""

    items: list[Item]


class EventsResponse(BaseModel):
    """On disk."""

    kept: int = Field(description="events that are new")
    duplicates: int = Field(description="events that were kept before under the same event_id, and say the same")
    conflicts: int = Field(0, description="events whose event_id was kept before with another item, event, value or context; the first one stays")
    unknown: int = Field(0, description="kept events whose item or type the model does not know yet; the next night may")
    opted_out: int = Field(0, description="events of a user who opted out, which are not kept")


class ForgetResponse(BaseModel):
    """On disk: nothing of the user is kept or read any more."""

    new: bool = Field(description="false: the user had opted out before")
    dropped: int = Field(description="entries of the log that went: events, answers, what came of them")


class FeedbackResponse(BaseModel):
    """On disk."""

    kept: bool = Field(description="false: kept before under the same feedback_id")
    set_aside: bool = Field(description="true: nobody knows that request_id yet; it counts if its answer is found in the log when that is collected")
    notes: list[str] = Field(default_factory=list, description="why it counts nothing, or less than was sent, for trials and policies")


class Privacy(BaseModel):
    """What the training of the bundle promises: each user who was learned from is protected with all events."""

    epsilon: float = Field(description="ε of this training")
    epsilon_of_all_trainings: float | None = Field(None, description="of all trainings of the population, as the bundle was written")
    delta: float


class ModelsResponse(BaseModel):
    """What is being served."""

    bundle: str
    policy: str | None = Field(None, description="the attention policy that decides for it")
    bundle_digest: str
    snapshot: str
    dataset: str
    night: str
    users: int | None = Field(description="null: they are protected, and how many there are is not said")
    items: int
    privacy: Privacy | None = Field(None, description="null: the bundle was trained without privacy")
    popular_only: bool = Field(False, description="no model was promoted yet: the popular list answers everybody (gates.first_run: fallback)")
    loaded_at: dt.datetime
    challenger: str | None = Field(None, description="bundle on trial, and its policy behind a plus sign")
    share: float = Field(0.0, description="of the users whom it answers")
    shadow: bool = Field(False, description="it answers all, and nobody sees it")


class Health(BaseModel):
    status: Literal["ok"]
    night: str | None


PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "No known API key"},
    403: {"model": Problem, "description": "The key has not the scope"},
    404: {"model": Problem, "description": "Nothing is known under that name"},
    408: {"model": Problem, "description": "The request did not arrive whole in time"},
    415: {"model": Problem, "description": "The body is not JSON"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Problem, "description": "The request makes no sense; `errors` names the fields"},
    429: {"model": Problem, "description": "Too many requests; Retry-After says when to come again"},
    503: {"model": Problem, "description": "Too busy, or a part is away; Retry-After says when to come again"},
}
