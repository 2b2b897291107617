"""The stages `collect`, from the endpoint's event store, and `prepare`, into a dataset."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import is_holdout
from recray.events import collect as collection
from recray.events.rewards import Rewards
from recray.events.store import open_log
from recray.prepare import prepare as preparation
from recray.release import Published
from recray.stages.context import AsOf, JobContext, StageReport
from recray.storage import Storage, is_complete, read_json, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

PLURALS = {
    "event": "events",
    "decision": "decisions",
    "outcome": "outcomes",
    "set_aside": "outcomes set aside",
    "access": "accesses",
}


def collect(context: JobContext) -> StageReport:
    """Copy the new entries of the event store to Parquet: events for prepare, impressions, outcomes."""
    options, storage = context.settings.serve, context.storage
    log = open_log(options.state, storage.root, options.keep_days)
    try:
        path, counts = collection.collect(storage, log)
        collection.drop_collected(
            storage, log, options.keep_days, _last_published_entry(storage, log.identity)
        )
    finally:
        log.close()
    for folder in sorted(storage.collected.glob("[!.]*")):  # also of an attempt that was killed
        if not (storage.outbox / f"{folder.name}.json").exists():
            _report_endpoint(context, folder, log.identity)
    context.deliver()

    shown = ", ".join(f"{count} {PLURALS[kind]}" for kind, count in counts.items())
    context.progress(f"collected: {shown or 'nothing new'}", stage="collect")
    metrics = {f"collected_{PLURALS[kind].replace(' ', '_')}": count for kind, count in counts.items()}
    if path is None:
        return StageReport(metrics=metrics, is_new=False)
    return StageReport(path.name, {"collected": str(path)}, metrics)


def _report_endpoint(context: JobContext, folder: Path, identity: str) -> None:
    """Queue the endpoint's metrics of a collected folder for MLflow; with privacy, of holdout users alone."""
    settings, step = context.settings, read_json(folder / "manifest.json")["collected_at_s"]
    among = None
    if settings.privacy.enabled:
        among = partial(is_holdout, split=settings.split.model_dump())
    values = collection.summarize(folder, Rewards.declared(settings.serve), among)
    context.outbox.put(
        folder.name,
        {
            "run_key": f"endpoint {identity}",
            "run_name": "endpoint",
            "order": [step, 0],
            "metrics": {"values": values, "step": step},
        },
    )


def _last_published_entry(storage: Storage, identity: str) -> int:
    """The last entry number of an event store that is in the published run, 0 for none."""
    published = Published.read(storage)
    if published is None:
        return 0
    collected = read_manifest(published.dataset, DATASET).get("collected", {})
    return int(collected.get(identity, 0))


def prepare(context: JobContext, as_of: AsOf, files: preparation.Input) -> StageReport:
    """Prepare a dataset from the input files."""
    key = preparation.prepare_key(context.settings, as_of, files)
    path = context.storage.dataset(key)
    is_new = not is_complete(path, DATASET, key)
    dataset = preparation.prepare(context.settings, as_of, files)
    manifest = dataset.manifest
    metrics = {name: manifest[name] for name in ("users", "items", "events", "rows", "bad_rows")}
    metrics |= preparation.count_dropped(manifest)

    for note in (*files.notes, *manifest.get("notes", [])):
        context.warn(note)
    context.progress(
        f"dataset {key}: {dataset.n_users} users, {dataset.n_items} items, {dataset.n_events} events, "
        f"{manifest['bad_rows']} invalid rows{preparation.describe_dropped(manifest)}"
    )
    return StageReport(key, {"dataset": str(path)}, metrics, is_new)
