"""Where a response comes from: which sources are asked, in which order, and those that need no model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

from recray.errors import PartUnavailableError
from recray.serving.deployment import Deployment
from recray.serving.experiment import is_in_share
from recray.serving.modulation import Exploration, can_explore
from recray.serving.query import Query
from recray.serving.ranking import RankedItems, to_filters
from recray.serving.state import ServingState
from recray.snapshot.reader import ScoredUser


class RankingSource(Enum):
    """What may rank. The first one that has a response is the one that responds."""

    COMPLETE_LIST = auto()  # the nightly list, where nothing is asked that it does not know
    MODEL = auto()
    LIST = auto()  # the nightly list as it is, or the popularity fallback for somebody who has none
    POPULARITY = auto()


ORDER = {
    "auto": (RankingSource.COMPLETE_LIST, RankingSource.MODEL, RankingSource.LIST, RankingSource.POPULARITY),
    "realtime": (RankingSource.MODEL, RankingSource.LIST, RankingSource.POPULARITY),
    "batch": (RankingSource.LIST, RankingSource.MODEL, RankingSource.POPULARITY),
}
MODEL_FIRST = (RankingSource.MODEL, RankingSource.COMPLETE_LIST, RankingSource.LIST, RankingSource.POPULARITY)


@dataclass(frozen=True)
class Route:
    """Which state serves a query, by which sources in turn, and whether the response explores.

    is_challengers : whether the state is the challenger's
    """

    state: ServingState
    sources: tuple[RankingSource, ...]
    exploration: Exploration | None = None
    is_challengers: bool = False


def choose_route(query: Query, deployment: Deployment, exploration: Exploration | None, share: float) -> Route:
    """The route of a query.

    exploration : how responses explore, None: not at all
    share : of the users whose responses explore
    """
    state, experiment, challenger = deployment.state, deployment.experiment, deployment.challenger
    if exploration is not None and not (explores(query.user, share) and can_explore(state, exploration)):
        exploration = None
    order = ORDER[query.mode]
    if query.mode == "auto" and (exploration is not None or not state.lists_are_current):
        order = MODEL_FIRST
    if experiment is None or challenger is None or query.mode == "batch" or not experiment.serves(query.user):
        return Route(state, order, exploration)
    return Route(challenger, MODEL_FIRST, exploration, is_challengers=True)


def explores(user: str | None, share: float) -> bool:
    """Whether responses for a user explore: a share of the users, other ones than an experiment's."""
    return user is not None and is_in_share(user, "exploration", share)


def look_up_complete_list(query: Query, state: ServingState) -> RankedItems | None:
    """The nightly list, None where it lacks something that is asked for.

    Raises PartUnavailableError where it cannot be read, RequestError.
    """
    adds_filter = query.items.filter_seen and not state.filters_seen
    if query.mode == "realtime" or query.needs_model or adds_filter:
        return None
    scored = _find(query, state)
    if scored is None:
        return None
    items, allowed = _allowed_items(query, state, scored)
    if len(items) < min(query.k, allowed):
        return None
    return _as_ranked(items, scored, query.k)


def lists_serve(query: Query, route: Route, champion: ServingState) -> bool:
    """Whether the champion's complete list would have served a query that the challenger was asked."""
    if query.mode != "auto" or route.exploration is not None or not champion.lists_are_current:
        return False
    try:
        return look_up_complete_list(query, champion) is not None
    except PartUnavailableError:
        return False


def look_up_list(query: Query, state: ServingState) -> RankedItems:
    """The nightly list as it is, or the popularity fallback for somebody who has none.

    Raises PartUnavailableError where it cannot be read, RequestError.
    """
    scored = _find(query, state)
    if scored is None:
        return rank_by_popularity(query, state)
    items, _ = _allowed_items(query, state, scored)
    return _as_ranked(items, scored, query.k)


def rank_by_popularity(query: Query, state: ServingState) -> RankedItems:
    """The popularity fallback, without asking the model. Raises RequestError."""
    items: list[tuple[Any, float | None]] = list(state.popular_items)
    if not query.items.is_open:
        index = state.predictor.index_of([item_id for item_id, _ in items])
        shown = to_filters(query.items, state).shows(index, _seen_items(query, state))
        items = [pair for pair, is_shown in zip(items, shown.tolist(), strict=True) if is_shown]
    return RankedItems(items[: query.k], "popular")


def _find(query: Query, state: ServingState) -> ScoredUser | None:
    if query.user_id is None:
        return None
    try:
        return state.snapshot.find(query.user_id)
    except Exception as error:
        log = logging.getLogger("ray.serve")
        log.error("the nightly lists cannot be read: %s", type(error).__name__)
        log.debug("the nightly lists cannot be read", exc_info=error)
        raise PartUnavailableError("snapshot") from error


def _as_ranked(items: list[tuple[Any, float | None]], scored: ScoredUser, k: int) -> RankedItems:
    return RankedItems(items[:k], "popular" if scored.source == "popular" else "snapshot")


def _allowed_items(query: Query, state: ServingState, scored: ScoredUser) -> tuple[list[tuple[Any, float | None]], int]:
    """Of a user's list what may be shown, and how many items of the catalogue might be."""
    items: list[tuple[Any, float | None]] = list(zip(scored.item_ids, scored.scores, strict=True))
    answerable = state.predictor.answerable
    rule = query.items
    if not (rule.deny or rule.allow is not None or rule.where or (rule.filter_seen and not state.filters_seen)):
        return items, answerable
    filters, seen = to_filters(rule, state), _seen_items(query, state)
    barred = np.unique(filters.barred(seen))
    barred = barred[barred > 0]
    shown = filters.shows(state.predictor.index_of(scored.item_ids), seen)
    allowed = answerable - len(barred) if filters.allow is None else len(np.setdiff1d(filters.allow, barred))
    return [pair for pair, is_shown in zip(items, shown.tolist(), strict=True) if is_shown], allowed


def _seen_items(query: Query, state: ServingState) -> np.ndarray:
    return np.zeros(0, np.int64) if query.user_id is None else state.stored_history(query.user_id).item_index
