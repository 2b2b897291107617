"""Checks of a running private training: the contribution of one user, the sampling of users, and the noise.

A lower bound of ε only finds mistakes that help an attacker in one training. These checks find others. Each
compares a measurement with what is accounted for, and fails by chance less than once in a hundred million
times.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recray.privacy.results import FindingRecord

SIGMAS = 6.0  # largest deviation of a figure from its expected value, in standard deviations
ALLOWED = 0.01  # largest deficit of the noise's variance, and excess of a contribution
MOST = 1.5  # largest ratio of variances: rounding adds far less, noise on two ranks adds more
COMPARED = 4096  # numbers of noise compared between consecutive steps
KEPT = 256  # numbers of the first step's noise, compared between trainings
SAME = 0.9  # correlation above which noise is the same up to its scale


@dataclass(frozen=True)
class Finding:
    """Result of one check: its name, whether it passed, and what was measured."""

    name: str
    passed: bool
    text: str

    def to_record(self) -> FindingRecord:
        """As JSON values."""
        return {"name": self.name, "passed": self.passed, "text": self.text}


class StepMonitor:
    """Monitors every step of one training.

    Parameters
    ----------
    users : rows that may be drawn
    rate : the accounted sampling rate q
    deviation : σ C, the standard deviation of the noise on the sum over all ranks
    clipping_norm : C
    """

    def __init__(self, users: int, rate: float, deviation: float, clipping_norm: float) -> None:
        self.rate, self.deviation, self.clipping_norm = rate, deviation, clipping_norm
        self.draw_counts = np.zeros(users, np.int64)
        self.steps = 0
        self.largest, self.largest_unclipped = 0.0, 0.0
        self.squares = 0.0
        self.numbers = 0
        self.worst_correlation = 0.0
        self.released: list[Tensor] = []
        """The noised sum of the last step, by parameter."""
        self._clean: list[Tensor] = []
        self._previous_sample: Tensor | None = None
        self.first_noise: list[float] = []

    def record_draw(self, users: np.ndarray) -> None:
        """Record the rows of a step."""
        self.draw_counts[users] += 1
        self.steps += 1

    def record_contribution(self, gradients: list[Tensor], unclipped: float) -> None:
        """Record the contribution of one user alone, and the norm that its gradient had before clipping."""
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        self.largest = max(self.largest, norm)
        self.largest_unclipped = max(self.largest_unclipped, unclipped)

    def record_sum(self, gradients: list[Tensor]) -> None:
        """Record the sum of a step over all ranks, before the noise."""
        self._clean = gradients

    def record_release(self, gradients: list[Tensor], users: float) -> None:
        """Record the released gradient of a step: the noised sum over `users`."""
        self.released = [gradient.double() * users for gradient in gradients]
        noise = torch.cat(
            [(noised - clean).flatten() for noised, clean in zip(self.released, self._clean, strict=True)]
        )
        self.squares += float(noise.square().sum())
        self.numbers += noise.numel()
        sample = noise[:COMPARED].cpu()
        if not self.first_noise:
            self.first_noise = sample[:KEPT].tolist()
        if self._previous_sample is not None and sample.std() > 0 and self._previous_sample.std() > 0:
            correlation = abs(float(torch.corrcoef(torch.stack([sample, self._previous_sample]))[0, 1]))
            self.worst_correlation = max(self.worst_correlation, correlation)
        self._previous_sample = sample

    def findings(self) -> list[Finding]:
        """All findings, after the training has ended."""
        return [self._contribution(), self._rate(), *self._noise()]

    def _contribution(self) -> Finding:
        text = (
            f"one user added {self.largest:.3f} to a sum at most, from a gradient norm of up to "
            f"{self.largest_unclipped:.3g}; C is {self.clipping_norm:g}"
        )
        was_clipped = self.largest_unclipped > self.clipping_norm
        return Finding(
            "contribution",
            self.largest <= (1 + ALLOWED) * self.clipping_norm,
            text + ("" if was_clipped else ": no gradient needed clipping"),
        )

    def _rate(self) -> Finding:
        expected, users = self.steps * self.rate, len(self.draw_counts)
        spread = math.sqrt(users * self.steps * self.rate * (1 - self.rate)) or 1.0
        total = abs(self.draw_counts.sum() - users * expected) / spread
        squared = ((self.draw_counts - expected) ** 2).sum() / max(
            self.steps * self.rate * (1 - self.rate), 1e-12
        )
        evenness = abs(squared - users) / math.sqrt(2 * max(users, 1) * (1 + 1 / max(expected, 1e-12)))
        text = (
            f"a user was drawn {self.draw_counts.mean():.2f} times on average and "
            f"{self.draw_counts.max(initial=0)} at most; {expected:.2f} times were expected"
        )
        return Finding("rate", bool(total <= SIGMAS and (evenness <= SIGMAS or self.rate == 1.0)), text)

    def _noise(self) -> list[Finding]:
        if not self.deviation:
            return []
        share = self.squares / max(self.numbers, 1) / self.deviation**2
        is_near = 1 - ALLOWED - SIGMAS * math.sqrt(2 / max(self.numbers, 1)) <= share <= MOST
        is_fresh = self.worst_correlation <= (SIGMAS + 1) / math.sqrt(
            min(COMPARED, self.numbers / max(self.steps, 1))
        )
        return [
            Finding(
                "noise",
                is_near,
                f"its variance is {share:.4f} times the accounted one, over {self.numbers} numbers",
            ),
            Finding(
                "fresh noise",
                is_fresh,
                f"noise of consecutive steps has a correlation of at most {self.worst_correlation:.3f}",
            ),
        ]


def check_repeated_noise(noise: dict[str, list[float]]) -> Finding:
    """Check that no two trainings began with the same noise, given the first numbers of each by name."""
    with_noise = {name: np.array(first) for name, first in noise.items() if np.std(first or [0.0]) > 0}
    for (name_a, first_noise_a), (name_b, first_noise_b) in itertools.combinations(with_noise.items(), 2):
        length = min(len(first_noise_a), len(first_noise_b))
        if abs(np.corrcoef(first_noise_a[:length], first_noise_b[:length])[0, 1]) > SAME:
            return Finding("noise of its own", False, f"{name_a} and {name_b} began with the same noise")
    return Finding("noise of its own", True, f"{len(with_noise)} trainings began with noise of their own")
