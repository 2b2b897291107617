"""The jobs: what each reads, which key names its result, when it is skipped, and what it reports.

A job is safe to repeat: its run key names its output, and an output that is there is not made again. A night is the
jobs one after the other; repeated, it goes on at the stage that failed.

What needs torch or MLflow is imported by the job that uses it: the driver of prepare stays small.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from recray import cluster
from recray.config import Settings
from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import Dataset
from recray.errors import MissingArtifactError
from recray.prepare import prepare as preparation
from recray.storage import Storage, is_sealed, locked, manifest_digest, write_json

if TYPE_CHECKING:
    from recray.bundle import Bundle
    from recray.tracking.runs import Tracking

AsOf = dt.datetime | None
Say = Callable[[str], None]


@dataclass
class JobResult:
    """How a job ended. `status`: ok | skipped | refused | failed; `seconds` of wall time."""

    job: str
    status: str
    run_key: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _quiet(message: str) -> None:
    """Default of `say`: nobody listens."""


def run_validate(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Check settings, and the input's columns and types from its footers. Runs nothing and writes nothing."""
    root = settings.root()
    source, items = preparation.inspect(settings)
    say(f"events: {len(source.files)} files, {source.rows} rows, ordered by {source.clock}; columns {', '.join(source.columns)}")
    say(f"items: {'none' if items is None else f'{len(items)} rows'}; storage.root {root}")
    return JobResult("validate", "ok", metrics={"rows": source.rows, "items": 0 if items is None else len(items)})


