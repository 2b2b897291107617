"""The train stage in the driver: runs Ray Train, reports the learning curve, and writes the model bundle."""

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

from recray.bundle import KIND, Bundle, CurveLine, PrivacyStatement, write_bundle
from recray.cluster import first_line, keep_signal_handlers, require_resources, unwrap_errors
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import (
    ClusterError,
    DataError,
    MissingArtifactError,
    RecrayError,
    RefusedError,
    TrainingError,
)
from recray.evaluation.statement import to_markdown
from recray.privacy.accounting import Mechanism, mechanism_of
from recray.privacy.ledger import Ledger
from recray.release import list_bundles
from recray.storage import Storage, find_disk_errno, find_failed_path, is_complete
from recray.training.batches import users_estimated, users_learned
from recray.training.neighbours import load_neighbours, save_neighbours
from recray.training.plan import TrainingPlan, bundle_settings, network_shape, training_settings
from recray.training.worker import (
    Reservation,
    WorkerConfig,
    fit_neighbours_for,
    last_checkpoint,
    train_worker,
)

OnMetrics = Callable[[CurveLine], None]
"""Called in the driver with each new line of the learning curve."""


def train(
    settings: Settings, plan: TrainingPlan, dataset: Dataset, on_metrics: OnMetrics = lambda line: None
) -> Bundle:
    """Train on a dataset and write the bundle of the plan, or open an existing one. Needs a Ray session.

    A killed run resumes from its last checkpoint. Raises DataError, ClusterError, TrainingError.
    """
    storage, key, parent = Storage(settings.root()), plan.key, plan.parent
    final = storage.bundle(key)
    run = storage.training_runs / key
    if is_complete(final, KIND, key):
        if settings.privacy.enabled:
            _ledger(settings).commit(key)
        shutil.rmtree(run, ignore_errors=True)  # an earlier attempt may have been killed before this line
        return Bundle.open(final)
    check_dataset(dataset)

    shape = network_shape(settings, dataset)
    mechanism = mechanism_for(settings, dataset, key)
    run.mkdir(parents=True, exist_ok=True)
    private = None
    if mechanism is not None:
        private = _reserve(settings, key, dataset, mechanism, last_checkpoint(run))

    neighbours = _fit_neighbours(settings, dataset, storage.training_runs / f"{key}.safetensors")
    progress = storage.training_runs / f"{key}.jsonl"
    with _CurveFollower(progress, on_metrics):
        checkpoint = _fit(settings, run, dataset, progress, parent, private, neighbours)

    final_neighbours = None
    if neighbours is not None:
        final_neighbours = _fit_neighbours(
            settings, dataset, neighbours.with_suffix(".final.safetensors"), with_validation=True
        )
    metrics = json.loads((checkpoint / "progress.json").read_text())
    statement: PrivacyStatement | None = None
    if mechanism is not None:
        statement = {
            **mechanism.statement(),
            **_ledger(settings).statement(),
            "cap": settings.privacy.cap,
            "held_out": settings.split.holdout_users,
            "began_with": _origin(parent),
        }
    bundle = write_bundle(
        final,
        key,
        dataset=dataset,
        shape=shape,
        state=load_file(checkpoint / "best.safetensors"),
        settings=bundle_settings(settings),
        metrics=metrics,
        parent=None if parent is None else parent.key,
        privacy=statement,
        page=None if statement is None else to_markdown(statement, f"bundle {key}"),
        neighbours=None if final_neighbours is None else load_neighbours(final_neighbours),
    )
    if mechanism is not None:
        _ledger(settings).commit(key)
    shutil.rmtree(run, ignore_errors=True)  # the bundle holds all results
    for path in (neighbours, final_neighbours):
        if path is not None:
            path.unlink(missing_ok=True)
    return bundle


def check_dataset(dataset: Dataset) -> None:
    """Raises DataError if a dataset has no training events or no validation users."""
    if not any((shard.train_lengths > 0).any() for shard in dataset.shards()):
        raise DataError(
            f"dataset {dataset.key} has no training events",
            "lower data.min_user_events or move split.test_from later",
        )
    if dataset.target_rule is not None and not users_learned(dataset):
        raise DataError(
            f"dataset {dataset.key} has no training event of a type in data.targets after an earlier event",
            "add types to data.targets, or move split.test_from later",
        )
    if not any(((shard.split[:, 1] > shard.split[:, 0]) & shard.queried).any() for shard in dataset.shards()):
        raise DataError(
            f"dataset {dataset.key} has no validation users",
            "raise split.validation_users, or move split.validation_from",
        )


