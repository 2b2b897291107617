"""The endpoint's operations and their types. Written by `python -m recray.client.generate`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Literal, Required, TypedDict
from urllib.parse import quote, urlencode


def add_query(path: str, values: dict[str, Any]) -> str:
    """The path with the values that are not None as its query."""
    sent = {name: value for name, value in values.items() if value is not None}
    return f"{path}?{urlencode(sent)}" if sent else path


class Event(TypedDict, total=False):
    """A user's interaction with an item."""

    item_id: Required[int | str]
    timestamp: str | None
    event: str | None
    value: float


class EventsRequest(TypedDict, total=False):
    """New events of a user."""

    user_id: Required[int | str]
    events: Required[list[LoggedEvent]]
    context: dict[str, str | int | bool]


class EventsResponse(TypedDict, total=False):
    """The event store has it on disk."""

    kept: Required[int]
    duplicates: Required[int]
    conflicts: int
    unknown: int
    opted_out: int


class FeedbackRequest(TypedDict, total=False):
    """An outcome of a response."""

    request_id: Required[str]
    outcome: Required[str]
    item_id: int | str | None
    value: float
    timestamp: str | None
    feedback_id: str | None


class FeedbackResponse(TypedDict, total=False):
    """The event store has it on disk."""

    kept: Required[bool]
    set_aside: Required[bool]
    notes: list[str]


class FieldError(TypedDict, total=False):
    """An invalid field. `field`: path in the request, such as body.history.0.item_id."""

    field: Required[str]
    problem: Required[str]


class ForgetResponse(TypedDict, total=False):
    """The opt-out is on disk: nothing of the user is kept or read from now on."""

    new: Required[bool]
    dropped: Required[int]


class FoundItem(TypedDict, total=False):
    """An item as people see it, as far as `data.display` declares it."""

    item_id: Required[int | str]
    title: str | None
    image: str | None
    link: str | None
    price: str | None
    available: Required[bool]


class Health(TypedDict, total=False):
    status: Required[Literal["ok"]]
    as_of: Required[str | None]


class HistoryRequest(TypedDict, total=False):
    """The last events of a user."""

    user_id: Required[int | str]
    last: int


class HistoryResponse(TypedDict, total=False):
    """Oldest first."""

    events: Required[list[KnownEvent]]
    degraded: list[Literal["state", "model", "snapshot"]]


class ImpressionsRequest(TypedDict, total=False):
    """The items of a response that were really shown."""

    request_id: Required[str]
    items: Required[list[ShownItem]]
    timestamp: str | None


class ImpressionsResponse(TypedDict, total=False):
    """The event store has them on disk."""

    kept: Required[int]
    duplicates: Required[int]
    set_aside: Required[bool]


class Item(TypedDict, total=False):
    """A recommended item. `explain` adds `title`, `why` and `text`; `describe` adds what `data.display`
    declares.
    """

    item_id: Required[int | str]
    score: Required[float]
    title: str | None
    image: str | None
    link: str | None
    price: str | None
    why: list[Reason] | None
    text: str | None


class ItemUpdate(TypedDict, total=False):
    """What changes of an item. What is not named stays as it is."""

    item_id: Required[int | str]
    available: bool | None
    attributes: dict[str, str | int | float | bool | list[str | int | float | bool | None] | None]


class ItemsRequest(TypedDict, total=False):
    """Changes of items."""

    items: Required[list[ItemUpdate]]


class ItemsResponse(TypedDict, total=False):
    """The changes are on disk; this replica serves with them, the others within two seconds."""

    changed: Required[int]
    added: Required[int]


class KnownEvent(TypedDict, total=False):
    """An event of the history. `fresh`: the published run does not know it yet."""

    item_id: Required[int | str | None]
    title: Required[str | None]
    event: Required[str]
    timestamp: Required[str | None]
    fresh: Required[bool]


class LoggedEvent(TypedDict, total=False):
    """An event for the event store."""

    item_id: Required[int | str]
    timestamp: str | None
    event: str | None
    value: float
    event_id: str | None