def run_prepare(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Events to dataset."""
    with _at_work(settings):
        return _prepare(settings, as_of, say)


def run_train(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Dataset to bundle, with its MLflow run."""
    with _at_work(settings):
        return _train(settings, _dataset(settings, as_of), say)


def run_evaluate(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """The current bundle and the baselines on the dataset's test users."""
    with _at_work(settings):
        return _evaluate(settings, _dataset(settings, as_of), say)


def run_score(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Every user's list by the current bundle, published."""
    with _at_work(settings):
        return _score(settings, _dataset(settings, as_of), say)


def run_nightly(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """A night: prepare, train (when `train.every_days` have passed), evaluate, score."""
    started = time.monotonic()
    with _at_work(settings):
        say("── prepare")
        results = [_prepare(settings, as_of, say)]
        dataset = Dataset.open(results[0].outputs["dataset"], verify=True)
        for stage in (_train, _evaluate, _score):
            say(f"── {stage.__name__.removeprefix('_')}")
            if stage is _train and not _train_is_due(settings, dataset):
                say("the last bundle is younger than train.every_days")
                continue
            results.append(stage(settings, dataset, say))
    outputs = {name: path for result in results for name, path in result.outputs.items()}
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    skipped = all(result.status == "skipped" for result in results)
    return _result("nightly", skipped, results[-1].run_key, outputs, metrics, started)


@contextlib.contextmanager
def _at_work(settings: Settings) -> Iterator[None]:
    """One job at a time in a root. Raises RefusedError, or ArtifactError if the root cannot be written to."""
    with locked(settings.root() / ".lock", wait=False):
        yield


def _prepare(settings: Settings, as_of: AsOf, say: Say) -> JobResult:
    started = time.monotonic()
    key = preparation.prepare_key(settings, as_of)
    path = Storage(settings.root()).dataset(key)
    skipped = is_sealed(path, DATASET, key)
    dataset = preparation.prepare(settings, key, as_of)
    manifest = dataset.manifest
    metrics = {name: manifest[name] for name in ("users", "items", "events", "rows", "bad_rows")}
    say(f"dataset {key}: {dataset.n_users} users, {dataset.n_items} items, {dataset.n_events} events, {manifest['bad_rows']} bad rows")
    return _result("prepare", skipped, key, {"dataset": str(path)}, metrics, started)


def _train(settings: Settings, dataset: Dataset, say: Say) -> JobResult:
    from recray.bundle import KIND, Bundle
    from recray.training import trainer

    started = time.monotonic()
    key = trainer.train_key(settings, dataset)
    path = Storage(settings.root()).bundle(key)
    skipped = is_sealed(path, KIND, key)
    if not skipped:
        tracking = _tracking(settings)
        run = tracking.run(key, _run_name(dataset.as_of_s))

        def on_metrics(line: dict[str, float]) -> None:
            say(
                f"epoch {line['epoch']:.0f}  loss {line['loss']:.4f}  validation ndcg@{settings.evaluate.k[0]} "
                f"{line['validation_ndcg']:.4f}  {line['seconds']:.1f} s"
            )
            tracking.curve(run, [line])

        cluster.start()
        say(f"training on {dataset.n_users} users, {settings.train.workers} worker(s); stops {settings.train.patience} epochs after the best")
        try:
            trainer.train(settings, key, dataset, on_metrics)
        except Exception:
            tracking.finish(run, "FAILED")
            raise
    bundle = Bundle.open(path)
    with _tracked(settings, key, bundle) as (told, run):
        if told is not None:
            told.settings(run, trainer.bundle_settings(settings))
            told.curve(run, bundle.metrics["curve"])
            told.folder(run, bundle.path, "bundle")
            told.finish(run)
    metrics = {"validation_ndcg": bundle.metrics["best_ndcg"], "epochs": bundle.metrics["epoch"], "best_epoch": bundle.metrics["best_epoch"]}
    say(f"bundle {key}: best epoch {metrics['best_epoch']}, validation ndcg {metrics['validation_ndcg']:.4f}")
    return _result("train", skipped, key, {"bundle": str(path)}, metrics, started)


def _evaluate(settings: Settings, dataset: Dataset, say: Say) -> JobResult:
    from recray.evaluation import evaluate as evaluation

    started = time.monotonic()
    bundle = _bundle(settings, dataset)
    key = evaluation.evaluate_key(settings, dataset, bundle)
    path = Storage(settings.root()).evaluation(key)
    skipped = is_sealed(path, evaluation.KIND, key)
    table = evaluation.evaluate(settings, key, dataset, bundle)
    metrics = headline(table, settings)
    with _tracked(settings, key, bundle) as (tracking, run):
        if tracking is not None:
            tracking.metrics(run, metrics, _day(dataset.as_of_s))
            tracking.document(run, table, f"evaluation/{_date(dataset.as_of_s)}-{key}.json")
    headline_ndcg = f"ndcg@{settings.evaluate.k[0]}"
    for setting, rows in table.items():
        if "skipped" in rows[evaluation.MODEL]:
            say(f"{setting}: skipped, {rows[evaluation.MODEL]['skipped']}")
            continue
        found = rows[evaluation.MODEL]["segments"]
        segments = [(name, found[name]) for name in evaluation.SEGMENTS if found[name]["users"]]
        shown = ", ".join(f"{name} {segment['ndcg']:.4f} ({segment['users']})" for name, segment in segments)
        say(f"{setting}: {headline_ndcg} {rows[evaluation.MODEL][headline_ndcg]:.4f}; by segment (users): {shown}")
    return _result("evaluate", skipped, key, {"evaluation": str(path)}, metrics, started)


def _score(settings: Settings, dataset: Dataset, say: Say) -> JobResult:
    from recray.scoring import score as scoring

    started = time.monotonic()
    bundle = _bundle(settings, dataset)
    key = scoring.score_key(settings, dataset, bundle)
    storage = Storage(settings.root())
    path = scoring.snapshot_path(storage, dataset.as_of_s, key)
    skipped = is_sealed(path, scoring.KIND, key)
    if not skipped:
        cluster.start()
    path, manifest, changed = scoring.score(settings, key, dataset, bundle)
    metrics = {name: manifest[name] for name in ("users", "popular_users", "coverage@10")}
    with _tracked(settings, key, bundle) as (tracking, run):
        if tracking is not None:
            document = {name: value for name, value in manifest.items() if name != "files"}
            document.update(date=_date(dataset.as_of_s), manifest_sha256=manifest_digest(path))
            tracking.document(run, document, f"snapshots/{_date(dataset.as_of_s)}-{key}.json")
            quantiles = {f"best_score_q{q}": value for q, value in manifest["best_score_quantiles"].items()}
            values = {f"snapshot_{name}": value for name, value in {**metrics, **quantiles}.items()}
            tracking.metrics(run, values, _day(dataset.as_of_s))
    say(
        f"snapshot {key}: {manifest['users']} users, {manifest['popular_users']} with the popular list; {'published' if changed else 'was published'}"
    )
    return _result("score", skipped and not changed, key, {"snapshot": str(path), "latest": str(storage.latest)}, metrics, started)


def headline(table: dict[str, Any], settings: Settings) -> dict[str, float]:
    """The model's figures at the first k of `evaluate.k`, by setting: `repeats_ndcg@10`, …; none for a skipped setting."""
    from recray.evaluation.evaluate import MODEL

    k = settings.evaluate.k[0]
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr", "recall", "coverage", "popularity_share")]
    return {f"{setting}_{name}": rows[MODEL][name] for setting, rows in table.items() for name in names if name in rows[MODEL]}


def _dataset(settings: Settings, as_of: AsOf) -> Dataset:
    key = preparation.prepare_key(settings, as_of)
    try:
        return Dataset.open(Storage(settings.root()).dataset(key), verify=True)
    except MissingArtifactError as error:
        raise MissingArtifactError(error.what, "run `recray prepare` with the same settings first, or `recray nightly`") from None


def _bundle(settings: Settings, dataset: Dataset) -> Bundle:
    """The bundle trained on this dataset, or else the last one trained alike that is not from the future."""
    from recray.bundle import Bundle, latest_bundle, settings_key
    from recray.training import trainer

    storage = Storage(settings.root())
    own = storage.bundle(trainer.train_key(settings, dataset))
    if own.exists():
        return Bundle.open(own)
    found = latest_bundle(storage.root / "bundles", settings_key(trainer.bundle_settings(settings)), dataset.as_of_s)
    if found is None or dataset.split_kind == "random":  # another random split tests on what this bundle was trained on
        raise MissingArtifactError(f"no bundle of these settings in {storage.root / 'bundles'}", "run `recray train` first")
    return found


def _train_is_due(settings: Settings, dataset: Dataset) -> bool:
    from recray.bundle import latest_bundle, settings_key
    from recray.training import trainer

    storage = Storage(settings.root())
    last = latest_bundle(storage.root / "bundles", settings_key(trainer.bundle_settings(settings)), dataset.as_of_s)
    if last is None or dataset.split_kind == "random" or storage.bundle(trainer.train_key(settings, dataset)).exists():
        return True
    age = _day(dataset.as_of_s) - _day(last.as_of_s)
    return not 0 < age < settings.train.every_days


def _tracking(settings: Settings) -> Tracking:
    from recray.tracking.runs import Tracking

    return Tracking(settings.tracking.uri, settings.tracking.experiment, Storage(settings.root()).tracking)


@contextlib.contextmanager
def _tracked(settings: Settings, key: str, bundle: Bundle) -> Iterator[tuple[Tracking | None, str]]:
    """The tracking and the bundle's run for what the job `key` has to tell; None if that was told before.

    A job that was killed between its output and its report tells it when it is repeated.
    """
    told = Storage(settings.root()).tracked(key)
    if told.exists():
        yield None, ""
        return
    tracking = _tracking(settings)
    run = tracking.run(bundle.key, _run_name(bundle.as_of_s))
    yield tracking, run
    write_json(told, {"run_id": run})


def _run_name(as_of_s: int) -> str:
    return f"train {_date(as_of_s)}"


def _result(job: str, skipped: bool, key: str, outputs: dict[str, str], metrics: dict[str, Any], started: float) -> JobResult:
    return JobResult(job, "skipped" if skipped else "ok", key, outputs, metrics, round(time.monotonic() - started, 2))


def _day(as_of_s: int) -> int:
    return as_of_s // 86_400


def _date(as_of_s: int) -> str:
    return str(dt.datetime.fromtimestamp(as_of_s, dt.UTC).date())
