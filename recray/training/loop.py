"""The training loop in plain torch, in one process or in one of several that share a process group.

It runs the epochs and stops early. All randomness of an epoch comes from (seed, epoch, rank). The state after
an epoch is therefore: weights, optimiser, the best weights so far, and the numbers in `Progress`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recray.errors import TrainingError
from recray.model.controls import Controls
from recray.model.losses import Criterion, Targets
from recray.model.network import Network
from recray.model.packed import pack
from recray.model.shape import Batch

if TYPE_CHECKING:
    from recray.bundle import CurveLine, TrainingMetrics

WORST_AFTER = 0.97  # of the validation NDCG after calibration: with a few hundred users it is rough
SCALAR_FACTOR = 10.0  # on the learning rate of the few scalar parameters

Validate = Callable[[Network, int, int], tuple[float, float]]
"""(model, rank, world_size) -> this rank's parts of a sum and of its divisor: together the mean NDCG"""
Gauge = Callable[[Network], list[float]]
"""How far cold items are from the lists; see `recray.training.calibration.measure_cold_gaps`"""
Calibrate = Callable[[Network], dict[str, float]]
"""Scales the terms of a model in place and returns their factors; see `recray.training.calibration`"""


class Batches(Protocol):
    """Source of training batches; see `recray.training.batches`."""

    def epoch(self, epoch: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Batch, Targets, int]]:
        """This rank's part of each global batch of an epoch, and the number of queries in the whole batch."""

    def padding(self, epoch: int = 0) -> float:
        """Share of padded positions in an epoch."""


@dataclass(frozen=True)
class LoopSettings:
    """The train settings that the loop reads; see `recray.config.TrainSettings`.

    row : positions of the row that a batch is packed into, a multiple of `packed.BLOCK`; 0: padded batches
    """

    epochs: int
    patience: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    seed: int
    ema_decay: float = 0.0
    temperature_jitter: float = 0.0
    autocast: bool = False
    row: int = 0


@dataclass
class Progress:
    """Progress of a run. `curve` has a line per epoch; `factors` are the calibration's, None before it."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_ndcg: float = -1.0
    curve: list[CurveLine] = field(default_factory=list)
    factors: dict[str, float] | None = None
    cold_gaps: list[float] | None = None

    def to_dict(self) -> TrainingMetrics:
        """As the content of a bundle's `metrics.json`."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best_epoch": self.best_epoch,
            "best_ndcg": self.best_ndcg,
            "curve": self.curve,
            "factors": self.factors,
            "cold_gaps": self.cold_gaps,
        }


