"""Second pass, one Ray task a shard: order every user's events, number the baskets, write the shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import schema
from recray.config import SplitSettings
from recray.prepare.partition import PartitionPlan, read_partition


@dataclass(frozen=True)
class ShardPlan:
    """What every task of the second pass needs to know. `item_ids` is the vocabulary in the order of its indices."""

    partition: PartitionPlan
    groups: int
    item_ids: pa.Array
    event_types: list[str]
    split: SplitSettings
    out: Path


def build_shard(plan: ShardPlan, number: int) -> None:
    """Write shard `number` to `plan.out`. Events of items outside the vocabulary are dropped; their users stay."""
    table = read_partition(plan.partition, plan.groups, number)
    users, user = _encode(table[schema.USER_ID])
    item = pc.fill_null(pc.index_in(table[schema.ITEM_ID], value_set=plan.item_ids), -1).to_numpy() + 1
    t = table["t"].to_numpy()
    keep = item > 0
    basket_key = _basket_keys(table, user, t)
    order = np.lexsort((t, *basket_key, user))  # stable: equal times keep the order (file, row)
    order = order[keep[order]]
    user, item, t = user[order], item[order], t[order]
    new = np.ones(len(user), bool)
    keys = [key[order] for key in basket_key] or [t]
    if plan.partition.clock == "file_order":
        keys = [np.arange(len(user))]
    new[1:] = (user[1:] != user[:-1]) | np.any([key[1:] != key[:-1] for key in keys], axis=0)
    basket = np.cumsum(new)
    counts = np.bincount(user, minlength=len(users))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    first_basket = np.zeros(len(users), np.int64)
    first_basket[counts > 0] = basket[offsets[:-1][counts > 0]]
    basket = basket - first_basket[user]
    event = pc.index_in(table[schema.EVENT], value_set=pa.array(plan.event_types, pa.string())).to_numpy()[order]
    time = t // 1_000_000 if plan.partition.clock == schema.TIMESTAMP else t
    context = [table[name].to_numpy()[order] for name in _context(table)]
    columns = [item, event, time, table[schema.VALUE].to_numpy()[order], *context, basket]
    if plan.split.kind == "random":
        columns = _held_out_last(user, columns, plan.split, number)
    target = schema.shard_schema(users.type, [name.removeprefix(schema.CONTEXT) for name in _context(table)])
    _write(plan, number, target, users, offsets, columns)


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


def _basket_keys(table: pa.Table, user: np.ndarray, t: np.ndarray) -> list[np.ndarray]:
    """Sort keys that keep a named basket together, least significant first: its number, then its first time.

    An event without a basket belongs to the events of its time.
    """
    if schema.BASKET not in table.column_names:
        return []
    names, code = _encode(table[schema.BASKET])
    unnamed = pc.is_null(table[schema.BASKET]).to_numpy()
    code = np.where(unnamed, len(names) + np.unique(t, return_inverse=True)[1], code)
    _, group = np.unique(user * (code.max(initial=0) + 1) + code, return_inverse=True)
    first = np.full(group.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, group, t)
    return [group, first[group]]


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
