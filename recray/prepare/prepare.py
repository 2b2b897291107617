"""The prepare stage: footers, first pass, vocabulary, second pass, split, sealed dataset."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray import cluster, lease, schema
from recray.config import Settings
from recray.dataset.context import CLOCK
from recray.dataset.popularity import Popularity
from recray.dataset.reader import KIND, Dataset
from recray.errors import DataError, Problems, RecrayError, RefusedError, SettingsError, TooManyBadRowsError
from recray.optout import OptOut
from recray.prepare.files import InputFile, Listing, collected_files, digest_files, list_files
from recray.prepare.partition import FUTURE, PartitionPlan, Stats, example, partition_row_group, read_stats
from recray.prepare.sentences import digest_encoder, encode_sentences, find_encoder
from recray.prepare.shards import ShardCounts, ShardPlan, build_shard, count_shard, recounts
from recray.prepare.sources import EventSource, RowGroup, as_id, inspect_events, read_items
from recray.prepare.split import check_cuts, cut_dates, held_out, split_shard
from recray.prepare.times import PLAUSIBLE_US
from recray.storage import Storage, is_sealed, key_of, read_json, sealed_directory
from recray.version import __version__

EVENTS_PER_SHARD = 500_000
JOINED = 0.95  # of the events and the items of the log are in the item table, or a note says how many
MOST_EVENT_TYPES = 1 << 15  # an index of one has 16 bits
LEFT_OUT = {
    "late_rows": "events after the end (--as-of, or the last event of the users who are held out)",
    "opted_out": "events of users who opted out",
    "low_rows": "events below data.min_value",
    "few": "users with fewer events than data.min_user_events",
    "unlisted": "events of items that data.items does not name",
    "rare": "items with fewer events than data.min_item_events",
    "told_twice": "events of the endpoint that the log has too",
}
TASK_RETRIES = 3  # of a task whose worker was lost
AHEAD = dt.timedelta(hours=36)  # what a time zone taken for UTC, or a date that means its end, may be ahead


@dataclass(frozen=True)
class Input:
    """The files that a dataset is made of, and the sha256 of their contents: of the events, the items and the sentence encoder.

    What comes into a folder later is the next night's. `notes` say what was left out; a dataset does not keep them, since they name places.
    """

    events: tuple[InputFile, ...]
    collected: tuple[InputFile, ...]
    items: tuple[InputFile, ...]
    digests: list[list[str]]
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises DataError if a file is another than it was."""
        files, before = (*self.events, *self.collected, *self.items), [*self.digests[0], *self.digests[1]]
        for file, digest, now in zip(files, before, digest_files(files), strict=True):
            if digest != now:
                raise DataError(f"{file.uri} was written to while it was read", "repeat the job when it is complete")


def prepare_key(settings: Settings, as_of: dt.datetime | None, given: Input | None = None) -> str:
    """Run key of prepare: settings, the content of the input files (`find_input`, unless they are given), who opted out, as-of and version."""
    opted_out = OptOut.of(settings.root(), settings.data.exclude_users).digest
    gone = () if opted_out is None else (opted_out,)
    return key_of("prepare", settings.result_settings("data", "split"), (given or find_input(settings)).digests, as_of, __version__, *gone)


def _encoder(settings: Settings) -> Path | None:
    """The sentence encoder, where a feature needs one."""
    return find_encoder(settings.data.text_encoder) if "sentence" in settings.data.features.values() else None


def find_input(settings: Settings) -> Input:
    """What there is now. Raises DataError, SettingsError for what is not there."""
    events, collected, items = list_input(settings)
    encoder = _encoder(settings)
    digests = [digest_files(events.files + collected), digest_files(items.files), *([[digest_encoder(encoder)]] if encoder else [])]
    return Input(events.files, collected, items.files, digests, events.notes + items.notes)


def list_input(settings: Settings) -> tuple[Listing, tuple[InputFile, ...], Listing]:
    """The files of the events, of what was collected, and of the item table. Raises DataError."""
    items = list_files((settings.data.items,), "data.items") if settings.data.items else Listing()
    return list_files(settings.data.events, without=settings.root()), collected_files(settings.root()), items


