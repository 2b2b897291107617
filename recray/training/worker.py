"""What one Ray Train worker does: build the model, resume, train epoch by epoch, checkpoint after each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from recray.bundle import Bundle
from recray.dataset.features import encode
from recray.dataset.reader import Dataset
from recray.errors import DataError, RecrayError, TrainingError
from recray.evaluation.metrics import per_user
from recray.evaluation.protocol import SETTINGS, Questions, wanted
from recray.inference import Filters, Predictor
from recray.model.fused import Linear
from recray.model.losses import Criterion
from recray.model.packed import BLOCK, packs
from recray.model.recommender import Recommender
from recray.model.shape import PRESETS, Shape
from recray.storage import sha256_file
from recray.training.batches import TrainingBatches
from recray.training.loop import Loop, LoopSettings, Validate
from recray.training.warm import begin_with

FILES = ("model", "average", "best", "optimizer")
DIGESTS = "digests.json"
VALIDATION_BATCH = 256


def shape_of(model: dict[str, Any], dataset: Dataset, *, counts: bool = False) -> Shape:
    """The network that the model settings ask for, given what the data knows. `counts`: its scores begin with noised item counts."""
    return Shape(
        event_types=max(len(dataset.event_types), 1),
        dim=model["dim"],
        blocks=model["blocks"],
        heads=model["heads"],
        history=model["history"],
        dropout=model["dropout"],
        values=model["values"],
        **{part: default if model[part] is None else model[part] for part, default in PRESETS[model["preset"]].items()},
        time_bias=model["time_bias"] and dataset.has_time,
        repeat=model["repeat"],
        repeat_by_item=model["repeat_by_item"],
        prior=model["prior_days"] > 0 and dataset.has_time,
        fresh=dataset.released_day is not None,
        feature_buckets=model["feature_buckets"],
        id_dropout=model["id_dropout"],
        fixed_items=model["items"] == "features",
        context=len(dataset.context),
        counts=counts,
    )


def train_worker(config: dict[str, Any]) -> RecrayError | None:
    """The function that Ray Train runs on every worker. `config`: dataset, settings, threads, progress, in `resume` the
    checkpoint of an earlier attempt or None, in `parent` the bundle to begin with or None, and in `private` the mechanism of a
    private training with ledger, population, run_key and cap of its reservation, or None.

    Returns what would fail again however often Ray Train began anew: every rank meets it, and a private training would pay each time.
    """
    try:
        _train(config)
    except (DataError, TrainingError) as error:
        return error
    return None


def _train(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    threads = config["threads"] or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
    torch.set_num_threads(threads)
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # what a GPU sums up is not summed in the same order twice
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads fresh memory
    loop = build_loop(config["dataset"], config["settings"], device, config["parent"], (private := config["private"]) and private["mechanism"])
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            load_checkpoint(loop, Path(folder))
    elif config["resume"]:
        load_checkpoint(loop, Path(config["resume"]))
    if private and context.get_world_rank() == 0:
        loop.take = _from_ledger(private, loop.progress.step)  # type: ignore[attr-defined]
    for line in loop.run():
        with tempfile.TemporaryDirectory() as folder:
            report = None
            if context.get_world_rank() == 0:
                save_checkpoint(loop, Path(folder))
                report = ray.train.Checkpoint.from_directory(folder)
                with open(config["progress"], "a") as file:
                    file.write(json.dumps(line) + "\n")
            ray.train.report(line, checkpoint=report)


def build_loop(
    dataset: Dataset | str, settings: dict[str, Any], device: torch.device, parent: str | None = None, mechanism: dict[str, Any] | None = None
) -> Loop:
    """Model, batches, validation and optimiser for a dataset, or the one in a folder; `settings` as `Settings.result_settings` gives them.

    parent : folder of the bundle whose weights the model begins with
    mechanism : a `Mechanism` as a dictionary, for a private training
    """
    dataset = Dataset.open(dataset) if isinstance(dataset, str) else dataset
    model_settings, train = settings["model"], settings["train"]
    shape = shape_of(model_settings, dataset, counts=bool(mechanism and mechanism["counts_sigma"]))
    torch.manual_seed(train["seed"])
    features = encode(dataset.items, settings["data"]["features"], shape.feature_buckets)
    if mechanism is not None:
        dataset = dataset.learning_from(mechanism["part"], mechanism["parts"])
    seen = dataset.trained_items()
    if mechanism is not None:  # which items were met is not to be learned from the weights: the catalogue is public
        seen = np.arange(dataset.n_items + 1) > 0
    model = Recommender(shape, seen, features).to(device)
    if parent is not None:
        begin_with(model, dataset, Bundle.open(parent))
    batches = TrainingBatches(
        dataset,
        history=shape.history,
        batch_positions=train["batch_positions"],
        windows=train["windows"] if mechanism is None else "last",
        prior_days=model_settings["prior_days"] if shape.prior else 0,
        seed=train["seed"],
        horizon=train["horizon"],
    )
    half = train["precision"] == "bfloat16" or (train["precision"] == "auto" and _gains_by_bfloat16(device))
    loop_settings = LoopSettings(
        epochs=train["epochs"],
        patience=train["patience"],
        learning_rate=train["learning_rate"],
        warmup_steps=train["warmup_steps"],
        weight_decay=train["weight_decay"],
        seed=train["seed"],
        average_decay=train["average_decay"],
        temperature_jitter=train["temperature_jitter"],
        autocast=half and device.type == "cuda",
        row=_row(train["batch_positions"], shape.history) if device.type == "cuda" and packs(shape) and mechanism is None else 0,
    )
    for module in model.modules():
        if isinstance(module, Linear):
            module.halved = half and mechanism is None
    criterion = Criterion(
        train["loss"],
        torch.from_numpy(batches.item_share()).to(device),
        full_items=train["full_softmax_items"],
        negatives=train["negatives"],
        calibration=train["gbce_calibration"],
        half=half,
        dated=batches.dated if shape.prior or shape.fresh else None,
    )
    validate = _validation(dataset, model, settings, private=mechanism is not None)
    if mechanism is None:
        return Loop(model, batches, validate, criterion, loop_settings)
    from recray.privacy.accounting import Mechanism
    from recray.training.private import PrivateLoop

    return PrivateLoop(model, batches, validate, criterion, loop_settings, Mechanism(**mechanism), every=settings["privacy"]["report_every"])


def _row(positions: int, history: int) -> int:
    """Length of the row that holds one rank's part of any batch but of one history that is longer alone."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    most = positions if world == 1 else positions // world + history
    return -(-most // BLOCK) * BLOCK


def _from_ledger(private: dict[str, Any], done: int) -> Callable[[int, int], None]:
    """Takes steps from the reservation in the ledger, after it was made to last from where the training stands."""
    from recray.privacy.accounting import Mechanism
    from recray.privacy.ledger import Ledger

    ledger = Ledger.open(private["ledger"], private["population"])
    ledger.reserve(private["run_key"], Mechanism(**private["mechanism"]), private["cap"], done)
    return lambda steps, counts: ledger.take(private["run_key"], steps, counts)


def _gains_by_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for it; without, converting costs more than it saves."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _validation(dataset: Dataset, model: Recommender, settings: dict[str, Any], *, private: bool) -> Validate:
    """Mean NDCG over validation users in the setting that selects, or the mean of both, by the predictor that will serve."""
    evaluate = settings["evaluate"]
    k = evaluate["k"][0]
    selecting = SETTINGS if settings["train"]["select_by"] == "both" else (evaluate["primary_setting"],)
    questions = Questions(dataset, "validation", max_users=settings["train"]["validation_users"], seed=settings["split"]["seed"])
    predictor = Predictor.of(model, dataset, settings["model"]["prior_days"], private=private)

    whole = [question for batch in questions.batches(VALIDATION_BATCH) for question in batch]
    users = {setting: sum(len(wanted(question, new_only=setting == "new_only")) > 0 for question in whole) for setting in selecting}
    for setting in selecting:
        if not users[setting]:
            raise DataError(
                f"no validation user has a target that {setting} asks for: there is nothing to select by",
                "raise split.validation_users or train.validation_users, or choose another evaluate.primary_setting",
            )

    def validate(candidate: Recommender, rank: int, world: int) -> tuple[float, float]:
        predictor.model = candidate
        predictor.refresh()
        total = 0.0
        for batch in questions.batches(VALIDATION_BATCH, rank, world):
            for setting in selecting:
                new_only = setting == "new_only"
                asked = [question for question in batch if len(wanted(question, new_only=new_only))]
                if not asked:
                    continue
                moments, contexts = [question.now for question in asked], [question.context for question in asked]
                answer = predictor.recommend([q.history for q in asked], k, now=moments, filters=Filters(new_only=new_only), context=contexts)
                ndcg = per_user(answer.item_index, [wanted(q, new_only=new_only) for q in asked], k)["ndcg"]
                total += float(ndcg.sum()) / (len(selecting) * users[setting])
        return total, 1.0 / world

    return validate


def save_checkpoint(loop: Loop, folder: Path) -> None:
    """Weights, best weights and optimiser as safetensors, the progress as JSON; no pickle.

    Generators and sampler are functions of (seed, epoch, rank), so the epoch in `progress.json` is their state.
    """
    for name, tensors in loop.state_dict().items():
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "progress.json").write_text(json.dumps(loop.progress.to_dict()))
    digests = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    (folder / DIGESTS).write_text(json.dumps(digests))


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint of most epochs among all attempts of a run; one that a kill left incomplete does not count."""
    found = []
    for path in run.glob("*/checkpoint_*"):
        try:
            digests = json.loads((path / DIGESTS).read_text())
            if digests.keys() >= {"progress.json"} and all(sha256_file(path / name) == digest for name, digest in digests.items()):
                found.append((json.loads((path / "progress.json").read_text())["epoch"], path.as_posix()))
        except (OSError, ValueError):
            continue
    return Path(max(found)[1]) if found else None


def load_checkpoint(loop: Loop, folder: Path) -> None:
    """Put a loop where `save_checkpoint` left it."""
    state = {name: load_file(folder / f"{name}.safetensors", device=str(loop.device)) for name in FILES}
    loop.load_state_dict(state, json.loads((folder / "progress.json").read_text()))
