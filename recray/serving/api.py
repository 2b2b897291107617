"""Requests and answers of the endpoint, with the examples that its OpenAPI page shows."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Id = int | str


class Event(BaseModel):
    """Something that a user did."""

    model_config = ConfigDict(extra="forbid")

    item_id: Id = Field(description="the item, as in the item table", examples=["85123A"])
    timestamp: dt.datetime | None = Field(None, description="when, UTC unless an offset is given; null: at the moment of the request")
    event: str | None = Field(None, description="event type; null: the most frequent one of the log", examples=["purchase"])
    value: float = Field(1.0, description="rating, quantity, dwell …", allow_inf_nan=False)


class RecommendRequest(BaseModel):
    """Who asks, and for what."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"user_id": 17850, "k": 5},
                {"history": [{"item_id": "85123A", "timestamp": "2011-12-08T10:00:00"}], "k": 5, "new_only": True},
                {"user_id": "somebody new", "k": 5},
            ]
        },
    )

    user_id: Id | None = Field(None, description="a user of the event log; unknown users get the popular list")
    k: int = Field(10, ge=1, le=1000, description="how many items")
    history: list[Event] | None = Field(None, max_length=10_000, description="the user's events, oldest first; taken instead of the stored history")
    new_only: bool = Field(False, description="leave out items of the history")
    exclude: list[Id] = Field([], max_length=10_000, description="items that must not be answered")
    context: dict[str, str | int | bool] = Field({}, max_length=64, description="what is known of the request: fields of data.context, as in the log")
    now: dt.datetime | None = Field(None, description="the moment asked about; null: just after the night's as-of or the last event of `history`")


class Item(BaseModel):
    item_id: Id
    score: float


class RecommendResponse(BaseModel):
    """Items best first. `source`: snapshot (the nightly list), realtime (the model ran now), popular (nothing is known)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [{"item_id": "22423", "score": 5.31}, {"item_id": "85123A", "score": 5.02}],
                    "source": "snapshot",
                    "night": "2011-12-09",
                    "bundle": "1f0a3c5577d0e2b4",
                }
            ]
        }
    )

    items: list[Item]
    source: Literal["snapshot", "realtime", "popular"]
    night: str
    bundle: str


class ModelsResponse(BaseModel):
    """What is being served."""

    bundle: str
    bundle_digest: str
    snapshot: str
    dataset: str
    night: str
    users: int
    items: int
    loaded_at: dt.datetime


class Health(BaseModel):
    status: Literal["ok"]
    night: str
