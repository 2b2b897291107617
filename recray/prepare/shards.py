"""Second pass, one Ray task a shard: order every user's events, number the baskets, write the shard.

Order is time, then position where both are mapped, then file and row. What happened at one time lies together by its basket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray import schema
from recray.config import DataSettings, SplitSettings
from recray.prepare.partition import ROW, P, PartitionPlan, describing, read_partition
from recray.storage import write_json


@dataclass(frozen=True)
class ShardPlan:
    """What every task of the second pass needs to know; `item_ids` in ascending order and `event_types` are the indices.

    default_event : index of the type that an event of any other type counts as
    clocked : whether the owner's times have a time of day
    until_us : what comes later is left out; None: nothing does
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

    def recounted(self, number: int, name: str) -> Path:
        """Where `count_shard` writes what it found of a column."""
        return self.partition.staging / f"recounted-{name}-{number:05d}.parquet"

    def counts(self, number: int) -> Path:
        """Where a shard's `ShardCounts` are."""
        return self.partition.staging / f"shard-{number:05d}.json"


@dataclass
class ShardCounts:
    """What the second pass left out or met.

    duplicates : rows equal to one before in all mapped columns; they are left out under data.duplicates=drop
    told_twice : events that the endpoint was told and the owner's log has too; the log's count
    few : users with fewer events than data.min_user_events, who are left out
    late : events after the last one of the users who say when the data end
    """

    duplicates: int = 0
    told_twice: int = 0
    few: int = 0
    late: int = 0

    def __add__(self, other: ShardCounts) -> ShardCounts:
        return ShardCounts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class _Rows:
    """The rows of a shard that stay, in order: their places, the rank of each one's user, and the ids of these users."""

    order: np.ndarray
    user: np.ndarray
    users: pa.Array
    counted: ShardCounts


def count_shard(plan: ShardPlan, number: int) -> None:
    """Count the events of each item, and those of each type of the users who describe the data, that stay in shard `number`; without a
    vocabulary any item does."""
    table = read_partition(plan.partition, plan.groups, number)
    names = (schema.ITEM_ID, schema.EVENT)
    (items, item), (types, event) = (_encode(table[name]) for name in names)
    known = np.ones(len(items), np.int64) if plan.item_ids is None else pc.is_in(items, value_set=plan.item_ids).cast(pa.int64()).to_numpy()
    order = _kept(plan, table, (item + 1) * known[item] if len(items) else item, event).order
    theirs = order[describing(plan.partition, table)[order]]
    for name, ids, code, rows in zip(names, (items, types), (item, event), (order, theirs), strict=True):
        found = pa.table({name: ids, "count_all": np.bincount(code[rows], minlength=len(ids))})
        pq.write_table(found.filter(pc.greater(found["count_all"], 0)), plan.recounted(number, name))


def recounts(plan: ShardPlan, name: str) -> pa.Table:
    """What `count_shard` found of all shards: the values of a column, and their events (`count_all`)."""
    tables = [pq.read_table(plan.recounted(number, name)) for number in range(plan.partition.shards)]
    found = pa.concat_tables(tables).group_by(name).aggregate([("count_all", "sum")])
    return found.rename_columns([name, "count_all"])


def build_shard(plan: ShardPlan, number: int) -> None:
    """Write shard `number` to `plan.out`. Events of items outside the vocabulary are dropped; their users stay."""
    clock = plan.partition.clock
    table = read_partition(plan.partition, plan.groups, number)
    item = pc.fill_null(pc.index_in(table[schema.ITEM_ID], value_set=plan.item_ids), -1).to_numpy() + 1
    event = pc.fill_null(pc.index_in(table[schema.EVENT], value_set=pa.array(plan.event_types, pa.string())), plan.default_event).to_numpy()
    kept = _kept(plan, table, item, event)
    order, user, users = kept.order, kept.user, kept.users
    t, value, named = table["t"].to_numpy(), table[schema.VALUE].to_numpy(), _codes(table, schema.BASKET)
    starts = _basket_starts(user, t[order], None if named is None else named[order], clock, plan.data.basket_gap)
    basket = np.cumsum(starts)
    counts = np.bincount(user, minlength=len(users))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    first_basket = np.zeros(len(users), np.int64)
    first_basket[counts > 0] = basket[offsets[:-1][counts > 0]]
    basket = basket - first_basket[user]
    time = t[order] // 1_000_000 if clock == schema.TIMESTAMP else t[order]
    context = [table[name].to_numpy()[order] for name in _context(table)]
    columns = [item[order], event[order], time, value[order], *context, basket]
    if plan.split.kind == "random":
        columns = _held_out_last(user, columns, plan.split, number)
    target = schema.shard_schema(users.type, [name.removeprefix(schema.CONTEXT) for name in _context(table)])
    _write(plan, number, target, users, offsets, columns)
    write_json(plan.counts(number), asdict(kept.counted))