def _origin(parent: Bundle | None) -> str:
    """The initial weights of a private training, for its statement."""
    if parent is None:
        return "random weights"
    source = f"bundle {parent.key} ({parent.digest})"
    if not parent.privacy["differential_privacy"]:
        return f"{source}, said to be of public data"
    return (
        f"{source}, private and in the same ledger, which began with "
        f"{parent.privacy.get('began_with', 'random weights')}"
    )


def mechanism_for(settings: Settings, dataset: Dataset, key: str | None = None) -> Mechanism | None:
    """The mechanism of a private training; None where privacy is off.

    key : run key of the training, which selects the part of the users where they are split in parts

    Raises SettingsError if the settings do not suit the number of users, DataError if there are no users.
    """
    if not settings.privacy.enabled:
        return None
    part, parts = _next_part(settings, key), settings.privacy.shards
    if not users_learned(dataset.with_training_part(part, parts)):
        where = f" in part {part + 1} of {parts}" if parts > 1 else ""
        raise DataError(
            f"dataset {dataset.key} has no training users{where}",
            "lower privacy.shards" if parts > 1 else "prepare more events",
        )
    all_users, learned = users_estimated(dataset)
    if not learned:
        raise DataError(
            f"dataset {dataset.key} has no holdout user with two events",
            "raise split.holdout_users: the number of users is estimated from them",
        )
    return replace(
        mechanism_of(settings.privacy, all_users),
        users=max(round(learned / parts), 1),
        part=part,
        parts=parts,
    )


def _next_part(settings: Settings, key: str | None) -> int:
    """The part of the users that a training learns from: its earlier one, or the one after the previous
    training's.
    """
    parts = settings.privacy.shards
    if parts == 1:
        return 0
    try:
        runs = Ledger.read(settings.ledger_url(), settings.privacy.population).runs()
    except MissingArtifactError:
        return 0
    own_parts = [run.mechanism.part for run in runs if run.run_key == key]
    before = [run.mechanism.part for run in runs if run.mechanism.parts == parts]
    return own_parts[0] if own_parts else (before[-1] + 1) % parts if before else 0


def _ledger(settings: Settings) -> Ledger:
    return Ledger.open(settings.ledger_url(), settings.privacy.population)


def _reserve(
    settings: Settings, key: str, dataset: Dataset, mechanism: Mechanism, resume: Path | None
) -> Reservation:
    """Reserve the steps of a private training in the ledger. Returns what its workers need to take them.

    Raises RefusedError.
    """
    ledger, options = _ledger(settings), settings.privacy
    _check_ledger(settings, ledger)
    trained = dataset.with_training_part(mechanism.part, mechanism.parts)
    users = (
        str(user)
        for shard in trained.shards()
        for user in shard.user_ids.filter(pa.array(shard.train_lengths > 0)).to_pylist()
    )
    done_steps = json.loads((resume / "progress.json").read_text())["step"] if resume else 0
    ledger.reserve(key, mechanism, options.cap, done_steps, users)
    return {
        "mechanism": asdict(mechanism),
        "ledger": settings.ledger_url(),
        "population": options.population,
        "run_key": key,
        "cap": options.cap,
    }


def _fit_neighbours(
    settings: Settings, dataset: Dataset, path: Path, *, with_validation: bool = False
) -> Path | None:
    """Fit the neighbours of items in a task, once for all attempts; None where the model has no item-to-item
    evidence. Raises SettingsError.
    """
    import ray

    if not settings.model.cooccurrence:
        return None
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        with unwrap_errors():
            ray.get(
                ray.remote(_write_neighbours).remote(
                    training_settings(settings), str(dataset.path), str(scratch), with_validation
                )
            )
        os.replace(scratch, path)
    return path


def _write_neighbours(settings: Settings, dataset: str, path: str, with_validation: bool) -> None:
    neighbours = fit_neighbours_for(settings, Dataset.open(dataset), with_validation=with_validation)
    save_neighbours(neighbours, Path(path))


