"""The prepare stage: inspect files, first pass, vocabulary, second pass, split, immutable dataset."""

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

from recray import cluster
from recray.config import Settings
from recray.config.formats import RESULTS_SINCE
from recray.dataset import schema
from recray.dataset.context import CLOCK
from recray.dataset.popularity import Popularity
from recray.dataset.reader import KIND, Dataset
from recray.dataset.targets import choose_targets
from recray.errors import (
    DataError,
    Problems,
    RecrayError,
    RefusedError,
    SettingsError,
    TooManyInvalidRowsError,
)
from recray.prepare.files import InputFile, Listing, digest_files, list_collected_files, list_files
from recray.prepare.partition import (
    FUTURE,
    PartitionPlan,
    Stats,
    format_invalid_row,
    partition_row_group,
    read_stats,
)
from recray.prepare.sentences import digest_encoder, encode_sentences, find_encoder
from recray.prepare.shards import ShardCounts, ShardPlan, build_shard, count_shard, merge_counts
from recray.prepare.sources import EventSource, RowGroup, inspect_events, read_items, to_id_column
from recray.prepare.split import check_cuts, cut_dates, mask_holdout, split_shard
from recray.prepare.times import PLAUSIBLE_US
from recray.storage import Storage, immutable_directory, is_complete, key_of, lease, read_json
from recray.storage.opt_out import OptOut
from recray.version import __version__

EVENTS_PER_SHARD = 500_000
MIN_MATCHED_SHARE = 0.95  # of events and items should be in the item table; below it there is a note
MAX_EVENT_TYPES = 1 << 15  # their indices have 16 bits
DROPPED_WORDS = {
    "late_rows": "events after the end (--as-of, or the last event of the holdout users)",
    "opted_out": "events of users who opted out",
    "low_rows": "events below data.min_value",
    "few": "users with fewer events than data.min_user_events",
    "unlisted": "events of items that data.items does not name",
    "rare": "items with fewer events than data.min_item_events",
    "told_twice": "collected events that data.events has too",
}
TASK_RETRIES = 3  # if a worker is lost
MAX_AHEAD = dt.timedelta(hours=36)  # a local time read as UTC, or a date for its end, may be so far ahead


