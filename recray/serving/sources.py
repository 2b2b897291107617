"""The sources of a response: their order for a query, and those that need no model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

from recray.dataset.reader import History
from recray.errors import PartUnavailableError, RequestError
from recray.serving.deployment import Deployment
from recray.serving.experiment import is_in_share
from recray.serving.modulation import Exploration, can_explore
from recray.serving.query import Query
from recray.serving.ranking import RankedItems, to_filters
from recray.serving.state import EMPTY_HISTORY, ServingState
from recray.snapshot.reader import ScoredUser


class RankingSource(Enum):
    """A source that ranks; the first one of a route that succeeds responds."""

    COMPLETE_LIST = auto()  # the batch recommendations, where they are current and long enough
    MODEL = auto()
    LIST = auto()  # the batch recommendations as they are, or the popularity fallback for a user without
    POPULARITY = auto()


ORDER = {
    "auto": (RankingSource.COMPLETE_LIST, RankingSource.MODEL, RankingSource.LIST, RankingSource.POPULARITY),
    "realtime": (RankingSource.MODEL, RankingSource.LIST, RankingSource.POPULARITY),
    "batch": (RankingSource.LIST, RankingSource.MODEL, RankingSource.POPULARITY),
}
MODEL_FIRST = (RankingSource.MODEL, RankingSource.COMPLETE_LIST, RankingSource.LIST, RankingSource.POPULARITY)


@dataclass(frozen=True)
class Route:
    """State and sources (in order) that serve a query, and its exploration.

    is_challengers : whether the state is the challenger's
    """

    state: ServingState
    sources: tuple[RankingSource, ...]
    exploration: Exploration | None = None
    is_challengers: bool = False


def choose_route(
    query: Query, deployment: Deployment, exploration: Exploration | None, share: float
) -> Route:
    """The route of a query. Raises RequestError for a challenger that there is not.

    exploration : how responses explore; None: not at all
    share : share of the users whose responses explore
    """
    state, experiment, challenger = deployment.state, deployment.experiment, deployment.challenger
    if query.variant == "popular":
        return Route(state, (RankingSource.POPULARITY,))
    if query.variant == "challenger":
        if challenger is None:
            raise RequestError(
                "variant: there is no challenger", "recray serve canary BUNDLE begins an experiment"
            )
        return Route(challenger, MODEL_FIRST, is_challengers=True)
    if query.variant == "champion" or (query.surface is not None and not query.surface[1].experiment):
        return Route(state, ORDER[query.mode])
    if exploration is not None and not (is_exploring(query.user, share) and can_explore(state, exploration)):
        exploration = None
    order = ORDER[query.mode]
    if query.mode == "auto" and (exploration is not None or not state.has_current_lists):
        order = MODEL_FIRST
    if experiment is None or challenger is None or query.mode == "batch" or not experiment.serves(query.user):
        return Route(state, order, exploration)
    return Route(challenger, MODEL_FIRST, exploration, is_challengers=True)


def is_exploring(user: str | None, share: float) -> bool:
    """Whether responses for a user explore. The share is drawn independently of an experiment's."""
    return user is not None and is_in_share(user, "exploration", share)


def look_up_complete_list(query: Query, state: ServingState) -> RankedItems | None:
    """The batch recommendations, None where they do not satisfy the query.

    Raises PartUnavailableError where they cannot be read, RequestError.
    """
    if (
        query.mode == "realtime"
        or query.needs_model
        or query.has_own_rules
        or _adds_seen_filter(query, state)
    ):
        return None
    scored = _find_scored_user(query, state)
    if scored is None:
        return None
    items, allowed = _filter_list(query, state, scored)
    if len(items) < min(query.k, allowed):
        return None
    return _to_ranked_items(items, scored, query.k)


def is_list_sufficient(query: Query, route: Route, champion: ServingState) -> bool:
    """Whether the champion's complete list would have served a query that the challenger served."""
    if query.mode != "auto" or route.exploration is not None or not champion.has_current_lists:
        return False
    try:
        return look_up_complete_list(query, champion) is not None
    except PartUnavailableError:
        return False


def look_up_list(query: Query, state: ServingState) -> RankedItems:
    """The batch recommendations as they are, or the popularity fallback for a user without.

    Raises PartUnavailableError where they cannot be read, RequestError.
    """
    scored = _find_scored_user(query, state)
    if scored is None:
        return rank_by_popularity(query, state)
    items, _ = _filter_list(query, state, scored)
    return _to_ranked_items(items, scored, query.k)


def rank_by_popularity(query: Query, state: ServingState) -> RankedItems:
    """The popularity fallback, without the model. Raises RequestError."""
    items: list[tuple[Any, float | None]] = list(state.popular_items)
    if not query.items.allows_all:
        index = state.predictor.vocabulary.index_of([item_id for item_id, _ in items])
        shown = to_filters(query.items, state, query.moment_s).is_allowed(index, _load_history(query, state))
        items = [pair for pair, is_shown in zip(items, shown.tolist(), strict=True) if is_shown]
    return RankedItems(items[: query.k], "popular")


def _find_scored_user(query: Query, state: ServingState) -> ScoredUser | None:
    if query.user_id is None:
        return None
    try:
        return state.snapshot.find(query.user_id)
    except Exception as error:
        log = logging.getLogger("ray.serve")
        log.error("the batch recommendations cannot be read: %s", type(error).__name__)
        log.debug("the batch recommendations cannot be read", exc_info=error)
        raise PartUnavailableError("snapshot") from error


def _to_ranked_items(items: list[tuple[Any, float | None]], scored: ScoredUser, k: int) -> RankedItems:
    return RankedItems(items[:k], "popular" if scored.source == "popular" else "snapshot")


def _filter_list(
    query: Query, state: ServingState, scored: ScoredUser
) -> tuple[list[tuple[Any, float | None]], int]:
    """The items of a user's list that the query allows, and how many items of the catalogue it allows."""
    items: list[tuple[Any, float | None]] = list(zip(scored.item_ids, scored.scores, strict=True))
    n_available = state.predictor.n_available
    rule = query.items
    filters_items = rule.deny or rule.allow is not None or rule.where or _adds_seen_filter(query, state)
    if not filters_items and not len(state.unavailable):
        return items, n_available
    filters, history = to_filters(rule, state, query.moment_s), _load_history(query, state)
    excluded = np.unique(filters.excluded_items(history))
    excluded = np.setdiff1d(excluded[excluded > 0], state.unavailable)
    index = state.predictor.vocabulary.index_of(scored.item_ids)
    shown = filters.is_allowed(index, history) & ~np.isin(index, state.unavailable)
    allowed = n_available - len(excluded)
    if filters.allow is not None:
        allowed = len(np.setdiff1d(filters.allow, np.union1d(excluded, state.unavailable)))
    return [pair for pair, is_shown in zip(items, shown.tolist(), strict=True) if is_shown], allowed


def _adds_seen_filter(query: Query, state: ServingState) -> bool:
    """Whether the query leaves out seen items otherwise than the lists."""
    return query.items.filter_seen and (not state.filters_seen or query.items.seen != state.seen_rule)


def _load_history(query: Query, state: ServingState) -> History:
    return EMPTY_HISTORY if query.user_id is None else state.stored_history(query.user_id)
