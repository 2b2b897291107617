"""Builds the batches that the network reads from histories."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recray.dataset.popularity import DAY_S, Popularity, dated_popularity
from recray.dataset.reader import History
from recray.errors import RequestError
from recray.model.shape import Batch

CACHED_DAYS = 64


class BatchBuilder:
    """Builds the batches of a model.

    Parameters
    ----------
    popularity_prior_days : days of the popularity prior, 0 for none
    has_time : whether `timestamp_s` is a time
    event_types : number of event types of the model
    released_day : day from which each item is available, as `Dataset.released_day`; None where the model does
        not use freshness
    """

    def __init__(
        self,
        popularity: Popularity,
        *,
        popularity_prior_days: int,
        has_time: bool,
        event_types: int,
        released_day: np.ndarray | None,
    ) -> None:
        self._popularity, self._prior_days = popularity, popularity_prior_days
        self._has_time, self._released_day = has_time, released_day
        self._event_types = event_types
        self._by_day: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def build(self, histories: list[History], moment: np.ndarray, context_BC: np.ndarray) -> Batch:
        """Histories that are queried at moments [B] (seconds) in contexts [B, C].

        Raises RequestError for an unknown event type or a value that is not finite.
        """
        length = np.array([len(history.item_index) for history in histories])
        B, T = len(histories), int(length.max())
        item, event, time = np.zeros((3, B, T), np.int64)
        value = np.zeros((B, T), np.float32)
        for row, history in enumerate(histories):
            item[row, : length[row]] = history.item_index
            event[row, : length[row]] = history.event_index
            time[row, : length[row]] = history.timestamp_s
            value[row, : length[row]] = history.value

        if event.min() < 0 or event.max() >= self._event_types:
            raise RequestError(
                f"event index {event.min()} or {event.max()} lies outside 0 to {self._event_types - 1}",
                "use Predictor.event_types",
            )
        if not np.isfinite(value).all():
            raise RequestError("history: a value is not finite", "leave it out, or send a number")

        # a position inside the history is queried at the time of the next basket, the last basket at `moment`
        if self._has_time:
            query_time = find_next_times(time, length, moment)
        else:
            query_time = np.broadcast_to(moment[:, None], (B, T)).copy()

        days, day = np.unique(moment // DAY_S, return_inverse=True)
        columns = [self._columns_on(int(d)) for d in days]
        prior = np.concatenate([prior for prior, _ in columns])
        fresh = np.concatenate([fresh for _, fresh in columns])
        arrays = (
            item,
            event,
            value,
            time,
            query_time,
            np.arange(B),
            length - 1,
            prior,
            fresh,
            day,
            context_BC,
        )
        return Batch._make((*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays), None))

    def _columns_on(self, day: int) -> tuple[np.ndarray, np.ndarray]:
        """log(1 + recent count) and the freshness bucket of every item on a day [1, V]; [1, 1] of what the
        model does not use.
        """
        if day not in self._by_day:
            evict_oldest(self._by_day)
            self._by_day[day] = dated_popularity(
                np.array([day]), self._popularity, self._prior_days, self._released_day
            )
        return self._by_day[day]


def find_next_times(time_BT: np.ndarray, length: np.ndarray, now: np.ndarray) -> np.ndarray:
    """For each position the time of the next basket; `now` for the last basket and the padding.

    A basket is a run of events of one time.
    """
    T = time_BT.shape[1]
    position = np.arange(T)
    is_end = np.empty(time_BT.shape, bool)  # whether another time begins after the position
    is_end[:, :-1] = (time_BT[:, :-1] != time_BT[:, 1:]) & (position[1:] < length[:, None])
    is_end[:, -1] = False
    end = np.minimum.accumulate(np.where(is_end, position, T)[:, ::-1], 1)[:, ::-1]
    following = np.take_along_axis(time_BT, np.minimum(end + 1, T - 1), 1)
    return np.where(end < T, following, now[:, None])


def evict_oldest(days: dict[int, Any]) -> None:
    """Drop the oldest entry of a full cache by day, because a request may name any day."""
    if len(days) >= CACHED_DAYS:
        del days[next(iter(days))]