def on_ray_data(task: Callable[[int], None], count: int) -> None:
    """Run task(0) … task(count - 1) as Ray Data tasks of one CPU each, on the connected Ray or one that is started."""
    import ray

    cluster.start()

    def run(row: dict[str, Any]) -> dict[str, Any]:
        task(int(row["item"]))
        return row

    with cluster.unwrapped():
        ray.data.from_items(list(range(count)), override_num_blocks=count).map(run, num_cpus=1, ray_remote_args_fn=_retries).materialize()


def one_by_one(task: Callable[[int], None], count: int) -> None:
    """Run the tasks of prepare in this process."""
    for number in range(count):
        task(number)


def _collected(files: tuple[InputFile, ...]) -> dict[str, int]:
    """The last number of the endpoint's log that is in the data, by the identity of the log."""
    found: dict[str, int] = {}
    for file in files:
        manifest = read_json(Path(file.uri).parent / "manifest.json")
        found[manifest["log"]] = max(found.get(manifest["log"], 0), manifest["last"])
    return found


def _retries() -> dict[str, Any]:
    return {"max_retries": TASK_RETRIES}


Each = Callable[[Callable[[int], None], int], None]
"""Runs a task for each number below a count, in any order and in any process."""


def inspect(settings: Settings, as_of: dt.datetime | None = None, given: Input | None = None) -> tuple[EventSource, pa.Table | None]:
    """What the input consists of, and the item table. Raises DataError, SettingsError for what cannot be prepared, all of it at once."""
    problems, data = Problems(), settings.data
    problems.of(partial(_encoder, settings))
    if given is None:
        root = problems.of(settings.root)
        listed = problems.of(partial(list_files, data.events, without=root or Path(os.devnull)))
        described = problems.of(partial(list_files, (data.items,), "data.items")) if data.items else Listing()
        collected = () if root is None else problems.of(partial(collected_files, root)) or ()
        events, files = (None if found is None else found.files for found in (listed, described))
    else:
        events, collected, files = given.events, given.collected, given.items
    source = None if events is None else problems.of(partial(inspect_events, data, events, collected))
    described_by = None if files is None else problems.of(partial(read_items, data, files))
    if source is not None and source.clock != schema.TIMESTAMP:
        problems.found += _without_times(settings, source.clock, as_of)
    problems.raise_all()
    assert source is not None and described_by is not None
    items, notes = described_by
    source = replace(source, notes=(*source.notes, *notes))
    theirs, mine = source.types[schema.ITEM_ID], None if items is None else items[schema.ITEM_ID].type
    if data.catalogue == "items" and mine is not None and mine != theirs:  # an event of something else does not make text of the others' ids
        source = replace(source, types={**source.types, schema.ITEM_ID: mine})
    elif files and items is not None and mine != theirs:
        items = items.set_column(0, schema.ITEM_ID, as_id(items[schema.ITEM_ID], pa.string(), files[0].uri))
        note = "item ids are whole numbers in one of data.events and data.items and text in the other: both are read as text"
        source = replace(source, types={**source.types, schema.ITEM_ID: pa.string()}, notes=(*source.notes, note))
    return source, items


def _without_times(settings: Settings, clock: str, as_of: dt.datetime | None) -> Iterator[RecrayError]:
    """What cannot be had where no event has a time."""
    if settings.split.kind == "time":
        yield DataError("split.kind=time needs a timestamp column", "map one with data.columns.timestamp=…, or use split.kind=leave_one_out")
    if read_off := [name for name in settings.data.context if name in CLOCK]:
        yield DataError(f"data.context: {read_off[0]} needs a timestamp column", "map one with data.columns.timestamp=…, or leave it out")
    if clock == "file_order" and settings.split.kind == "leave_one_out":
        yield DataError("without a timestamp or a position only split.kind=random is possible", "map data.columns.timestamp or .position")
    if as_of is not None:
        yield SettingsError("--as-of says up to when events count, but data.events has no times", "leave it out, or map data.columns.timestamp")


