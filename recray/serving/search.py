"""Finds items by their title or id, and users to look at."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow.compute as pc

from recray.dataset.schema import ITEM_ID
from recray.serving.api import FoundItem
from recray.serving.state import ServingState
from recray.storage.opt_out import OptOut

LEAST_EVENTS = 3  # of a user to look at
MOST_READ = 1000  # users that are read to find some


def search_items(text: str, k: int, state: ServingState) -> list[FoundItem]:
    """The items with an id or a title that contains a text, in any case: those with this id or title first,
    then the most popular ones.
    """
    titles, ids = state.search_texts
    text = text.strip().lower()
    is_match = pc.or_(pc.match_substring(titles, text), pc.match_substring(ids, text))
    rows = np.flatnonzero(pc.fill_null(is_match, False).to_numpy(zero_copy_only=False))
    is_exact = pc.or_(pc.equal(titles.take(rows), text), pc.equal(ids.take(rows), text))
    counts = state.predictor.counts()[state.translation.to_bundle[rows + 1]]
    best = np.lexsort((rows, -counts, ~pc.fill_null(is_exact, False).to_numpy(zero_copy_only=False)))[:k]
    item_ids = state.dataset.items[ITEM_ID]
    return [describe_found_item(item_ids[int(rows[row])].as_py(), state) for row in best]


def describe_found_item(item_id: Any, state: ServingState) -> FoundItem:
    """What people see of an item."""
    index = int(state.predictor.vocabulary.index_of([item_id])[0])
    is_available = index > 0 and index not in state.unavailable and index not in state.predictor.retired
    return FoundItem(item_id=item_id, available=is_available, **state.describe_item(item_id))


def sample_users(k: int, state: ServingState, opted_out: OptOut) -> list[Any]:
    """A few users with a history who did not opt out, the same ones for a run; with privacy holdout users
    alone.
    """
    users: list[Any] = []
    read = 0
    for shard in state.dataset.shards():
        lengths = np.diff(shard.offsets[: MOST_READ + 1])
        is_shown = (lengths >= LEAST_EVENTS) & (shard.queried[: len(lengths)] if state.is_private else True)
        named = (shard.user_ids[int(row)].as_py() for row in np.flatnonzero(is_shown))
        users += itertools.islice((user for user in named if user not in opted_out), k - len(users))
        read += len(lengths)
        if len(users) >= k or read >= MOST_READ:
            break
    return users
