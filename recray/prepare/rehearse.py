"""What prepare would say of an input, found out on a sample of its rows: what would refuse it, all at once, and what a person should know."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import DataError, ImpossibleSplitError, RecrayError, RefusedError, TooManyBadRowsError
from recray.prepare.prepare import Input, list_input, one_by_one, prepare
from recray.prepare.sources import EventSource

ROWS = 1_000_000


@dataclass
class Rehearsal:
    """What became of a sample of `rows` rows: a dataset, unless a problem left none, and notes of files and rows.

    as_asked : whether the dataset is of the settings as they are, not of what a problem left of them
    """

    rows: int
    dataset: Dataset | None = None
    as_asked: bool = True
    problems: list[RecrayError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rehearse(settings: Settings, as_of: dt.datetime | None, folder: Path, source: EventSource, items: pa.Table | None) -> Rehearsal:
    """Prepare a sample of the rows in a folder of its own, by this process alone.

    After a problem it goes on without what the problem was about, so that one does not hide the next. What only all rows can say
    (how many are bad, how many events a user has, whether there are any after a cut) is no problem of a sample, but a note.
    """
    events, collected, described = list_input(settings)
    given = Input(events.files, collected, described.files, [[], []])  # what is thrown away needs no digests
    sample = _sample(source)
    is_whole = sample.rows == source.rows
    found = Rehearsal(sample.rows, notes=[*events.notes, *described.notes])
    chosen = _with(settings, storage={"root": str(folder)})
    if not is_whole:
        chosen = _with(chosen, data={"min_user_events": 1, "min_item_events": min(settings.data.min_item_events, 1)})
    while True:
        try:
            found.dataset = prepare(chosen, as_of, given, one_by_one, (sample, items))
            found.notes += found.dataset.manifest["notes"]
            return found
        except (DataError, RefusedError) as error:
            is_sure = is_whole or not isinstance(error, TooManyBadRowsError | ImpossibleSplitError)
            if isinstance(error, TooManyBadRowsError):
                is_sure |= error.bad > settings.data.max_bad_fraction * source.rows
            found.as_asked = False
            if is_sure:
                found.problems.append(error)
            else:
                found.notes.append(f"in a sample of {sample.rows} of {source.rows} rows: {error.what}")
            if isinstance(error, TooManyBadRowsError) and chosen.data.max_bad_fraction < 1:
                chosen = _with(chosen, data={"max_bad_fraction": 1.0})
            elif isinstance(error, ImpossibleSplitError) and chosen.split.kind == "time":
                chosen = _with(chosen, split={"kind": "random"})
            elif items is not None:
                items, chosen = None, without_items(chosen)
            else:
                return found


def without_items(settings: Settings) -> Settings:
    """The settings without an item table."""
    return _with(settings, data={"items": None, "features": {}, "released": None})


def _with(settings: Settings, **sections: dict[str, object]) -> Settings:
    return settings.model_copy(update={name: getattr(settings, name).model_copy(update=changed) for name, changed in sections.items()})


def _sample(source: EventSource) -> EventSource:
    """Some row groups, from all over the input."""
    size = source.rows / max(len(source.row_groups), 1)
    step = max(-(-source.rows // ROWS), 1)
    some = source.row_groups[::step] if size <= ROWS else source.row_groups[:1]
    return replace(source, row_groups=tuple(replace(group, number=number) for number, group in enumerate(some)))