def prepare(
    settings: Settings,
    as_of: dt.datetime | None,
    given: Input | None = None,
    each: Each = on_ray_data,
    inspected: tuple[EventSource, pa.Table | None] | None = None,
) -> Dataset:
    """Write the dataset of an input (None: what there is now), or open it if it is there. `each` runs the tasks.

    inspected : what `inspect` found, or a part of it

    Raises DataError and its kinds, OutputExistsError, RefusedError for events of the future.
    """
    given = given or find_input(settings)
    storage, key = Storage(settings.root()), prepare_key(settings, as_of, given)
    final = storage.dataset(key)
    with lease.commit():
        shutil.rmtree(storage.staging, ignore_errors=True)  # left by an attempt that was killed, maybe when it had all but this to do
    if is_sealed(final, KIND, key):
        return Dataset.open(final)
    source, items = inspected or inspect(settings, as_of, given)
    plan = _plan(settings, as_of, source, storage, key)
    try:
        each(partial(_partition, plan, source.row_groups), len(source.row_groups))
        totals = _totals(plan, source, settings, as_of, kept=inspected is None)
        last_us = _last_us(plan, totals)
        as_of_s = int(as_of.timestamp()) if as_of else last_us // 1_000_000
        encoder = _encoder(settings)
        clocked = any(stats.clocked for stats, _ in read_stats(plan, plan.first_live))
        until_us = last_us if plan.described_by is not None and as_of is None and plan.clock == schema.TIMESTAMP else None
        shard_plan = ShardPlan(plan, len(source.row_groups), clocked, until_us, settings.split, settings.data)
        item_table, joins, dropped = _item_table(_item_counts(shard_plan, each), settings, items)
        if settings.data.min_user_events > 1:
            item_table = _left(replace(shard_plan, item_ids=item_table[schema.ITEM_ID].combine_chunks()), item_table, items, totals, each)
        vocabulary = item_table[schema.ITEM_ID].combine_chunks()
        types, default = _event_types(settings, totals)
        fields: dict[str, Any] = {
            "recray": __version__,
            "settings": settings.result_settings("data", "split"),
            "clock": source.clock,
            "as_of_s": as_of_s,
            "shards": plan.shards,
            "items": len(vocabulary),
            "event_types": types,
            "default_event": default,
            "rows": totals.rows,
            "bad_rows": totals.bad,
            "late_rows": totals.late,
            "low_rows": totals.low,
            "opted_out": totals.opted_out,
            **dropped,
            "reasons": totals.reasons,
            "collected": _collected(given.collected),
            "text_encoder": None if encoder is None else digest_encoder(encoder),
        }
        with sealed_directory(final, KIND, key, fields) as folder:
            (folder / "shards").mkdir()
            (folder / "splits").mkdir()
            if settings.split.held_out:
                (folder / "held_out").mkdir()
            shard_plan = replace(shard_plan, item_ids=vocabulary, event_types=types, default_event=types.index(default), out=folder / "shards")
            each(partial(build_shard, shard_plan), plan.shards)
            counted = sum((ShardCounts(**read_json(shard_plan.counts(number))) for number in range(plan.shards)), ShardCounts())
            fields["late_rows"] += counted.late
            fields |= asdict(counted) | {"notes": [*source.notes, *joins, *_notes(settings, plan, totals, counted, kept=inspected is None)]}
            events = _finish(folder, fields, settings)
            item_table = item_table.set_column(item_table.schema.get_field_index("events"), "events", events)
            pq.write_table(_with_sentences(item_table, settings, storage), folder / "items.parquet")
            if inspected is None:
                given.check()
    finally:
        shutil.rmtree(plan.staging, ignore_errors=True)
    return Dataset.open(final)