class Loop:
    """Trains a model until early stop. `state_dict` and `load_state_dict` move it between processes.

    Parameters
    ----------
    calibrate : epochs are compared, and the trained model is left, after it
    attach : adds to the trained model what training does not need
    complete : gives the calibrated model what calibration must not see
    gauge : measures the calibrated model
    """

    def __init__(
        self,
        model: Network,
        batches: Batches,
        validate: Validate,
        criterion: Criterion,
        settings: LoopSettings,
        calibrate: Calibrate | None = None,
        attach: Callable[[Network], None] | None = None,
        complete: Callable[[Network], None] | None = None,
        gauge: Gauge | None = None,
    ) -> None:
        self.model, self.batches, self.validate = model, batches, validate
        self.calibrate, self.attach = calibrate, attach
        self.complete, self.gauge = complete, gauge
        self.criterion, self.settings = criterion, settings
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        self.device = next(model.parameters()).device
        self.progress = Progress()
        groups = [
            {"params": list(parameters), "factor": factor} for factor, parameters in _parameter_groups(model)
        ]
        implementation = {"fused": True} if self.device.type == "cuda" else {"foreach": True}
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            **implementation,
        )
        # the validated and kept weights: the model itself, or its exponential moving average (EMA)
        self.ema_model = copy.deepcopy(model).eval().requires_grad_(False) if settings.ema_decay else model
        self.best = copy_weights(model)

    def run(self) -> Iterator[CurveLine]:
        """Train and yield each epoch's line of the curve, plus `seconds`, which is not kept."""
        progress, settings = self.progress, self.settings
        while progress.epoch < settings.epochs and progress.epoch - progress.best_epoch < settings.patience:
            started = time.monotonic()
            loss = self.train_epoch(progress.epoch)
            ndcg = self.validation_ndcg()
            progress.epoch += 1
            if ndcg > progress.best_ndcg:
                progress.best_ndcg, progress.best_epoch, self.best = (
                    ndcg,
                    progress.epoch,
                    copy_weights(self.ema_model),
                )
            line: CurveLine = {
                "epoch": progress.epoch,
                "steps": progress.step,
                "loss": loss,
                "validation_ndcg": ndcg,
            }
            progress.curve.append(line)
            yield {**line, "seconds": time.monotonic() - started}

    def finish(self) -> Network:
        """The trained model: the best weights, calibrated once, unless validation users are clearly
        better off without.
        """
        model = self.ema_model.eval()
        model.load_state_dict(self.best)
        if self.progress.factors is None:
            self.progress.factors = {} if self.calibrate is None else self._calibrate(model, self.calibrate)
            self.best = copy_weights(model)
            self.progress.cold_gaps = None if self.gauge is None else self.gauge(model)
        if self.complete is not None:
            self.complete(model)
        return model

    def _calibrate(self, model: Network, calibrate: Calibrate) -> dict[str, float]:
        before, _ = self.validate(model, 0, 1)
        if self.attach is not None:
            self.attach(model)
        factors = calibrate(model)
        after, _ = self.validate(model, 0, 1)
        if after >= WORST_AFTER * before:
            return factors
        model.load_state_dict(self.best)
        if model.cooccurrence is not None:
            model.cooccurrence.scale.zero_()
            model.cooccurrence.log_scale.zero_()
        return {}

    def train_epoch(self, epoch: int) -> float:
        """One pass over the training histories; returns the mean loss of a query.

        Raises TrainingError if the loss, or a weight afterwards, is not finite.
        """
        seed = np.random.SeedSequence([self.settings.seed, epoch, self.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        self.model.train()
        total, queries = torch.zeros(2, device=self.device, dtype=torch.float64)
        batches = self._prepare_batches(epoch)
        for batch, targets, n_queries in batches if self.device.type == "cpu" else prefetch(batches):
            total += self.train_step(batch, targets, n_queries)
            queries += n_queries
        total = self._sum_over_ranks(total[None])[0]
        loss = float(total / queries.clamp(min=1))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of epoch {epoch + 1} is {loss}",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        # the loss does not reveal a bad last step
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            raise TrainingError(
                f"after epoch {epoch + 1} a weight is not finite",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        return loss

    def _prepare_batches(self, epoch: int) -> Iterator[tuple[Batch, Targets, int]]:
        """The completed batches of an epoch, on the model's device."""
        for batch, targets, n_queries in self.batches.epoch(epoch, self.rank, self.world_size):
            batch = self.criterion.complete(batch)
            if self.settings.row and len(batch.item_BT):
                batch = batch._replace(packing=pack(batch.item_BT, self.settings.row))
            yield batch.to(self.device), targets.to(self.device), n_queries

    def train_step(self, batch: Batch, targets: Targets, n_queries: int) -> Tensor:
        """One step on this rank's part of a global batch of `n_queries` queries; returns its summed loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast):
            loss = self.criterion.backward(self.model, batch, targets, 1.0 / n_queries, self._jitter(batch))
        self._all_reduce_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.progress.step += 1
        rate = self.settings.learning_rate * min(1.0, self.progress.step / max(self.settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self._update_ema()
        return loss

    def _jitter(self, batch: Batch) -> Controls | None:
        """Random attention temperatures of a training batch, so that the model supports others than 1."""
        if not self.settings.temperature_jitter:
            return None
        return Controls(
            self.settings.temperature_jitter
            * torch.randn(len(batch.item_BT), self.model.shape.heads, device=self.device)
        )

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Move the EMA towards the weights; faster in early steps, so that the initial weights fade soon."""
        if self.ema_model is self.model:
            return
        step = self.progress.step
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.ema_model.parameters()), list(self.model.parameters()), 1 - decay)

    def _all_reduce_gradients(self) -> None:
        """Sum gradients over the ranks in one flat tensor. Losses are already divided by the global batch."""
        if self.world_size == 1:
            return
        gradients = []
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = self._sum_over_ranks(torch.cat([g.reshape(-1) for g in gradients]))
        parts = flat.split([g.numel() for g in gradients])  # type: ignore[no-untyped-call]
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def validation_ndcg(self) -> float:
        model = self.ema_model
        if self.calibrate is not None:
            model = copy.deepcopy(model).eval()
            self.calibrate(model)
        total, users = self.validate(model, self.rank, self.world_size)
        total, users = self._sum_over_ranks(
            torch.tensor([total, users], dtype=torch.float64, device=self.device)
        ).tolist()
        result: float = total / max(users, 1.0)
        return result

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Named tensors by file: model, average, best, optimizer. `progress` is stored separately as JSON."""
        optimizer = {
            f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        return {
            "model": copy_weights(self.model),
            "average": copy_weights(self.ema_model),
            "best": self.best,
            "optimizer": optimizer,
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], progress: TrainingMetrics) -> None:
        self.model.load_state_dict(state["model"])
        self.ema_model.load_state_dict(state["average"])
        self.best = state["best"]
        self.progress = Progress(**progress)
        state_by_parameter: dict[int, dict[str, Tensor]] = {}
        for name, value in state["optimizer"].items():
            index, key = name.split(".", 1)
            state_by_parameter.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state_by_parameter, "param_groups": groups})


def prefetch(batches: Iterator[tuple[Batch, Targets, int]]) -> Iterator[tuple[Batch, Targets, int]]:
    """The same batches; a thread builds the next one while a GPU trains on the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        future = pool.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = pool.submit(next, batches, None)
            yield batch


def _parameter_groups(model: Network) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters by factor on the learning rate.

    The few parameters of the repeat-consumption head, the popularity prior and freshness need larger steps.
    """
    scalar_parameters = [
        p for name, p in model.named_parameters() if name.startswith(("repeat.", "prior_scale", "freshness."))
    ]
    scalar_ids = {id(p) for p in scalar_parameters}
    other_parameters = [p for p in model.parameters() if id(p) not in scalar_ids]
    return (
        [(1.0, other_parameters), (SCALAR_FACTOR, scalar_parameters)]
        if scalar_parameters
        else [(1.0, other_parameters)]
    )


def copy_weights(model: Network) -> dict[str, Tensor]:
    """A copy of the model's current weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