def _kept(plan: ShardPlan, table: pa.Table, item: np.ndarray, event: np.ndarray) -> _Rows:
    """Order the rows, and leave out those of no item (0), those that were told twice or repeat another one, and users with few."""
    clock, counted = plan.partition.clock, ShardCounts()
    users, user = _encode(table[schema.USER_ID])
    t, value = table["t"].to_numpy(), table[schema.VALUE].to_numpy()
    named = _codes(table, schema.BASKET)
    order = np.lexsort((table[P].to_numpy(), t, user) if P in table.column_names else (t, user))  # stable: equal times keep the order (file, row)
    keep = item > 0
    if plan.until_us is not None:
        late = t > plan.until_us
        keep &= ~late
        counted.late = int(late.sum())
    live = table["live"].to_numpy()
    if live.any():
        moment = t // 1_000_000 if plan.clocked else plan.partition.times.day(t)
        twice = keep & _told_twice(table, live, user, item, event, moment if clock == schema.TIMESTAMP else None)
        keep &= ~twice
        counted.told_twice = int(twice.sum())
    if plan.partition.remembers_low:
        keep &= value >= np.float32(plan.data.min_value or 0)
    order = order[keep[order]]
    if named is not None and P not in table.column_names:
        order = order[_by_basket(user[order], t[order], named[order])]
    exactly = [table[name].to_numpy() for name in (P, ROW) if name in table.column_names]
    same = [named, _codes(table, schema.EVENT_ID), *exactly, *(table[name].to_numpy() for name in _context(table))]
    repeated = _repeated(user[order], t[order], item[order], [event[order], value[order], *(one[order] for one in same if one is not None)])
    counted.duplicates = int(repeated.sum())
    if plan.data.duplicates == "drop":
        order = order[~repeated]
    few = np.bincount(user[order], minlength=len(users)) < plan.data.min_user_events
    if few.any() and plan.data.min_user_events > 1:
        counted.few = int(few.sum())
        order = order[~few[user[order]]]
        users, user = users.filter(pa.array(~few)), (np.cumsum(~few) - 1)[user]
    return _Rows(order, user[order], users, counted)


def _context(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(schema.CONTEXT)]


