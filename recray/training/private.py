"""Training with user-level differential privacy: a fixed number of noised steps, without early stop.

Each user is one row: the last events that the model reads. The steps release no figure of a training user,
not even a loss or a norm. All reported figures are measured on holdout users.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from recray.bundle import CurveLine
from recray.errors import TrainingError
from recray.model.losses import Criterion, Targets
from recray.model.network import Network
from recray.model.shape import Batch
from recray.privacy.accounting import Mechanism
from recray.privacy.counts import log_counts
from recray.privacy.engine import PrivateStep
from recray.privacy.sampling import PoissonUsers
from recray.training.batches import TrainingBatches
from recray.training.loop import Loop, LoopSettings, Validate, copy_weights

PHYSICAL_BYTES = 256 << 20
"""Memory of a physical batch between its two passes: scores, products of pairs of events, and activations."""
KEPT = 16
"""Activations that a block keeps per event, as a rough multiple of its width."""

TakeSteps = Callable[[int, int], None]
"""Called before each release with numbers of steps and of item count releases; raises RefusedError to forbid
them.
"""


def physical_users(items: int, events: int, width: int) -> int:
    """Users of a physical batch.

    items : scores per query
    events : events per user, each with a query
    width : of all blocks together
    """
    return max(PHYSICAL_BYTES // (4 * events * (items + 2 * events + KEPT * width)), 1)


class PrivateRows:
    """One row per training user; gives the drawn users of a step in physical batches."""

    def __init__(self, batches: TrainingBatches, width: int) -> None:
        self.batches, self.width = batches, width
        self.sequences = batches.last_sequences()
        self.length = self.sequences.stop - self.sequences.start
        self.items = batches.dataset.n_items + 1

    def __len__(self) -> int:
        return len(self.sequences)

    def physical_batches(self, users: np.ndarray) -> Iterator[tuple[Batch, Targets]]:
        """Batches of the users, the longest histories first, each as large as PHYSICAL_BYTES allows."""
        ordered = users[np.argsort(-self.length[users], kind="stable")]
        first = 0
        while first < len(ordered):
            size = physical_users(self.items, int(self.length[ordered[first]]), self.width)
            yield self.batches.collate(self.sequences[ordered[first : first + size]])
            first += size


class PrivateLoop(Loop):
    """Takes a fixed number of noised steps. An epoch is the interval between two checkpoints."""

    def __init__(
        self,
        model: Network,
        batches: TrainingBatches,
        validate: Validate,
        criterion: Criterion,
        settings: LoopSettings,
        mechanism: Mechanism,
        *,
        report_every: int,
        take_steps: TakeSteps = lambda steps, counts: None,
    ) -> None:
        super().__init__(model, batches, validate, criterion, settings)
        self.rows = PrivateRows(batches, model.shape.dim * model.shape.blocks)
        self.steps, self.counts_sigma = mechanism.steps, mechanism.counts_sigma
        self.report_every, self.take_steps = report_every, take_steps
        self.sampler = PoissonUsers(
            len(self.rows), mechanism.rate, rank=self.rank, world_size=self.world_size
        )
        self.private = PrivateStep(
            model,
            self.optimizer,
            clipping_norm=mechanism.clipping_norm,
            noise_multiplier=mechanism.sigma,
            expected_users=mechanism.rate * mechanism.users,
        )

    def run(self) -> Iterator[CurveLine]:
        """Train to the last step; yields a line per checkpoint, without the loss, which is not private."""
        progress = self.progress
        if progress.step == 0:
            self.release_counts()
        while progress.step < self.steps:
            started = time.monotonic()
            steps = min(self.report_every, self.steps - progress.step)
            if self.rank == 0:
                self.take_steps(steps, 0)  # recorded once: all ranks take each step together
            for _ in range(steps):
                self.private_step()
            self._check_weights()
            progress.epoch += 1
            progress.best_epoch, progress.best_ndcg, self.best = (
                progress.epoch,
                self.validation_ndcg(),
                copy_weights(self.ema_model),
            )
            line: CurveLine = {
                "epoch": progress.epoch,
                "steps": progress.step,
                "validation_ndcg": progress.best_ndcg,
            }
            progress.curve.append(line)
            yield {**line, "seconds": time.monotonic() - started}

    def release_counts(self) -> None:
        """Set the noised item counts of the scores before the first step; rank 0 draws the noise."""
        offset_V = self.model.offset_V
        if offset_V is None:
            return
        if self.rank == 0:
            self.take_steps(0, 1)
            offset_V.copy_(torch.from_numpy(log_counts(self.rows.batches.dataset, self.counts_sigma)))
        if self.world_size > 1:
            dist.broadcast(offset_V, 0)
        assert self.ema_model.offset_V is not None
        self.ema_model.offset_V.copy_(offset_V)

    def _check_weights(self) -> None:
        """Raises TrainingError if a weight is not finite, or if the ranks' weights are not bit-identical."""
        weights = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        if not bool(weights.isfinite().all()):
            raise TrainingError(
                f"after step {self.progress.step} a weight is not finite",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        if self.world_size == 1:
            return
        first = weights.clone()
        dist.broadcast(first, 0)
        differs = torch.tensor(float(not torch.equal(first, weights)), device=self.device)
        if float(self._sum_over_ranks(differs)):
            raise TrainingError(
                f"after step {self.progress.step} the ranks' weights differ",
                "report this as a bug; the last checkpoint is kept",
            )

    def private_step(self) -> None:
        """Take one step with newly drawn users and dropout.

        A predictable dropout mask would not average out, so its seed comes from the system.
        """
        torch.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
        self.progress.step += 1
        rate = self.settings.learning_rate * min(1.0, self.progress.step / max(self.settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.private.step(self.rows.physical_batches(self.sampler.draw()))
        self._update_ema()
