"""How the events since the previous run differ from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recray.dataset.popularity import DAY_S
from recray.dataset.reader import Dataset

REFERENCE_DAYS = 28  # before the previous run
LEAST_SHARE = 1e-4  # of a class in either period, so that the logarithm is finite
MODERATE, LARGE = 0.1, 0.25  # population stability indices from which a shift is moderate, or large
MOST_VALUES = 8  # of a categorical column; the rest is one class
COLUMNS = 3  # categorical columns of the item table that are compared
SHARES = (0.1, 0.3, 0.6, 1.0)  # of the events before, on the most popular items: bounds of the classes


@dataclass(frozen=True)
class Shift:
    """The classes of one distribution before and after.

    psi : population stability index, sum of (after - before) ln(after / before) over the classes (Lewis, An
        Introduction to Credit Scoring, 1994)
    classes : name, share before, share after
    """

    name: str
    psi: float
    classes: tuple[tuple[str, float, float], ...]

    @property
    def level(self) -> str:
        """`stable`, `moderate` (from 0.1) or `large` (from 0.25)."""
        return "large" if self.psi >= LARGE else "moderate" if self.psi >= MODERATE else "stable"


@dataclass(frozen=True)
class InputChange:
    """The events of a run after the previous one's as-of, beside those of the `REFERENCE_DAYS` before it.

    per_day : events a day, before and after
    new_items, new_users : items and users without an event up to the previous as-of
    """

    previous_as_of_s: int
    events: int
    per_day: tuple[float, float]
    new_items: int
    new_users: int
    shifts: tuple[Shift, ...]


def compare_inputs(
    dataset: Dataset, previous_as_of_s: int, *, holdout_only: bool = False
) -> InputChange | None:
    """What changed since the previous run; None without times, or without events in both periods.

    holdout_only : count the events of holdout users alone, as privacy demands
    """
    if not dataset.has_time:
        return None
    start_s = previous_as_of_s - REFERENCE_DAYS * DAY_S
    parts: dict[bool, list[list[np.ndarray]]] = {False: [], True: []}
    was_seen = np.zeros(dataset.n_items + 1, bool)
    new_users = 0
    for shard in dataset.shards():
        time_s, item = np.asarray(shard.timestamp_s), np.asarray(shard.item_index)
        user = np.repeat(np.arange(len(shard)), np.diff(shard.offsets))
        is_counted = shard.queried[user] if holdout_only else np.ones(len(time_s), bool)
        is_new = time_s > previous_as_of_s
        was_seen[item[~is_new & is_counted]] = True
        knew = np.zeros(len(shard), bool)
        knew[user[~is_new]] = True
        new_users += len(np.unique(user[is_new & is_counted & ~knew[user]]))
        for after in (False, True):
            in_period = is_counted & (is_new if after else ~is_new & (time_s > start_s))
            parts[after].append(
                [item[in_period], np.asarray(shard.event_index)[in_period], time_s[in_period]]
            )
    before, after_ = (
        [np.concatenate(arrays) for arrays in zip(*parts[after], strict=True)] for after in (False, True)
    )
    if not len(before[0]) or not len(after_[0]):
        return None
    days_before = min(REFERENCE_DAYS, (previous_as_of_s - int(before[2].min())) / DAY_S)
    days_after = (dataset.as_of_s - previous_as_of_s) / DAY_S
    return InputChange(
        previous_as_of_s,
        len(after_[0]),
        (len(before[0]) / max(days_before, 1.0), len(after_[0]) / max(days_after, 1 / 24)),
        int((~was_seen[np.unique(after_[0])]).sum()),
        new_users,
        tuple(_find_shifts(dataset, before, after_)),
    )


def _find_shifts(dataset: Dataset, before: list[np.ndarray], after: list[np.ndarray]) -> list[Shift]:
    shifts = [_shift("event types", dataset.event_types, before[1], after[1])]
    hours = [f"{hour:02d} to {hour + 6:02d} h UTC" for hour in range(0, 24, 6)]
    shifts.append(_shift("time of day", hours, *(part[2] % DAY_S // (6 * 3600) for part in (before, after))))
    counts = np.bincount(before[0], minlength=dataset.n_items + 1)
    order = np.argsort(-counts, kind="stable")
    share_above = np.empty(len(counts))
    share_above[order] = (np.cumsum(counts[order]) - counts[order]) / counts.sum()
    band_V = np.where(counts > 0, np.searchsorted(SHARES, share_above, side="right"), len(SHARES))
    bands = [f"the items with the first {share:.0%} of the events" for share in SHARES[:1]]
    bands += [
        f"the next, up to {share:.0%}" if share < 1 else "the rest of the items with events"
        for share in SHARES[1:]
    ]
    shifts.append(
        _shift("items", [*bands, "items without events before"], band_V[before[0]], band_V[after[0]])
    )
    for column in [name for name, kind in dataset.features.items() if kind == "categorical"][:COLUMNS]:
        encoded = dataset.items[column].combine_chunks().dictionary_encode()
        code_V = np.concatenate([[-1], encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
        values = encoded.dictionary.to_pylist()
        codes = [code_V[part[0]] for part in (before, after)]
        common = np.argsort(-np.bincount(codes[0][codes[0] >= 0], minlength=len(values)), kind="stable")
        position = np.full(len(values) + 1, MOST_VALUES)  # the last one stands for no value
        position[common[:MOST_VALUES]] = np.arange(min(MOST_VALUES, len(common)))
        names = [str(values[code]) for code in common[:MOST_VALUES]]
        names += [""] * (MOST_VALUES - len(names)) + ["others"]
        shifts.append(_shift(column, names, *(position[code] for code in codes)))
    return shifts


def _shift(name: str, classes: Sequence[str], before: np.ndarray, after: np.ndarray) -> Shift:
    shares = [
        np.bincount(np.asarray(part, np.int64), minlength=len(classes)) / len(part)
        for part in (before, after)
    ]
    old, new = (np.maximum(share, LEAST_SHARE) for share in shares)
    is_there = shares[0] + shares[1] > 0
    psi = float(((new - old) * np.log(new / old))[is_there].sum())
    rows = zip(classes, shares[0].tolist(), shares[1].tolist(), strict=True)
    return Shift(name, psi, tuple(row for row, there in zip(rows, is_there, strict=True) if there))
