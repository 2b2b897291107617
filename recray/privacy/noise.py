"""Gaussian noise on a grid, from a cryptographic generator: the lowest bits of a release reveal nothing.

The sum of a floating-point number and floating-point noise shows traces of both in its lowest bits. An
attacker can recognise a neighbouring data set from them, whatever the ε (Mironov, CCS 2012). Therefore sum
and noise are both rounded to multiples of a grid and added as integers, which is exact. The release is a
function of these integers alone.

Rounding may move two neighbouring sums apart, by γ in each number, and sums in 32 bits have errors. The noise
is slightly larger than accounted for, to cover both. δ covers the missing tails
(`recray.privacy.accounting.TAILS`). Draws have 64 bits, so the probability of a multiple has a relative error
of about 2⁻³⁵, which nothing covers.
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
"""Upper bound of γ, as a share of the noise's standard deviation."""
ARITHMETIC = 2.0**-10
"""Error bound of sums in 32 bits, as a share of a contribution."""
CHUNK = 1 << 20  # numbers drawn at once


class GridNoise:
    """Noise for sums to which one user adds a vector with a norm of at most `contribution`.

    Parameters
    ----------
    multiplier : σ, the accounted noise multiplier; 0: no noise, only for the control of an audit
    contribution : C
    numbers : length of the vector over all its tensors
    """

    def __init__(self, multiplier: float, contribution: float, numbers: int) -> None:
        deviation = multiplier * contribution
        self.grid = 2.0 ** math.floor(math.log2(deviation or contribution * GRID)) * GRID
        contribution_bound = contribution * (1.0 + ARITHMETIC) + self.grid * math.sqrt(numbers)
        self.deviation = multiplier * contribution_bound
        """Standard deviation of the noise, in units of the sum."""

    def to_grid(self, total: Tensor) -> Tensor:
        """Round a sum to multiples of the grid, int64."""
        return torch.round(total.double() / self.grid).long()

    def draw_like(self, multiples: Tensor) -> Tensor:
        """Draw noise as multiples of the grid, int64, on the same device."""
        if not self.deviation:
            return torch.zeros_like(multiples)
        noise = gaussian(multiples.numel())
        noise *= self.deviation / self.grid
        return torch.from_numpy(np.rint(noise).astype(np.int64)).view_as(multiples).to(multiples.device)

    def from_grid(self, multiples: Tensor) -> Tensor:
        """Convert multiples of the grid to numbers of the sum, float32."""
        return (multiples.double() * self.grid).float()


def gaussian(count: int) -> np.ndarray:
    """Independent standard normal numbers, float64 [count]: the Box-Muller transform of system randomness."""
    normal = np.empty(count + count % 2)
    for first in range(0, len(normal), CHUNK):
        part = normal[first : first + CHUNK]
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
    return normal[:count]


def uniform(count: int) -> np.ndarray:
    """Independent uniform numbers in [0, 1), float64 [count], from system randomness."""
    return (random_bits(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_bits(count: int) -> np.ndarray:
    """uint64 [count] of ChaCha20 (RFC 8439), with a new key from the operating system for each call."""
    stream = Cipher(ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    return np.frombuffer(b"".join(stream.update(bytes(size)) for size in _pieces(8 * count)), np.uint64)


def _pieces(size: int) -> Iterator[int]:
    for first in range(0, size, 8 * CHUNK):
        yield min(8 * CHUNK, size - first)
