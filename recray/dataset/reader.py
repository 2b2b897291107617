"""Reader of a prepared dataset: shards of users, memory-mapped, with the split that prepare decided.

Owns `Dataset`, `Shard` and `History`. Holds no user in memory that nobody asked for: arrays are views of mapped files.
"""

from __future__ import annotations

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

from recray.dataset.context import clock_code
from recray.dataset.popularity import DAY_S, NEVER_SAID, Popularity
from recray.errors import MissingArtifactError
from recray.schema import CONTEXT, ITEM_ID, RELEASED, USER_ID
from recray.storage import manifest_digest, open_sealed

KIND = "dataset"


class History(NamedTuple):
    """Events of one user in order of time.

    item_index int [n] (0 is never in it), event_index int [n], timestamp_s int64 [n] (or position), value float32 [n].
    """

    item_index: np.ndarray
    event_index: np.ndarray
    timestamp_s: np.ndarray
    value: np.ndarray

    def last(self, n: int) -> History:
        return History(*(a[max(len(a) - n, 0) :] for a in self))


def bucket_of(user_ids: Sequence[Any], buckets: int) -> np.ndarray:
    """Shard of each user: xxh64 of the id's text modulo `buckets`, int64 [n]."""
    return np.fromiter((bucket_of_one(user, buckets) for user in user_ids), np.int64, len(user_ids))


def bucket_of_one(user_id: Any, buckets: int) -> int:
    """As `bucket_of`, for one user."""
    return int(xxhash.xxh64_intdigest(str(user_id).encode()) % buckets)


def draw_of(user_ids: pa.Array, seed: object) -> np.ndarray:
    """A number in [0, 1) for each user, float64 [users]: every night the same, so that who was held out yesterday is held out today."""
    text = (f"{seed}\0{user}".encode() for user in user_ids.to_pylist())
    found: np.ndarray = np.fromiter((xxhash.xxh64_intdigest(user) for user in text), np.uint64, len(user_ids)) / 2.0**64
    return found


def nothing_learned_of(user_ids: pa.Array, split: Mapping[str, Any]) -> np.ndarray:
    """The users of whom nothing is learned by the settings of a split, bool [users]."""
    found: np.ndarray = draw_of(user_ids, f"held out {split['seed']}") < split.get("held_out", 0.0)
    return found


