"""Synthetic users of a privacy audit that are rows of the data set: training collates, draws, clips and
noises them like all others.

Each is present with probability 1/2. The attacker knows what all real users add to each step, and what each
synthetic user would add. Along these directions, the rest of the released gradient shows who was present.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recray.dataset.reader import Dataset, Shard
from recray.model.losses import Targets
from recray.model.shape import Batch
from recray.privacy.watch import StepMonitor
from recray.training.private import PrivateLoop, PrivateRows

EVENTS = 20  # of each user, one per hour


def synthetic_users(dataset: Dataset, count: int, random: np.random.Generator) -> Shard:
    """`count` users who repeat one item, or alternate between two.

    For such a user the gradients of reading and of scoring an item's vector add up.
    """
    items = random.integers(1, dataset.n_items + 1, (count, 2))
    items[::2, 1] = items[::2, 0]
    end = (dataset.cut_s("validation") or dataset.as_of_s) if dataset.clock == "timestamp" else EVENTS
    step = 3600 if dataset.clock == "timestamp" else 1
    return Shard(
        user_ids=pa.array([f"synthetic {number}" for number in range(count)]),
        offsets=np.arange(count + 1, dtype=np.int64) * EVENTS,
        item_index=items[:, np.arange(EVENTS) % 2].ravel(),
        event_index=np.zeros(count * EVENTS, np.int64),
        timestamp_s=np.tile(end - step * np.arange(EVENTS, 0, -1), count),
        value=np.ones(count * EVENTS, np.float32),
        basket=np.tile(np.arange(EVENTS), count),
        split=np.full((count, 4), EVENTS, np.int32),
        holdout=np.zeros(count, bool),
    )


class _SplitRows(PrivateRows):
    """Rows whose physical batches hold real users first, then synthetic ones; records the sum in between."""

    def __init__(
        self, rows: PrivateRows, first_synthetic_row: int, parameters: list[torch.nn.Parameter]
    ) -> None:
        self.__dict__.update(rows.__dict__)
        self.first_synthetic_row, self.parameters = first_synthetic_row, parameters
        self.real_sum: list[Tensor] = []

    def physical_batches(self, users: np.ndarray) -> Iterator[tuple[Batch, Targets]]:
        yield from super().physical_batches(users[users < self.first_synthetic_row])
        self.real_sum = [
            parameter.grad.double() for parameter in self.parameters if parameter.grad is not None
        ]
        yield from super().physical_batches(users[users >= self.first_synthetic_row])


class SyntheticRows:
    """The last `count` rows of a training are synthetic, and about half of them are absent.

    is_present_M : whether each is present
    membership_score_M : how much the released gradients resemble each one's contribution
    """

    def __init__(
        self, loop: PrivateLoop, count: int, monitor: StepMonitor, random: np.random.Generator
    ) -> None:
        self.loop, self.monitor, self.random = loop, monitor, random
        self.first_synthetic_row = len(loop.rows) - count
        self.is_present_M, self.membership_score_M = random.random(count) < 0.5, np.zeros(count)
        self.rows = _SplitRows(loop.rows, self.first_synthetic_row, loop.private.optimizer.params)
        loop.rows = self.rows
        sampler = loop.sampler = copy.copy(loop.sampler)
        sampler.own_users = sampler.own_users[
            (sampler.own_users < self.first_synthetic_row)
            | np.append(np.zeros(self.first_synthetic_row, bool), self.is_present_M)[sampler.own_users]
        ]

    def step(self, take_step: object) -> None:
        """Run one step of the loop, `take_step`, and observe it."""
        assert callable(take_step)
        contributions_MP = torch.stack(
            [
                self._contribution(self.first_synthetic_row + number)
                for number in range(len(self.is_present_M))
            ]
        )
        if self.first_synthetic_row:
            self._contribution(int(self.random.integers(self.first_synthetic_row)))
        take_step()
        released_gradient = torch.cat([gradient.flatten() for gradient in self.monitor.released])
        real_sum = torch.cat([gradient.flatten() for gradient in self.rows.real_sum])
        self.membership_score_M += (contributions_MP.double() @ (released_gradient - real_sum)).cpu().numpy()

    def _contribution(self, row: int) -> Tensor:
        batch, targets = self.rows.batches.collate(self.rows.sequences[np.array([row])])
        gradients, norm = self.loop.private.contribution_of(batch, targets)
        self.monitor.record_contribution(gradients, norm)
        return torch.cat([gradient.flatten() for gradient in gradients])
