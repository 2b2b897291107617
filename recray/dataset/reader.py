"""Reader of a prepared dataset: memory-mapped shards of users, with the split that prepare wrote.

Owns `Dataset`, `Shard` and `History`. Arrays are views of mapped files, so only users that are read are
loaded into memory.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from recray.dataset.context import encode_clock
from recray.dataset.popularity import DAY_S, UNKNOWN_DAY, Popularity
from recray.dataset.schema import AVAILABLE_FROM, CONTEXT, DISPLAY, ITEM_ID, USER_ID
from recray.dataset.targets import TargetRule
from recray.errors import MissingArtifactError
from recray.storage import Manifest, manifest_digest, open_immutable

KIND = "dataset"


class History(NamedTuple):
    """Events of one user in order of time.

    item_index int [n] (never 0), event_index int [n], timestamp_s int64 [n] (or position), value float32 [n].
    """

    item_index: np.ndarray
    event_index: np.ndarray
    timestamp_s: np.ndarray
    value: np.ndarray

    def last(self, n: int) -> History:
        return History(*(a[max(len(a) - n, 0) :] for a in self))


def assign_buckets(user_ids: Sequence[Any], buckets: int) -> np.ndarray:
    """Shard of each user: xxh64 of the id's text modulo `buckets`, int64 [n]."""
    return np.fromiter((assign_bucket(user, buckets) for user in user_ids), np.int64, len(user_ids))


def assign_bucket(user_id: Any, buckets: int) -> int:
    """As `assign_buckets`, for one user."""
    return int(xxhash.xxh64_intdigest(str(user_id).encode()) % buckets)


def hash_to_unit_interval(user_ids: pa.Array, seed: object) -> np.ndarray:
    """A number in [0, 1) for each user, float64 [users]. It depends only on user and seed, so holdout users
    stay the same in every run.
    """
    text = (f"{seed}\0{user}".encode() for user in user_ids.to_pylist())
    return np.fromiter((xxhash.xxh64_intdigest(user) for user in text), np.uint64, len(user_ids)) / 2.0**64


def is_holdout(user_ids: pa.Array, split: Mapping[str, Any]) -> np.ndarray:
    """The holdout users of a split, bool [users]."""
    result: np.ndarray = hash_to_unit_interval(user_ids, f"held out {split['seed']}") < split.get(
        "holdout_users", 0.0
    )
    return result


