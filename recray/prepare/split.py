"""Third pass, in the driver: where each user's training events end and which events are targets, one shard at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from recray.config import SplitSettings
from recray.dataset.reader import Shard, hash_to_unit_interval, is_holdout
from recray.errors import DataError, ImpossibleSplitError
from recray.prepare.shards import count_holdout_baskets


def quantile(chunks: Callable[[], Iterable[np.ndarray]], q: float) -> float:
    """Quantile of integers that come in chunks, with the linear interpolation of `numpy.quantile`, in memory
    for one chunk.

    Finds the two order statistics around q by narrowing histograms over the value range.
    """
    count = sum(len(chunk) for chunk in chunks())
    position = q * (count - 1)
    low = _order_statistic(chunks, int(np.floor(position)))
    high = _order_statistic(chunks, int(np.ceil(position)))
    result: float = low + (high - low) * (position - np.floor(position))
    return result


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


def cut_dates(settings: SplitSettings, iterate_times: Callable[[], Iterable[np.ndarray]]) -> dict[str, int]:
    """First second of validation and test with a time split. Raises DataError if they cannot both contain
    events.
    """
    if not any(len(chunk) for chunk in iterate_times()):
        raise DataError("no user has data.min_user_events events", "lower data.min_user_events")
    test = (
        settings.test_from.timestamp()
        if settings.test_from
        else quantile(iterate_times, 1 - settings.test_fraction)
    )
    validation: float = test
    if settings.validation_from:
        validation = settings.validation_from.timestamp()
    elif any((chunk < test).any() for chunk in iterate_times()):
        validation = quantile(
            lambda: (chunk[chunk < test] for chunk in iterate_times()), 1 - settings.test_fraction
        )
    first_s = min((int(chunk.min()) for chunk in iterate_times() if len(chunk)), default=0)
    last_s = max((int(chunk.max()) for chunk in iterate_times() if len(chunk)), default=0)
    if not first_s < validation < test <= last_s:
        as_date = np.array([first_s, validation, test, last_s]).astype("datetime64[s]")
        raise ImpossibleSplitError(
            f"impossible split: events from {as_date[0]} to {as_date[3]}, validation from {as_date[1]}, "
            f"test from {as_date[2]}",
            "set split.validation_from and split.test_from within the time of the events, or use "
            "split.kind=leave_one_out",
        )
    return {"validation": int(np.ceil(validation)), "test": int(np.ceil(test))}


def split_shard(shard: Shard, settings: SplitSettings, cuts: dict[str, int]) -> np.ndarray:
    """Split of one shard, int32 [users, 4] as in `Shard.split`."""
    counts = np.diff(shard.offsets)
    split = np.zeros((len(shard), 4), np.int32)
    train_end, validation_end, test_start, test_end = split.T
    if settings.kind == "time":
        is_queried = (
            mask_holdout(shard, settings)
            if settings.holdout_users
            else hash_to_unit_interval(shard.user_ids, settings.seed) < settings.validation_users
        )
        before_test = _count_before(shard, cuts["test"])
        before_validation = _count_before(shard, cuts["validation"])
        start = shard.offsets[:-1]
        first_test = shard.next_target(start + before_test) - start
        first_validation = shard.next_target(start + before_validation) - start
        is_at_target = settings.query_time == "target"  # the user's events up to the target are history
        test_start[:] = first_test if is_at_target else before_test
        has_target = (before_test > 0) & (first_test < counts)
        test_end[:] = np.where(has_target, _basket_end(shard, first_test), test_start)
        validation = is_queried & (before_validation > 0) & (first_validation < before_test)
        before_validation = first_validation if is_at_target else before_validation
        train_end[:] = np.where(validation, before_validation, before_test)
        validation_end[:] = np.where(
            validation, np.minimum(_basket_end(shard, first_validation), before_test), train_end
        )
    elif settings.kind == "leave_one_out":
        targets = shard.target_positions
        end = shard.targets_before[shard.offsets[1:]]
        count = end - shard.targets_before[shard.offsets[:-1]]
        # the last two targets of a user who has an event before them
        last, before = (
            np.append(targets, 0)[np.maximum(end - back, -1)] - shard.offsets[:-1] for back in (1, 2)
        )
        is_queried = (count >= 2) & (before >= 1)
        test_start[:], test_end[:] = (np.where(is_queried, event, counts) for event in (last, last + 1))
        train_end[:], validation_end[:] = (
            np.where(is_queried, event, counts) for event in (before, before + 1)
        )
        if settings.holdout_users:  # other users have no targets
            is_trained = ~mask_holdout(shard, settings)
            split[is_trained, :3] = counts[is_trained, None]
    else:
        baskets = np.zeros(len(shard), np.int64)
        baskets[counts > 0] = shard.basket[shard.offsets[1:][counts > 0] - 1] + 1
        holdout_counts = count_holdout_baskets(baskets, settings.test_fraction)
        test_end[:] = counts
        test_start[:] = validation_end[:] = _count_before_basket(shard, baskets - holdout_counts)
        train_end[:] = _count_before_basket(shard, baskets - 2 * holdout_counts)
    return split


def mask_holdout(shard: Shard, settings: SplitSettings) -> np.ndarray:
    """The holdout users, bool [users]."""
    if not settings.holdout_users:
        return np.zeros(len(shard), bool)
    return is_holdout(shard.user_ids, settings.model_dump())


def _count_before_basket(shard: Shard, basket: np.ndarray) -> np.ndarray:
    """Events of each user before basket number `basket[user]`, int64 [users]."""
    inside = shard.basket < np.repeat(basket, np.diff(shard.offsets))
    before = np.concatenate([[0], np.cumsum(inside)])
    result: np.ndarray = before[shard.offsets[1:]] - before[shard.offsets[:-1]]
    return result


def _count_before(shard: Shard, cut_s: int) -> np.ndarray:
    """Events of each user before a moment, int64 [users]."""
    before = np.concatenate([[0], np.cumsum(shard.timestamp_s < cut_s)])
    result: np.ndarray = before[shard.offsets[1:]] - before[shard.offsets[:-1]]
    return result


def check_cuts(shard: Shard, cuts: dict[str, int]) -> None:
    """Raises DataError if a history is not in order of time, or an event at or after the test cut is in
    training.
    """
    leaked, out_of_order = shard.count_split_violations(cuts["test"]) if cuts else (0, 0)
    if leaked or out_of_order:
        raise DataError(
            f"{leaked} events at or after the test cut are in training, {out_of_order} events come before an "
            "earlier one of their user",
            "this is a bug in recray: report it with the settings of data and split",
        )


def _basket_end(shard: Shard, start: np.ndarray) -> np.ndarray:
    """End (in events from the user's first) of the basket of event `start`; `start` if there is no such
    event.
    """
    counts = np.diff(shard.offsets)
    if not len(shard.basket):
        return start
    key = np.repeat(np.arange(len(shard)), counts) * (int(shard.basket.max()) + 1) + shard.basket
    exists = start < counts
    event = np.where(exists, shard.offsets[:-1] + start, 0)
    end = np.searchsorted(key, key[event], side="right") - shard.offsets[:-1]
    return np.where(exists, end, start)