def _plan(settings: Settings, as_of: dt.datetime | None, source: EventSource, storage: Storage, key: str) -> PartitionPlan:
    """What the first pass needs to know."""
    return PartitionPlan(
        columns=source.columns,
        types=source.types,
        clock=source.clock,
        times=source.times,
        as_of_us=_microseconds(as_of) if as_of else None,
        future_us=None if as_of else _microseconds(dt.datetime.now(dt.UTC) + AHEAD),
        min_value=settings.data.min_value,
        remembers_low=settings.data.min_value is not None and any(group.live for group in source.row_groups),
        loses=source.loses,
        pointed=source.pointed,
        whole_items=settings.data.catalogue == "items" and pa.types.is_integer(source.types[schema.ITEM_ID]),
        described_by=settings.split.model_dump() if settings.split.held_out else None,
        default_event=settings.data.default_event or schema.DEFAULT_EVENT,
        opted_out=OptOut.of(storage.root, settings.data.exclude_users),
        first_live=next((group.number for group in source.row_groups if group.live), len(source.row_groups)),
        shards=settings.data.shards or max(4, -(-source.rows // EVENTS_PER_SHARD)),
        staging=storage.staging / f"{key}-{uuid.uuid4().hex[:8]}",  # its own, whatever a late task of another attempt still writes
        quarantine=storage.quarantine(key),
    )


def left_out(manifest: Mapping[str, Any]) -> dict[str, int]:
    """How much of the input a dataset's settings left out, by the names of `LEFT_OUT`; what is 0 is not there."""
    return {name: manifest[name] for name in LEFT_OUT if manifest.get(name)}


def left_out_words(manifest: Mapping[str, Any]) -> str:
    """The same for a person, each after a comma."""
    return "".join(f", {count} {LEFT_OUT[name]}" for name, count in left_out(manifest).items())


def _microseconds(moment: dt.datetime) -> int:
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def _moment(us: int | None) -> str:
    moment = dt.datetime.now(dt.UTC) if us is None else dt.datetime.fromtimestamp(us / 1e6, dt.UTC)
    return moment.isoformat(sep=" ", timespec="minutes")


def _partition(plan: PartitionPlan, groups: tuple[RowGroup, ...], number: int) -> None:
    partition_row_group(plan, groups[number])


def _totals(plan: PartitionPlan, source: EventSource, settings: Settings, as_of: dt.datetime | None, *, kept: bool) -> Stats:
    """Sum of the row groups' statistics. Raises TooManyBadRowsError, DataError if as-of leaves nothing.

    kept : whether the quarantine stays, so that a person can look there
    """
    totals = Stats()
    for stats, _ in read_stats(plan, len(source.row_groups)):
        totals.add(stats)
    if totals.bad > settings.data.max_bad_fraction * totals.rows:
        if totals.reasons.get(FUTURE, 0) > settings.data.max_bad_fraction * totals.rows:
            raise RefusedError(
                f"{totals.reasons[FUTURE]} of {totals.rows} events have times of the future, by this machine's clock, {_moment(None)}: "
                f"either it was set back, or the times have another unit or zone; for example {example(plan.quarantine)}",
                "set the clock, read only what has happened with --as-of, or say the unit: data.time_unit=date if they are digits such as 2024030110",
            )
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(totals.reasons.items()))
        raise TooManyBadRowsError(
            f"{totals.bad} of {totals.rows} rows are bad ({reasons}), for example {example(plan.quarantine)}"
            + (f"; they are in {plan.quarantine}" if kept else ""),
            ("check data.time_unit and data.timezone, " if plan.times.outside in totals.reasons else "")
            + "mend the input, or allow more with data.max_bad_fraction",
            totals.bad,
        )
    if len(totals.event_types) > MOST_EVENT_TYPES:
        raise DataError(f"data.events has {len(totals.event_types)} types of events", "name the column of the types: data.columns.event=YOUR_COLUMN")
    if not totals.events and totals.late:
        raise DataError(f"no event at or before as-of {as_of}: {totals.late} come later", "choose a later --as-of")
    if not totals.events:
        what = f"no event is left of {totals.rows} rows: {totals.bad} are bad, {totals.low} are worth less than data.min_value"
        raise DataError(what, "mend the input, or lower data.min_value")
    if plan.clock == schema.TIMESTAMP and settings.data.time_unit == "auto" and (totals.last_us or 0) < PLAUSIBLE_US:
        raise DataError(
            f"the newest event is of {_moment(totals.last_us)}: seconds read as milliseconds or nanoseconds look so",
            "write the times again, or set data.time_unit to their unit if they are right",
        )
    return totals


def _last_us(plan: PartitionPlan, totals: Stats) -> int:
    """The as-of that nobody named: the newest event, or the end of its day where no event has a time of day. Where users are held out it is
    the newest of theirs: the last moment of another one would tell of that one."""
    if totals.last_us is None:
        if plan.described_by is not None and plan.as_of_us is None and plan.clock == schema.TIMESTAMP:
            raise DataError("no event is of a user who is held out, and theirs say when the data end", "raise split.held_out, or name --as-of")
        return 0
    return totals.last_us if totals.clocked else plan.times.end_of_day(totals.last_us)


def _notes(settings: Settings, plan: PartitionPlan, totals: Stats, counted: ShardCounts, *, kept: bool) -> list[str]:
    """What a person should know of the rows, counted. kept : whether the quarantine stays"""
    found = []
    if totals.bad:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(totals.reasons.items()))
        where = "see quarantine/ under storage.root" if kept else f"for example {example(plan.quarantine)}"
        found.append(f"{totals.bad} of {totals.rows} rows are bad and left out ({reasons}); {where}")
    if totals.words:
        found.append(
            f"{totals.words} events have an id such as 'nan', 'None' or 'NULL': if a program wrote these for nothing, write null, or drop them"
        )
    if totals.padded:
        found.append(f"{totals.padded} ids in events begin or end with a blank, and are others than those without: mend them if that is not meant")
    if counted.duplicates:
        what = "left out" if settings.data.duplicates == "drop" else "kept: data.duplicates=drop leaves them out"
        found.append(f"{counted.duplicates} events equal another in all mapped columns and are {what}")
    if totals.negative and settings.data.min_value is None:
        found.append(f"{totals.negative} events have a value of 0 or less (returns?) and count like the others: data.min_value leaves them out")
    return found


