"""Noised interaction counts of the items over the training users: the initial scores of a private model.

Each user adds a vector of length 1: 1/√n to each of its n items. Gaussian noise of standard deviation σ on
the sum is therefore the Gaussian mechanism with noise multiplier σ.
"""

from __future__ import annotations

import numpy as np
import torch

from recray.dataset.reader import Dataset
from recray.privacy.noise import GridNoise


def weighted_counts(dataset: Dataset, power: float = 0.5) -> np.ndarray:
    """Sum over the training users of n^-power for each of a user's n items, float64 [n_items + 1].

    0 for padding. Not private.
    """
    counts = np.zeros(dataset.n_items + 1)
    for shard in dataset.shards():
        for start, learned in zip(shard.offsets[:-1], shard.train_lengths, strict=True):
            items = np.unique(shard.item_index[start : start + learned])
            counts[items] += max(len(items), 1) ** -power
    return counts


def log_counts(dataset: Dataset, sigma: float) -> np.ndarray:
    """Log of the noised counts, float32 [n_items + 1], relative to the largest; counts below σ are σ."""
    counts = weighted_counts(dataset)
    noise = GridNoise(sigma, 1.0, len(counts))
    multiples = noise.to_grid(torch.from_numpy(counts))
    noised = noise.from_grid(multiples + noise.draw_like(multiples)).double().numpy()
    noised[0] = 0.0
    log_noised = np.log(np.maximum(noised, sigma))
    return np.asarray(log_noised - log_noised.max(), np.float32)