def released_day(items: pa.Table) -> np.ndarray | None:
    """See `Dataset.released_day`; for an item table with padding first."""
    if AVAILABLE_FROM not in items.column_names:
        return None
    seconds = pc.fill_null(items[AVAILABLE_FROM], UNKNOWN_DAY * DAY_S).to_numpy()
    return np.concatenate([[UNKNOWN_DAY], seconds // DAY_S])


@dataclass(frozen=True)
class Shard:
    """Users of one shard and their events, flat: user u has the events offsets[u]:offsets[u + 1].

    split int32 [users, 4] counts events from the user's first: [0, train_end) trains, [train_end,
    validation_end) is the validation target, [0, test_start) the test history, [test_start, test_end) its
    target. context holds the codes of the declared columns, int16 [n] each. holdout bool [users]: the holdout
    users; None without such. other_part bool [users]: users of other training parts, who are neither trained
    nor queried (`Dataset.with_training_part`); None without parts. target_rule: None: every event is a
    target.
    """

    user_ids: pa.Array
    offsets: np.ndarray
    item_index: np.ndarray
    event_index: np.ndarray
    timestamp_s: np.ndarray
    value: np.ndarray
    basket: np.ndarray
    split: np.ndarray
    context: dict[str, np.ndarray] = field(default_factory=dict)
    holdout: np.ndarray | None = None
    other_part: np.ndarray | None = None
    target_rule: TargetRule | None = None

    def __len__(self) -> int:
        return len(self.user_ids)

    def history(self, user: int, end: int | None = None) -> History:
        """The first `end` events (None: all) of the shard's user number `user`."""
        start, stop = int(self.offsets[user]), int(self.offsets[user + 1])
        if end is not None:
            stop = start + end
        return History(
            *(a[start:stop] for a in (self.item_index, self.event_index, self.timestamp_s, self.value))
        )

    def history_before(self, user: int, target: int) -> History:
        """The events before event number `target` of the user, without those of its own basket."""
        start, stop = int(self.offsets[user]), int(self.offsets[user]) + target
        if stop < self.offsets[user + 1]:
            stop = start + int(np.searchsorted(self.basket[start:stop], self.basket[stop]))
        return self.history(user, stop - start)

    def context_of(self, names: Sequence[str], event: np.ndarray) -> np.ndarray:
        """Context codes of events (flat), int64 [n, len(names)]; see `recray.dataset.context`."""
        columns = [
            self.context[name][event] if name in self.context else encode_clock(name, self.timestamp_s[event])
            for name in names
        ]
        return np.stack(columns, 1).astype(np.int64) if names else np.zeros((len(event), 0), np.int64)

    def targets(self, user: int, first: int, last: int) -> np.ndarray:
        """Distinct items of the targets among the user's events first:last, ascending."""
        start = int(self.offsets[user])
        where: np.ndarray | slice = slice(start + first, start + last)
        if self.target_rule is not None:
            before = self.targets_before
            where = self.target_positions[before[start + first] : before[start + last]]
        return np.unique(self.item_index[where])

    @cached_property
    def target_positions(self) -> np.ndarray:
        """The events (flat, over all users) that are targets, ascending, int64."""
        if self.target_rule is None:
            return np.arange(len(self.item_index))
        return np.flatnonzero(self.target_rule.weigh(self.event_index, self.value))

    @cached_property
    def targets_before(self) -> np.ndarray:
        """Number of targets before each event (flat), and of all, int64 [events + 1]."""
        is_target = np.zeros(len(self.item_index) + 1, np.int64)
        is_target[self.target_positions + 1] = 1
        return np.cumsum(is_target)

    def count_targets(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Number of targets among the events first[i]:end[i] (flat), int64 [n]."""
        if self.target_rule is None:
            result: np.ndarray = np.maximum(end - first, 0)
        else:
            result = self.targets_before[np.maximum(end, first)] - self.targets_before[first]
        return result

    def next_target(self, event: np.ndarray) -> np.ndarray:
        """The first target at or after an event (flat) of each user, int64 [users]; the end of the user's
        events where there is none.
        """
        if self.target_rule is None:
            return event
        positions = np.append(self.target_positions, len(self.item_index))
        result: np.ndarray = np.minimum(positions[self.targets_before[event]], self.offsets[1:])
        return result

    @cached_property
    def train_lengths(self) -> np.ndarray:
        """How many events from each user's first are in training, int [users]."""
        return self._of_trained_users(self.split[:, 0])

    @property
    def test_starts(self) -> np.ndarray:
        """How many events from each user's first are in training or before the test, int [users]; as in
        `train_lengths`, none of a user who takes no part in training.
        """
        return self._of_trained_users(self.split[:, 2])

    def _of_trained_users(self, lengths: np.ndarray) -> np.ndarray:
        for mask in (self.holdout, self.other_part):
            lengths = lengths if mask is None else np.where(mask, 0, lengths)
        return lengths

    @property
    def queried(self) -> np.ndarray:
        """The users who are queried in validation and test, bool [users]."""
        return np.ones(len(self), bool) if self.holdout is None else self.holdout

    def count_split_violations(self, cut_s: int) -> tuple[int, int]:
        """How many training events are at or after a time, and how many events come before an earlier one of
        their user: both should be 0.
        """
        counts = np.diff(self.offsets)
        position = np.arange(len(self.item_index)) - np.repeat(self.offsets[:-1], counts)
        is_leaked = (position < np.repeat(self.split[:, 0], counts)) & (self.timestamp_s >= cut_s)
        is_out_of_order = (np.diff(self.timestamp_s) < 0) & (position[1:] > 0)
        return int(is_leaked.sum()), int(is_out_of_order.sum())

    def trained_item_index(self, *, targets: bool = False) -> np.ndarray:
        """Items of the training events, in order.

        targets : of those that are targets
        """
        counts = np.diff(self.offsets)
        position = np.arange(len(self.item_index)) - np.repeat(self.offsets[:-1], counts)
        is_trained = position < np.repeat(self.train_lengths, counts)
        if targets and self.target_rule is not None:
            is_trained &= self.target_rule.weigh(self.event_index, self.value) > 0
        result: np.ndarray = self.item_index[is_trained]
        return result

    @cached_property
    def basket_starts(self) -> np.ndarray:
        """First event (flat, over all users) of each basket, ascending, and the number of events, int64."""
        new = np.ones(len(self.basket) + 1, bool)
        new[1:-1] = self.basket[1:] != self.basket[:-1]
        new[self.offsets] = True
        return np.flatnonzero(new)

    @cached_property
    def time_starts(self) -> np.ndarray:
        """As `basket_starts`, for runs of equal `timestamp_s`."""
        new = np.ones(len(self.timestamp_s) + 1, bool)
        new[1:-1] = self.timestamp_s[1:] != self.timestamp_s[:-1]
        new[self.offsets] = True
        return np.flatnonzero(new)

    def find(self, user_id: Any) -> int | None:
        """Row of a user, or None."""
        row = bisect_left(range(len(self)), user_id, key=lambda row: self.user_ids[row].as_py())
        return row if row < len(self) and self.user_ids[row].as_py() == user_id else None


class Dataset:
    """A prepared dataset. Open it with `Dataset.open`."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        part: int = 0,
        parts: int = 1,
        added_shards: tuple[Shard, ...] = (),
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.key: str = manifest["run_key"]
        self.n_users: int = manifest["users"]
        self.n_items: int = manifest["items"]
        self.n_events: int = manifest["events"]
        self.n_shards: int = manifest["shards"] + len(added_shards)
        self.event_types: list[str] = manifest["event_types"]
        self.clock: str = manifest["clock"]
        self.as_of_s: int = manifest["as_of_s"]
        self.context: list[str] = manifest["settings"]["data"].get("context", [])
        self.features: dict[str, str] = manifest["settings"]["data"].get("features", {})
        self.display: dict[str, str] = manifest["settings"]["data"].get("display", {})
        self.text_encoder: str | None = manifest.get("text_encoder")
        self.query_time: str = manifest["settings"]["split"].get("query_time", "cutoff")
        self.target_rule = TargetRule.of(manifest)
        self.split_kind: str = manifest["settings"]["split"]["kind"]
        self._part, self._parts, self._added_shards = part, parts, added_shards

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Dataset:
        """Open a dataset; `verify` checks every file against its digest.

        Raises MissingArtifactError, DamagedArtifactError.
        """
        path = Path(path)
        return cls(path, open_immutable(path, KIND, verify=verify))

    def with_training_part(self, part: int, parts: int) -> Dataset:
        """The same dataset with training on one of `parts` parts of its users. The parts are the same in
        every run.
        """
        if parts == 1:
            return self
        return Dataset(self.path, self.manifest, part=part, parts=parts, added_shards=self._added_shards)

    def with_shard(self, shard: Shard) -> Dataset:
        """The same dataset with one more shard of users, in memory only. They are in every training part."""
        added = (*self._added_shards, shard)
        return Dataset(self.path, self.manifest, part=self._part, parts=self._parts, added_shards=added)

    def with_items(self, items: pa.Table) -> Dataset:
        """The same dataset with another item table, in memory only. It may have more items at its end."""
        changed = copy.copy(self)
        for name in ("popularity", "public_popularity"):  # they have a number for each item
            changed.__dict__.pop(name, None)
        changed.__dict__["items"], changed.n_items = items, len(items)
        return changed

    @cached_property
    def digest(self) -> str:
        return manifest_digest(self.path)

    @property
    def has_time(self) -> bool:
        """Whether `timestamp_s` is a time and histories are in its order (with a random split they are
        not).
        """
        return self.clock == "timestamp" and self.split_kind != "random"

    @property
    def now_s(self) -> int:
        """Query time of a nightly run: just after the as-of."""
        return self.as_of_s + 1

    def cut_s(self, part: str) -> int | None:
        """First second of `validation` or `test` with a time split, else None."""
        result: int | None = self.manifest["cuts"].get(part)
        return result

    @cached_property
    def items(self) -> pa.Table:
        """Row i describes item_index i + 1: `item_id`, `events` (count up to as-of) and the feature
        columns.
        """
        return pq.read_table(self.path / "items.parquet")

    def describe_item(self, item_index: int) -> dict[str, str]:
        """What people see of an item, as far as it is known: `title`, `image`, `link`, `price`."""
        row = {name: self.items[column][item_index - 1].as_py() for name, column in self._display_columns}
        return {name: str(value) for name, value in row.items() if value not in (None, "")}

    @property
    def title_column(self) -> str | None:
        """The column of `items` that has their titles."""
        return dict(self._display_columns).get("title")

    @cached_property
    def _display_columns(self) -> list[tuple[str, str]]:
        """What people see, and the columns of `items` that have it."""
        columns = {name: DISPLAY + name for name in self.display}
        if "title" not in columns and "title" in self.items.column_names:
            columns["title"] = "title"
        return list(columns.items())

    @property
    def released_day(self) -> np.ndarray | None:
        """Day from which each item is available, int64 [n_items + 1]; UNKNOWN_DAY if unknown, None for a
        dataset without such days.
        """
        return released_day(self.items) if self.has_time else None

    @cached_property
    def popularity(self) -> Popularity:
        return Popularity.load(self.path / "popularity.parquet", self.n_items)

    @cached_property
    def public_popularity(self) -> Popularity:
        """Popularity from the events of holdout users only, which privacy does not protect; of all users
        without holdout users.
        """
        popularity = Popularity.count_events(np.zeros(0, np.int64), None, self.n_items)
        for shard in self.shards():
            is_queried = np.repeat(shard.queried, np.diff(shard.offsets))
            event = np.arange(len(is_queried))
            is_queried &= shard.count_targets(event, event + 1) > 0
            popularity = popularity + Popularity.count_events(
                shard.item_index[is_queried],
                shard.timestamp_s[is_queried] if self.has_time else None,
                self.n_items,
            )
        return popularity

    @property
    def user_type(self) -> pa.DataType:
        return self.shard(0).user_ids.type

    @cached_property
    def _shards(self) -> dict[int, Shard]:
        return {}

    def shard(self, number: int) -> Shard:
        """Shard `number`, mapped once."""
        n_files = self.n_shards - len(self._added_shards)
        if number >= n_files:
            return self._added_shards[number - n_files]
        if number not in self._shards:
            self._shards[number] = self._map(number)
        return self._shards[number]

    def shards(self) -> Iterator[Shard]:
        return (self.shard(number) for number in range(self.n_shards))

    def _map(self, number: int) -> Shard:
        file = self.path / "shards" / f"{number:05d}.arrow"
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
        except (OSError, pa.ArrowInvalid) as error:
            raise MissingArtifactError(
                f"dataset {self.key}: {file.name} cannot be mapped: {error}", "prepare it again"
            ) from None
        batch = reader.get_batch(0)
        columns = {name: batch.column(name) for name in batch.schema.names}
        holdout_file = self.path / "held_out" / f"{number:05d}.npy"
        is_in_part = (
            None
            if self._parts == 1
            else np.floor(hash_to_unit_interval(columns[USER_ID], "part") * self._parts) == self._part
        )
        return Shard(
            user_ids=columns[USER_ID],
            offsets=columns["item_index"].offsets.to_numpy().astype(np.int64),
            split=np.load(self.path / "splits" / f"{number:05d}.npy", mmap_mode="r"),
            holdout=np.load(holdout_file, mmap_mode="r") if holdout_file.exists() else None,
            other_part=None if is_in_part is None else ~is_in_part,
            target_rule=self.target_rule,
            context={
                name.removeprefix(CONTEXT): array.values.to_numpy()
                for name, array in columns.items()
                if name.startswith(CONTEXT)
            },
            **{
                name: array.values.to_numpy()
                for name, array in columns.items()
                if name != USER_ID and not name.startswith(CONTEXT)
            },
        )

    def mask_trained_items(self) -> np.ndarray:
        """Items that occur in training events, bool [n_items + 1]; the others are cold."""
        is_trained = np.zeros(self.n_items + 1, bool)
        for shard in self.shards():
            is_trained[shard.trained_item_index()] = True
        return is_trained

    def user_history(self, user_id: Any) -> History | None:
        """All events of a user, None for an unknown user."""
        shard = self.shard(assign_bucket(user_id, self.manifest["shards"]))
        row = shard.find(user_id)
        return None if row is None else shard.history(row)

    def translate(self, item_ids: pa.Array) -> np.ndarray:
        """Index of each item of this dataset in another vocabulary, int64 [n_items + 1]; 0 if it is unknown
        there.

        `item_ids` lists the other vocabulary in the order of its indices, from 1.
        """
        own_ids = self.items[ITEM_ID].combine_chunks()
        if own_ids.type != item_ids.type:
            own_ids, item_ids = own_ids.cast(pa.string()), item_ids.cast(pa.string())
        position = pc.fill_null(pc.index_in(own_ids, value_set=item_ids), -1)
        return np.concatenate([[0], position.to_numpy(zero_copy_only=False).astype(np.int64) + 1])