def _check_ledger(settings: Settings, ledger: Ledger) -> None:
    """Raises RefusedError if the ledger lacks a private bundle of its population: it is new or outdated."""
    recorded = {run.run_key for run in ledger.runs()}
    for path in list_bundles(Storage(settings.root())):
        bundle = Bundle.open(path)
        if (
            bundle.privacy["differential_privacy"]
            and bundle.privacy.get("population") == ledger.population
            and bundle.key not in recorded
        ):
            raise RefusedError(
                f"the ledger {sa.engine.make_url(settings.ledger_url())!r} does not contain bundle "
                f"{bundle.key}, a private training of population {ledger.population}: its ε is not counted",
                "restore the ledger that counted it (a backup, or privacy.ledger); for other users, set "
                "another privacy.population",
            )


def _fit(
    settings: Settings,
    run: Path,
    dataset: Dataset,
    progress: Path,
    parent: Bundle | None,
    private: Reservation | None,
    neighbours: Path | None,
) -> Path:
    """Run Ray Train to the end; returns the folder of the last checkpoint.

    Each attempt is a Ray Train run in its own folder, so that an attempt presumed dead cannot write into the
    next one's. It begins with the best checkpoint of all earlier attempts.
    """
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    options = settings.train
    gpus = options.workers if options.use_gpu else 0
    require_resources(options.workers * options.cpus_per_worker, gpus, "train", options.timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(options.report_timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(options.timeout_s)
    attempt = 1 + sum(1 for path in run.iterdir() if path.is_dir())
    resume = last_checkpoint(run)

    resources = {"CPU": options.cpus_per_worker, **({"GPU": 1} if options.use_gpu else {})}
    config: WorkerConfig = {
        "dataset": str(dataset.path),
        "settings": training_settings(settings),
        "threads": options.threads,
        "progress": str(progress),
        "resume": None if resume is None else str(resume),
        "parent": None if parent is None else str(parent.path.resolve()),
        "private": private,
        "neighbours": None if neighbours is None else str(neighbours),
    }
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # Ray's types lack its return value
        train_loop_config=dict(config),
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu=options.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"attempt-{attempt}",
            storage_path=str(run),
            failure_config=_failures(options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )

    try:
        with unwrap_errors(), keep_signal_handlers():
            result: Any = trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray Train ends a process with exit 0 on SIGINT
    except Exception as error:
        if (training_error := _to_training_error(error, options.max_failures)) is None:
            raise
        raise training_error from error
    if result.return_value is not None:
        raise result.return_value
    if result.checkpoint is None and resume is not None:
        return resume  # an earlier attempt trained to the end
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint", "read the worker logs of Ray")
    return Path(result.checkpoint.path)


def _to_training_error(error: Exception, restarts: int) -> Exception | None:
    """A failure of a worker or of Ray Train as an error of recray; None for other errors."""
    from ray.train.v2.api.exceptions import TrainingFailedError

    if failed := getattr(error, "worker_failures", None):
        first = next(iter(failed.values()))
        first = getattr(first, "_base_exc", first)
        if isinstance(first, RecrayError):
            return first
        if (number := find_disk_errno(first)) is not None:
            return OSError(number, os.strerror(number), find_failed_path(first))
        return TrainingError(
            f"train worker failed: {type(first).__name__}: {first}",
            "fix the cause and repeat the job; it resumes from the last checkpoint",
        )
    if isinstance(error, TrainingFailedError):
        cause = getattr(error, "controller_failure", error)
        return ClusterError(
            f"Ray Train gave up after {restarts} restarts: {type(cause).__name__}: {first_line(cause)}",
            "check for a lost node (ray status), then repeat the job; it resumes from the last checkpoint",
        )
    return None


def _failures(at_most: int) -> Any:
    """Limits on restarts after a lost worker, a lost node and a failed start; Ray has none by default."""
    from ray.train.v2.api.config import FailureConfig

    return FailureConfig(
        max_failures=at_most, controller_failure_limit=at_most, max_preemption_failures=at_most
    )


class _CurveFollower:
    """Reads the lines that rank 0 appends to a file and passes on each epoch once, in its own thread."""

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
                continue  # cut off by a kill; it is only displayed
            if line["epoch"] not in self._seen:
                self._seen.add(line["epoch"])
                self.on_metrics(line)
