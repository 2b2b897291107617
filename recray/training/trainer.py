"""The train stage in the driver: Ray Train around `worker`, the learning curve as it grows, then the bundle."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from safetensors.torch import load_file

from recray.bundle import KIND, Bundle, write_bundle
from recray.cluster import first_line, own_signals, require, unwrapped
from recray.config import Settings, expanded
from recray.dataset.reader import Dataset
from recray.errors import ClusterError, DataError, MissingArtifactError, RecrayError, RefusedError, SettingsError, TrainingError
from recray.evaluation.gates import incomparable
from recray.evaluation.statement import markdown
from recray.model.shape import Shape
from recray.privacy.accounting import Mechanism, mechanism_of
from recray.privacy.ledger import Ledger
from recray.release import Release, bundles
from recray.storage import Storage, blamed, is_sealed, key_of, no_room
from recray.training.batches import users_estimated, users_learned
from recray.training.worker import last_checkpoint, shape_of, train_worker
from recray.version import __version__

OnMetrics = Callable[[dict[str, float]], None]
"""Called in the driver with each new line of the learning curve."""


def bundle_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape a bundle, given its dataset."""
    chosen = settings.result_settings("data", "split", "model", "train", "privacy", "evaluate")
    chosen["evaluate"] = {name: chosen["evaluate"][name] for name in ("k", "primary_setting")}
    chosen["train"].pop("every_days")
    if settings.privacy.epsilon is not None or settings.privacy.sigma is not None:  # what the cap and its trainings would say
        chosen["privacy"] |= {"cap": None, "trainings": 1}
    if settings.privacy.enabled and settings.model.items == "learned":  # the norm of a gradient of features is not known exactly
        chosen["data"]["features"] = {}
    return chosen


def train_key(settings: Settings, dataset: Dataset) -> str:
    """Run key of train; also names the Ray Train run and the MLflow run."""
    chosen = bundle_settings(settings)
    parent = parent_of(settings, dataset)
    return key_of("train", chosen, dataset.key, dataset.digest, parent and parent.digest, __version__)


def parent_of(settings: Settings, dataset: Dataset) -> Bundle | None:
    """The bundle that a training begins with: the champion of before this night, or that of public data. None to begin anew.

    Raises SettingsError if the bundle of public data has another network, or cannot be of public data.
    """
    champion = _champion_of(settings, dataset) if settings.train.warm_start else None
    public = settings.privacy.public_start if settings.privacy.enabled else None
    if champion is not None or public is None:
        return champion
    path = expanded(public, "privacy.public_start").resolve()
    bundle = Bundle.open(path)
    wrong = {
        "was trained privately: only its own ledger knows what it spent": bundle.privacy["differential_privacy"],
        f"lies in {settings.root()}, whose users are the ones to protect": path.is_relative_to(settings.root().resolve()),
        "has another network": not _same_network(settings, dataset, bundle),
    }
    for what, found in wrong.items():
        if found:
            raise SettingsError(f"privacy.public_start: bundle {bundle.key} {what}", "name one of public data, of the same model and data settings")
    return bundle


def _champion_of(settings: Settings, dataset: Dataset) -> Bundle | None:
    """The champion of before this night; None if there is none, its network is another, it knows some of tonight's test, or
    tonight is private and the ledger does not know its training.

    Tonight's own champion stands for the one that it began with, so that a repeated night begins alike.
    """
    storage = Storage(settings.root())
    champion = Release.read(storage).champion
    bundle = None if champion is None else champion.open(storage)
    while bundle is not None and _is_of(dataset, bundle):
        before = bundle.manifest.get("parent")
        path = before and storage.bundle(before)
        bundle = Bundle.open(path) if path and path.exists() else None
    if bundle is None or incomparable(dataset, bundle):
        return None
    if bundle.settings["split"] != bundle_settings(settings)["split"]:
        return None  # with another split it may have learned what tonight's training is selected by
    if settings.privacy.enabled and not _accounted(settings, bundle):
        return None
    return bundle if _same_network(settings, dataset, bundle) else None


def _is_of(dataset: Dataset, bundle: Bundle) -> bool:
    """Whether a bundle is of this night, or of a later one. Where no time is known, nights may differ by their data alone."""
    if dataset.clock == "timestamp" or bundle.as_of_s != dataset.as_of_s:
        return bundle.as_of_s >= dataset.as_of_s
    return bool(bundle.manifest["dataset_digest"] == dataset.digest)


def _accounted(settings: Settings, bundle: Bundle) -> bool:
    """Whether what a bundle learned is in tonight's ledger."""
    if bundle.privacy.get("population") != settings.privacy.population:
        return False
    try:
        return Ledger.read(settings.ledger_url(), settings.privacy.population).holds(bundle.key)
    except MissingArtifactError:
        return False


def _shape(settings: Settings, dataset: Dataset) -> Shape:
    return shape_of(bundle_settings(settings)["model"], dataset, counts=settings.privacy.enabled and settings.privacy.counts_share > 0)


