"""Users made up for an audit who are rows of the data set: collated, drawn, clipped and noised as all others are.

Each is there with probability 1/2. The attacker knows what all real users add to each step and what each of those made up would add, so
what is released beside it, along that, tells of who was there.
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
from recray.privacy.watch import Watch
from recray.training.private import PrivateLoop, PrivateRows

EVENTS = 20  # of each, one an hour


def made_up(dataset: Dataset, count: int, random: np.random.Generator) -> Shard:
    """So many users who meet one item again and again, or two by turns: what reading and scoring do to its vector adds up."""
    items = random.integers(1, dataset.n_items + 1, (count, 2))
    items[::2, 1] = items[::2, 0]
    end = (dataset.cut_s("validation") or dataset.as_of_s) if dataset.clock == "timestamp" else EVENTS
    step = 3600 if dataset.clock == "timestamp" else 1
    return Shard(
        user_ids=pa.array([f"made up {number}" for number in range(count)]),
        offsets=np.arange(count + 1, dtype=np.int64) * EVENTS,
        item_index=items[:, np.arange(EVENTS) % 2].ravel(),
        event_index=np.zeros(count * EVENTS, np.int64),
        timestamp_s=np.tile(end - step * np.arange(EVENTS, 0, -1), count),
        value=np.ones(count * EVENTS, np.float32),
        basket=np.tile(np.arange(EVENTS), count),
        split=np.full((count, 4), EVENTS, np.int32),
        held_out=np.zeros(count, bool),
    )


class _InTwo(PrivateRows):
    """Rows whose physical batches are those of real users first, then of those made up; what the real ones add is noted in between."""

    def __init__(self, rows: PrivateRows, first: int, parameters: list[torch.nn.Parameter]) -> None:
        self.__dict__.update(rows.__dict__)
        self.first, self.parameters = first, parameters
        self.known: list[Tensor] = []

    def physical(self, users: np.ndarray) -> Iterator[tuple[Batch, Targets]]:
        yield from super().physical(users[users < self.first])
        self.known = [parameter.grad.double() for parameter in self.parameters if parameter.grad is not None]
        yield from super().physical(users[users >= self.first])


class Rows:
    """The last `count` rows of a training are made up, half of them not there.

    planted_M, seen_M : which are there, and how much what is released looks like it
    """

    def __init__(self, loop: PrivateLoop, count: int, watch: Watch, random: np.random.Generator) -> None:
        self.loop, self.watch, self.random = loop, watch, random
        self.first = len(loop.rows) - count
        self.planted_M, self.seen_M = random.random(count) < 0.5, np.zeros(count)
        self.rows = _InTwo(loop.rows, self.first, loop.private.optimizer.params)
        loop.rows = self.rows
        sampler = loop.sampler = copy.copy(loop.sampler)
        sampler.mine = sampler.mine[(sampler.mine < self.first) | np.append(np.zeros(self.first, bool), self.planted_M)[sampler.mine]]

    def step(self, take: object) -> None:
        """One step of the loop (`take`), looked at."""
        assert callable(take)
        added_MP = torch.stack([self._alone(self.first + number) for number in range(len(self.planted_M))])
        if self.first:
            self._alone(int(self.random.integers(self.first)))
        take()
        noised = torch.cat([gradient.flatten() for gradient in self.watch.released])
        known = torch.cat([gradient.flatten() for gradient in self.rows.known])
        self.seen_M += (added_MP.double() @ (noised - known)).cpu().numpy()

    def _alone(self, row: int) -> Tensor:
        batch, targets = self.rows.batches.collate(self.rows.windows[np.array([row])])
        gradients, norm = self.loop.private.alone(batch, targets)
        self.watch.contributes(gradients, norm)
        return torch.cat([gradient.flatten() for gradient in gradients])
