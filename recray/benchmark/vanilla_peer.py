"""The baseline of private training: a standard transformer, made private by Opacus' defaults.

Its output layer has its own matrix, since Opacus does not clip correctly where an item table is used twice.
Shapes: B users, T events, V items and padding, D width.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recray.privacy.accounting import Mechanism

PHYSICAL_USERS = 64


class Vanilla(nn.Module):
    """SASRec (arXiv 1808.09781) with a layer norm before each part and a separate output layer."""

    def __init__(self, items: int, dim: int, blocks: int, heads: int, history: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(history, dim)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, items + 1)
        self.dropout = nn.Dropout(dropout)
        for table in (self.items, self.positions, self.output):
            nn.init.normal_(table.weight, std=0.02)
        self.scale = math.sqrt(dim)

    def forward(self, item_BT: Tensor) -> Tensor:
        """Scores of all items after each event [B, T, V]."""
        position_BT = torch.arange(item_BT.shape[1]).repeat(len(item_BT), 1)
        x = self.dropout(self.items(item_BT) * self.scale + self.positions(position_BT))
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.output(self.norm(x))
        return result


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.wide, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.before(x_BTD)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x = x_BTD + self.dropout(self.out(attended))
        result: Tensor = x + self.dropout(self.narrow(F.relu(self.wide(self.between(x)))))
        return result


class _NextItem(nn.Module):
    """Cross-entropy of the next item, the mean over a user's events [B]; 0 is padding."""

    reduction = "mean"

    def forward(self, scores_BTV: Tensor, next_BT: Tensor) -> Tensor:
        loss_BT = F.cross_entropy(
            scores_BTV.flatten(0, 1), next_BT.flatten(), reduction="none", ignore_index=0
        ).view(next_BT.shape)
        return loss_BT.sum(1) / (next_BT > 0).sum(1).clamp(min=1)


def train(
    model: Vanilla, item_BT: np.ndarray, next_BT: np.ndarray, mechanism: Mechanism, learning_rate: float
) -> None:
    """Train with the mechanism's number of noised AdamW steps, on users (rows) drawn by Opacus' Poisson
    sampler.

    The loader is created by its sampling rate: converted from another loader, it would sample at 1 over the
    number of that loader's batches.
    """
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    data = TensorDataset(torch.from_numpy(item_BT), torch.from_numpy(next_BT))
    loader = DPDataLoader(data, sample_rate=mechanism.rate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    private, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=model.train(),
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=mechanism.sigma,
        max_grad_norm=mechanism.clipping_norm,
        criterion=_NextItem(),
        grad_sample_mode="ghost",
        poisson_sampling=False,
    )
    optimizer.expected_batch_size = mechanism.rate * len(data)
    steps_done = 0
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=PHYSICAL_USERS, optimizer=optimizer
    ) as batches:
        while steps_done < mechanism.steps:
            for item, following in batches:
                optimizer.zero_grad()
                criterion(private(item), following).backward()
                optimizer.step()
                steps_done += not optimizer._is_last_step_skipped
                if steps_done == mechanism.steps:
                    break