@dataclass(frozen=True)
class Input:
    """The files that a dataset is made of, and the sha256 of their contents: of events, items and the
    sentence encoder.

    Files that arrive later belong to the next run. A dataset does not store `notes` about skipped files,
    since they name paths.
    """

    events: tuple[InputFile, ...]
    collected: tuple[InputFile, ...]
    items: tuple[InputFile, ...]
    digests: list[list[str]]
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises DataError if a file changed since it was listed."""
        files, expected = (*self.events, *self.collected, *self.items), [*self.digests[0], *self.digests[1]]
        for file, digest, actual in zip(files, expected, digest_files(files), strict=True):
            if digest != actual:
                raise DataError(
                    f"{file.uri} changed while it was read", "repeat the job when the file is complete"
                )


def prepare_key(settings: Settings, as_of: dt.datetime | None, inputs: Input | None = None) -> str:
    """Run key of prepare: settings, content of the input files (None: `find_input`), opted-out users, as-of
    and version.
    """
    opted_out = OptOut.of(settings.root(), settings.data.exclude_users).digest
    opted_out_part = () if opted_out is None else (opted_out,)
    return key_of(
        "prepare",
        settings.key_settings("data", "split"),
        (inputs or find_input(settings)).digests,
        as_of,
        RESULTS_SINCE,
        *opted_out_part,
    )


def _find_encoder(settings: Settings) -> Path | None:
    """The folder of the sentence encoder, None if no feature needs it."""
    return find_encoder(settings.data.text_encoder) if "sentence" in settings.data.features.values() else None


def find_input(settings: Settings) -> Input:
    """The current input files. Raises DataError, SettingsError for missing ones."""
    events, collected, items = list_input(settings)
    encoder = _find_encoder(settings)
    digests = [
        digest_files(events.files + collected),
        digest_files(items.files),
        *([[digest_encoder(encoder)]] if encoder else []),
    ]
    return Input(events.files, collected, items.files, digests, events.notes + items.notes)


def list_input(settings: Settings) -> tuple[Listing, tuple[InputFile, ...], Listing]:
    """The files of the events, the collected files, and those of the item table. Raises DataError."""
    items = list_files((settings.data.items,), "data.items") if settings.data.items else Listing()
    return (
        list_files(settings.data.events, excluded=settings.root()),
        list_collected_files(settings.root()),
        items,
    )


def run_on_ray_data(task: Callable[[int], None], count: int) -> None:
    """Run task(0) … task(count - 1) as Ray Data tasks of one CPU each, on the connected Ray or a new one."""
    import ray

    cluster.start()

    def run(row: dict[str, int]) -> dict[str, int]:
        task(int(row["item"]))
        return row

    with cluster.unwrap_errors():
        ray.data.from_items(list(range(count)), override_num_blocks=count).map(
            run, num_cpus=1, ray_remote_args_fn=_retry_options
        ).materialize()


def run_in_process(task: Callable[[int], None], count: int) -> None:
    """Run task(0) … task(count - 1) in this process."""
    for number in range(count):
        task(number)


def _last_collected(files: tuple[InputFile, ...]) -> dict[str, int]:
    """The last number of each event store that is in the data, by the identity of the store."""
    last_numbers: dict[str, int] = {}
    for file in files:
        manifest = read_json(Path(file.uri).parent / "manifest.json")
        last_numbers[manifest["log"]] = max(last_numbers.get(manifest["log"], 0), manifest["last"])
    return last_numbers


def _retry_options() -> dict[str, int]:
    return {"max_retries": TASK_RETRIES}


TaskRunner = Callable[[Callable[[int], None], int], None]
"""Runs task(0) … task(count - 1), in any order and in any process."""


def inspect_input(
    settings: Settings,
    as_of: dt.datetime | None = None,
    inputs: Input | None = None,
    *,
    tolerates_ids: bool = False,
) -> tuple[EventSource, pa.Table | None]:
    """The event source and the item table. Raises DataError, SettingsError with all problems at once.

    tolerates_ids : see `read_items`
    """
    problems, data = Problems(), settings.data
    problems.collect(partial(_find_encoder, settings))
    if inputs is None:
        root = problems.collect(settings.root)
        event_listing = problems.collect(partial(list_files, data.events, excluded=root or Path(os.devnull)))
        item_listing = (
            problems.collect(partial(list_files, (data.items,), "data.items")) if data.items else Listing()
        )
        collected = () if root is None else problems.collect(partial(list_collected_files, root)) or ()
        events, files = (
            None if listing is None else listing.files for listing in (event_listing, item_listing)
        )
    else:
        events, collected, files = inputs.events, inputs.collected, inputs.items
    source = None if events is None else problems.collect(partial(inspect_events, data, events, collected))
    item_result = (
        None
        if files is None
        else problems.collect(partial(read_items, data, files, tolerates_ids=tolerates_ids))
    )
    if source is not None and source.clock != schema.TIMESTAMP:
        problems.errors += _check_without_times(settings, source.clock, as_of)
    problems.raise_all()
    assert source is not None and item_result is not None
    items, notes = item_result
    source = replace(source, notes=(*source.notes, *notes))
    event_id_type, item_id_type = (
        source.types[schema.ITEM_ID],
        None if items is None else items[schema.ITEM_ID].type,
    )
    if (
        data.catalogue == "items" and item_id_type is not None and item_id_type != event_id_type
    ):  # the item table decides: an unknown id in an event must not turn all ids into text
        source = replace(source, types={**source.types, schema.ITEM_ID: item_id_type})
    elif files and items is not None and item_id_type != event_id_type:
        items = items.set_column(
            0, schema.ITEM_ID, to_id_column(items[schema.ITEM_ID], pa.string(), files[0].uri)
        )
        note = (
            "item ids are whole numbers in one of data.events and data.items, and text in the other: "
            "both are read as text"
        )
        source = replace(
            source, types={**source.types, schema.ITEM_ID: pa.string()}, notes=(*source.notes, note)
        )
    return source, items


def _check_without_times(settings: Settings, clock: str, as_of: dt.datetime | None) -> Iterator[RecrayError]:
    """Errors for settings that need times, where events have none."""
    if settings.split.kind == "time":
        yield DataError(
            "split.kind=time needs a timestamp column",
            "map one with data.columns.timestamp=…, or use split.kind=leave_one_out",
        )
    if clock_names := [name for name in settings.data.context if name in CLOCK]:
        yield DataError(
            f"data.context: {clock_names[0]} needs a timestamp column",
            "map one with data.columns.timestamp=…, or leave it out",
        )
    if clock == "file_order" and settings.split.kind == "leave_one_out":
        yield DataError(
            "without a timestamp or a position only split.kind=random is possible",
            "map data.columns.timestamp or .position",
        )
    if as_of is not None:
        yield SettingsError(
            "--as-of limits events by time, but data.events has no times",
            "leave it out, or map data.columns.timestamp",
        )


def prepare(
    settings: Settings,
    as_of: dt.datetime | None,
    inputs: Input | None = None,
    run_tasks: TaskRunner = run_on_ray_data,
    inspected: tuple[EventSource, pa.Table | None] | None = None,
) -> Dataset:
    """Write the dataset of the input files (None: the current ones), or open it if it exists.

    run_tasks : runs the tasks of both passes
    inspected : the result of `inspect_input`, or a sample of it

    Raises DataError and its kinds, OutputExistsError, RefusedError for events in the future.
    """
    inputs = inputs or find_input(settings)
    storage, key = Storage(settings.root()), prepare_key(settings, as_of, inputs)
    final = storage.dataset(key)
    with lease.commit():
        shutil.rmtree(storage.staging, ignore_errors=True)  # of an attempt that was killed
    if is_complete(final, KIND, key):
        return Dataset.open(final)

    source, items = inspected or inspect_input(settings, as_of, inputs)
    plan = _plan_partition(settings, as_of, source, storage, key)
    try:
        run_tasks(partial(_partition_group, plan, source.row_groups), len(source.row_groups))
        totals = _sum_stats(plan, source, settings, as_of, keeps_quarantine=inspected is None)
        last_us = _default_as_of_us(plan, totals)
        as_of_s = int(as_of.timestamp()) if as_of else last_us // 1_000_000
        encoder = _find_encoder(settings)

        shard_plan = _plan_shards(plan, source, settings, as_of, last_us)
        item_table, join_notes, dropped = _build_item_table(
            _count_items(shard_plan, run_tasks), settings, items
        )
        if settings.data.min_user_events > 1:
            item_table = _drop_unused_items(
                replace(shard_plan, item_ids=item_table[schema.ITEM_ID].combine_chunks()),
                item_table,
                items,
                totals,
                run_tasks,
            )
        vocabulary = item_table[schema.ITEM_ID].combine_chunks()
        types, default = _order_event_types(settings, totals)
        targets = choose_targets(
            settings.data.targets,
            totals.event_types,
            types,
            has_returns=totals.negative > 0 and not settings.split.holdout_users,
        )

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
            "collected": _last_collected(inputs.collected),
            **({} if targets is None else {"targets": targets}),
            "text_encoder": None if encoder is None else digest_encoder(encoder),
        }
        with immutable_directory(final, KIND, key, fields) as folder:
            (folder / "shards").mkdir()
            (folder / "splits").mkdir()
            if settings.split.holdout_users:
                (folder / "held_out").mkdir()
            shard_plan = replace(
                shard_plan,
                item_ids=vocabulary,
                event_types=types,
                default_event=types.index(default),
                out=folder / "shards",
            )
            counted = _build_shards(shard_plan, run_tasks)
            fields["late_rows"] += counted.late
            fields |= asdict(counted) | {
                "notes": [
                    *source.notes,
                    *join_notes,
                    *_describe_rows(settings, plan, totals, counted, keeps_quarantine=inspected is None),
                ]
            }
            events = _write_splits(folder, fields, settings)
            item_table = item_table.set_column(item_table.schema.get_field_index("events"), "events", events)
            pq.write_table(_encode_texts(item_table, settings, storage), folder / "items.parquet")
            if inspected is None:
                inputs.check()
    finally:
        shutil.rmtree(plan.staging, ignore_errors=True)
    return Dataset.open(final)


def _plan_partition(
    settings: Settings, as_of: dt.datetime | None, source: EventSource, storage: Storage, key: str
) -> PartitionPlan:
    """The plan of the first pass."""
    return PartitionPlan(
        columns=source.columns,
        types=source.types,
        clock=source.clock,
        times=source.times,
        as_of_us=_microseconds(as_of) if as_of else None,
        future_us=None if as_of else _microseconds(dt.datetime.now(dt.UTC) + MAX_AHEAD),
        min_value=settings.data.min_value,
        keeps_low_values=settings.data.min_value is not None
        and any(group.live for group in source.row_groups),
        has_row_digests=source.is_lossy,
        integral_float_ids=source.integral_float_ids,
        needs_integer_items=settings.data.catalogue == "items"
        and pa.types.is_integer(source.types[schema.ITEM_ID]),
        holdout_split=settings.split.model_dump() if settings.split.holdout_users else None,
        default_event=settings.data.default_event or schema.DEFAULT_EVENT,
        opted_out=OptOut.of(storage.root, settings.data.exclude_users),
        first_live=next((group.number for group in source.row_groups if group.live), len(source.row_groups)),
        shards=settings.data.shards or max(4, -(-source.rows // EVENTS_PER_SHARD)),
        # a folder of its own, since a late task of another attempt may still write
        staging=storage.staging / f"{key}-{uuid.uuid4().hex[:8]}",
        quarantine=storage.quarantine(key),
    )


def _plan_shards(
    plan: PartitionPlan, source: EventSource, settings: Settings, as_of: dt.datetime | None, last_us: int
) -> ShardPlan:
    """The plan of the second pass, before the vocabulary is known."""
    clocked = any(stats.clocked for stats, _ in read_stats(plan, plan.first_live))
    ends_with_holdout = plan.holdout_split is not None and as_of is None and plan.clock == schema.TIMESTAMP
    return ShardPlan(
        plan,
        len(source.row_groups),
        clocked,
        last_us if ends_with_holdout else None,
        settings.split,
        settings.data,
    )


def _build_shards(plan: ShardPlan, run_tasks: TaskRunner) -> ShardCounts:
    """Run the second pass and add up its counts."""
    run_tasks(partial(build_shard, plan), plan.partition.shards)
    counts = (
        ShardCounts(**read_json(plan.shard_counts_path(number))) for number in range(plan.partition.shards)
    )
    return sum(counts, ShardCounts())


def count_dropped(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Counts of input that the settings left out, by the names of `DROPPED_WORDS`, without zeros."""
    return {name: manifest[name] for name in DROPPED_WORDS if manifest.get(name)}


