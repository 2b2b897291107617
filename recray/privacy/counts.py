"""How often the items were met by the users who are learned from, with noise: what the scores of a private model begin with.

Each user adds a vector of length 1, 1/√n to each of its n items, so Gaussian noise of standard deviation σ on the sum is the Gaussian
mechanism with noise multiplier σ.
"""

from __future__ import annotations

import numpy as np
import torch

from recray.dataset.reader import Dataset
from recray.privacy.noise import GridNoise


def weighted_counts(dataset: Dataset, power: float = 0.5) -> np.ndarray:
    """Σ over the users who are learned from of n^-power for each of its n items, float64 [n_items + 1]; 0 for padding. Not private."""
    found = np.zeros(dataset.n_items + 1)
    for shard in dataset.shards():
        for start, learned in zip(shard.offsets[:-1], shard.learned, strict=True):
            items = np.unique(shard.item_index[start : start + learned])
            found[items] += max(len(items), 1) ** -power
    return found


def log_counts(dataset: Dataset, sigma: float) -> np.ndarray:
    """log of the noised counts, float32 [n_items + 1], 0 for the largest; what does not stand out of the noise counts as σ."""
    counts = weighted_counts(dataset)
    noise = GridNoise(sigma, 1.0, len(counts))
    whole = noise.rounded(torch.from_numpy(counts))
    noised = noise.released(whole + noise.drawn_like(whole)).double().numpy()
    noised[0] = 0.0
    found = np.log(np.maximum(noised, sigma))
    return np.asarray(found - found.max(), np.float32)
