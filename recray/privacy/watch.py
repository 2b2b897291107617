"""What an audit checks of a private training while it runs, by its own means: what one user adds, how often each is drawn, and the noise.

A bound of ε sees only mistakes that let an attacker guess well in one training. These see the others: each compares what happens with what
was accounted for, and fails only for what chance does less than once in a hundred million times.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIGMAS = 6.0  # that a figure may be away from what is expected
ALLOWED = 0.01  # that the noise's variance may lack, and a contribution exceed
MORE = 1.5  # times the variance: what rounding costs is far less, noise on two ranks more
COMPARED = 4096  # numbers of one step's noise that are compared with the next one's
KEPT = 256  # of the first step's, by which trainings are compared
SAME = 0.9  # correlation of noise that is the same but for its size


@dataclass(frozen=True)
class Finding:
    """One question that was put to a training, whether it passed, and what was seen."""

    name: str
    passed: bool
    text: str


class Watch:
    """Looks at every step of one training.

    Parameters
    ----------
    users : rows that may be drawn
    rate : q that is accounted for
    deviation : σ C, the standard deviation of the noise on the sum over all ranks
    clipping_norm : C
    """

    def __init__(self, users: int, rate: float, deviation: float, clipping_norm: float) -> None:
        self.rate, self.deviation, self.clipping_norm = rate, deviation, clipping_norm
        self.drawn = np.zeros(users, np.int64)
        self.steps = 0
        self.largest, self.largest_unclipped = 0.0, 0.0
        self.squares = 0.0
        self.numbers = 0
        self.worst_correlation = 0.0
        self.released: list[Tensor] = []
        """The noised sum of the last step."""
        self._clean: list[Tensor] = []
        self._before: Tensor | None = None
        self.first_noise: list[float] = []

    def draws(self, users: np.ndarray) -> None:
        """Rows that a step takes."""
        self.drawn[users] += 1
        self.steps += 1

    def contributes(self, gradients: list[Tensor], unclipped: float) -> None:
        """What one user alone added to the sum, and the norm that its gradient is said to have had before it was clipped."""
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        self.largest = max(self.largest, norm)
        self.largest_unclipped = max(self.largest_unclipped, unclipped)

    def sums(self, gradients: list[Tensor]) -> None:
        """The sum of a step over all ranks, before there is noise in it."""
        self._clean = gradients

    def releases(self, gradients: list[Tensor], users: float) -> None:
        """The gradient of a step as it is released: the noised sum over `users`."""
        self.released = [gradient.double() * users for gradient in gradients]
        noise = torch.cat([(noised - clean).flatten() for noised, clean in zip(self.released, self._clean, strict=True)])
        self.squares += float(noise.square().sum())
        self.numbers += noise.numel()
        few = noise[:COMPARED].cpu()
        if not self.first_noise:
            self.first_noise = few[:KEPT].tolist()
        if self._before is not None and few.std() > 0 and self._before.std() > 0:
            correlation = abs(float(torch.corrcoef(torch.stack([few, self._before]))[0, 1]))
            self.worst_correlation = max(self.worst_correlation, correlation)
        self._before = few

    def findings(self) -> list[Finding]:
        """What was found, once the training ended."""
        return [self._contribution(), self._rate(), *self._noise()]

    def _contribution(self) -> Finding:
        text = f"one user added {self.largest:.3f} to a sum at most, of a gradient of up to {self.largest_unclipped:.3g}; C is {self.clipping_norm:g}"
        tested = self.largest_unclipped > self.clipping_norm
        return Finding("contribution", self.largest <= (1 + ALLOWED) * self.clipping_norm, text + ("" if tested else ": nothing was there to clip"))

    def _rate(self) -> Finding:
        expected, users = self.steps * self.rate, len(self.drawn)
        spread = math.sqrt(users * self.steps * self.rate * (1 - self.rate)) or 1.0
        total = abs(self.drawn.sum() - users * expected) / spread
        squared = ((self.drawn - expected) ** 2).sum() / max(self.steps * self.rate * (1 - self.rate), 1e-12)
        even = abs(squared - users) / math.sqrt(2 * max(users, 1) * (1 + 1 / max(expected, 1e-12)))
        text = f"a user was drawn {self.drawn.mean():.2f} times on average and {self.drawn.max(initial=0)} at most, of {expected:.2f} to be expected"
        return Finding("rate", bool(total <= SIGMAS and (even <= SIGMAS or self.rate == 1.0)), text)

    def _noise(self) -> list[Finding]:
        if not self.deviation:
            return []
        share = self.squares / max(self.numbers, 1) / self.deviation**2
        near = 1 - ALLOWED - SIGMAS * math.sqrt(2 / max(self.numbers, 1)) <= share <= MORE
        apart = self.worst_correlation <= (SIGMAS + 1) / math.sqrt(min(COMPARED, self.numbers / max(self.steps, 1)))
        return [
            Finding("noise", near, f"its variance is {share:.4f} times what is accounted for, over {self.numbers} numbers"),
            Finding("fresh noise", apart, f"noise of one step correlates with that of the one before by {self.worst_correlation:.3f} at most"),
        ]


def repeats(noise: dict[str, list[float]]) -> Finding:
    """Whether two trainings began with the same noise, given the first numbers of each one's, by its name."""
    with_noise = {name: np.array(first) for name, first in noise.items() if np.std(first or [0.0]) > 0}
    for (one, mine), (other, theirs) in itertools.combinations(with_noise.items(), 2):
        length = min(len(mine), len(theirs))
        if abs(np.corrcoef(mine[:length], theirs[:length])[0, 1]) > SAME:
            return Finding("noise of its own", False, f"{one} and {other} began with the same noise")
    return Finding("noise of its own", True, f"{len(with_noise)} trainings began with noise of their own")


def as_dicts(findings: list[Finding]) -> list[dict[str, Any]]:
    """For JSON."""
    return [vars(finding) for finding in findings]
