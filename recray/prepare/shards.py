"""Second pass, one Ray task per shard: order every user's events, number the baskets, write the shard.

Events are ordered by time, then by position where both are mapped, then by file and row. Events of one time
are grouped by basket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray.config import DataSettings, SplitSettings
from recray.dataset import schema
from recray.prepare.partition import (
    ROW_DIGEST,
    STAGED_POSITION,
    PartitionPlan,
    mask_statistics_users,
    read_partition,
)
from recray.storage import write_json


@dataclass(frozen=True)
class ShardPlan:
    """Input of every task of the second pass. The positions in `item_ids` (ascending) and `event_types` are
    the indices.

    default_event : index of the type that any other type counts as
    clocked : whether times of `data.events` have a time of day
    until_us : later events are left out; None: none are
    """

    partition: PartitionPlan
    groups: int
    clocked: bool
    until_us: int | None
    split: SplitSettings
    data: DataSettings
    item_ids: pa.Array | None = None
    event_types: Sequence[str] = ()
    default_event: int = 0
    out: Path = Path()

    def counts_path(self, number: int, name: str) -> Path:
        """Where `count_shard` writes the counts of a column."""
        return self.partition.staging / f"recounted-{name}-{number:05d}.parquet"

    def shard_counts_path(self, number: int) -> Path:
        """Where a shard's `ShardCounts` are."""
        return self.partition.staging / f"shard-{number:05d}.json"


