"""One Ray Train worker: build the model, resume, train, and write a checkpoint after each epoch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from recray.bundle import Bundle, CurveLine
from recray.config import ModelSettings, Settings, TrainSettings
from recray.dataset.features import encode_features
from recray.dataset.reader import Dataset
from recray.errors import DataError, RecrayError, TrainingError
from recray.evaluation.metrics import per_user
from recray.evaluation.protocol import PROTOCOLS, EvaluationQueries, targets_of
from recray.inference import Filters, Predictor
from recray.model.cooccurrence import Neighbours
from recray.model.fused import Linear
from recray.model.losses import Criterion
from recray.model.network import Network
from recray.model.packed import BLOCK, is_packable
from recray.model.shape import PRESETS, Shape
from recray.privacy.accounting import Mechanism
from recray.privacy.ledger import Ledger
from recray.storage import sha256_file
from recray.training.batches import TrainingBatches
from recray.training.calibration import calibrate, measure_cold_gaps
from recray.training.loop import Loop, LoopSettings, Validate
from recray.training.neighbours import fit_neighbours, load_neighbours
from recray.training.warm import copy_parent_weights

FILES = ("model", "average", "best", "optimizer")
DIGESTS = "digests.json"
VALIDATION_BATCH = 256


class Reservation(TypedDict):
    """What the workers of a private training need to take its steps.

    mechanism : fields of the `Mechanism`
    ledger : URL of its database
    cap : maximum ε of the population; None: none is set
    """

    mechanism: Mapping[str, Any]
    ledger: str
    population: str
    run_key: str
    cap: float | None


class WorkerConfig(TypedDict):
    """The config of `train_worker`.

    dataset : its folder
    threads : of each worker; None: the cores of its machine, shared among its workers
    progress : file to which rank 0 appends the lines of the learning curve
    resume : folder of the checkpoint of an earlier attempt; None: there is none
    parent : folder of the bundle whose weights the training begins with; None: random weights
    private : None: the training is not private
    neighbours : file of the neighbours of items; None: the model has no item-to-item evidence
    """

    dataset: str
    settings: Settings
    threads: int | None
    progress: str
    resume: str | None
    parent: str | None
    private: Reservation | None
    neighbours: str | None


def shape_of(model: ModelSettings, dataset: Dataset, *, counts: bool = False) -> Shape:
    """Architecture for the model settings and the data set.

    counts : scores include noised item counts
    """
    return Shape(
        event_types=max(len(dataset.event_types), 1),
        dim=model.dim,
        blocks=model.blocks,
        heads=model.heads,
        history=model.history,
        dropout=model.dropout,
        values=model.values,
        **{
            part: default if (value := getattr(model, part)) is None else value
            for part, default in PRESETS[model.preset].items()
        },
        time_bias=model.time_bias and dataset.has_time,
        repeat=model.repeat_consumption,
        repeat_by_item=model.repeat_by_item,
        prior=model.popularity_prior_days > 0 and dataset.has_time,
        fresh=dataset.released_day is not None,
        feature_buckets=model.feature_buckets,
        id_dropout=model.id_dropout,
        fixed_items=model.items == "features",
        cooccurrence=model.cooccurrence_events if model.cooccurrence else 0,
        context=len(dataset.context),
        counts=counts,
    )


def train_worker(config: WorkerConfig) -> RecrayError | None:
    """The function that Ray Train runs on every worker.

    Returns an error that every restart would repeat on every rank. Raising it would make Ray Train restart,
    and each restart of a private training costs privacy.
    """
    try:
        _train(config)
    except (DataError, TrainingError) as error:
        return error
    return None


def _train(config: WorkerConfig) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    threads = config["threads"] or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
    torch.set_num_threads(threads)
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # a GPU has no fixed order of summation
        torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler
        # nothing here reads uninitialized memory
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    private = config["private"]
    mechanism = None if private is None else private["mechanism"]
    loop = build_loop(
        config["dataset"], config["settings"], device, config["parent"], mechanism, config["neighbours"]
    )

    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            load_checkpoint(loop, Path(folder))
    elif config["resume"]:
        load_checkpoint(loop, Path(config["resume"]))
    if private and context.get_world_rank() == 0:
        loop.take_steps = _ledger_taker(private, loop.progress.step)  # type: ignore[attr-defined]

    def report(line: CurveLine, *, is_new: bool = True) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if context.get_world_rank() == 0:
                save_checkpoint(loop, Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
                if is_new:
                    with open(config["progress"], "a") as file:
                        file.write(json.dumps(line) + "\n")
            ray.train.report(dict(line), checkpoint=checkpoint)

    for line in loop.run():
        report(line)
    if loop.calibrate is not None and loop.progress.factors is None and loop.progress.curve:
        loop.finish()
        report(loop.progress.curve[-1], is_new=False)


def build_loop(
    dataset: Dataset | str,
    settings: Settings,
    device: torch.device,
    parent: str | None = None,
    mechanism: Mapping[str, Any] | None = None,
    neighbours: str | None = None,
) -> Loop:
    """Build model, batches, validation and optimiser.

    dataset : or its folder
    settings : as `recray.training.plan.training_settings` returns them
    parent : folder of the bundle whose weights the model begins with
    mechanism : fields of the `Mechanism` of a private training
    neighbours : file of `save_neighbours`; None: fitted here where the model has item-to-item evidence
    """
    dataset = Dataset.open(dataset) if isinstance(dataset, str) else dataset
    train = settings.train
    shape = shape_of(settings.model, dataset, counts=bool(mechanism and mechanism["counts_sigma"]))
    torch.manual_seed(train.seed)
    features = encode_features(dataset.items, settings.data.features, shape.feature_buckets)
    if mechanism is not None:
        dataset = dataset.with_training_part(mechanism["part"], mechanism["parts"])
    seen = dataset.mask_trained_items()
    if mechanism is not None:  # the weights must not reveal which items have events; the catalogue is public
        seen = np.arange(dataset.n_items + 1) > 0

    model = Network(shape, seen, features).to(device)
    if parent is not None:
        copy_parent_weights(model, dataset, Bundle.open(parent))

    batches = TrainingBatches(
        dataset,
        history=shape.history,
        batch_tokens=train.batch_tokens,
        sequences=train.sequences if mechanism is None else "last",
        popularity_prior_days=settings.model.popularity_prior_days if shape.prior else 0,
        seed=train.seed,
        target_baskets=train.target_baskets,
    )

    half = train.precision == "bfloat16" or (train.precision == "auto" and _is_bfloat16_fast(device))
    loop_settings = _loop_settings(train, shape, device, half=half, private=mechanism is not None)
    for module in model.modules():
        if isinstance(module, Linear):
            module.halved = half and mechanism is None
    criterion = Criterion(
        train.loss,
        torch.from_numpy(batches.item_share()).to(device),
        full_items=train.full_softmax_items,
        negatives=train.negatives,
        calibration=train.gbce_calibration,
        half=half,
        dated=batches.dated if shape.prior or shape.fresh else None,
    )

    validate = _build_validation(dataset, model, settings, private=mechanism is not None)
    if mechanism is None:
        calibration = None
        if train.calibrate:
            calibration = partial(
                calibrate,
                dataset=dataset,
                popularity_prior_days=settings.model.popularity_prior_days,
                protocols=_selection_protocols(settings),
                seed=settings.split.seed,
            )
        attach = complete = None
        if shape.cooccurrence:
            attach = partial(_attach_neighbours, dataset, settings, neighbours)
            if neighbours is None:
                complete = partial(_attach_neighbours, dataset, settings, None, with_validation=True)
        gauge = partial(
            measure_cold_gaps,
            dataset=dataset,
            popularity_prior_days=settings.model.popularity_prior_days,
            filter_seen="filter_seen" in _selection_protocols(settings),
            seed=settings.split.seed,
        )
        return Loop(model, batches, validate, criterion, loop_settings, calibration, attach, complete, gauge)
    from recray.training.private import PrivateLoop

    return PrivateLoop(
        model,
        batches,
        validate,
        criterion,
        loop_settings,
        Mechanism(**mechanism),
        report_every=settings.privacy.report_every,
    )


def fit_neighbours_for(settings: Settings, dataset: Dataset, *, with_validation: bool = False) -> Neighbours:
    """The neighbours of items for a training, or for its bundle. Raises SettingsError."""
    return fit_neighbours(
        dataset,
        neighbours=settings.model.cooccurrence_neighbours,
        l2=settings.evaluate.ease_l2,
        memory_bytes=settings.train.cooccurrence_memory * 2**30,
        with_validation=with_validation,
    )


def _attach_neighbours(
    dataset: Dataset,
    settings: Settings,
    neighbours: str | None,
    model: Network,
    *,
    with_validation: bool = False,
) -> None:
    """Give a model with item-to-item evidence its neighbours, of a file or fitted here."""
    assert model.cooccurrence is not None
    if neighbours is None:
        model.cooccurrence.attach(fit_neighbours_for(settings, dataset, with_validation=with_validation))
    else:
        model.cooccurrence.attach(load_neighbours(Path(neighbours)))


def _loop_settings(
    train: TrainSettings, shape: Shape, device: torch.device, *, half: bool, private: bool
) -> LoopSettings:
    return LoopSettings(
        epochs=train.epochs,
        patience=train.patience,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        seed=train.seed,
        ema_decay=train.ema_decay,
        temperature_jitter=train.temperature_jitter,
        autocast=half and device.type == "cuda",
        row=row_length(train.batch_tokens, shape.history)
        if device.type == "cuda" and is_packable(shape) and not private
        else 0,
    )


def row_length(positions: int, history: int) -> int:
    """Length of the row for one rank's part of any batch, except one whose single history is longer."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    longest = positions if world_size == 1 else positions // world_size + history
    return -(-longest // BLOCK) * BLOCK


def _ledger_taker(private: Reservation, done_steps: int) -> Callable[[int, int], None]:
    """A function that records steps in the ledger.

    First reserves the steps that remain after `done_steps`.
    """
    ledger = Ledger.open(private["ledger"], private["population"])
    ledger.reserve(private["run_key"], Mechanism(**private["mechanism"]), private["cap"], done_steps)
    return lambda steps, counts: ledger.take_steps(private["run_key"], steps, counts)


def _is_bfloat16_fast(device: torch.device) -> bool:
    """Whether the device has bfloat16 units; without them, the conversion costs more than it saves."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _selection_protocols(settings: Settings) -> tuple[str, ...]:
    """The protocols by which validation users select the weights."""
    return PROTOCOLS if settings.train.select_by == "both" else (settings.evaluate.protocol,)


def _build_validation(dataset: Dataset, model: Network, settings: Settings, *, private: bool) -> Validate:
    """A function for the mean NDCG of validation users under the protocol of selection, or under both.

    It uses the predictor that serves. Raises DataError where a protocol has no target.
    """
    k = settings.evaluate.k[0]
    protocols = _selection_protocols(settings)
    queries = EvaluationQueries(
        dataset, "validation", max_users=settings.train.validation_users, seed=settings.split.seed
    )
    predictor = Predictor.of(model, dataset, settings.model.popularity_prior_days, private=private)

    all_queries = [query for batch in queries.batches(VALIDATION_BATCH) for query in batch]
    users = {
        protocol: sum(
            len(targets_of(query, filter_seen=protocol == "filter_seen")) > 0 for query in all_queries
        )
        for protocol in protocols
    }
    for protocol in protocols:
        if not users[protocol]:
            raise DataError(
                f"no validation user has a target under the protocol {protocol}, so no epoch can be selected",
                "raise split.validation_users or train.validation_users, or use another evaluate.protocol",
            )

    def validate(candidate: Network, rank: int, world_size: int) -> tuple[float, float]:
        predictor.refresh(candidate)
        total = 0.0
        for batch in queries.batches(VALIDATION_BATCH, rank, world_size):
            for protocol in protocols:
                filter_seen = protocol == "filter_seen"
                with_targets = [query for query in batch if len(targets_of(query, filter_seen=filter_seen))]
                if not with_targets:
                    continue
                ranked = predictor.recommend(
                    [query.history for query in with_targets],
                    k,
                    now=[query.now for query in with_targets],
                    filters=Filters(filter_seen=filter_seen),
                    context=[query.context for query in with_targets],
                )
                targets = [targets_of(query, filter_seen=filter_seen) for query in with_targets]
                ndcg = per_user(ranked.item_index, targets, k)["ndcg"]
                total += float(ndcg.sum()) / (len(protocols) * users[protocol])
        return total, 1.0 / world_size

    return validate


def save_checkpoint(loop: Loop, folder: Path) -> None:
    """Write weights, best weights and optimiser as safetensors and the progress as JSON; no pickle.

    Random generators and sampler are functions of (seed, epoch, rank), so the epoch in `progress.json` is
    their state.
    """
    for name, tensors in loop.state_dict().items():
        save_file(
            {key: tensor.cpu().contiguous() for key, tensor in tensors.items()},
            folder / f"{name}.safetensors",
        )
    (folder / "progress.json").write_text(json.dumps(loop.progress.to_dict()))
    digests = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    (folder / DIGESTS).write_text(json.dumps(digests))


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most epochs among all attempts of a run, without incomplete ones."""
    checkpoints = []
    for path in run.glob("*/checkpoint_*"):
        try:
            digests = json.loads((path / DIGESTS).read_text())
            if digests.keys() >= {"progress.json"} and all(
                sha256_file(path / name) == digest for name, digest in digests.items()
            ):
                checkpoints.append(
                    (json.loads((path / "progress.json").read_text())["epoch"], path.as_posix())
                )
        except (OSError, ValueError):
            continue
    return Path(max(checkpoints)[1]) if checkpoints else None


def load_checkpoint(loop: Loop, folder: Path) -> None:
    """Restore a loop from a `save_checkpoint` folder."""
    state = {name: load_file(folder / f"{name}.safetensors", device=str(loop.device)) for name in FILES}
    loop.load_state_dict(state, json.loads((folder / "progress.json").read_text()))