def describe_dropped(manifest: Mapping[str, Any]) -> str:
    """The same as text, each count after a comma."""
    return "".join(f", {count} {DROPPED_WORDS[name]}" for name, count in count_dropped(manifest).items())


def _microseconds(moment: dt.datetime) -> int:
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def _format_time(us: int | None) -> str:
    moment = dt.datetime.now(dt.UTC) if us is None else dt.datetime.fromtimestamp(us / 1e6, dt.UTC)
    return moment.isoformat(sep=" ", timespec="minutes")


def _partition_group(plan: PartitionPlan, groups: tuple[RowGroup, ...], number: int) -> None:
    partition_row_group(plan, groups[number])


def _sum_stats(
    plan: PartitionPlan,
    source: EventSource,
    settings: Settings,
    as_of: dt.datetime | None,
    *,
    keeps_quarantine: bool,
) -> Stats:
    """Sum of the statistics of all row groups. Raises TooManyInvalidRowsError, DataError if no event
    remains.

    keeps_quarantine : whether the quarantine stays, so that the error can name it
    """
    totals = Stats()
    for stats, _ in read_stats(plan, len(source.row_groups)):
        totals.add(stats)
    if totals.bad > settings.data.max_invalid_fraction * totals.rows:
        if totals.reasons.get(FUTURE, 0) > settings.data.max_invalid_fraction * totals.rows:
            raise RefusedError(
                f"{totals.reasons[FUTURE]} of {totals.rows} events have times in the future by this "
                f"machine's clock, {_format_time(None)}: "
                "the clock is slow, or the times have another unit or zone; for example "
                f"{format_invalid_row(plan.quarantine)}",
                "set the clock, limit the events with --as-of, or set the unit: "
                "data.time_unit=date for digits such as 2024030110",
            )
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(totals.reasons.items()))
        raise TooManyInvalidRowsError(
            f"{totals.bad} of {totals.rows} rows are invalid ({reasons}), for example "
            f"{format_invalid_row(plan.quarantine)}"
            + (f"; they are in {plan.quarantine}" if keeps_quarantine else ""),
            ("check data.time_unit and data.timezone, " if plan.times.outside in totals.reasons else "")
            + "fix the input, or allow more with data.max_invalid_fraction",
            totals.bad,
        )
    if len(totals.event_types) > MAX_EVENT_TYPES:
        raise DataError(
            f"data.events has {len(totals.event_types)} types of events",
            "map the column of the types: data.columns.event=YOUR_COLUMN",
        )
    if not totals.events and totals.late:
        raise DataError(
            f"no event at or before as-of {as_of}: {totals.late} come later", "choose a later --as-of"
        )
    if not totals.events:
        problem = (
            f"no event remains of {totals.rows} rows: {totals.bad} are invalid, {totals.low} have a value "
            "below data.min_value"
        )
        raise DataError(problem, "fix the input, or lower data.min_value")
    if (
        plan.clock == schema.TIMESTAMP
        and settings.data.time_unit == "auto"
        and (totals.last_us or 0) < PLAUSIBLE_US
    ):
        raise DataError(
            f"the newest event is of {_format_time(totals.last_us)}: seconds read as milliseconds or "
            "nanoseconds look like this",
            "fix the times, or set data.time_unit if they are right",
        )
    return totals