def _same_network(settings: Settings, dataset: Dataset, bundle: Bundle) -> bool:
    told = {"features": bundle_settings(settings)["data"]["features"], "context": dataset.context, "text_encoder": dataset.text_encoder}
    if any(bundle.manifest.get(name) != value for name, value in told.items()):
        return False
    shape = _shape(settings, dataset)
    return replace(Shape(**bundle.manifest["shape"]), event_types=shape.event_types) == shape


def train(settings: Settings, key: str, dataset: Dataset, on_metrics: OnMetrics = lambda line: None) -> Bundle:
    """Train on a dataset and write the bundle `key`, or open it if it is there. Needs a Ray session.

    A run that was killed goes on from its last checkpoint. Raises DataError, ClusterError, TrainingError.
    """
    storage = Storage(settings.root())
    final = storage.bundle(key)
    run = storage.training_runs / key
    if is_sealed(final, KIND, key):
        if settings.privacy.enabled:
            _ledger(settings).commit(key)
        shutil.rmtree(run, ignore_errors=True)  # an attempt may have been killed before it came to this
        return Bundle.open(final)
    if not any((shard.learned > 0).any() for shard in dataset.shards()):
        raise DataError(f"dataset {dataset.key} has no training events", "lower data.min_user_events or move split.test_from later")
    if not any(((shard.split[:, 1] > shard.split[:, 0]) & shard.asked).any() for shard in dataset.shards()):
        raise DataError(f"dataset {dataset.key} has no validation users", "raise split.validation_users, or move split.validation_from")
    chosen = bundle_settings(settings)
    shape = _shape(settings, dataset)
    parent = parent_of(settings, dataset)
    mechanism = mechanism_for(settings, dataset, key)
    run.mkdir(parents=True, exist_ok=True)
    private = None
    if mechanism is not None:
        private = _reserve(settings, key, dataset, mechanism, last_checkpoint(run))
    progress = storage.training_runs / f"{key}.jsonl"
    with _Follow(progress, on_metrics):
        checkpoint = _fit(settings, run, dataset, chosen, progress, parent, private)
    curve = json.loads((checkpoint / "progress.json").read_text())
    statement = None
    if mechanism is not None:
        statement = (
            mechanism.statement()
            | _ledger(settings).statement()
            | {
                "cap": settings.privacy.cap,
                "held_out": settings.split.held_out,
                "began_with": _origin(parent),
            }
        )
    bundle = write_bundle(
        final,
        key,
        dataset=dataset,
        shape=shape,
        state=load_file(checkpoint / "best.safetensors"),
        features=chosen["data"]["features"],
        prior_days=chosen["model"]["prior_days"] if shape.prior else 0,
        settings=chosen,
        metrics=curve,
        parent=None if parent is None else parent.key,
        privacy=statement,
        page=None if statement is None else markdown(statement, f"bundle {key}"),
    )
    if mechanism is not None:
        _ledger(settings).commit(key)
    shutil.rmtree(run, ignore_errors=True)  # the bundle has all that is needed of it
    return bundle


def _origin(parent: Bundle | None) -> str:
    """What a private training began with, for its statement."""
    if parent is None:
        return "random weights"
    named = f"bundle {parent.key} ({parent.digest})"
    if not parent.privacy["differential_privacy"]:
        return f"{named}, said to be of public data"
    return f"{named}, private and in the same ledger, which began with {parent.privacy.get('began_with', 'random weights')}"


def mechanism_for(settings: Settings, dataset: Dataset, key: str | None = None) -> Mechanism | None:
    """What a private training does; None where privacy is off.

    key : of the training, which decides whose turn it is where users are in parts
    Raises SettingsError if the settings cannot be kept with these users, DataError if there are none.
    """
    if not settings.privacy.enabled:
        return None
    part, parts = _turn(settings, key), settings.privacy.shards
    if not users_learned(dataset.learning_from(part, parts)):
        where = f" in part {part + 1} of {parts}" if parts > 1 else ""
        raise DataError(f"dataset {dataset.key}: nobody to learn from{where}", "lower privacy.shards" if parts > 1 else "prepare more events")
    everybody, learned = users_estimated(dataset)
    if not learned:
        raise DataError(f"dataset {dataset.key}: nobody who is held out has two events", "raise split.held_out: they say how many users there are")
    return replace(mechanism_of(settings.privacy, everybody), users=max(round(learned / parts), 1), part=part, parts=parts)


def _turn(settings: Settings, key: str | None) -> int:
    """The part of the users that a training learns from: as it was begun, or the one after the last training's."""
    parts = settings.privacy.shards
    if parts == 1:
        return 0
    try:
        runs = Ledger.read(settings.ledger_url(), settings.privacy.population).runs()
    except MissingArtifactError:
        return 0
    begun = [run.mechanism.part for run in runs if run.run_key == key]
    before = [run.mechanism.part for run in runs if run.mechanism.parts == parts]
    return begun[0] if begun else (before[-1] + 1) % parts if before else 0


def _ledger(settings: Settings) -> Ledger:
    return Ledger.open(settings.ledger_url(), settings.privacy.population)


