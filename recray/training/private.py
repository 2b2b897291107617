"""Training with user-level differential privacy: a fixed number of noised steps instead of epochs until an early stop.

A user is one row: its last events, as many as the model reads. Nothing that is seen of a user who is learned from leaves the
steps: no loss, no norm; what is reported is measured on users of whom nothing is learned.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from recray.errors import TrainingError
from recray.model.losses import Criterion, Targets
from recray.model.recommender import Recommender
from recray.model.shape import Batch
from recray.privacy.accounting import Mechanism
from recray.privacy.counts import log_counts
from recray.privacy.engine import PrivateStep
from recray.privacy.sampling import PoissonUsers
from recray.training.batches import TrainingBatches
from recray.training.loop import Loop, LoopSettings, Validate, copied

PHYSICAL_BYTES = 256 << 20
"""Of a physical batch, between its two passes: scores, products of events with events, and what the blocks keep for the way back."""
KEPT = 16
"""Numbers that a block keeps for each event, as multiples of its width; of that order."""


Take = Callable[[int, int], None]
"""Called with a number of steps before they are taken, and of releases of the item counts; raises RefusedError if they may not be."""


def physical_users(items: int, events: int, width: int) -> int:
    """Users of a physical batch, each with so many events and asked after each about so many items; `width` of all blocks together."""
    return max(PHYSICAL_BYTES // (4 * events * (items + 2 * events + KEPT * width)), 1)


class PrivateRows:
    """A row for each user who is learned from, and the drawn ones of a step in physical batches."""

    def __init__(self, batches: TrainingBatches, width: int) -> None:
        self.batches, self.width = batches, width
        self.windows = batches.last_windows()
        self.length = self.windows.stop - self.windows.start
        self.items = batches.dataset.n_items + 1

    def __len__(self) -> int:
        return len(self.windows)

    def physical(self, users: np.ndarray) -> Iterator[tuple[Batch, Targets]]:
        """Batches of the users, the longest histories first, each as large as memory may hold."""
        chosen = users[np.argsort(-self.length[users], kind="stable")]
        first = 0
        while first < len(chosen):
            size = physical_users(self.items, int(self.length[chosen[first]]), self.width)
            yield self.batches.collate(self.windows[chosen[first : first + size]])
            first += size


class PrivateLoop(Loop):
    """Steps with noise until they are all taken; an epoch is what lies between two checkpoints."""

    def __init__(
        self,
        model: Recommender,
        batches: TrainingBatches,
        validate: Validate,
        criterion: Criterion,
        settings: LoopSettings,
        mechanism: Mechanism,
        *,
        every: int,
        take: Take = lambda steps, counts: None,
    ) -> None:
        super().__init__(model, batches, validate, criterion, settings)
        self.rows = PrivateRows(batches, model.shape.dim * model.shape.blocks)
        self.steps, self.every, self.take, self.counts_sigma = mechanism.steps, every, take, mechanism.counts_sigma
        self.sampler = PoissonUsers(len(self.rows), mechanism.rate, rank=self.rank, world=self.world)
        self.private = PrivateStep(
            model,
            self.optimizer,
            clipping_norm=mechanism.clipping_norm,
            noise_multiplier=mechanism.sigma,
            expected_users=mechanism.rate * mechanism.users,
        )

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the last step; yields a line a checkpoint. There is no loss in it: it is not private."""
        progress = self.progress
        if progress.step == 0:
            self.begin()
        while progress.step < self.steps:
            started = time.monotonic()
            steps = min(self.every, self.steps - progress.step)
            if self.rank == 0:
                self.take(steps, 0)  # no rank takes a step without rank 0
            for _ in range(steps):
                self.private_step()
            self._sound()
            progress.epoch += 1
            progress.best_epoch, progress.best_ndcg, self.best = progress.epoch, self._validated(), copied(self.average)
            line = {"epoch": progress.epoch, "steps": progress.step, "validation_ndcg": progress.best_ndcg}
            progress.curve.append(line)
            yield {**line, "seconds": time.monotonic() - started}

    def begin(self) -> None:
        """Put noised item counts under the scores, before the first step; rank 0 draws the noise."""
        offset_V = self.model.offset_V
        if offset_V is None:
            return
        if self.rank == 0:
            self.take(0, 1)
            offset_V.copy_(torch.from_numpy(log_counts(self.rows.batches.dataset, self.counts_sigma)))
        if self.world > 1:
            dist.broadcast(offset_V, 0)
        assert self.average.offset_V is not None
        self.average.offset_V.copy_(offset_V)

    def _sound(self) -> None:
        """Raises TrainingError if a weight is not finite, or the ranks' weights are not equal to the bit."""
        flat = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        if not bool(flat.isfinite().all()):
            raise TrainingError(
                f"after step {self.progress.step} a weight is not finite", "lower train.learning_rate; the last good checkpoint is kept"
            )
        if self.world == 1:
            return
        first = flat.clone()
        dist.broadcast(first, 0)
        differs = torch.tensor(float(not torch.equal(first, flat)), device=self.device)
        if float(self._sum(differs)):
            raise TrainingError(f"after step {self.progress.step} the ranks' weights differ", "report it; the last checkpoint is kept")

    def private_step(self) -> None:
        """One step; its users are drawn anew, and so is dropout: a mask that could be foreseen would not average out."""
        torch.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
        self.progress.step += 1
        rate = self.settings.learning_rate * min(1.0, self.progress.step / max(self.settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.private.step(self.rows.physical(self.sampler.draw()))
        self._update_average()