def _event_types(settings: Settings, totals: Stats) -> tuple[list[str], str]:
    """The types of events in the order of their indices, and the one that an event of none, or of another one, counts as.

    The most frequent comes first; where users are held out it is they alone who have types, in the order of their names.
    """
    found = {name: 0 for name in [settings.data.default_event] if name} | totals.event_types
    order = sorted(found, key=lambda name: (-found[name], name)) or [schema.DEFAULT_EVENT]
    return sorted(order) if settings.split.held_out else order, settings.data.default_event or order[0]


def _item_counts(plan: ShardPlan, each: Each) -> pa.Table:
    """The events of each item, without those that repeat another one where these are left out."""
    if plan.data.duplicates == "drop":
        whoever = replace(plan, data=plan.data.model_copy(update={"min_user_events": 1}))
        each(partial(count_shard, whoever), plan.partition.shards)
        counts = recounts(plan, schema.ITEM_ID)
    else:
        counts = pa.concat_tables([found for _, found in read_stats(plan.partition, plan.groups) if len(found)])
        counts = counts.group_by(schema.ITEM_ID).aggregate([("count_all", "sum")])
    return counts.rename_columns([schema.ITEM_ID, "events"])


def _left(plan: ShardPlan, item_table: pa.Table, items: pa.Table | None, totals: Stats, each: Each) -> pa.Table:
    """The item table without items that only users with few events met, unless they are described; event types that only those had go from
    the totals too. Raises DataError where nobody is left."""
    each(partial(count_shard, plan), plan.partition.shards)
    counts, types = (recounts(plan, name) for name in (schema.ITEM_ID, schema.EVENT))
    if not len(counts):
        raise DataError("no user has data.min_user_events events", "lower data.min_user_events")
    totals.event_types = dict(zip(types[schema.EVENT].to_pylist(), types["count_all"].to_pylist(), strict=True))
    known = [counts[schema.ITEM_ID], *([] if items is None else [items[schema.ITEM_ID]])]
    stay = pc.is_in(item_table[schema.ITEM_ID], value_set=pa.chunked_array([chunk for column in known for chunk in column.chunks]).combine_chunks())
    return item_table.filter(stay).combine_chunks()


def _item_table(counts: pa.Table, settings: Settings, items: pa.Table | None) -> tuple[pa.Table, list[str], dict[str, int]]:
    """The items in ascending order of their ids, with the column `events`; how the owner's table joins the events; and what is left out, by
    the names of `LEFT_OUT`. Raises DataError."""
    notes = [] if items is None else _joins(counts, items)
    dropped = {"unlisted": 0, "rare": 0}
    if items is not None:
        alone = settings.data.catalogue == "items"
        known = pa.chunked_array([*([] if alone else counts[schema.ITEM_ID].chunks), *items[schema.ITEM_ID].chunks]).unique()
        if alone:
            listed = pc.is_in(counts[schema.ITEM_ID], value_set=known)
            dropped["unlisted"] = pc.sum(counts["events"].filter(pc.invert(listed))).as_py() or 0
        events = counts["events"].take(pc.index_in(known, counts[schema.ITEM_ID].combine_chunks()))
        described = items.take(pc.index_in(known, items[schema.ITEM_ID].combine_chunks()))
        columns = {schema.ITEM_ID: known, "events": pc.fill_null(events, 0)}
        dated = [schema.RELEASED] if settings.data.released else []
        counts = pa.table({**columns, **{name: described[name] for name in (*settings.data.features, *dated)}})
    left = counts.filter(pc.greater_equal(counts["events"], settings.data.min_item_events)).sort_by(schema.ITEM_ID).combine_chunks()
    if not len(left):
        raise DataError(f"no item has {settings.data.min_item_events} events", "lower data.min_item_events")
    return left, notes, {**dropped, "rare": len(counts) - len(left)}