def _reserve(settings: Settings, key: str, dataset: Dataset, mechanism: Mechanism, resume: Path | None) -> dict[str, Any]:
    """Reserve the steps of a private training in the ledger; what its workers need to take them. Raises RefusedError."""
    ledger, options = _ledger(settings), settings.privacy
    _knows_all(settings, ledger)
    tonight = dataset.learning_from(mechanism.part, mechanism.parts)
    users = (str(user) for shard in tonight.shards() for user in shard.user_ids.filter(pa.array(shard.learned > 0)).to_pylist())
    done = json.loads((resume / "progress.json").read_text())["step"] if resume else 0
    ledger.reserve(key, mechanism, options.cap, done, users)
    named = {"ledger": settings.ledger_url(), "population": options.population, "run_key": key, "cap": options.cap}
    return {"mechanism": asdict(mechanism), **named}


def _knows_all(settings: Settings, ledger: Ledger) -> None:
    """Raises RefusedError for a ledger that does not know a private bundle of its population: it is a new one, or of before."""
    known = {run.run_key for run in ledger.runs()}
    for path in bundles(Storage(settings.root())):
        bundle = Bundle.open(path)
        if bundle.privacy["differential_privacy"] and bundle.privacy.get("population") == ledger.population and bundle.key not in known:
            raise RefusedError(
                f"the ledger {sa.engine.make_url(settings.ledger_url())!r} does not know bundle {bundle.key}, a private training of population "
                f"{ledger.population}: what it spent is not counted",
                "bring back the ledger that counted it (a backup, or privacy.ledger); other users are another privacy.population",
            )


def _fit(
    settings: Settings, run: Path, dataset: Dataset, chosen: dict[str, Any], progress: Path, parent: Bundle | None, private: dict[str, Any] | None
) -> Path:
    """Run Ray Train to the end; returns the folder of the last checkpoint.

    Each attempt is a Ray Train run in a folder of its own, so that one that was taken for dead cannot write into the
    next one's; it begins with the best checkpoint that any attempt left.
    """
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    options = settings.train
    gpus = options.workers if options.use_gpu else 0
    require(options.workers * options.cpus_per_worker, gpus, "train", options.timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(options.report_timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(options.timeout_s)
    attempt = 1 + sum(1 for path in run.iterdir() if path.is_dir())
    resume = last_checkpoint(run)
    resources = {"CPU": options.cpus_per_worker, **({"GPU": 1} if options.use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # Ray's types do not know that it may return something
        train_loop_config={
            "dataset": str(dataset.path),
            "settings": chosen,
            "threads": options.threads,
            "progress": str(progress),
            "resume": resume and str(resume),
            "parent": parent and str(parent.path.resolve()),
            "private": private,
        },
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run),
            failure_config=_failures(options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with unwrapped(), own_signals():
            result: Any = trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None  # how Ray Train ends a process that was sent SIGINT: with exit 0
    except Exception as error:
        if (told := _told(error, options.max_failures)) is None:
            raise
        raise told from error
    if result.return_value is not None:
        raise result.return_value
    if result.checkpoint is None and resume is not None:
        return resume  # an earlier attempt had trained to the end
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint", "look at the worker logs of Ray")
    return Path(result.checkpoint.path)


def _told(error: Exception, restarts: int) -> Exception | None:
    """What went wrong in a worker or in Ray Train, as ours; None for what Ray Train has no part in."""
    from ray.train.v2.api.exceptions import TrainingFailedError

    if failed := getattr(error, "worker_failures", None):
        first = next(iter(failed.values()))
        first = getattr(first, "_base_exc", first)
        if isinstance(first, RecrayError):
            return first
        if (number := no_room(first)) is not None:
            return OSError(number, os.strerror(number), blamed(first))
        return TrainingError(
            f"train worker failed: {type(first).__name__}: {first}", "mend the cause and repeat the job; it goes on from the last checkpoint"
        )
    if isinstance(error, TrainingFailedError):
        cause = getattr(error, "controller_failure", error)
        return ClusterError(
            f"Ray Train gave up after {restarts} restarts: {type(cause).__name__}: {first_line(cause)}",
            "look whether a node was lost (ray status), then repeat the job; it goes on from the last checkpoint",
        )
    return None


def _failures(at_most: int) -> Any:
    """Restarts after a lost worker, a lost node and a group that could not start, each bounded; Ray's defaults are endless."""
    from ray.train.v2.api.config import FailureConfig

    return FailureConfig(max_failures=at_most, controller_failure_limit=at_most, max_preemption_failures=at_most)


class _Follow:
    """Reads the lines that rank 0 appends to a file and hands each epoch on once, in a thread of the driver."""

    def __init__(self, path: Path, on_metrics: OnMetrics) -> None:
        self.path, self.on_metrics = path, on_metrics
        self._done = threading.Event()
        self._seen: set[float] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._read()

    def _run(self) -> None:
        while not self._done.wait(0.5):
            self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        for text in self.path.read_text().split("\n")[:-1]:
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn by a kill; it is only shown
            if line["epoch"] not in self._seen:
                self._seen.add(line["epoch"])
                self.on_metrics(line)
