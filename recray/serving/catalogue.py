"""Requests about items: similar ones, those of a text, and their changes; and a few users to look at."""

from __future__ import annotations

import asyncio
import time

from recray.events.items import ItemChange
from recray.serving.api import (
    ItemsRequest,
    ItemsResponse,
    SampleUsersResponse,
    SearchRequest,
    SearchResponse,
    SimilarRequest,
    SimilarResponse,
)
from recray.serving.deployment import Deployments
from recray.serving.explain import describe_items
from recray.serving.impressions import ImpressionLog
from recray.serving.items import resolve_changes
from recray.serving.ranking import rank_similar_items
from recray.serving.recorder import EventRecorder, make_id
from recray.serving.search import sample_users, search_items
from recray.serving.state import ServingState
from recray.storage.opt_out import OptOut

SAMPLE_USERS = 5


class Catalogue:
    """The items of the current deployment."""

    def __init__(
        self, deployments: Deployments, recorder: EventRecorder, impressions: ImpressionLog, opted_out: OptOut
    ) -> None:
        self._deployments, self._recorder = deployments, recorder
        self._impressions, self._opted_out = impressions, opted_out

    @property
    def _state(self) -> ServingState:
        return self._deployments.current.state

    def refresh(self) -> None:
        """Take over the changes of items."""
        self._deployments.refresh_items(self._recorder.log)

    async def similar(self, request: SimilarRequest) -> SimilarResponse:
        """Find similar items. Raises RequestError for an unknown item, UnavailableError without a model."""
        started, state = time.monotonic(), self._state
        ranked_items = await asyncio.to_thread(rank_similar_items, request.item_id, request.k, state)
        response = SimilarResponse(
            request_id=make_id(), as_of=state.date, bundle=state.bundle, items=ranked_items.to_items()
        )
        if request.describe:
            describe_items(response.items, state)
        self._impressions.record_other(response, "realtime", None, started, "similar")
        return response

    async def change_items(self, request: ItemsRequest) -> ItemsResponse:
        """Change items; on disk when it returns. Raises RequestError, UnavailableError."""
        state = self._state
        changes = await asyncio.to_thread(resolve_changes, request.items, state)
        known = {change.key for change in changes if state.knows_item(change.item_id)}
        await self._store_changes(changes)
        return ItemsResponse(changed=len(known), added=len({change.key for change in changes} - known))

    async def restore_item(self, item_id: str) -> ItemsResponse:
        """Drop the changes of an item; on disk when it returns. Raises RequestError, UnavailableError."""
        item = self._state.require_item(item_id, "item_id")
        is_known = self._state.knows_item(item)
        await self._store_changes([ItemChange(item, is_removed=True)])
        return ItemsResponse(changed=int(is_known), added=0)

    async def _store_changes(self, changes: list[ItemChange]) -> None:
        await self._recorder.write(lambda writer: asyncio.to_thread(writer.log.change_items, changes))
        await asyncio.to_thread(self.refresh)

    async def search(self, request: SearchRequest) -> SearchResponse:
        """Find items by text."""
        return SearchResponse(
            items=await asyncio.to_thread(search_items, request.text, request.k, self._state)
        )

    async def sample_users(self) -> SampleUsersResponse:
        """A few users to look at."""
        users = await asyncio.to_thread(sample_users, SAMPLE_USERS, self._state, self._opted_out)
        return SampleUsersResponse(users=users)
