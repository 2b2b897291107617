"""Who is asked what: the users of a part of the split, their histories, the moment, and the targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recray.dataset.reader import Dataset, History, Shard

SETTINGS = ("repeats", "new_only")


@dataclass(frozen=True)
class Question:
    """One user of the evaluation. `context` holds the codes [C] of what is known when the question is asked."""

    shard: int
    row: int
    history: History
    target: np.ndarray
    now: int
    context: np.ndarray


class Ranker(Protocol):
    """Whatever recommends: the predictor or a baseline."""

    def __call__(self, questions: list[Question], k: int, *, new_only: bool) -> np.ndarray:
        """Item indices [len(questions), k]."""


class Questions:
    """The users of `part` (validation or test) of a dataset, in the order of their indices.

    max_users : a fixed random sample of so many; None for all
    """

    def __init__(self, dataset: Dataset, part: str, *, max_users: int | None = None, seed: int = 0) -> None:
        self.dataset, self.part = dataset, part
        first, last = (0, 1) if part == "validation" else (2, 3)
        places = [
            np.stack([np.full(len(rows), number), rows, s.split[rows, first], s.split[rows, last]], 1)
            for number, s in enumerate(dataset.shards())
            if len(rows := np.flatnonzero((s.split[:, last] > s.split[:, first]) & (s.split[:, first] > 0) & s.asked))
        ]
        self.places = np.concatenate(places) if places else np.zeros((0, 4), np.int64)
        if max_users is not None and len(self.places) > max_users:
            chosen = np.random.default_rng(seed).choice(len(self.places), max_users, replace=False)
            self.places = self.places[np.sort(chosen)]

    def __len__(self) -> int:
        return len(self.places)

    def _at_cut(self) -> bool:
        return self.dataset.cut_s(self.part) is not None and self.dataset.asked_at == "cut"

    def _now(self, target_s: int) -> int:
        """The moment of a question: the cut, or when its target came, so that no later event is seen."""
        cut = self.dataset.cut_s(self.part)
        return cut if cut is not None and self._at_cut() else target_s

    def batches(self, size: int, rank: int = 0, world: int = 1) -> Iterator[list[Question]]:
        mine = self.places[rank::world]
        for start in range(0, len(mine), size):
            yield [self._question(*map(int, place)) for place in mine[start : start + size]]

    def _question(self, shard_number: int, row: int, first: int, last: int) -> Question:
        shard = self.dataset.shard(shard_number)
        now = self._now(int(shard.timestamp_s[shard.offsets[row] + first]))
        context = self._context(shard, int(shard.offsets[row]) + first)
        return Question(shard_number, row, shard.history_before(row, first), shard.targets(row, first, last), now, context)

    def _context(self, shard: Shard, event: int) -> np.ndarray:
        """That of the target's moment; unknown where all users are asked at the cut."""
        names = self.dataset.context
        if self._at_cut():
            return np.zeros(len(names), np.int64)
        found: np.ndarray = shard.context_of(names, np.array([event]))[0]
        return found


def wanted(question: Question, *, new_only: bool) -> np.ndarray:
    """The targets that count in a setting."""
    return np.setdiff1d(question.target, question.history.item_index) if new_only else question.target
