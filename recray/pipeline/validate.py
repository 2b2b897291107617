"""`recray validate`: reports all problems of settings and data before anything is written."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recray.config import Settings
from recray.dataset.context import CODES
from recray.dataset.features import describe_features
from recray.dataset.reader import Dataset
from recray.errors import Problems, RecrayError, SettingsError
from recray.inference.rules import find_unmatched, is_everything_excluded
from recray.pipeline import discard
from recray.prepare import prepare as preparation
from recray.prepare.rehearse import rehearse, without_items
from recray.serving import guard
from recray.stages import AsOf, JobResult, ProgressLog, to_date
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
    inspected = problems.collect(lambda: preparation.inspect_input(settings, as_of))
    if inspected is None:  # an unreadable item table may hide problems of the events
        with contextlib.suppress(RecrayError):
            inspected = preparation.inspect_input(without_items(settings), as_of)
    if inspected is None:
        problems.raise_all()
        raise AssertionError
    source, items = inspected
    columns = ", ".join(source.columns)
    progress(
        f"events: {len(source.files)} files, {source.rows} rows, ordered by {source.clock}; columns {columns}"
    )
    progress(f"items: {'none' if items is None else f'{len(items)} rows'}; storage.root {root}")

    notes = []
    if items is not None:
        notes = describe_features(items, dict(settings.data.features), settings.model.feature_buckets)
    metrics: dict[str, int] = {"rows": source.rows, "items": 0 if items is None else len(items)}
    readable = settings if items is not None or settings.data.items is None else without_items(settings)
    with tempfile.TemporaryDirectory(prefix="recray-validate-") as folder:
        rehearsal = rehearse(readable, as_of, Path(folder), source, items)
        problems.errors += rehearsal.problems
        notes = [*rehearsal.notes, *notes]
        if (dataset := rehearsal.dataset) is not None:
            if rehearsal.is_unmodified:
                _describe(dataset, rehearsal.prefix, progress)
            names = ("users", "events", "bad_rows", "duplicates")
            metrics |= {name: dataset.manifest[name] for name in names}
            mismatches = [
                *_find_unknown_actions(settings, dataset.event_types),
                *_find_unmatched_rules(settings, dataset),
            ]
            if rehearsal.prefix:  # of a sample: other rows may contain what is missing
                metrics["sample_rows"] = rehearsal.rows
                notes += [f"{rehearsal.prefix}{mismatch.message}" for mismatch in mismatches]
            else:
                problems.errors += mismatches
            notes += _find_crowded_fields(dataset)
    problems.raise_all()

    for note in notes:
        progress(f"note: {note}", level="warning")
    seconds = round(time.monotonic() - started, 2)
    return JobResult("validate", "ok", metrics=metrics, warnings=notes, seconds=seconds)


def _find_unmatched_rules(settings: Settings, dataset: Dataset) -> Iterator[RecrayError]:
    """Rules of section score that match no item of a dataset, or exclude all."""
    if not set(settings.data.features) <= set(dataset.items.column_names):
        return
    rules = settings.score.rules()
    for name in find_unmatched(rules, dataset):
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


def _describe(dataset: Dataset, sample: str, progress: ProgressLog) -> None:
    """Log the dataset of a rehearsal of prepare; `sample` names the rows, where these are not all."""
    manifest = dataset.manifest
    span = f", up to {to_date(dataset.as_of_s)}" if dataset.has_time else ""
    progress(
        f"{sample}{dataset.n_users} users, {dataset.n_items} items, {dataset.n_events} events{span}; types "
        f"{', '.join(dataset.event_types)}"
    )
    progress(
        f"{sample}{manifest['bad_rows']} invalid rows, {manifest['duplicates']} rows that equal another"
        f"{preparation.describe_dropped(manifest)}"
    )
    split = np.concatenate([np.asarray(shard.split) for shard in dataset.shards()])
    learned = int(sum(shard.train_lengths.sum() for shard in dataset.shards()))
    test_users = int((split[:, 3] > split[:, 2]).sum())
    cuts = "".join(f", {name} from {to_date(moment)}" for name, moment in manifest["cuts"].items())
    progress(f"{sample}{learned} training events, {test_users} test users{cuts}")
