"""The train stage in the driver: Ray Train around `worker`, the learning curve as it grows, then the bundle."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from recray import __version__
from recray.bundle import KIND, Bundle, write_bundle
from recray.cluster import require, unwrapped
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import DataError, TrainingError
from recray.storage import Storage, is_sealed, key_of
from recray.training.worker import shape_of, train_worker

OnMetrics = Callable[[dict[str, float]], None]
"""Called in the driver with each new line of the learning curve."""


def bundle_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape a bundle, given its dataset."""
    chosen = settings.result_settings("data", "split", "model", "train", "evaluate")
    chosen["evaluate"] = {name: chosen["evaluate"][name] for name in ("k", "primary_setting")}
    chosen["train"].pop("every_days")
    return chosen


def train_key(settings: Settings, dataset: Dataset) -> str:
    """Run key of train; also names the Ray Train run and the MLflow run."""
    return key_of("train", bundle_settings(settings), dataset.key, dataset.digest, __version__)


def train(settings: Settings, key: str, dataset: Dataset, on_metrics: OnMetrics = lambda line: None) -> Bundle:
    """Train on a dataset and write the bundle `key`, or open it if it is there. Needs a Ray session.

    A run that was killed goes on from its last checkpoint. Raises DataError, ClusterError, TrainingError.
    """
    storage = Storage(settings.root())
    final = storage.bundle(key)
    if is_sealed(final, KIND, key):
        return Bundle.open(final)
    if not any((shard.split[:, 0] > 0).any() for shard in dataset.shards()):
        raise DataError(f"dataset {dataset.key} has no training events", "lower data.min_user_events or move split.test_from later")
    if not any((shard.split[:, 1] > shard.split[:, 0]).any() for shard in dataset.shards()):
        raise DataError(f"dataset {dataset.key} has no validation users", "raise split.validation_users, or move split.validation_from")
    chosen = bundle_settings(settings)
    storage.training_runs.mkdir(parents=True, exist_ok=True)
    progress = storage.training_runs / f"{key}.jsonl"
    with _Follow(progress, on_metrics):
        checkpoint = _fit(settings, key, dataset, chosen, progress)
    curve = json.loads((checkpoint / "progress.json").read_text())
    shape = shape_of(chosen["model"], dataset)
    return write_bundle(
        final,
        key,
        dataset=dataset,
        shape=shape,
        state=load_file(checkpoint / "best.safetensors"),
        features=chosen["data"]["features"],
        prior_days=chosen["model"]["prior_days"] if shape.prior else 0,
        settings=chosen,
        metrics=curve,
    )


def _fit(settings: Settings, key: str, dataset: Dataset, chosen: dict[str, Any], progress: Path) -> Path:
    """Run Ray Train to the end; returns the folder of the last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    options = settings.train
    gpus = options.workers if options.use_gpu else 0
    require(options.workers * options.cpus_per_worker, gpus, "train", options.timeout_s)
    resources = {"CPU": options.cpus_per_worker, **({"GPU": 1} if options.use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"dataset": str(dataset.path), "settings": chosen, "threads": options.threads, "progress": str(progress)},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=key,
            storage_path=str(Storage(settings.root()).training_runs),
            failure_config=FailureConfig(max_failures=options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with unwrapped():
            result = trainer.fit()
    except Exception as error:
        failed = getattr(error, "worker_failures", None)
        if failed:
            first = next(iter(failed.values()))
            first = getattr(first, "_base_exc", first)
            raise TrainingError(
                f"train worker failed: {type(first).__name__}: {first}", "mend the cause and repeat the job; it goes on from the last checkpoint"
            ) from error
        raise
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint", "look at the worker logs of Ray")
    return Path(result.checkpoint.path)


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
            line = json.loads(text)
            if line["epoch"] not in self._seen:
                self._seen.add(line["epoch"])
                self.on_metrics(line)
