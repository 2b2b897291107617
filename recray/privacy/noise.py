"""Gaussian noise on a grid, from a cryptographic generator: what is released says nothing by its last bits.

A sum of floating point numbers and noise of floating point numbers leaves a trace of each in the last bits of what they make: numbers that
nobody else touches lie on the generator's own lattice, and a neighbour is recognised whatever ε is promised (Mironov, CCS 2012). So the sum
is rounded to whole multiples of a grid, the noise too, and these whole numbers are added, which is exact. What is released is a
function of the whole numbers alone.

Rounding may move two neighbouring sums apart, by γ in each number; for that, and for the arithmetic of 32 bits by which the sum was made,
the noise is a little larger than what is accounted for. What the tails lack is part of δ (`recray.privacy.accounting.TAILS`).
Draws are numbers of 64 bits, so that the probability of a multiple is off by
some 2⁻³⁵ of itself; nothing pays for that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

GRID = 2.0**-18
"""γ as a share of the noise's standard deviation, at most."""
ARITHMETIC = 2.0**-10
"""Of a contribution, by which sums in 32 bits may be wrong."""
CHUNK = 1 << 20  # draws at once


class GridNoise:
    """Noise for sums to which each neighbour adds a vector of a length of at most `contribution`.

    Parameters
    ----------
    multiplier : σ, the noise multiplier that is accounted for; 0: no noise, which only an audit's control asks for
    contribution : C
    numbers : length of the vector, over all its tensors
    """

    def __init__(self, multiplier: float, contribution: float, numbers: int) -> None:
        deviation = multiplier * contribution
        self.grid = 2.0 ** math.floor(math.log2(deviation or contribution * GRID)) * GRID
        moved = contribution * (1.0 + ARITHMETIC) + self.grid * math.sqrt(numbers)
        self.deviation = multiplier * moved
        """Standard deviation of the noise, in units of the sum."""

    def rounded(self, total: Tensor) -> Tensor:
        """A sum in whole multiples of the grid, int64."""
        return torch.round(total.double() / self.grid).long()

    def drawn_like(self, whole: Tensor) -> Tensor:
        """Noise in whole multiples of the grid, int64, on the same device."""
        if not self.deviation:
            return torch.zeros_like(whole)
        drawn = gaussian(whole.numel())
        drawn *= self.deviation / self.grid
        return torch.from_numpy(np.rint(drawn).astype(np.int64)).view_as(whole).to(whole.device)

    def released(self, whole: Tensor) -> Tensor:
        """Whole multiples of the grid as numbers of the sum, float32."""
        return (whole.double() * self.grid).float()


def gaussian(count: int) -> np.ndarray:
    """Independent standard normal numbers, float64 [count], by Box and Muller's method from fresh randomness of the system."""
    found = np.empty(count + count % 2)
    for first in range(0, len(found), CHUNK):
        part = found[first : first + CHUNK]
        half = len(part) // 2
        bits = random_bits(len(part))
        radius = bits[:half].astype(np.float64)
        radius += 0.5
        radius *= 2.0**-64
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle = bits[half:].astype(np.float64)
        angle *= 2.0 * math.pi * 2.0**-64
        np.cos(angle, out=part[:half])
        np.sin(angle, out=part[half:])
        part[:half] *= radius
        part[half:] *= radius
    return found[:count]


def uniform(count: int) -> np.ndarray:
    """Independent numbers of [0, 1), float64 [count], from fresh randomness of the system."""
    return (random_bits(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_bits(count: int) -> np.ndarray:
    """uint64 [count] of ChaCha20 (RFC 8439), under a key that the operating system draws for this call alone."""
    stream = Cipher(ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    return np.frombuffer(b"".join(stream.update(bytes(size)) for size in _pieces(8 * count)), np.uint64)


def _pieces(size: int) -> Iterator[int]:
    for first in range(0, size, 8 * CHUNK):
        yield min(8 * CHUNK, size - first)
