"""How much ε one training shows: lower bounds from canaries that were planted or not, and from members told from others.

Canaries are users made up for the audit, each there with probability 1/2. Who sees every noised gradient, and knows what all
others add to it, guesses of some whether they were there; that too many guesses are right refutes an ε (Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv
2305.08846, theorem 5.2). Shapes: M canaries.
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
"""Shares of the canaries that are guessed, the surest first; the confidence is shared among them."""
SHARED = 1.0 - (1.0 - CONFIDENCE) / len(GUESSED)
LARGEST = 20.0  # ε to which bounds are looked for
FAR = 1.25  # times a claim that canaries should be able to show


class Canaries:
    """Users whose gradient is C at one number of the weights and zero elsewhere (Dirac canaries).

    Parameters
    ----------
    parameters : the trained weights
    count : M, planted or not
    rate : chance of one that is planted to be in a step, as of any user
    entropy : seeds which are planted, where, and in which steps; None: the system's randomness
    """

    def __init__(self, parameters: list[Tensor], count: int, rate: float, clipping_norm: float, entropy: int | None = None) -> None:
        sizes = np.array([parameter.numel() for parameter in parameters])
        if not 2 <= count <= sizes.sum():
            raise SettingsError(f"privacy.audit_canaries: {count}, of 2 to {sizes.sum()} that the network has room for", "name a number in between")
        self._random = np.random.default_rng(entropy)
        flat = np.sort(self._random.choice(sizes.sum(), count, replace=False))
        ends = sizes.cumsum()
        self._owner_M = np.searchsorted(ends, flat, side="right")
        self._place_M = flat - (ends - sizes)[self._owner_M]
        self.planted_M = self._random.random(count) < 0.5
        self.seen_M, self._known_M = np.zeros(count), np.zeros(count)
        self.rate, self.clipping_norm = rate, clipping_norm

    def plant(self, gradients: list[Tensor]) -> None:
        """Add those who are in this step to the sum of the clipped gradients."""
        self._known_M = self._read(gradients)
        drawn = self.planted_M & (self._random.random(len(self.planted_M)) < self.rate)
        for number, where in self._by_owner(drawn):
            gradients[number].view(-1)[torch.from_numpy(self._place_M[where])] += self.clipping_norm

    def observe(self, gradients: list[Tensor], users: float) -> None:
        """Look at the gradient of a step as it is released: the noised sum over `users`, of which the part of all others is known."""
        self.seen_M += users * self._read(gradients) - self._known_M

    def _read(self, gradients: list[Tensor]) -> np.ndarray:
        found = np.zeros(len(self.planted_M))
        for number, where in self._by_owner(np.ones(len(self.planted_M), bool)):
            found[where] = gradients[number].reshape(-1)[torch.from_numpy(self._place_M[where])].double().cpu().numpy()
        return found

    def _by_owner(self, chosen_M: np.ndarray) -> list[tuple[int, np.ndarray]]:
        return [(int(number), np.flatnonzero(chosen_M & (self._owner_M == number))) for number in np.unique(self._owner_M[chosen_M])]


@dataclass(frozen=True)
class Bound:
    """`epsilon`: no training with less would let so many guesses be right, at CONFIDENCE; `ceiling`: what it would be were all right."""

    epsilon: float
    ceiling: float
    canaries: int
    guesses: int
    correct: int

    def verdict(self, claim: float) -> str:
        """`refuted`, `not refuted`, or `cannot tell` when even right guesses alone would not refute the claim."""
        return "refuted" if self.epsilon > claim else "cannot tell" if self.ceiling <= claim else "not refuted"


def bound(planted_M: np.ndarray, seen_M: np.ndarray, delta: float) -> Bound:
    """The best lower bound of ε, over how many are guessed: half of them there (the largest `seen`), half not (the smallest)."""
    count = len(planted_M)
    order = np.argsort(seen_M, kind="stable")
    most, found = ceiling(count, delta), []
    for half in _halves(count):
        correct = int(planted_M[order[count - half :]].sum() + (~planted_M[order[:half]]).sum())
        found.append(Bound(lower_bound(count, 2 * half, correct, delta, SHARED), most, count, 2 * half, correct))
    return max(found, key=lambda one: one.epsilon)


def ceiling(count: int, delta: float) -> float:
    """The bound that right guesses alone would give with so many canaries."""
    return max(lower_bound(count, 2 * half, 2 * half, delta, SHARED) for half in _halves(count))


def enough(claim: float, delta: float, at_most: int) -> int:
    """So many canaries, of 1,000 or twice that and so on, that right guesses would refute a claim by far; `at_most` where that takes more."""
    count = 1000
    while count < at_most and ceiling(count, delta) < FAR * claim:
        count *= 2
    return min(count, at_most)


def _halves(count: int) -> list[int]:
    return [max(int(share * count) // 2, 1) for share in GUESSED]


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest ε (to 0.001) at which so many right guesses have a chance below 1 - confidence; 0 if there is none."""
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
    """Upper bound of the chance that `correct` or more of the guesses are right under (ε, δ)-privacy.

    P[W ≥ v] + 2 M δ max_i P[v > W ≥ v - i] / i, W binomial of the guesses with success e^ε / (1 + e^ε).
    """
    success = 1.0 / (1.0 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, success))
    i = np.arange(1, correct + 1)
    below = np.cumsum(binom.pmf(correct - i, guesses, success))
    return min(1.0, tail + 2.0 * canaries * delta * float((below / i).max(initial=0.0)))


def true_positives(members: np.ndarray, others: np.ndarray, false_positives: float) -> float:
    """Share of the members whose loss is below that of all but a share `false_positives` of the others, rounded down."""
    threshold = np.sort(others)[int(false_positives * len(others))]
    return float((members < threshold).mean())