def _encode(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
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


def _codes(table: pa.Table, name: str) -> np.ndarray | None:
    """A number for each distinct value of a column, -1 for null, int64 [n]; None for a column that is not there."""
    if name not in table.column_names:
        return None
    _, code = _encode(table[name])
    return np.where(pc.is_null(table[name]).to_numpy(), -1, code)


def _by_basket(user: np.ndarray, t: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Order in which what happened at one time lies together by its basket, as each basket began. Arrays in order of (user, t)."""
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (t[1:] != t[:-1])
    moment = np.cumsum(new)
    _, first, inverse = np.unique(moment * (named.max(initial=-1) + 2) + named + 1, return_index=True, return_inverse=True)
    found: np.ndarray = np.argsort(first[inverse], kind="stable")
    return found


def _basket_starts(user: np.ndarray, t: np.ndarray, named: np.ndarray | None, clock: str, gap_s: float) -> np.ndarray:
    """Where a basket begins, bool [n], of events in order: a name holds until another one, or a pause of more than `gap_s` seconds.

    What has no name belongs to what happened at its time; without any time each is its own.
    """
    new = np.ones(len(user), bool)
    other_time = np.ones(max(len(user) - 1, 0), bool) if clock == "file_order" else t[1:] != t[:-1]
    if named is None:
        new[1:] = (user[1:] != user[:-1]) | other_time
        return new
    pause = t[1:] - t[:-1] > gap_s * 1_000_000 if clock == schema.TIMESTAMP else np.zeros_like(other_time)
    unnamed = named[1:] < 0
    new[1:] = (user[1:] != user[:-1]) | (named[1:] != named[:-1]) | np.where(unnamed, other_time, pause)
    return new


def _repeated(user: np.ndarray, t: np.ndarray, item: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Rows that equal one before in user, time, item and all others, bool [n]. Arrays in order of (user, t)."""
    found = np.zeros(len(user), bool)
    as_before = np.zeros(len(user) + 1, bool)
    as_before[1:-1] = (user[1:] == user[:-1]) & (t[1:] == t[:-1])
    place = np.flatnonzero(as_before[1:] | as_before[:-1])  # another one has this user and time
    if not len(place):
        return found
    keys = [item[place], *(one[place] for one in others)]
    moment = np.cumsum(~as_before[place])
    order = np.lexsort((place, *keys, moment))
    equal = moment[order][1:] == moment[order][:-1]
    for key in keys:
        equal &= key[order][1:] == key[order][:-1]
    found[place[order][1:][equal]] = True
    return found


def _told_twice(table: pa.Table, live: np.ndarray, user: np.ndarray, item: np.ndarray, event: np.ndarray, moment: np.ndarray | None) -> np.ndarray:
    """Events that the endpoint was told and the owner's log has too, bool [n]: by event_id, where both have one; else by user, item, type
    and `moment`, the second, or the day where the log knows no more."""
    found = np.zeros(len(live), bool)
    mine, theirs = np.flatnonzero(live), np.flatnonzero(~live)
    ids = _codes(table, schema.EVENT_ID)
    ids = np.full(len(live), -1) if ids is None else ids
    found[mine] = (ids[mine] >= 0) & _is_in(mine, theirs[ids[theirs] >= 0], [user, ids])
    if moment is not None:
        keys = [user, item, event, moment]
        alike = _is_in(mine, theirs[ids[theirs] < 0], keys)
        unnamed = mine[ids[mine] < 0]
        found[mine] |= alike
        found[unnamed] |= _is_in(unnamed, theirs, keys)
    return found


def _is_in(rows: np.ndarray, among: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    """Whether a row has the keys of one among others, bool [rows]."""
    both = np.stack([np.concatenate([key[rows], key[among]]) for key in keys], 1)
    _, inverse = np.unique(both, axis=0, return_inverse=True)
    found: np.ndarray = np.isin(inverse[: len(rows)], inverse[len(rows) :])
    return found


def _held_out_last(user: np.ndarray, columns: list[np.ndarray], split: SplitSettings, number: int) -> list[np.ndarray]:
    """The columns (basket last) reordered so that a random `test_fraction` of each user's baskets comes last, as many before.

    The split then is a matter of counting, as under the other kinds. Baskets are renumbered in their new order.
    """
    if not len(user):
        return columns
    basket = columns[-1]
    first = np.flatnonzero(np.concatenate([[True], (user[1:] != user[:-1]) | (basket[1:] != basket[:-1])]))
    owner = user[first]
    count = np.bincount(owner, minlength=int(owner.max()) + 1)
    start = np.cumsum(count) - count
    draw = np.lexsort((np.random.default_rng([split.seed, number]).random(len(owner)), owner))
    place = np.empty(len(owner), np.int64)
    place[draw] = np.arange(len(owner)) - start[owner[draw]]
    held = held_out_counts(count, split.test_fraction)[owner]
    part = np.where(place < held, 2, np.where(place < 2 * held, 1, 0))
    order = np.lexsort((np.arange(len(owner)), part, owner))
    renumbered = np.empty(len(owner), np.int64)
    renumbered[order] = np.arange(len(owner)) - start[owner[order]]
    size = np.diff(np.append(first, len(user)))
    basket = np.repeat(renumbered, size)
    shuffle = np.lexsort((np.arange(len(user)), basket, user))
    return [column[shuffle] for column in (*columns[:-1], basket)]


def held_out_counts(baskets: np.ndarray, fraction: float) -> np.ndarray:
    """Baskets of each user that a random split holds out for the test: a share, at least 1 of 3 or more."""
    return np.where(baskets >= 3, np.maximum(np.round(baskets * fraction), 1), 0).astype(np.int64)


def _write(plan: ShardPlan, number: int, target: pa.Schema, users: pa.Array, offsets: np.ndarray, columns: list[np.ndarray]) -> None:
    arrays = [users]
    for field, column in zip(list(target)[1:], columns, strict=True):
        values = pa.array(column).cast(field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values).cast(field.type))
    path = plan.out / f"{number:05d}.arrow"
    scratch = path.with_suffix(".part")
    with pa.ipc.new_file(scratch, target) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=target))
    scratch.rename(path)
