"""Lower bounds of the ε of one training, from canaries and from membership inference.

Canaries are synthetic users, each present with probability 1/2. The attacker sees every noised gradient,
knows what all others add to it, and guesses for some canaries whether they are present. Too many correct
guesses refute an ε (Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv 2305.08846, theorem 5.2). Shapes: M
canaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from recray.errors import SettingsError

CONFIDENCE = 0.95
GUESSED = (1.0, 0.5, 0.25, 0.1, 0.05)
"""Shares of the canaries that are guessed, the most certain first; the confidence is split among them."""
SHARED = 1.0 - (1.0 - CONFIDENCE) / len(GUESSED)
LARGEST = 20.0  # upper end of the search for ε
FAR = 1.25  # times a claim: the ε that canaries should be able to demonstrate


class Canaries:
    """Synthetic users whose gradient is C at one weight and zero elsewhere (Dirac canaries).

    Parameters
    ----------
    parameters : the trained weights
    count : M, planted or not
    rate : probability of a planted canary to be in a step, as of any user
    entropy : seed of which are planted, where, and in which steps; None: system randomness
    """

    def __init__(
        self,
        parameters: list[Tensor],
        count: int,
        rate: float,
        clipping_norm: float,
        entropy: int | None = None,
    ) -> None:
        sizes = np.array([parameter.numel() for parameter in parameters])
        if not 2 <= count <= sizes.sum():
            raise SettingsError(
                f"privacy.audit_canaries: {count}, but this network needs 2 to {sizes.sum()} canaries",
                "set a number in this range",
            )
        self._random = np.random.default_rng(entropy)
        flat = np.sort(self._random.choice(sizes.sum(), count, replace=False))
        ends = sizes.cumsum()
        self._owner_M = np.searchsorted(ends, flat, side="right")
        self._position_M = flat - (ends - sizes)[self._owner_M]
        self.is_present_M = self._random.random(count) < 0.5
        self.membership_score_M, self._clean_M = np.zeros(count), np.zeros(count)
        self.rate, self.clipping_norm = rate, clipping_norm

    def plant(self, gradients: list[Tensor]) -> None:
        """Add the canaries of this step to the sum of the clipped gradients."""
        self._clean_M = self._read(gradients)
        drawn = self.is_present_M & (self._random.random(len(self.is_present_M)) < self.rate)
        for number, where in self._by_owner(drawn):
            gradients[number].view(-1)[torch.from_numpy(self._position_M[where])] += self.clipping_norm

    def observe(self, gradients: list[Tensor], users: float) -> None:
        """Record the released gradient of a step, the noised sum over `users`, minus the sum of others."""
        self.membership_score_M += users * self._read(gradients) - self._clean_M

    def _read(self, gradients: list[Tensor]) -> np.ndarray:
        values = np.zeros(len(self.is_present_M))
        for number, where in self._by_owner(np.ones(len(self.is_present_M), bool)):
            values[where] = (
                gradients[number]
                .reshape(-1)[torch.from_numpy(self._position_M[where])]
                .double()
                .cpu()
                .numpy()
            )
        return values

    def _by_owner(self, selected_M: np.ndarray) -> list[tuple[int, np.ndarray]]:
        return [
            (int(number), np.flatnonzero(selected_M & (self._owner_M == number)))
            for number in np.unique(self._owner_M[selected_M])
        ]


@dataclass(frozen=True)
class Bound:
    """A lower bound of ε at CONFIDENCE.

    epsilon : every training with less would allow fewer correct guesses
    ceiling : the bound if all guesses were correct
    """

    epsilon: float
    ceiling: float
    canaries: int
    guesses: int
    correct: int

    def verdict(self, claim: float) -> str:
        """`refuted`, `not refuted`, or `cannot tell` if even correct guesses alone would not refute the
        claim.
        """
        return (
            "refuted" if self.epsilon > claim else "cannot tell" if self.ceiling <= claim else "not refuted"
        )


def bound(is_present_M: np.ndarray, membership_score_M: np.ndarray, delta: float) -> Bound:
    """The best lower bound of ε over the numbers of guesses.

    Half of the guesses are present (the largest `membership_score_M`), half are absent (the smallest).
    """
    count = len(is_present_M)
    order = np.argsort(membership_score_M, kind="stable")
    highest, bounds = ceiling(count, delta), []
    for half in _halves(count):
        correct = int(is_present_M[order[count - half :]].sum() + (~is_present_M[order[:half]]).sum())
        bounds.append(
            Bound(lower_bound(count, 2 * half, correct, delta, SHARED), highest, count, 2 * half, correct)
        )
    return max(bounds, key=lambda candidate: candidate.epsilon)


def ceiling(count: int, delta: float) -> float:
    """The bound if all guesses were correct, with `count` canaries."""
    return max(lower_bound(count, 2 * half, 2 * half, delta, SHARED) for half in _halves(count))


def required_canaries(claim: float, delta: float, at_most: int) -> int:
    """Number of canaries (1,000, doubled as needed) whose correct guesses would clearly refute a claim.

    `at_most` where that needs more.
    """
    count = 1000
    while count < at_most and ceiling(count, delta) < FAR * claim:
        count *= 2
    return min(count, at_most)


def _halves(count: int) -> list[int]:
    return [max(int(share * count) // 2, 1) for share in GUESSED]


def lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest ε (to 0.001) at which `correct` guesses have a probability below 1 - confidence; else 0."""
    low, high = 0.0, LARGEST
    if chance_of(canaries, guesses, correct, low, delta) >= 1.0 - confidence:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        if chance_of(canaries, guesses, correct, middle, delta) < 1.0 - confidence:
            low = middle
        else:
            high = middle
    return low


def chance_of(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound of the probability of `correct` or more correct guesses under (ε, δ)-privacy.

    P[W ≥ v] + 2 M δ max_i P[v > W ≥ v - i] / i, W binomial of the guesses with success e^ε / (1 + e^ε).
    """
    success = 1.0 / (1.0 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, success))
    i = np.arange(1, correct + 1)
    tail_weights = np.cumsum(binom.pmf(correct - i, guesses, success))
    return min(1.0, tail + 2.0 * canaries * delta * float((tail_weights / i).max(initial=0.0)))


def true_positives(members: np.ndarray, non_members: np.ndarray, false_positives: float) -> float:
    """Share of the members whose loss is below a threshold.

    The threshold is below the losses of all but a share `false_positives` (rounded down) of the non-members.
    """
    threshold = np.sort(non_members)[int(false_positives * len(non_members))]
    return float((members < threshold).mean())