def _default_as_of_us(plan: PartitionPlan, totals: Stats) -> int:
    """The as-of where none is given: the newest event, or the end of its day if no event has a time of
    day.

    With holdout users it is the newest of their events: another user's last event would reveal something
    about that user.
    """
    if totals.last_us is None:
        if plan.holdout_split is not None and plan.as_of_us is None and plan.clock == schema.TIMESTAMP:
            raise DataError(
                "no event is of a holdout user, and their events define the end of the data",
                "raise split.holdout_users, or set --as-of",
            )
        return 0
    return totals.last_us if totals.clocked else plan.times.end_of_day(totals.last_us)


def _describe_rows(
    settings: Settings, plan: PartitionPlan, totals: Stats, counted: ShardCounts, *, keeps_quarantine: bool
) -> list[str]:
    """Notes about the counts of rows.

    keeps_quarantine : whether the quarantine stays
    """
    notes = []
    if totals.bad:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(totals.reasons.items()))
        where = (
            "see quarantine/ under storage.root"
            if keeps_quarantine
            else f"for example {format_invalid_row(plan.quarantine)}"
        )
        notes.append(f"{totals.bad} of {totals.rows} rows are invalid and left out ({reasons}); {where}")
    if totals.words:
        notes.append(
            f"{totals.words} events have an id such as 'nan', 'None' or 'NULL': if it stands for a missing "
            "id, write null, or drop the events"
        )
    if totals.padded:
        notes.append(
            f"{totals.padded} ids in events begin or end with a blank, and differ from those without: "
            "fix them if that is not intended"
        )
    if counted.duplicates:
        action = (
            "left out"
            if settings.data.duplicates == "drop"
            else "kept: set data.duplicates=drop to leave them out"
        )
        notes.append(f"{counted.duplicates} events equal another in all mapped columns and are {action}")
    if totals.negative and settings.data.min_value is None:
        has_rule = bool(settings.data.targets) or not settings.split.holdout_users
        count = "are history, but no targets" if has_rule else "count like all others"
        notes.append(
            f"{totals.negative} events have a value below 0 (returns?) and {count}: set data.min_value to "
            "leave them out"
        )
    if totals.zero and settings.data.min_value is None and not settings.data.targets:
        notes.append(
            f"{totals.zero} events have a value of 0 and count like all others: set data.min_value, or "
            "data.targets, if they are no interest"
        )
    return notes