class ModelsResponse(TypedDict, total=False):
    """The bundle, dataset and snapshot that serve."""

    bundle: Required[str]
    policy: str | None
    bundle_digest: Required[str]
    snapshot: Required[str]
    dataset: Required[str]
    as_of: Required[str]
    users: Required[int | None]
    items: Required[int]
    controls: list[str]
    privacy: Privacy | None
    popular_only: bool
    loaded_at: Required[str]
    challenger: str | None
    share: float
    shadow: bool


class Privacy(TypedDict, total=False):
    """The guarantee of the bundle's training, for each user with all events."""

    epsilon: Required[float]
    epsilon_of_all_trainings: float | None
    delta: Required[float]


class Problem(TypedDict, total=False):
    """Why a request was refused. `fix`: the next step."""

    title: Required[str]
    status: Required[int]
    detail: Required[str]
    fix: str
    errors: list[FieldError]


class Range(TypedDict, total=False):
    """Numbers between two bounds, both included."""

    min: int | float | None
    max: int | float | None


class Reason(TypedDict, total=False):
    """An event that carried a recommendation. `share`: its share of the contributions of all events;
    `attention`: its share of the attention.
    """

    item_id: Required[int | str]
    event: Required[str]
    timestamp: Required[str | None]
    share: Required[float]
    attention: Required[float]


class RecommendRequest(TypedDict, total=False):
    """A recommendation list for a user or a history."""

    user_id: int | str | None
    history: list[Event] | None
    events: list[Event]
    context: dict[str, str | int | bool]
    now: str | None
    users: list[int | str] | None
    k: int
    cursor: str | None
    mode: Literal["auto", "batch", "realtime"]
    controls: dict[str, float] | None
    surface: str | None
    variant: Literal["champion", "challenger", "popular"] | None
    describe: bool
    explain: bool
    filter_seen: bool
    seen_events: list[str] | None
    seen_days: float | None
    allow: list[int | str] | None
    deny: list[int | str]
    where: dict[str, list[str | int | float | bool] | Range]


class RecommendResponse(TypedDict, total=False):
    """Items, best first. `source`: snapshot (batch recommendations), realtime (the model), popular
    (popularity fallback).
    """

    request_id: Required[str]
    as_of: Required[str]
    bundle: Required[str]
    degraded: list[Literal["state", "model", "snapshot"]]
    policy: str | None
    controls: dict[str, float] | None
    source: Required[Literal["snapshot", "realtime", "popular"]]
    items: Required[list[Item]]
    cursor: str | None


class SampleUsersResponse(TypedDict, total=False):
    """A few users of the published run with a history; with privacy holdout users."""

    users: Required[list[int | str]]


class ScoreRequest(TypedDict, total=False):
    """Candidates to score."""

    user_id: int | str | None
    history: list[Event] | None
    events: list[Event]
    context: dict[str, str | int | bool]
    now: str | None
    items: Required[list[int | str]]


class ScoreResponse(TypedDict, total=False):
    """The candidates in the order of the request."""

    request_id: Required[str]
    as_of: Required[str]
    bundle: Required[str]
    degraded: list[Literal["state", "model", "snapshot"]]
    source: Required[Literal["realtime", "popular"]]
    items: Required[list[ScoredItem]]


class ScoredItem(TypedDict, total=False):
    item_id: Required[int | str]
    score: Required[float | None]


class SearchRequest(TypedDict, total=False):
    """Items by text."""

    text: Required[str]
    k: int


class SearchResponse(TypedDict, total=False):
    """Those with this id or title first, then by popularity."""

    items: Required[list[FoundItem]]


class ShownItem(TypedDict, total=False):
    """An item that was shown, and where."""

    item_id: Required[int | str]
    position: Required[int]


class SimilarRequest(TypedDict, total=False):
    """Items that are similar to an item, by the cosine of their vectors."""

    item_id: Required[int | str]
    k: int
    describe: bool


class SimilarResponse(TypedDict, total=False):
    """Most similar first; scores are cosines."""

    request_id: Required[str]
    as_of: Required[str]
    bundle: Required[str]
    degraded: list[Literal["state", "model", "snapshot"]]
    items: Required[list[Item]]


class UserResponse(TypedDict, total=False):
    """The response for one of many users."""

    request_id: Required[str]
    as_of: Required[str]
    bundle: Required[str]
    degraded: list[Literal["state", "model", "snapshot"]]
    policy: str | None
    controls: dict[str, float] | None
    source: Required[Literal["snapshot", "realtime", "popular"]]
    items: Required[list[Item]]
    cursor: str | None
    user_id: Required[int | str]


