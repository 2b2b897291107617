"""The nightly run: its stages in order. A repeated run resumes at the stage that failed.

It is refused if a later run is published, or if an attempt with other settings did not end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recray.config import RESULT_SECTIONS, Settings
from recray.config.formats import to_current_settings
from recray.dataset.reader import Dataset
from recray.errors import DataError, PrivacySpentError, RecrayError, RefusedError, StateError, TrainingError
from recray.events.store import sqlite_file
from recray.pipeline import discard, hold_workspace
from recray.prepare import prepare as preparation
from recray.release import Release
from recray.stages import AsOf, JobContext, JobResult, ProgressLog, run_stage, to_date
from recray.stages.train import is_train_due
from recray.storage import Storage, key_of, lease, read_json, write_json

REFUSED_FIX = (
    "nothing was published; train longer or with other settings (sections train, model), or lower the "
    "criteria of a first model (promotion.must_beat), then repeat; promotion.first_run=fallback publishes "
    "the popularity fallback until a model is promoted"
)


def nightly(
    settings: Settings, as_of: AsOf, progress: ProgressLog = discard, *, restart: bool = False
) -> JobResult:
    """Prepare, train (when `train.every_days` have passed), evaluate, promote, score, report.

    A run that started with other settings and did not end is refused, unless `restart`.
    """
    started = time.monotonic()
    with hold_workspace("nightly", settings, progress) as context:
        files, run_file = _find_input(context, as_of)
        if not run_file.exists() or read_json(run_file)["ended"]:
            # an unfinished run resumes with the data that it started with; a new one collects first
            _collect(context)
            files, run_file = _find_input(context, as_of)
        begin_run(run_file, settings, as_of, restart=restart)
        with _recording_end(run_file):
            results = _run_stages(context, as_of, files)
            is_refused = _publishes_nothing(context)

    result = JobResult(
        job="nightly",
        status="skipped" if all(stage.status == "skipped" for stage in results) else "ok",
        run_key=next((stage.run_key for stage in results if stage.job == "score"), results[-2].run_key),
        outputs={name: path for stage in results for name, path in stage.outputs.items()},
        metrics={name: value for stage in results for name, value in stage.metrics.items()},
        seconds=round(time.monotonic() - started, 2),
        reason="; ".join(stage.reason for stage in results if stage.reason),
        warnings=context.warnings,
    )
    if is_refused:
        result.status = "refused"
        report = f"the report shows the comparison: {result.outputs['report']}"
        result.reason = f"{result.reason}; fix: {REFUSED_FIX}; {report}"
    return result


def _find_input(context: JobContext, as_of: AsOf) -> tuple[preparation.Input, Path]:
    """The current input files, and the file of the run that reads them."""
    files = preparation.find_input(context.settings)
    return files, context.storage.nightly_run(key_of("night", as_of, files.digests))


def _collect(context: JobContext) -> None:
    """Collect where there is an event store. Without an unavailable store, the run goes on without its last
    events.
    """
    if context.settings.serve.state == "sqlite" and not sqlite_file(context.storage.root).exists():
        return
    context.progress("── collect", stage="collect")
    try:
        run_stage("collect", context)
    except StateError as error:
        context.warn(f"events since the previous run are missing in this one: {error.message}")


def _run_stages(context: JobContext, as_of: AsOf, files: preparation.Input) -> list[JobResult]:
    """Run the stages in order; without a champion, tune and score are left out."""
    context.progress("── prepare", stage="prepare")
    results = [run_stage("prepare", context, as_of, files)]
    dataset = Dataset.open(results[0].outputs["dataset"], verify=True)
    _require_order(context.storage, dataset)
    tune = ("tune",) if context.settings.policy.enabled else ()
    for name in ("train", "evaluate", "promote", *tune, "score", "report"):
        if name in ("tune", "score") and _publishes_nothing(context):
            continue
        context.progress(f"── {name}", stage=name)
        if name == "train" and not is_train_due(context, dataset):
            context.progress("the last bundle is younger than train.every_days")
            continue
        try:
            results.append(run_stage(name, context, dataset))
        except PrivacySpentError as error:
            if not _has_champion(context.storage):
                raise
            context.warn(f"{error.message}; the champion scores tonight's run")
        except Exception as error:  # a nightly run does not need a policy
            if name != "tune":
                raise
            reason = f"unexpected {type(error).__name__}: {error}"
            if isinstance(error, RecrayError):
                reason = error.message
            context.warn(f"no policy tonight: {reason}")
    return results


def begin_run(run_file: Path, settings: Settings, as_of: AsOf, *, restart: bool) -> None:
    """Record the settings of a run. Raises RefusedError if it started with others and did not end."""
    current = settings.result_settings(*RESULT_SECTIONS)
    content = read_json(run_file) if run_file.exists() else None
    if content is not None:
        recorded = to_current_settings(content["settings"])
        if recorded == current:
            return
        if not content["ended"] and not restart:
            values, recorded_values = _flatten_settings(current), _flatten_settings(recorded)
            changed = [
                f"{name} {recorded_values.get(name)!r} → {value!r}"
                for name, value in values.items()
                if recorded_values.get(name) != value
            ]
            raise RefusedError(
                f"this run (as of {as_of or 'all events'}) started with other settings and did not end: "
                f"{', '.join(changed)}",
                "repeat it with the settings it started with, or start again with these: --restart",
            )
    write_json(run_file, {"as_of": as_of and as_of.isoformat(), "settings": current, "ended": False})


def _flatten_settings(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()
    }


@contextlib.contextmanager
def _recording_end(run_file: Path) -> Iterator[None]:
    """Record that a run ended: successfully, or with an error that needs other data or settings. An
    interrupted run stays open.
    """
    try:
        yield
    except (DataError, RefusedError, TrainingError):
        _close(run_file)
        raise
    _close(run_file)


def _close(run_file: Path) -> None:
    content = read_json(run_file)
    if not content["ended"]:
        with lease.commit(), contextlib.suppress(OSError):
            write_json(run_file, {**content, "ended": True})


def _require_order(storage: Storage, dataset: Dataset) -> None:
    """Raises RefusedError if a later run is published: the as-of, or the clock behind it, went back."""
    if not storage.latest.exists():
        return
    published = read_json(storage.latest)
    if published["as_of_s"] > dataset.as_of_s:
        raise RefusedError(
            f"the run of {to_date(published['as_of_s'])} is published; this one ends earlier, on "
            f"{to_date(dataset.as_of_s)}: was a clock set back?",
            f"choose a later --as-of; to publish the older run on purpose, remove {storage.latest}, or use "
            "another storage.root",
        )


def _publishes_nothing(context: JobContext) -> bool:
    """Whether the run ends without lists: no bundle was ever promoted, and `promotion.first_run` refuses."""
    return context.settings.promotion.first_run == "refuse" and not _has_champion(context.storage)


def _has_champion(storage: Storage) -> bool:
    return Release.read(storage).champion is not None
