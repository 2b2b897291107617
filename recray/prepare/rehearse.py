"""Runs prepare on a sample of the rows and reports all problems at once, with notes for the user."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from recray.config import Settings
from recray.dataset.context import CLOCK
from recray.dataset.reader import Dataset
from recray.errors import DataError, ImpossibleSplitError, RecrayError, RefusedError, TooManyInvalidRowsError
from recray.prepare.files import InputFile, list_files
from recray.prepare.formats import open_file
from recray.prepare.prepare import Input, list_input, prepare, run_in_process
from recray.prepare.sources import EventSource, RowGroup, read_items

SAMPLE_ROWS = 1_000_000


@dataclass
class Rehearsal:
    """The result of preparing a sample of `rows` rows: a dataset, unless a problem prevented it, and notes
    about files and rows.

    prefix : put before notes that hold for the sample only; empty if all rows were used
    is_unmodified : whether the dataset was made with the settings as they are, none dropped after a problem
    """

    rows: int
    prefix: str
    dataset: Dataset | None = None
    is_unmodified: bool = True
    problems: list[RecrayError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rehearse(
    settings: Settings, as_of: dt.datetime | None, folder: Path, source: EventSource, items: pa.Table | None
) -> Rehearsal:
    """Prepare a sample of the rows in a folder of its own, in this process.

    After a problem it drops the setting that caused it and continues, so that one problem does not hide the
    next. A problem of the sample is a note, unless its invalid rows alone exceed the limit for all rows.
    """
    events, collected, item_listing = list_input(settings)
    inputs = Input(
        events.files, collected, item_listing.files, [[], []]
    )  # a temporary dataset needs no digests
    sample = _sample_groups(source)
    is_whole = sample.rows == source.rows
    prefix = "" if is_whole else f"in a sample of {sample.rows} of {source.rows} rows: "
    rehearsal = Rehearsal(sample.rows, prefix, notes=[*events.notes, *item_listing.notes])
    sample_settings = _update_sections(settings, storage={"root": str(folder)})
    if not is_whole:
        sample_settings = _update_sections(
            sample_settings,
            data={"min_user_events": 1, "min_item_events": min(settings.data.min_item_events, 1)},
        )
    while True:
        try:
            rehearsal.dataset = prepare(sample_settings, as_of, inputs, run_in_process, (sample, items))
            rehearsal.notes += [
                note if note in source.notes else f"{rehearsal.prefix}{note}"
                for note in rehearsal.dataset.manifest["notes"]
            ]
            return rehearsal
        except (DataError, RefusedError) as error:
            rehearsal.is_unmodified = False
            if is_whole or (
                isinstance(error, TooManyInvalidRowsError)
                and error.invalid_rows > settings.data.max_invalid_fraction * source.rows
            ):
                rehearsal.problems.append(error)
            else:
                rehearsal.notes.append(f"{rehearsal.prefix}{error.message}")
            if isinstance(error, TooManyInvalidRowsError) and sample_settings.data.max_invalid_fraction < 1:
                sample_settings = _update_sections(sample_settings, data={"max_invalid_fraction": 1.0})
            elif isinstance(error, ImpossibleSplitError) and sample_settings.split.kind == "time":
                sample_settings = _update_sections(sample_settings, split={"kind": "random"})
            elif items is not None:
                items, sample_settings = None, without_items(sample_settings)
            else:
                return rehearsal


def looser_settings(settings: Settings, folder: Path) -> Iterator[Settings]:
    """The settings without the columns that their files lack, and then also without the features that cannot
    be read, so that a problem does not hide the next.

    folder : workspace in place of one that cannot be used
    """
    data, usable = settings.data, settings
    try:
        settings.root()
    except RecrayError:
        usable = _update_sections(usable, storage={"root": str(folder)})
    with contextlib.suppress(RecrayError):
        names = set(itertools.chain(*map(_read_names, list_files(data.events).files)))
        columns = {name: column for name, column in data.columns.items() if column is None or column in names}
        context = tuple(name for name in data.context if name in names or name in CLOCK)
        usable = _update_sections(usable, data={"columns": columns, "context": context})
    if data.items is None:
        yield usable
        return
    try:
        files = list_files((data.items,), "data.items").files
        names = set(itertools.chain(*map(_read_names, files)))
    except RecrayError:
        yield without_items(usable)
        return
    features = {name: kind for name, kind in data.features.items() if name in names}
    available_from = data.available_from if data.available_from in names else None
    display = {use: name for use, name in data.display.items() if name in names}
    changed = {"features": features, "display": display, "available_from": available_from}
    usable = _update_sections(usable, data=changed)
    yield usable
    for name, kind in features.items():
        alone = _update_sections(
            usable, data={"features": {name: kind}, "display": {}, "available_from": None}
        )
        try:
            read_items(alone.data, files, tolerates_ids=True)
        except RecrayError:
            remaining = {other: kind for other, kind in usable.data.features.items() if other != name}
            usable = _update_sections(usable, data={"features": remaining})
    try:
        read_items(usable.data, files, tolerates_ids=True)
    except RecrayError:
        usable = without_items(usable)
    yield usable


def _read_names(file: InputFile) -> list[str]:
    with open_file(file) as table:
        return table.names


def without_items(settings: Settings) -> Settings:
    """The settings without an item table."""
    nothing: dict[str, object] = {"items": None, "features": {}, "display": {}, "available_from": None}
    return _update_sections(settings, data=nothing)


def _update_sections(settings: Settings, **sections: dict[str, object]) -> Settings:
    return settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    )


def _sample_groups(source: EventSource) -> EventSource:
    """Some row groups, spread evenly over every file; all of them if there are few rows."""
    if source.rows <= SAMPLE_ROWS:
        return source
    by_file = [
        list(groups) for _, groups in itertools.groupby(source.row_groups, key=lambda group: group.file)
    ]
    first_groups, rest = (
        [groups[0] for groups in by_file],
        [group for groups in by_file for group in groups[1:]],
    )
    selected = _spread_evenly(first_groups, SAMPLE_ROWS)
    selected += _spread_evenly(rest, SAMPLE_ROWS - sum(group.rows for group in selected))
    selected.sort(key=lambda group: group.number)
    return replace(
        source,
        row_groups=tuple(
            replace(group, number=number) for number, group in enumerate(selected or first_groups[:1])
        ),
    )


def _spread_evenly(groups: list[RowGroup], rows: int) -> list[RowGroup]:
    """Every n-th of the groups, so that they have about `rows` rows."""
    step = max(-(-sum(group.rows for group in groups) // max(rows, 1)), 1)
    return groups[::step] if rows > 0 else []