class UsersResponse(TypedDict, total=False):
    """The responses for `users`, in their order."""

    responses: Required[list[UserResponse]]


class Operations:
    """The operations of the endpoint, as methods that return when the response is there."""

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, repeatable: bool) -> Any:
        raise NotImplementedError

    def recommend(
        self,
        *,
        user_id: int | str | None = None,
        history: list[Event] | None = None,
        events: list[Event] | None = None,
        context: dict[str, str | int | bool] | None = None,
        now: str | None = None,
        users: list[int | str] | None = None,
        k: int | None = None,
        cursor: str | None = None,
        mode: Literal["auto", "batch", "realtime"] | None = None,
        controls: dict[str, float] | None = None,
        surface: str | None = None,
        variant: Literal["champion", "challenger", "popular"] | None = None,
        describe: bool | None = None,
        explain: bool | None = None,
        filter_seen: bool | None = None,
        seen_events: list[str] | None = None,
        seen_days: float | None = None,
        allow: list[int | str] | None = None,
        deny: list[int | str] | None = None,
        where: dict[str, list[str | int | float | bool] | Range] | None = None,
    ) -> RecommendResponse | UsersResponse:
        """Recommend items. For a user of the event log, a history in the request, an unknown user, or many
        users at once. Scope: read.

        user_id : a user of the event log; an unknown user gets the popularity fallback
        history : the user's events, instead of the stored history
        events : events after the stored history, for this response alone
        context : context of the request: fields of data.context, as in the event log
        now : query time; null: just after the as-of of the published run, or after the last event
        users : many users at once, instead of user_id: the response has one for each in `responses`
        k : how many items
        cursor : page by page, without repeats: empty for the first page, then the last response's cursor;
            null: a single page
        mode : auto: the batch recommendations when nothing is new for the user, else the model now; batch:
            the batch recommendations alone; realtime: the model
        controls : attention controls, -1 to 1 each: temperature, recency, event.TYPE, weight.FEATURE; null:
            as the policy decides, {}: no modulation
        surface : place of the product, one of serve.surfaces; it fills in what the request lacks
        variant : to compare what serves: this variant responds, and the response counts in no experiment;
            null: as the experiment decides
        describe : return title, image, link and price, as data.display says
        explain : return the past events that carried each recommendation, and their shares; costs several
            passes of the model
        filter_seen : seen-item filter: leave out the items of the history
        seen_events : event types whose items the filter leaves out; null: as in score.seen_events, []: all
        seen_days : days for which the filter leaves an item out; null: as in score.seen_days
        allow : recommend only these items
        deny : items that must not be recommended
        where : columns of the item table: values of which an item must have one, or bounds
        """
        response: RecommendResponse | UsersResponse = self._call(
            "POST",
            "/v1/recommend",
            {
                "user_id": user_id,
                "history": history,
                "events": events,
                "context": context,
                "now": now,
                "users": users,
                "k": k,
                "cursor": cursor,
                "mode": mode,
                "controls": controls,
                "surface": surface,
                "variant": variant,
                "describe": describe,
                "explain": explain,
                "filter_seen": filter_seen,
                "seen_events": seen_events,
                "seen_days": seen_days,
                "allow": allow,
                "deny": deny,
                "where": where,
            },
            repeatable=True,
        )
        return response

    def score(
        self,
        *,
        items: list[int | str],
        user_id: int | str | None = None,
        history: list[Event] | None = None,
        events: list[Event] | None = None,
        context: dict[str, str | int | bool] | None = None,
        now: str | None = None,
    ) -> ScoreResponse:
        """Score candidates. The model's scores of candidate items. Scope: read.

        items : the candidates
        user_id : a user of the event log; an unknown user gets the popularity fallback
        history : the user's events, instead of the stored history
        events : events after the stored history, for this response alone
        context : context of the request: fields of data.context, as in the event log
        now : query time; null: just after the as-of of the published run, or after the last event
        """
        response: ScoreResponse = self._call(
            "POST",
            "/v1/score",
            {
                "items": items,
                "user_id": user_id,
                "history": history,
                "events": events,
                "context": context,
                "now": now,
            },
            repeatable=True,
        )
        return response

    def history(self, *, user_id: int | str, last: int | None = None) -> HistoryResponse:
        """Read a user's history. The last events behind a user's recommendations, including those since the
        published run. Scope: history.

        user_id : a user of the event log
        last : how many of the last events
        """
        response: HistoryResponse = self._call(
            "POST", "/v1/history", {"user_id": user_id, "last": last}, repeatable=True
        )
        return response

    def similar(
        self, *, item_id: int | str, k: int | None = None, describe: bool | None = None
    ) -> SimilarResponse:
        """Find similar items. The items with the most similar vectors. Scope: read.

        item_id : the item to compare with
        k : how many items
        describe : return title, image, link and price, as data.display says
        """
        response: SimilarResponse = self._call(
            "POST", "/v1/similar", {"item_id": item_id, "k": k, "describe": describe}, repeatable=True
        )
        return response

    def search(self, *, text: str, k: int | None = None) -> SearchResponse:
        """Find items by text. By a part of their title or id. Scope: read.

        text : part of a title or of an id, in any case
        k : how many items
        """
        response: SearchResponse = self._call("POST", "/v1/search", {"text": text, "k": k}, repeatable=True)
        return response

    def users(self) -> SampleUsersResponse:
        """Name a few users to look at. Users with a history, the same ones for a run. Scope: history."""
        response: SampleUsersResponse = self._call("GET", "/v1/users", repeatable=True)
        return response

    def read_list(
        self,
        user_id: int | str,
        *,
        k: int | None = None,
        surface: str | None = None,
        filter_seen: bool | None = None,
        describe: bool | None = None,
    ) -> RecommendResponse:
        """Read a user's list. As /v1/recommend, for clients that cache: an ETag, and 304 for a list that
        the client has. Such a
        response is no impression. Scope: read.

        k : how many items
        surface : place of the product, one of serve.surfaces
        filter_seen : seen-item filter: leave out the items of the history
        describe : return title, image, link and price, as data.display says
        """
        response: RecommendResponse = self._call(
            "GET",
            add_query(
                f"/v1/lists/{quote(str(user_id), safe='')}",
                {"k": k, "surface": surface, "filter_seen": filter_seen, "describe": describe},
            ),
            repeatable=True,
        )
        return response

    def events(
        self,
        *,
        user_id: int | str,
        events: list[LoggedEvent],
        context: dict[str, str | int | bool] | None = None,
    ) -> EventsResponse:
        """Log events of a user. On disk when it responds; the user's next recommendations include them.
        Scope: write.

        user_id : the user
        events : oldest first
        context : fields of data.context, as in the event log
        """
        response: EventsResponse = self._call(
            "POST", "/v1/events", {"user_id": user_id, "events": events, "context": context}, repeatable=False
        )
        return response

    def feedback(
        self,
        *,
        request_id: str,
        outcome: str,
        item_id: int | str | None = None,
        value: float | None = None,
        timestamp: str | None = None,
        feedback_id: str | None = None,
    ) -> FeedbackResponse:
        """Log an outcome of a response. On disk when it responds, after the response that it is about.
        Scope: write.

        request_id : of the response
        outcome : click, purchase, skip …: `serve.outcomes` names them
        item_id : the item of the response; null: the response as a whole
        value : factor of the reward that `serve.outcomes` declares, from 0 to `serve.outcome_bound`
        timestamp : when, UTC unless an offset is given; null: now
        feedback_id : your id; a second outcome with the same id is not kept
        """
        response: FeedbackResponse = self._call(
            "POST",
            "/v1/feedback",
            {
                "request_id": request_id,
                "outcome": outcome,
                "item_id": item_id,
                "value": value,
                "timestamp": timestamp,
                "feedback_id": feedback_id,
            },
            repeatable=False,
        )
        return response

    def impressions(
        self, *, request_id: str, items: list[ShownItem], timestamp: str | None = None
    ) -> ImpressionsResponse:
        """Log which items of a response were shown. On disk when it responds. A page may report again while
        the user scrolls: each item counts once. Scope: write.

        request_id : of the response
        items : each item once
        timestamp : when, UTC unless an offset is given; null: now
        """
        response: ImpressionsResponse = self._call(
            "POST",
            "/v1/impressions",
            {"request_id": request_id, "items": items, "timestamp": timestamp},
            repeatable=False,
        )
        return response

    def forget(self, user_id: int | str) -> ForgetResponse:
        """Forget a user. From now on nothing is stored of the user, and responses are those of an unknown
        user. `recray
        forget` erases the user from files. Scope: admin.
        """
        response: ForgetResponse = self._call(
            "DELETE", f"/v1/users/{quote(str(user_id), safe='')}", repeatable=False
        )
        return response

    def change_items(self, *, items: list[ItemUpdate]) -> ItemsResponse:
        """Change items. Availability and attributes, or new items, without a nightly run: all of the
        request or nothing. A
        change holds until the next one of the item, or until it is deleted; filters, rules and titles use
            it.
        Vectors of items that the model was trained with stay. Scope: items.

        items : later ones win
        """
        response: ItemsResponse = self._call("PUT", "/v1/items", {"items": items}, repeatable=True)
        return response

    def restore_item(self, item_id: int | str) -> ItemsResponse:
        """Drop the changes of an item. The item is as in the item table of the published run again. Scope:
        items.
        """
        response: ItemsResponse = self._call(
            "DELETE", f"/v1/items/{quote(str(item_id), safe='')}", repeatable=True
        )
        return response

    def models(self) -> ModelsResponse:
        """Show what is served. Bundle, dataset and snapshot of the responses. Scope: read."""
        response: ModelsResponse = self._call("GET", "/v1/models", repeatable=True)
        return response

    def health(self) -> Health:
        """Check that the replica is alive. Responds as long as the process runs."""
        response: Health = self._call("GET", "/healthz", repeatable=True)
        return response

    def ready(self) -> Health:
        """Check that all parts are available. 503 while batch recommendations or the event store are
        unavailable. Fallbacks serve meanwhile, and
        responses name the parts in `degraded`.
        """
        response: Health = self._call("GET", "/readyz", repeatable=True)
        return response