def _order_event_types(settings: Settings, totals: Stats) -> tuple[list[str], str]:
    """The event types in the order of their indices, and the type that stands for a missing or unknown
    one.

    The most frequent type comes first. With holdout users only their types exist, in order of name.
    """
    counts = {name: 0 for name in [settings.data.default_event] if name} | totals.event_types
    order = sorted(counts, key=lambda name: (-counts[name], name)) or [schema.DEFAULT_EVENT]
    return sorted(order) if settings.split.holdout_users else order, settings.data.default_event or order[0]


def _count_items(plan: ShardPlan, run_tasks: TaskRunner) -> pa.Table:
    """Events of each item, without duplicates if these are dropped."""
    if plan.data.duplicates == "drop":
        all_users_plan = replace(plan, data=plan.data.model_copy(update={"min_user_events": 1}))
        run_tasks(partial(count_shard, all_users_plan), plan.partition.shards)
        counts = merge_counts(plan, schema.ITEM_ID)
    else:
        counts = pa.concat_tables(
            [table for _, table in read_stats(plan.partition, plan.groups) if len(table)]
        )
        counts = counts.group_by(schema.ITEM_ID).aggregate([("count_all", "sum")])
    return counts.rename_columns([schema.ITEM_ID, "events"])


def _drop_unused_items(
    plan: ShardPlan, item_table: pa.Table, items: pa.Table | None, totals: Stats, run_tasks: TaskRunner
) -> pa.Table:
    """The item table without items that only users with few events interacted with, unless the owner's table
    lists them. Event types of only those users are removed from the totals. Raises DataError if no user
    remains.
    """
    run_tasks(partial(count_shard, plan), plan.partition.shards)
    counts, types = (merge_counts(plan, name) for name in (schema.ITEM_ID, schema.EVENT))
    if not len(counts):
        raise DataError("no user has data.min_user_events events", "lower data.min_user_events")
    totals.event_types = dict(
        zip(types[schema.EVENT].to_pylist(), types["count_all"].to_pylist(), strict=True)
    )
    used_ids = [counts[schema.ITEM_ID], *([] if items is None else [items[schema.ITEM_ID]])]
    is_used = pc.is_in(
        item_table[schema.ITEM_ID],
        value_set=pa.chunked_array(
            [chunk for column in used_ids for chunk in column.chunks]
        ).combine_chunks(),
    )
    return item_table.filter(is_used).combine_chunks()


