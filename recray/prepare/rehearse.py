"""What prepare would say of an input, found out on a sample of its rows: what would refuse it, all at once, and what a person should know."""

from __future__ import annotations

import datetime as dt
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import DataError, ImpossibleSplitError, RecrayError, RefusedError, TooManyBadRowsError
from recray.prepare.prepare import Input, list_input, one_by_one, prepare
from recray.prepare.sources import EventSource, RowGroup

ROWS = 1_000_000


@dataclass
class Rehearsal:
    """What became of a sample of `rows` rows: a dataset, unless a problem left none, and notes of files and rows.

    where : what to say before what only the sample says, nothing of all rows
    as_asked : whether the dataset is of the settings as they are, not of what a problem left of them
    """

    rows: int
    where: str
    dataset: Dataset | None = None
    as_asked: bool = True
    problems: list[RecrayError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rehearse(settings: Settings, as_of: dt.datetime | None, folder: Path, source: EventSource, items: pa.Table | None) -> Rehearsal:
    """Prepare a sample of the rows in a folder of its own, by this process alone.

    After a problem it goes on without what the problem was about, so that one does not hide the next. What is wrong with a sample is a note,
    unless more of its rows are bad than all may be.
    """
    events, collected, described = list_input(settings)
    given = Input(events.files, collected, described.files, [[], []])  # what is thrown away needs no digests
    sample = _sample(source)
    is_whole = sample.rows == source.rows
    where = "" if is_whole else f"in a sample of {sample.rows} of {source.rows} rows: "
    found = Rehearsal(sample.rows, where, notes=[*events.notes, *described.notes])
    chosen = _with(settings, storage={"root": str(folder)})
    if not is_whole:
        chosen = _with(chosen, data={"min_user_events": 1, "min_item_events": min(settings.data.min_item_events, 1)})
    while True:
        try:
            found.dataset = prepare(chosen, as_of, given, one_by_one, (sample, items))
            found.notes += [note if note in source.notes else f"{found.where}{note}" for note in found.dataset.manifest["notes"]]
            return found
        except (DataError, RefusedError) as error:
            found.as_asked = False
            if is_whole or (isinstance(error, TooManyBadRowsError) and error.bad > settings.data.max_bad_fraction * source.rows):
                found.problems.append(error)
            else:
                found.notes.append(f"{found.where}{error.what}")
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
    """Some row groups: of every file, as far as it goes, and from all over it; all of them where they are few."""
    if source.rows <= ROWS:
        return source
    by_file = [list(groups) for _, groups in itertools.groupby(source.row_groups, key=lambda group: group.file)]
    firsts, others = [groups[0] for groups in by_file], [group for groups in by_file for group in groups[1:]]
    chosen = _spread(firsts, ROWS)
    chosen += _spread(others, ROWS - sum(group.rows for group in chosen))
    chosen.sort(key=lambda group: group.number)
    return replace(source, row_groups=tuple(replace(group, number=number) for number, group in enumerate(chosen or firsts[:1])))


def _spread(groups: list[RowGroup], rows: int) -> list[RowGroup]:
    """Every so many of the groups, so that they have about so many rows."""
    step = max(-(-sum(group.rows for group in groups) // max(rows, 1)), 1)
    return groups[::step] if rows > 0 else []