class AsyncOperations:
    """The operations of the endpoint, as methods that are awaited."""

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, repeatable: bool) -> Any:
        raise NotImplementedError

    def recommend(
        self,
        *,
        user_id: int | str | None = None,
        history: list[Event] | None = None,
        events: list[Event] | None = None,
        context: dict[str, str | int | bool] | None = None,
        now: str | None = None,
        users: list[int | str] | None = None,
        k: int | None = None,
        cursor: str | None = None,
        mode: Literal["auto", "batch", "realtime"] | None = None,
        controls: dict[str, float] | None = None,
        surface: str | None = None,
        variant: Literal["champion", "challenger", "popular"] | None = None,
        describe: bool | None = None,
        explain: bool | None = None,
        filter_seen: bool | None = None,
        seen_events: list[str] | None = None,
        seen_days: float | None = None,
        allow: list[int | str] | None = None,
        deny: list[int | str] | None = None,
        where: dict[str, list[str | int | float | bool] | Range] | None = None,
    ) -> Awaitable[RecommendResponse | UsersResponse]:
        """Recommend items. For a user of the event log, a history in the request, an unknown user, or many
        users at once. Scope: read.

        user_id : a user of the event log; an unknown user gets the popularity fallback
        history : the user's events, instead of the stored history
        events : events after the stored history, for this response alone
        context : context of the request: fields of data.context, as in the event log
        now : query time; null: just after the as-of of the published run, or after the last event
        users : many users at once, instead of user_id: the response has one for each in `responses`
        k : how many items
        cursor : page by page, without repeats: empty for the first page, then the last response's cursor;
            null: a single page
        mode : auto: the batch recommendations when nothing is new for the user, else the model now; batch:
            the batch recommendations alone; realtime: the model
        controls : attention controls, -1 to 1 each: temperature, recency, event.TYPE, weight.FEATURE; null:
            as the policy decides, {}: no modulation
        surface : place of the product, one of serve.surfaces; it fills in what the request lacks
        variant : to compare what serves: this variant responds, and the response counts in no experiment;
            null: as the experiment decides
        describe : return title, image, link and price, as data.display says
        explain : return the past events that carried each recommendation, and their shares; costs several
            passes of the model
        filter_seen : seen-item filter: leave out the items of the history
        seen_events : event types whose items the filter leaves out; null: as in score.seen_events, []: all
        seen_days : days for which the filter leaves an item out; null: as in score.seen_days
        allow : recommend only these items
        deny : items that must not be recommended
        where : columns of the item table: values of which an item must have one, or bounds
        """
        response: Awaitable[RecommendResponse | UsersResponse] = self._call(
            "POST",
            "/v1/recommend",
            {
                "user_id": user_id,
                "history": history,
                "events": events,
                "context": context,
                "now": now,
                "users": users,
                "k": k,
                "cursor": cursor,
                "mode": mode,
                "controls": controls,
                "surface": surface,
                "variant": variant,
                "describe": describe,
                "explain": explain,
                "filter_seen": filter_seen,
                "seen_events": seen_events,
                "seen_days": seen_days,
                "allow": allow,
                "deny": deny,
                "where": where,
            },
            repeatable=True,
        )
        return response

    def score(
        self,
        *,
        items: list[int | str],
        user_id: int | str | None = None,
        history: list[Event] | None = None,
        events: list[Event] | None = None,
        context: dict[str, str | int | bool] | None = None,
        now: str | None = None,
    ) -> Awaitable[ScoreResponse]:
        """Score candidates. The model's scores of candidate items. Scope: read.

        items : the candidates
        user_id : a user of the event log; an unknown user gets the popularity fallback
        history : the user's events, instead of the stored history
        events : events after the stored history, for this response alone
        context : context of the request: fields of data.context, as in the event log
        now : query time; null: just after the as-of of the published run, or after the last event
        """
        response: Awaitable[ScoreResponse] = self._call(
            "POST",
            "/v1/score",
            {
                "items": items,
                "user_id": user_id,
                "history": history,
                "events": events,
                "context": context,
                "now": now,
            },
            repeatable=True,
        )
        return response

    def history(self, *, user_id: int | str, last: int | None = None) -> Awaitable[HistoryResponse]:
        """Read a user's history. The last events behind a user's recommendations, including those since the
        published run. Scope: history.

        user_id : a user of the event log
        last : how many of the last events
        """
        response: Awaitable[HistoryResponse] = self._call(
            "POST", "/v1/history", {"user_id": user_id, "last": last}, repeatable=True
        )
        return response

    def similar(
        self, *, item_id: int | str, k: int | None = None, describe: bool | None = None
    ) -> Awaitable[SimilarResponse]:
        """Find similar items. The items with the most similar vectors. Scope: read.

        item_id : the item to compare with
        k : how many items
        describe : return title, image, link and price, as data.display says
        """
        response: Awaitable[SimilarResponse] = self._call(
            "POST", "/v1/similar", {"item_id": item_id, "k": k, "describe": describe}, repeatable=True
        )
        return response

    def search(self, *, text: str, k: int | None = None) -> Awaitable[SearchResponse]:
        """Find items by text. By a part of their title or id. Scope: read.

        text : part of a title or of an id, in any case
        k : how many items
        """
        response: Awaitable[SearchResponse] = self._call(
            "POST", "/v1/search", {"text": text, "k": k}, repeatable=True
        )
        return response

    def users(self) -> Awaitable[SampleUsersResponse]:
        """Name a few users to look at. Users with a history, the same ones for a run. Scope: history."""
        response: Awaitable[SampleUsersResponse] = self._call("GET", "/v1/users", repeatable=True)
        return response

    def read_list(
        self,
        user_id: int | str,
        *,
        k: int | None = None,
        surface: str | None = None,
        filter_seen: bool | None = None,
        describe: bool | None = None,
    ) -> Awaitable[RecommendResponse]:
        """Read a user's list. As /v1/recommend, for clients that cache: an ETag, and 304 for a list that
        the client has. Such a
        response is no impression. Scope: read.

        k : how many items
        surface : place of the product, one of serve.surfaces
        filter_seen : seen-item filter: leave out the items of the history
        describe : return title, image, link and price, as data.display says
        """
        response: Awaitable[RecommendResponse] = self._call(
            "GET",
            add_query(
                f"/v1/lists/{quote(str(user_id), safe='')}",
                {"k": k, "surface": surface, "filter_seen": filter_seen, "describe": describe},
            ),
            repeatable=True,
        )
        return response

    def events(
        self,
        *,
        user_id: int | str,
        events: list[LoggedEvent],
        context: dict[str, str | int | bool] | None = None,
    ) -> Awaitable[EventsResponse]:
        """Log events of a user. On disk when it responds; the user's next recommendations include them.
        Scope: write.

        user_id : the user
        events : oldest first
        context : fields of data.context, as in the event log
        """
        response: Awaitable[EventsResponse] = self._call(
            "POST", "/v1/events", {"user_id": user_id, "events": events, "context": context}, repeatable=False
        )
        return response

    def feedback(
        self,
        *,
        request_id: str,
        outcome: str,
        item_id: int | str | None = None,
        value: float | None = None,
        timestamp: str | None = None,
        feedback_id: str | None = None,
    ) -> Awaitable[FeedbackResponse]:
        """Log an outcome of a response. On disk when it responds, after the response that it is about.
        Scope: write.

        request_id : of the response
        outcome : click, purchase, skip …: `serve.outcomes` names them
        item_id : the item of the response; null: the response as a whole
        value : factor of the reward that `serve.outcomes` declares, from 0 to `serve.outcome_bound`
        timestamp : when, UTC unless an offset is given; null: now
        feedback_id : your id; a second outcome with the same id is not kept
        """
        response: Awaitable[FeedbackResponse] = self._call(
            "POST",
            "/v1/feedback",
            {
                "request_id": request_id,
                "outcome": outcome,
                "item_id": item_id,
                "value": value,
                "timestamp": timestamp,
                "feedback_id": feedback_id,
            },
            repeatable=False,
        )
        return response

    def impressions(
        self, *, request_id: str, items: list[ShownItem], timestamp: str | None = None
    ) -> Awaitable[ImpressionsResponse]:
        """Log which items of a response were shown. On disk when it responds. A page may report again while
        the user scrolls: each item counts once. Scope: write.

        request_id : of the response
        items : each item once
        timestamp : when, UTC unless an offset is given; null: now
        """
        response: Awaitable[ImpressionsResponse] = self._call(
            "POST",
            "/v1/impressions",
            {"request_id": request_id, "items": items, "timestamp": timestamp},
            repeatable=False,
        )
        return response

    def forget(self, user_id: int | str) -> Awaitable[ForgetResponse]:
        """Forget a user. From now on nothing is stored of the user, and responses are those of an unknown
        user. `recray
        forget` erases the user from files. Scope: admin.
        """
        response: Awaitable[ForgetResponse] = self._call(
            "DELETE", f"/v1/users/{quote(str(user_id), safe='')}", repeatable=False
        )
        return response

    def change_items(self, *, items: list[ItemUpdate]) -> Awaitable[ItemsResponse]:
        """Change items. Availability and attributes, or new items, without a nightly run: all of the
        request or nothing. A
        change holds until the next one of the item, or until it is deleted; filters, rules and titles use
            it.
        Vectors of items that the model was trained with stay. Scope: items.

        items : later ones win
        """
        response: Awaitable[ItemsResponse] = self._call("PUT", "/v1/items", {"items": items}, repeatable=True)
        return response

    def restore_item(self, item_id: int | str) -> Awaitable[ItemsResponse]:
        """Drop the changes of an item. The item is as in the item table of the published run again. Scope:
        items.
        """
        response: Awaitable[ItemsResponse] = self._call(
            "DELETE", f"/v1/items/{quote(str(item_id), safe='')}", repeatable=True
        )
        return response

    def models(self) -> Awaitable[ModelsResponse]:
        """Show what is served. Bundle, dataset and snapshot of the responses. Scope: read."""
        response: Awaitable[ModelsResponse] = self._call("GET", "/v1/models", repeatable=True)
        return response

    def health(self) -> Awaitable[Health]:
        """Check that the replica is alive. Responds as long as the process runs."""
        response: Awaitable[Health] = self._call("GET", "/healthz", repeatable=True)
        return response

    def ready(self) -> Awaitable[Health]:
        """Check that all parts are available. 503 while batch recommendations or the event store are
        unavailable. Fallbacks serve meanwhile, and
        responses name the parts in `degraded`.
        """
        response: Awaitable[Health] = self._call("GET", "/readyz", repeatable=True)
        return response
