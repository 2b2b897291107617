"""`recray validate`: reports all problems of settings and data before anything is written."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from recray.config import Settings
from recray.dataset.context import CODES
from recray.dataset.features import describe_features
from recray.dataset.reader import Dataset
from recray.errors import Problems, RecrayError, SettingsError
from recray.inference.filters import SeenRule
from recray.inference.rules import find_unmatched, is_everything_excluded
from recray.pipeline import discard
from recray.pipeline.overview import describe_cost, describe_dataset, describe_input
from recray.prepare.prepare import inspect_input
from recray.prepare.rehearse import looser_settings, rehearse
from recray.serving import guard
from recray.stages import AsOf, JobResult, ProgressLog
from recray.storage import check_workspace


def validate(settings: Settings, as_of: AsOf, progress: ProgressLog = discard) -> JobResult:
    """Check settings, files and columns, and prepare a sample of the rows in a temporary folder. Writes
    nothing else.

    Raises what prepare would raise, all problems at once.
    """
    started, problems = time.monotonic(), Problems()
    root = problems.collect(settings.root)
    if root is not None:
        problems.collect(lambda: check_workspace(root))
    problems.collect(lambda: guard.load_keys(settings.serve))
    inspected, usable = problems.collect(lambda: inspect_input(settings, as_of)), settings
    if inspected is None:  # what is wrong with a column must not hide what is wrong with the rows
        for usable in looser_settings(settings, Path(tempfile.gettempdir()) / "recray-validate"):
            problems.collect(partial(inspect_input, usable, as_of))
        with contextlib.suppress(RecrayError):
            inspected = inspect_input(usable, as_of, tolerates_ids=True)
    if inspected is None:
        problems.raise_all()
        raise AssertionError
    source, items = inspected
    for line in describe_input(source, None if items is None else len(items), root):
        progress(line)

    notes = []
    if items is not None:
        notes = describe_features(items, dict(usable.data.features), settings.model.feature_buckets)
    metrics: dict[str, int] = {"rows": source.rows, "items": 0 if items is None else len(items)}
    with tempfile.TemporaryDirectory(prefix="recray-validate-") as folder:
        rehearsal = rehearse(usable, as_of, Path(folder), source, items)
        problems.errors += rehearsal.problems
        notes = [*rehearsal.notes, *notes]
        if (dataset := rehearsal.dataset) is not None:
            if rehearsal.is_unmodified and not problems.errors:
                for line in describe_dataset(dataset, settings, rehearsal.prefix):
                    progress(line)
            names = ("users", "events", "bad_rows", "duplicates")
            metrics |= {name: dataset.manifest[name] for name in names}
            mismatches = [
                *_find_unknown_actions(settings, dataset.event_types),
                *_find_unmatched_rules(settings, usable, dataset),
            ]
            if rehearsal.prefix:  # of a sample: other rows may contain what is missing
                metrics["sample_rows"] = rehearsal.rows
                notes += [f"{rehearsal.prefix}{mismatch.message}" for mismatch in mismatches]
            else:
                problems.errors += mismatches
            notes += _find_crowded_fields(dataset)
            if rehearsal.is_unmodified and not problems.errors:
                progress(describe_cost(dataset, settings, rehearsal.rows / source.rows))
    problems.raise_all()

    for note in notes:
        progress(f"note: {note}", level="warning")
    seconds = round(time.monotonic() - started, 2)
    return JobResult("validate", "ok", metrics=metrics, warnings=notes, seconds=seconds)


def _find_unmatched_rules(settings: Settings, usable: Settings, dataset: Dataset) -> Iterator[RecrayError]:
    """Rules of section score that match no item or event type of a dataset, or exclude all.

    usable : the settings without the features that cannot be read; rules about those are not checked
    """
    seen = SeenRule.from_settings(settings.score.seen())
    if problem := seen.find_problem(dataset.event_types, has_time=dataset.has_time):
        yield SettingsError(f"score.{problem[0]}", problem[1])
    if not set(usable.data.features) <= set(dataset.items.column_names):
        return
    unread, rules = settings.data.features.keys() - usable.data.features.keys(), settings.score.rules()
    for name in find_unmatched(rules, dataset):
        if name.partition("=")[0] in unread:
            continue
        yield SettingsError(f"score: no item has {name}", "correct the rule, or remove it")
    if is_everything_excluded(rules, dataset):
        yield SettingsError("score.exclude leaves no item to recommend", "exclude less")


def _find_unknown_actions(settings: Settings, event_types: list[str]) -> Iterator[RecrayError]:
    """Actions of section policy whose event or feature does not exist."""
    names = {"event": event_types, "weight": ["id", *settings.data.features]}
    for action in settings.policy.actions:
        control, _, name = action.partition(".")
        if control in names and name not in names[control]:
            yield SettingsError(
                f"policy.actions: {action}: there is no {name!r}", f"known: {', '.join(names[control])}"
            )


def _find_crowded_fields(dataset: Dataset) -> Iterator[str]:
    """Notes on context fields with so many values that some share a code."""
    for name in dataset.context:
        shards = [shard for shard in dataset.shards() if name in shard.context]
        codes = set().union(*(np.unique(shard.context[name]).tolist() for shard in shards))
        if len(codes) > CODES / 2:
            yield (
                f"context {name}: {len(codes)} of {CODES - 1} codes are in use, so some values share a code; "
                "group its values"
            )
