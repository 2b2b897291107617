"""From histories to what the network reads of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recray.dataset.popularity import DAY_S, Popularity, dated
from recray.dataset.reader import History
from recray.errors import RequestError
from recray.model.shape import Batch

CACHED_DAYS = 64


class Inputs:
    """Makes the batches of a model that asks for these parts.

    Parameters
    ----------
    prior_days : days of the popularity prior, 0 for none
    has_time : whether `timestamp_s` is a time
    event_types : how many the model knows
    released_day : since when each item can be met, as `Dataset.released_day`; None where the model does not ask how fresh an item is
    """

    def __init__(self, popularity: Popularity, *, prior_days: int, has_time: bool, event_types: int, released_day: np.ndarray | None) -> None:
        self._popularity, self._prior_days, self._has_time, self._released_day = popularity, prior_days, has_time, released_day
        self._event_types = event_types
        self._dated: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, histories: list[History], moment: np.ndarray, context_BC: np.ndarray) -> Batch:
        """Histories that are asked at moments [B] in contexts [B, C].

        Raises RequestError for an event type that the model does not know, and for a value that is not finite.
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
            raise RequestError(f"event index {event.min()} or {event.max()} lies outside 0 to {self._event_types - 1}", "use Predictor.event_types")
        if not np.isfinite(value).all():
            raise RequestError("history: a value is not finite", "leave it out, or send a number")
        # inside the history a position is asked when the next basket came, the last one (and its basket) at `now`
        asked = next_times(time, length, moment) if self._has_time else np.broadcast_to(moment[:, None], (B, T)).copy()
        days, day = np.unique(moment // DAY_S, return_inverse=True)
        known = [self._on(int(d)) for d in days]
        prior, fresh = np.concatenate([rows[0] for rows in known]), np.concatenate([rows[1] for rows in known])
        arrays = (item, event, value, time, asked, np.arange(B), length - 1, prior, fresh, day, context_BC)
        return Batch._make((*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays), None))

    def _on(self, day: int) -> tuple[np.ndarray, np.ndarray]:
        """On a day log(1 + recent count) and the bucket of freshness of every item [1, V]; [1, 1] of what the model does not ask for."""
        if day not in self._dated:
            make_room(self._dated)
            self._dated[day] = dated(np.array([day]), self._popularity, self._prior_days, self._released_day)
        return self._dated[day]


def next_times(time_BT: np.ndarray, length: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The time of the first later event of another time for each position; `now` for the last basket and the padding."""
    T = time_BT.shape[1]
    place = np.arange(T)
    ends = np.empty(time_BT.shape, bool)  # a position after which another time begins
    ends[:, :-1] = (time_BT[:, :-1] != time_BT[:, 1:]) & (place[1:] < length[:, None])
    ends[:, -1] = False
    end = np.minimum.accumulate(np.where(ends, place, T)[:, ::-1], 1)[:, ::-1]
    following = np.take_along_axis(time_BT, np.minimum(end + 1, T - 1), 1)
    found: np.ndarray = np.where(end < T, following, now[:, None])
    return found


def make_room(days: dict[int, Any]) -> None:
    """Drop the oldest entry of a cache by day that is full; a request may name any day."""
    if len(days) >= CACHED_DAYS:
        del days[next(iter(days))]