def released_day(items: pa.Table) -> np.ndarray | None:
    """See `Dataset.released_day`; of an item table with padding first."""
    if RELEASED not in items.column_names:
        return None
    seconds = pc.fill_null(items[RELEASED], NEVER_SAID * DAY_S).to_numpy()
    return np.concatenate([[NEVER_SAID], seconds // DAY_S])


@dataclass(frozen=True)
class Shard:
    """Users of one shard and their events, flat: user u has the events offsets[u]:offsets[u + 1].

    split int32 [users, 4] counts events from the user's first: [0, train_end) trains, [train_end, validation_end) is
    the validation target, [0, test_start) the history of the test, [test_start, test_end) its target. context holds the codes
    of the declared columns, int16 [n] each. held_out bool [users]: nothing is learned of them; None where there are none.
    left_out bool [users]: nor of them, but nobody asks them either (`Dataset.learning_from`); None where there are none.
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
    held_out: np.ndarray | None = None
    left_out: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_ids)

    def history(self, user: int, end: int | None = None) -> History:
        """The first `end` events (None: all) of the shard's user number `user`."""
        start, stop = int(self.offsets[user]), int(self.offsets[user + 1])
        if end is not None:
            stop = start + end
        return History(*(a[start:stop] for a in (self.item_index, self.event_index, self.timestamp_s, self.value)))

    def history_before(self, user: int, target: int) -> History:
        """What came before event number `target` of the user: a target is never predicted from its own basket."""
        start, stop = int(self.offsets[user]), int(self.offsets[user]) + target
        if stop < self.offsets[user + 1]:
            stop = start + int(np.searchsorted(self.basket[start:stop], self.basket[stop]))
        return self.history(user, stop - start)

    def context_of(self, names: Sequence[str], event: np.ndarray) -> np.ndarray:
        """Codes of the context in which events (flat) came, int64 [n, len(names)]; see `recray.dataset.context`."""
        found = [self.context[name][event] if name in self.context else clock_code(name, self.timestamp_s[event]) for name in names]
        return np.stack(found, 1).astype(np.int64) if names else np.zeros((len(event), 0), np.int64)

    def targets(self, user: int, first: int, last: int) -> np.ndarray:
        """Distinct items of the user's events first:last, ascending."""
        start = int(self.offsets[user])
        return np.unique(self.item_index[start + first : start + last])

    @cached_property
    def learned(self) -> np.ndarray:
        """How many events from the first of each user may be learned, int [users]."""
        found = self.split[:, 0]
        for mask in (self.held_out, self.left_out):
            found = found if mask is None else np.where(mask, 0, found)
        return found

    @property
    def asked(self) -> np.ndarray:
        """The users who are asked in validation and test, bool [users]."""
        return np.ones(len(self), bool) if self.held_out is None else self.held_out

    def leaks(self, cut_s: int) -> tuple[int, int]:
        """How many events at or after a moment may be learned, and how many come before an earlier one of their user: none should."""
        counts = np.diff(self.offsets)
        position = np.arange(len(self.item_index)) - np.repeat(self.offsets[:-1], counts)
        late = (position < np.repeat(self.split[:, 0], counts)) & (self.timestamp_s >= cut_s)
        back = (np.diff(self.timestamp_s) < 0) & (position[1:] > 0)
        return int(late.sum()), int(back.sum())

    def trained_item_index(self) -> np.ndarray:
        """Items of the training events, one after the other."""
        counts = np.diff(self.offsets)
        position = np.arange(len(self.item_index)) - np.repeat(self.offsets[:-1], counts)
        found: np.ndarray = self.item_index[position < np.repeat(self.learned, counts)]
        return found

    @cached_property
    def basket_starts(self) -> np.ndarray:
        """Events (flat, over all users) with which a basket begins, ascending, and the number of events, int64."""
        new = np.ones(len(self.basket) + 1, bool)
        new[1:-1] = self.basket[1:] != self.basket[:-1]
        new[self.offsets] = True
        return np.flatnonzero(new)

    @cached_property
    def time_starts(self) -> np.ndarray:
        """As `basket_starts`, but of the runs of equal `timestamp_s`."""
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

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.key: str = manifest["run_key"]
        self.n_users: int = manifest["users"]
        self.n_items: int = manifest["items"]
        self.n_events: int = manifest["events"]
        self.n_shards: int = manifest["shards"]
        self.event_types: list[str] = manifest["event_types"]
        self.clock: str = manifest["clock"]
        self.as_of_s: int = manifest["as_of_s"]
        self.context: list[str] = manifest["settings"]["data"].get("context", [])
        self.features: dict[str, str] = manifest["settings"]["data"].get("features", {})
        self.text_encoder: str | None = manifest.get("text_encoder")
        self.asked_at: str = manifest["settings"]["split"].get("asked_at", "cut")
        self.split_kind: str = manifest["settings"]["split"]["kind"]
        self._part, self._parts = 0, 1

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Dataset:
        """Open a dataset; `verify` reads every file against its digest.

        Raises MissingArtifactError, DamagedArtifactError.
        """
        path = Path(path)
        return cls(path, open_sealed(path, KIND, verify=verify))

    def learning_from(self, part: int, parts: int) -> Dataset:
        """The same dataset, of whose users one of `parts` parts is learned from. Who is in which is the same every night."""
        if parts == 1:
            return self
        found = Dataset(self.path, self.manifest)
        found._part, found._parts = part, parts
        return found

    def with_shard(self, shard: Shard) -> Dataset:
        """The same dataset with one more shard of users, whom no file has."""
        found = Dataset(self.path, {**self.manifest, "shards": self.n_shards + 1})
        found._part, found._parts = self._part, self._parts
        found._shards[self.n_shards] = shard
        return found

    @cached_property
    def digest(self) -> str:
        return manifest_digest(self.path)

    @property
    def has_time(self) -> bool:
        """Whether `timestamp_s` is a time and histories are in its order (they are not under a random split)."""
        return self.clock == "timestamp" and self.split_kind != "random"

    @property
    def now_s(self) -> int:
        """The moment of a nightly score: just after the as-of."""
        return self.as_of_s + 1

    def cut_s(self, part: str) -> int | None:
        """First moment of `validation` or `test` under a time split, else None."""
        found: int | None = self.manifest["cuts"].get(part)
        return found

    @cached_property
    def items(self) -> pa.Table:
        """Row i describes item_index i + 1: `item_id`, `events` (count up to as-of) and the feature columns."""
        return pq.read_table(self.path / "items.parquet")

    @property
    def released_day(self) -> np.ndarray | None:
        """Day since which each item can be met, int64 [n_items + 1]; NEVER_SAID where it is not known, None for a dataset without."""
        return released_day(self.items) if self.has_time else None

    @cached_property
    def popularity(self) -> Popularity:
        return Popularity.load(self.path / "popularity.parquet", self.n_items)

    @cached_property
    def public_popularity(self) -> Popularity:
        """Of the events of the users of whom nothing is learned alone, where there are such: what may be told where the others are protected."""
        found = Popularity.count_events(np.zeros(0, np.int64), None, self.n_items)
        for shard in self.shards():
            mine = np.repeat(shard.asked, np.diff(shard.offsets))
            found = found + Popularity.count_events(shard.item_index[mine], shard.timestamp_s[mine] if self.has_time else None, self.n_items)
        return found

    @property
    def user_type(self) -> pa.DataType:
        return self.shard(0).user_ids.type

    @cached_property
    def _shards(self) -> dict[int, Shard]:
        return {}

    def shard(self, number: int) -> Shard:
        """Shard `number`, mapped once."""
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
            raise MissingArtifactError(f"dataset {self.key}: {file.name} cannot be mapped: {error}", "prepare it again") from None
        batch = reader.get_batch(0)
        columns = {name: batch.column(name) for name in batch.schema.names}
        held = self.path / "held_out" / f"{number:05d}.npy"
        mine = None if self._parts == 1 else np.floor(draw_of(columns[USER_ID], "part") * self._parts) == self._part
        return Shard(
            user_ids=columns[USER_ID],
            offsets=columns["item_index"].offsets.to_numpy().astype(np.int64),
            split=np.load(self.path / "splits" / f"{number:05d}.npy", mmap_mode="r"),
            held_out=np.load(held, mmap_mode="r") if held.exists() else None,
            left_out=None if mine is None else ~mine,
            context={name.removeprefix(CONTEXT): array.values.to_numpy() for name, array in columns.items() if name.startswith(CONTEXT)},
            **{name: array.values.to_numpy() for name, array in columns.items() if name != USER_ID and not name.startswith(CONTEXT)},
        )

    def trained_items(self) -> np.ndarray:
        """Items that occur in the training events, bool [n_items + 1]; the others are cold."""
        seen = np.zeros(self.n_items + 1, bool)
        for shard in self.shards():
            seen[shard.trained_item_index()] = True
        return seen

    def user_history(self, user_id: Any) -> History | None:
        """All events of a user, or None if the user is unknown."""
        shard = self.shard(bucket_of_one(user_id, self.n_shards))
        row = shard.find(user_id)
        return None if row is None else shard.history(row)

    def translate(self, item_ids: pa.Array) -> np.ndarray:
        """Index of each of this dataset's items in another vocabulary, int64 [n_items + 1]; 0 where it is unknown.

        `item_ids` lists the other vocabulary in the order of its indices, from 1.
        """
        mine = self.items[ITEM_ID].combine_chunks()
        if mine.type != item_ids.type:
            mine, item_ids = mine.cast(pa.string()), item_ids.cast(pa.string())
        found = pc.fill_null(pc.index_in(mine, value_set=item_ids), -1)
        return np.concatenate([[0], found.to_numpy(zero_copy_only=False).astype(np.int64) + 1])