def _build_item_table(
    counts: pa.Table, settings: Settings, items: pa.Table | None
) -> tuple[pa.Table, list[str], dict[str, int]]:
    """The items in ascending order of their ids, with the column `events`; notes on how they match the
    events; and counts of what is left out, by the names of `DROPPED_WORDS`. Raises DataError.
    """
    notes = [] if items is None else _check_join(counts, items)
    dropped = {"unlisted": 0, "rare": 0}
    if items is not None:
        is_closed = settings.data.catalogue == "items"
        item_ids = pa.chunked_array(
            [*([] if is_closed else counts[schema.ITEM_ID].chunks), *items[schema.ITEM_ID].chunks]
        ).unique()
        if is_closed:
            is_listed = pc.is_in(counts[schema.ITEM_ID], value_set=item_ids)
            dropped["unlisted"] = pc.sum(counts["events"].filter(pc.invert(is_listed))).as_py() or 0
        events = counts["events"].take(pc.index_in(item_ids, counts[schema.ITEM_ID].combine_chunks()))
        described_items = items.take(pc.index_in(item_ids, items[schema.ITEM_ID].combine_chunks()))
        columns = {schema.ITEM_ID: item_ids, "events": pc.fill_null(events, 0)}
        others = [schema.DISPLAY + use for use in settings.data.display]
        others += [schema.AVAILABLE_FROM] if settings.data.available_from else []
        counts = pa.table(
            {**columns, **{name: described_items[name] for name in (*settings.data.features, *others)}}
        )
    item_table = (
        counts.filter(pc.greater_equal(counts["events"], settings.data.min_item_events))
        .sort_by(schema.ITEM_ID)
        .combine_chunks()
    )
    if not len(item_table):
        raise DataError(f"no item has {settings.data.min_item_events} events", "lower data.min_item_events")
    return item_table, notes, {**dropped, "rare": len(counts) - len(item_table)}