@dataclass
class ShardCounts:
    """What the second pass left out.

    duplicates : rows equal to an earlier one in all mapped columns; left out with data.duplicates=drop
    told_twice : collected events that `data.events` contains too; the latter count
    few : users with fewer events than data.min_user_events
    late : events after the last one of the users who define the end of the data
    """

    duplicates: int = 0
    told_twice: int = 0
    few: int = 0
    late: int = 0

    def __add__(self, other: ShardCounts) -> ShardCounts:
        return ShardCounts(*(own + added for own, added in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class _KeptRows:
    """Rows of a shard that are kept, in order: their positions, the rank of each row's user, and the ids of
    these users.
    """

    order: np.ndarray
    user: np.ndarray
    users: pa.Array
    counted: ShardCounts


def count_shard(plan: ShardPlan, number: int) -> None:
    """Count the kept events of shard `number` by item, and by event type for the users who describe the data.
    Without a vocabulary every item is kept.
    """
    table = read_partition(plan.partition, plan.groups, number)
    names = (schema.ITEM_ID, schema.EVENT)
    (items, item), (types, event) = (_rank_ids(table[name]) for name in names)
    in_vocabulary = (
        np.ones(len(items), np.int64)
        if plan.item_ids is None
        else pc.is_in(items, value_set=plan.item_ids).cast(pa.int64()).to_numpy()
    )
    order = _filter_rows(plan, table, (item + 1) * in_vocabulary[item] if len(items) else item, event).order
    statistics_rows = order[mask_statistics_users(plan.partition, table)[order]]
    for name, ids, codes, rows in zip(
        names, (items, types), (item, event), (order, statistics_rows), strict=True
    ):
        counts = pa.table({name: ids, "count_all": np.bincount(codes[rows], minlength=len(ids))})
        pq.write_table(counts.filter(pc.greater(counts["count_all"], 0)), plan.counts_path(number, name))


def merge_counts(plan: ShardPlan, name: str) -> pa.Table:
    """The counts of `count_shard` over all shards: values of a column and their events (`count_all`)."""
    tables = [pq.read_table(plan.counts_path(number, name)) for number in range(plan.partition.shards)]
    counts = pa.concat_tables(tables).group_by(name).aggregate([("count_all", "sum")])
    return counts.rename_columns([name, "count_all"])


def build_shard(plan: ShardPlan, number: int) -> None:
    """Write shard `number` to `plan.out`. Events of items outside the vocabulary are dropped; their users are
    kept.
    """
    clock = plan.partition.clock
    table = read_partition(plan.partition, plan.groups, number)
    item = pc.fill_null(pc.index_in(table[schema.ITEM_ID], value_set=plan.item_ids), -1).to_numpy() + 1
    event = pc.fill_null(
        pc.index_in(table[schema.EVENT], value_set=pa.array(plan.event_types, pa.string())),
        plan.default_event,
    ).to_numpy()
    kept = _filter_rows(plan, table, item, event)
    order, user, users = kept.order, kept.user, kept.users

    time, value = table["t"].to_numpy(), table[schema.VALUE].to_numpy()
    basket_codes = _encode_if_present(table, schema.BASKET)
    is_start = _mark_basket_starts(
        user, time[order], None if basket_codes is None else basket_codes[order], clock, plan.data.basket_gap
    )
    basket = np.cumsum(is_start)
    counts = np.bincount(user, minlength=len(users))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    first_basket = np.zeros(len(users), np.int64)
    first_basket[counts > 0] = basket[offsets[:-1][counts > 0]]
    basket = basket - first_basket[user]

    timestamp = time[order] // 1_000_000 if clock == schema.TIMESTAMP else time[order]
    context = [table[name].to_numpy()[order] for name in _context_columns(table)]
    columns = [item[order], event[order], timestamp, value[order], *context, basket]
    if plan.split.kind == "random":
        columns = _move_holdout_last(user, columns, plan.split, number)
    context_names = [name.removeprefix(schema.CONTEXT) for name in _context_columns(table)]
    shard_schema = schema.shard_schema(users.type, context_names)
    _write_shard(plan, number, shard_schema, users, offsets, columns)
    write_json(plan.shard_counts_path(number), asdict(kept.counted))


def _filter_rows(plan: ShardPlan, table: pa.Table, item: np.ndarray, event: np.ndarray) -> _KeptRows:
    """Order the rows, and leave out those without an item (0), collected events that the log has too,
    duplicates, and users with few events.
    """
    clock, counted = plan.partition.clock, ShardCounts()
    users, user = _rank_ids(table[schema.USER_ID])
    time, value = table["t"].to_numpy(), table[schema.VALUE].to_numpy()
    basket_codes = _encode_if_present(table, schema.BASKET)
    order = np.lexsort(
        (table[STAGED_POSITION].to_numpy(), time, user)
        if STAGED_POSITION in table.column_names
        else (time, user)
    )  # stable: equal times keep the order (file, row)

    keep = item > 0
    if plan.until_us is not None:
        is_late = time > plan.until_us
        keep &= ~is_late
        counted.late = int(is_late.sum())
    live = table["live"].to_numpy()
    if live.any():
        seconds_or_days = time // 1_000_000 if plan.clocked else plan.partition.times.day(time)
        is_repeated_event = keep & _mask_collected_duplicates(
            table, live, user, item, event, seconds_or_days if clock == schema.TIMESTAMP else None
        )
        keep &= ~is_repeated_event
        counted.told_twice = int(is_repeated_event.sum())
    if plan.partition.keeps_low_values:
        keep &= value >= np.float32(plan.data.min_value or 0)
    order = order[keep[order]]

    if basket_codes is not None and STAGED_POSITION not in table.column_names:
        order = order[_group_by_basket(user[order], time[order], basket_codes[order])]

    exact_keys = [
        table[name].to_numpy() for name in (STAGED_POSITION, ROW_DIGEST) if name in table.column_names
    ]
    other_keys = [
        basket_codes,
        _encode_if_present(table, schema.EVENT_ID),
        *exact_keys,
        *(table[name].to_numpy() for name in _context_columns(table)),
    ]
    is_duplicate = _mask_duplicates(
        user[order],
        time[order],
        item[order],
        [event[order], value[order], *(key[order] for key in other_keys if key is not None)],
    )
    counted.duplicates = int(is_duplicate.sum())
    if plan.data.duplicates == "drop":
        order = order[~is_duplicate]

    has_few_events = np.bincount(user[order], minlength=len(users)) < plan.data.min_user_events
    if has_few_events.any() and plan.data.min_user_events > 1:
        counted.few = int(has_few_events.sum())
        order = order[~has_few_events[user[order]]]
        users, user = users.filter(pa.array(~has_few_events)), (np.cumsum(~has_few_events) - 1)[user]
    return _KeptRows(order, user[order], users, counted)


def _context_columns(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(schema.CONTEXT)]


def _rank_ids(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Distinct ids in ascending order, and the rank of each row's id (any rank where it is null)."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    if not len(encoded.dictionary):
        return encoded.dictionary, np.zeros(len(encoded), np.int64)
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(order)), rank[pc.fill_null(encoded.indices, 0).to_numpy()]


def _encode_if_present(table: pa.Table, name: str) -> np.ndarray | None:
    """A code for each distinct value of a column, -1 for null, int64 [n]; None if the column is not there."""
    if name not in table.column_names:
        return None
    _, codes = _rank_ids(table[name])
    return np.where(pc.is_null(table[name]).to_numpy(), -1, codes)


def _group_by_basket(user: np.ndarray, time: np.ndarray, basket_codes: np.ndarray) -> np.ndarray:
    """An order that groups events of one time by basket, in the order in which the baskets begin. Arrays are
    in order of (user, time).
    """
    is_new = np.ones(len(user), bool)
    is_new[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    moment = np.cumsum(is_new)
    _, first, inverse = np.unique(
        moment * (basket_codes.max(initial=-1) + 2) + basket_codes + 1, return_index=True, return_inverse=True
    )
    return np.argsort(first[inverse], kind="stable")


def _mark_basket_starts(
    user: np.ndarray, time: np.ndarray, basket_codes: np.ndarray | None, clock: str, gap_s: float
) -> np.ndarray:
    """Where a basket begins, bool [n], for events in order. A basket ends at another basket id, or after a
    pause of more than `gap_s` seconds.

    Events without a basket id form a basket with those of the same time; without any time each event is its
    own.
    """
    is_start = np.ones(len(user), bool)
    other_time = np.ones(max(len(user) - 1, 0), bool) if clock == "file_order" else time[1:] != time[:-1]
    if basket_codes is None:
        is_start[1:] = (user[1:] != user[:-1]) | other_time
        return is_start
    is_pause = (
        time[1:] - time[:-1] > gap_s * 1_000_000 if clock == schema.TIMESTAMP else np.zeros_like(other_time)
    )
    splits_basket = np.where(basket_codes[1:] < 0, other_time, is_pause)
    is_start[1:] = (user[1:] != user[:-1]) | (basket_codes[1:] != basket_codes[:-1]) | splits_basket
    return is_start


def _mask_duplicates(
    user: np.ndarray, time: np.ndarray, item: np.ndarray, other_keys: list[np.ndarray]
) -> np.ndarray:
    """Rows that equal an earlier one in user, time, item and all other keys, bool [n]. Arrays are in order of
    (user, time).
    """
    is_duplicate = np.zeros(len(user), bool)
    same_as_previous = np.zeros(len(user) + 1, bool)
    same_as_previous[1:-1] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    rows = np.flatnonzero(same_as_previous[1:] | same_as_previous[:-1])  # another row has this user and time
    if not len(rows):
        return is_duplicate
    keys = [item[rows], *(key[rows] for key in other_keys)]
    moment = np.cumsum(~same_as_previous[rows])
    order = np.lexsort((rows, *keys, moment))
    is_equal = moment[order][1:] == moment[order][:-1]
    for key in keys:
        is_equal &= key[order][1:] == key[order][:-1]
    is_duplicate[rows[order][1:][is_equal]] = True
    return is_duplicate


def _mask_collected_duplicates(
    table: pa.Table,
    live: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    event: np.ndarray,
    moment: np.ndarray | None,
) -> np.ndarray:
    """Collected events that `data.events` has too, bool [n]: by event_id where both have one, else by user,
    item, type and `moment` (the second, or the day where the log has dates only).
    """
    is_repeated = np.zeros(len(live), bool)
    live_rows, log_rows = np.flatnonzero(live), np.flatnonzero(~live)
    ids = _encode_if_present(table, schema.EVENT_ID)
    ids = np.full(len(live), -1) if ids is None else ids
    is_repeated[live_rows] = (ids[live_rows] >= 0) & _is_in(
        live_rows, log_rows[ids[log_rows] >= 0], [user, ids]
    )
    if moment is not None:
        keys = [user, item, event, moment]
        has_same_keys = _is_in(live_rows, log_rows[ids[log_rows] < 0], keys)
        live_without_id = live_rows[ids[live_rows] < 0]
        is_repeated[live_rows] |= has_same_keys
        is_repeated[live_without_id] |= _is_in(live_without_id, log_rows, keys)
    return is_repeated


def _is_in(rows: np.ndarray, other_rows: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    """Whether each row has the keys of one of the other rows, bool [rows]."""
    all_keys = np.stack([np.concatenate([key[rows], key[other_rows]]) for key in keys], 1)
    _, inverse = np.unique(all_keys, axis=0, return_inverse=True)
    return np.isin(inverse[: len(rows)], inverse[len(rows) :])


def _move_holdout_last(
    user: np.ndarray, columns: list[np.ndarray], split: SplitSettings, number: int
) -> list[np.ndarray]:
    """The columns (basket last) reordered so that a random `test_fraction` of each user's baskets comes last,
    and as many before them for validation.

    The split is then a matter of counting, as with the other kinds. Baskets are renumbered in their new
    order.
    """
    if not len(user):
        return columns
    basket = columns[-1]
    basket_start = np.flatnonzero(
        np.concatenate([[True], (user[1:] != user[:-1]) | (basket[1:] != basket[:-1])])
    )
    basket_user = user[basket_start]
    basket_count = np.bincount(basket_user, minlength=int(basket_user.max()) + 1)
    first_of_user = np.cumsum(basket_count) - basket_count
    shuffled = np.lexsort((np.random.default_rng([split.seed, number]).random(len(basket_user)), basket_user))
    position = np.empty(len(basket_user), np.int64)
    position[shuffled] = np.arange(len(basket_user)) - first_of_user[basket_user[shuffled]]
    holdout_count = count_holdout_baskets(basket_count, split.test_fraction)[basket_user]
    split_part = np.where(position < holdout_count, 2, np.where(position < 2 * holdout_count, 1, 0))
    order = np.lexsort((np.arange(len(basket_user)), split_part, basket_user))
    renumbered = np.empty(len(basket_user), np.int64)
    renumbered[order] = np.arange(len(basket_user)) - first_of_user[basket_user[order]]
    sizes = np.diff(np.append(basket_start, len(user)))
    basket = np.repeat(renumbered, sizes)
    event_order = np.lexsort((np.arange(len(user)), basket, user))
    return [column[event_order] for column in (*columns[:-1], basket)]


def count_holdout_baskets(baskets: np.ndarray, fraction: float) -> np.ndarray:
    """Baskets of each user that a random split holds out for the test: a share, at least 1 of 3 or more."""
    return np.where(baskets >= 3, np.maximum(np.round(baskets * fraction), 1), 0).astype(np.int64)


def _write_shard(
    plan: ShardPlan,
    number: int,
    shard_schema: pa.Schema,
    users: pa.Array,
    offsets: np.ndarray,
    columns: list[np.ndarray],
) -> None:
    arrays = [users]
    for field, column in zip(list(shard_schema)[1:], columns, strict=True):
        values = pa.array(column).cast(field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values).cast(field.type))
    path = plan.out / f"{number:05d}.arrow"
    scratch = path.with_suffix(".part")
    with pa.ipc.new_file(scratch, shard_schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=shard_schema))
    scratch.rename(path)