def _joins(counts: pa.Table, items: pa.Table) -> list[str]:
    """How many events and items of the log are in the item table, where that is not nearly all. Raises DataError where none is."""
    there = pc.is_in(counts[schema.ITEM_ID], value_set=items[schema.ITEM_ID].combine_chunks())
    events = pc.sum(counts["events"].filter(there)).as_py() or 0
    share, of_items = events / max(pc.sum(counts["events"]).as_py(), 1), int(pc.sum(there).as_py() or 0)
    if min(share, of_items / max(len(counts), 1)) >= JOINED:
        return []
    mine, theirs = counts[schema.ITEM_ID].filter(pc.invert(there)), items[schema.ITEM_ID]
    theirs = theirs.filter(pc.invert(pc.is_in(theirs, value_set=counts[schema.ITEM_ID].combine_chunks())))
    examples = f"data.events has {_examples(mine)}, data.items {_examples(theirs)}"
    if not events:
        raise DataError(f"no item of data.events is in data.items: {examples}", "write the ids of both alike (blanks, case, leading zeros)")
    return [f"{share:.1%} of the events and {of_items} of {len(counts)} items of data.events are in data.items; without the others: {examples}"]


def _examples(ids: pa.ChunkedArray) -> str:
    return ", ".join(repr(one) for one in ids.slice(0, 3).to_pylist()) or "none that is missing"


def _with_sentences(items: pa.Table, settings: Settings, storage: Storage) -> pa.Table:
    """The item table with vectors in the place of texts of kind `sentence`."""
    encoder = _encoder(settings)
    for name, kind in settings.data.features.items():
        if encoder is not None and kind == "sentence":
            vectors = encode_sentences(items[name], encoder, storage.sentences(digest_encoder(encoder)))
            items = items.set_column(items.schema.get_field_index(name), name, vectors)
    return items


def _finish(folder: Path, fields: dict[str, Any], settings: Settings) -> pa.Array:
    """Count users and events, decide the cuts, write the splits and the popularity. Returns the events of each item.

    Raises DataError for a split that is impossible, or that would let an event at or after the cut be learned.
    """
    probe = Dataset(folder, {**fields, "run_key": "", "users": 0, "events": 0, "cuts": {}})
    has_time = probe.has_time
    popularity = Popularity.count_events(np.zeros(0, np.int64), None, probe.n_items)
    users = events = 0
    asked = []
    for number in range(probe.n_shards):
        np.save(folder / "splits" / f"{number:05d}.npy", np.zeros((0, 4), np.int32))
        shard = probe._map(number)
        asked.append(held_out(shard, settings.split) if settings.split.held_out else None)
        users += len(shard)
        events += len(shard.item_index)
        popularity = popularity + Popularity.count_events(shard.item_index, shard.timestamp_s if has_time else None, probe.n_items)

    def kept_times() -> Iterator[np.ndarray]:
        for number, keep in enumerate(asked):  # what is learned must not say when the split is
            shard = probe._map(number)  # anew each time: what was mapped and read stays in this process's memory
            yield shard.timestamp_s if keep is None else shard.timestamp_s[np.repeat(keep, np.diff(shard.offsets))]

    cuts = cut_dates(settings.split, kept_times) if settings.split.kind == "time" else {}
    for number in range(probe.n_shards):
        shard = probe._map(number)
        split = split_shard(shard, settings.split, cuts)
        check_cuts(replace(shard, split=split), cuts)
        np.save(folder / "splits" / f"{number:05d}.npy", split)
        if (mask := asked[number]) is not None:
            np.save(folder / "held_out" / f"{number:05d}.npy", mask)
    popularity.save(folder / "popularity.parquet")
    fields.update(users=users, events=events, cuts=cuts)
    return pa.array(popularity.total()[1:].astype(np.int64))
