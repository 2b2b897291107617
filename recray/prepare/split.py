"""Third pass, in the driver: where each user's training events end and what is predicted, one shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from recray.config import SplitSettings
from recray.dataset.reader import Shard, draw_of, nothing_learned_of
from recray.errors import DataError, ImpossibleSplitError
from recray.prepare.shards import held_out_counts


def quantile(chunks: Callable[[], Iterable[np.ndarray]], q: float) -> float:
    """Quantile of integers that come in chunks, by linear interpolation as `numpy.quantile`, in memory for one chunk.

    Finds the two order statistics around q by narrowing histograms over the value range.
    """
    count = sum(len(chunk) for chunk in chunks())
    where = q * (count - 1)
    low = _order_statistic(chunks, int(np.floor(where)))
    high = _order_statistic(chunks, int(np.ceil(where)))
    found: float = low + (high - low) * (where - np.floor(where))
    return found


def _order_statistic(chunks: Callable[[], Iterable[np.ndarray]], rank: int) -> int:
    low = min(int(chunk.min()) for chunk in chunks() if len(chunk))
    high = max(int(chunk.max()) for chunk in chunks() if len(chunk)) + 1
    while high - low > 1:
        width = -(-(high - low) // 4096)
        bins = np.zeros(4097, np.int64)
        for chunk in chunks():
            inside = chunk[(chunk >= low) & (chunk < high)]
            bins += np.bincount((inside - low) // width, minlength=4097)
        position = int(np.searchsorted(np.cumsum(bins), rank, side="right"))
        rank -= int(bins[:position].sum())
        low, high = low + position * width, min(low + (position + 1) * width, high)
    return low


def cut_dates(settings: SplitSettings, kept_times: Callable[[], Iterable[np.ndarray]]) -> dict[str, int]:
    """First second of validation and test under a time split. Raises DataError if they cannot both hold events."""
    if not any(len(chunk) for chunk in kept_times()):
        raise DataError("no user has data.min_user_events events", "lower data.min_user_events")
    test = settings.test_from.timestamp() if settings.test_from else quantile(kept_times, 1 - settings.test_fraction)
    validation: float = test
    if settings.validation_from:
        validation = settings.validation_from.timestamp()
    elif any((chunk < test).any() for chunk in kept_times()):
        validation = quantile(lambda: (chunk[chunk < test] for chunk in kept_times()), 1 - settings.test_fraction)
    first = min((int(chunk.min()) for chunk in kept_times() if len(chunk)), default=0)
    last = max((int(chunk.max()) for chunk in kept_times() if len(chunk)), default=0)
    if not first < validation < test <= last:
        as_date = np.array([first, validation, test, last]).astype("datetime64[s]")
        raise ImpossibleSplitError(
            f"impossible split: events from {as_date[0]} to {as_date[3]}, validation from {as_date[1]}, test from {as_date[2]}",
            "set split.validation_from and split.test_from inside the events, or use split.kind=leave_one_out",
        )
    return {"validation": int(np.ceil(validation)), "test": int(np.ceil(test))}


def split_shard(shard: Shard, settings: SplitSettings, cuts: dict[str, int]) -> np.ndarray:
    """Split of one shard, int32 [users, 4] as `Shard.split`."""
    counts = np.diff(shard.offsets)
    split = np.zeros((len(shard), 4), np.int32)
    train_end, validation_end, test_start, test_end = split.T
    if settings.kind == "time":
        asked = held_out(shard, settings) if settings.held_out else draw_of(shard.user_ids, settings.seed) < settings.validation_users
        before_test = _count_before(shard, cuts["test"])
        before_validation = _count_before(shard, cuts["validation"])
        test_start[:] = before_test
        test_end[:] = np.where(before_test > 0, _basket_end(shard, before_test), before_test)
        validation = asked & (before_validation > 0) & (before_validation < before_test)
        train_end[:] = np.where(validation, before_validation, before_test)
        validation_end[:] = np.where(validation, np.minimum(_basket_end(shard, before_validation), before_test), train_end)
    elif settings.kind == "leave_one_out":
        held = np.where(counts >= 3, 1, 0)
        test_end[:] = counts
        test_start[:] = validation_end[:] = counts - held
        train_end[:] = counts - 2 * held
        if settings.held_out:  # nothing is asked of the others
            others = ~held_out(shard, settings)
            split[others, :3] = counts[others, None]
    else:
        baskets = np.zeros(len(shard), np.int64)
        baskets[counts > 0] = shard.basket[shard.offsets[1:][counts > 0] - 1] + 1
        held = held_out_counts(baskets, settings.test_fraction)
        test_end[:] = counts
        test_start[:] = validation_end[:] = _count_before_basket(shard, baskets - held)
        train_end[:] = _count_before_basket(shard, baskets - 2 * held)
    return split


def held_out(shard: Shard, settings: SplitSettings) -> np.ndarray:
    """The users of whom nothing is learned, bool [users]."""
    if not settings.held_out:
        return np.zeros(len(shard), bool)
    return nothing_learned_of(shard.user_ids, settings.model_dump())


def _count_before_basket(shard: Shard, basket: np.ndarray) -> np.ndarray:
    """Events of each user before basket number `basket[user]`, int64 [users]."""
    inside = shard.basket < np.repeat(basket, np.diff(shard.offsets))
    before = np.concatenate([[0], np.cumsum(inside)])
    found: np.ndarray = before[shard.offsets[1:]] - before[shard.offsets[:-1]]
    return found


def _count_before(shard: Shard, cut_s: int) -> np.ndarray:
    """Events of each user before a moment, int64 [users]."""
    before = np.concatenate([[0], np.cumsum(shard.timestamp_s < cut_s)])
    found: np.ndarray = before[shard.offsets[1:]] - before[shard.offsets[:-1]]
    return found


def check_cuts(shard: Shard, cuts: dict[str, int]) -> None:
    """Raises DataError where a history is out of order of time, or an event at or after the test cut would be learned."""
    late, back = shard.leaks(cuts["test"]) if cuts else (0, 0)
    if late or back:
        raise DataError(
            f"{late} events at or after the test cut would be learned, {back} events come before an earlier one of their user",
            "this is a fault in recray: report it with the settings of data and split",
        )


def _basket_end(shard: Shard, start: np.ndarray) -> np.ndarray:
    """End (events from the user's first) of the basket in which event `start` lies; `start` if there is none."""
    counts = np.diff(shard.offsets)
    if not len(shard.basket):
        return start
    key = np.repeat(np.arange(len(shard)), counts) * (int(shard.basket.max()) + 1) + shard.basket
    there = start < counts
    event = np.where(there, shard.offsets[:-1] + start, 0)
    end = np.searchsorted(key, key[event], side="right") - shard.offsets[:-1]
    return np.where(there, end, start)