def _check_join(counts: pa.Table, items: pa.Table) -> list[str]:
    """A note if many events or items have no row in the item table. Raises DataError if none has one."""
    is_described = pc.is_in(counts[schema.ITEM_ID], value_set=items[schema.ITEM_ID].combine_chunks())
    events = pc.sum(counts["events"].filter(is_described)).as_py() or 0
    event_share = events / max(pc.sum(counts["events"]).as_py(), 1)
    item_count = int(pc.sum(is_described).as_py() or 0)
    if min(event_share, item_count / max(len(counts), 1)) >= MIN_MATCHED_SHARE:
        return []

    undescribed_ids, unused_ids = (
        counts[schema.ITEM_ID].filter(pc.invert(is_described)),
        items[schema.ITEM_ID],
    )
    unused_ids = unused_ids.filter(
        pc.invert(pc.is_in(unused_ids, value_set=counts[schema.ITEM_ID].combine_chunks()))
    )
    examples = (
        f"data.events has {_format_examples(undescribed_ids)}, data.items {_format_examples(unused_ids)}"
    )
    if not events:
        raise DataError(
            f"no item of data.events is in data.items: {examples}",
            "write the ids in both the same way (blanks, case, leading zeros)",
        )
    return [
        f"{event_share:.1%} of the events and {item_count} of {len(counts)} items of data.events are in "
        f"data.items; without a match: {examples}"
    ]


def _format_examples(ids: pa.ChunkedArray) -> str:
    return ", ".join(repr(item_id) for item_id in ids.slice(0, 3).to_pylist()) or "none missing"


def _encode_texts(items: pa.Table, settings: Settings, storage: Storage) -> pa.Table:
    """The item table with vectors in place of texts of kind `sentence`."""
    encoder = _find_encoder(settings)
    for name, kind in settings.data.features.items():
        if encoder is not None and kind == "sentence":
            vectors = encode_sentences(items[name], encoder, storage.sentences(digest_encoder(encoder)))
            items = items.set_column(items.schema.get_field_index(name), name, vectors)
    return items


def _write_splits(folder: Path, fields: dict[str, Any], settings: Settings) -> pa.Array:
    """Count users and events, set the cuts, write the splits and the popularity of the targets. Returns the
    events of each item.

    Raises DataError for a split that is impossible, or that would put an event at or after the cut into
    training.
    """
    probe = Dataset(folder, {**fields, "run_key": "", "users": 0, "events": 0, "cuts": {}})
    has_time = probe.has_time
    popularity = Popularity.count_events(np.zeros(0, np.int64), None, probe.n_items)
    interacted = np.zeros(probe.n_items + 1, np.int64)
    users = events = 0
    holdout_masks = []
    for number in range(probe.n_shards):
        np.save(folder / "splits" / f"{number:05d}.npy", np.zeros((0, 4), np.int32))
        shard = probe._map(number)
        holdout_masks.append(mask_holdout(shard, settings.split) if settings.split.holdout_users else None)
        users += len(shard)
        events += len(shard.item_index)
        where = slice(None) if shard.target_rule is None else shard.target_positions
        popularity = popularity + Popularity.count_events(
            shard.item_index[where], shard.timestamp_s[where] if has_time else None, probe.n_items
        )
        interacted += np.bincount(shard.item_index, minlength=len(interacted))

    def iterate_times() -> Iterator[np.ndarray]:
        for number, mask in enumerate(holdout_masks):  # the split must not depend on training users
            shard = probe._map(number)  # map it again: pages that were read stay in memory while it is mapped
            yield (
                shard.timestamp_s
                if mask is None
                else shard.timestamp_s[np.repeat(mask, np.diff(shard.offsets))]
            )

    if events and not len(popularity.day):
        raise DataError(
            "no event of a type in data.targets remains",
            "add types to data.targets, or leave fewer events out",
        )
    cuts = cut_dates(settings.split, iterate_times) if settings.split.kind == "time" else {}
    for number in range(probe.n_shards):
        shard = probe._map(number)
        split = split_shard(shard, settings.split, cuts)
        check_cuts(replace(shard, split=split), cuts)
        np.save(folder / "splits" / f"{number:05d}.npy", split)
        if (mask := holdout_masks[number]) is not None:
            np.save(folder / "held_out" / f"{number:05d}.npy", mask)
    popularity.save(folder / "popularity.parquet")
    fields.update(users=users, events=events, cuts=cuts)
    return pa.array(interacted[1:])
