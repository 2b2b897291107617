"""Squared norms of one user's gradient, computed without the gradient.

The table of item vectors is used twice: histories look its rows up, and hidden states are scored against
them. One user's gradient is the sum of both, G = Σ_t e(x_t) d_tᵀ + Σ_s p_s h_sᵀ, so its norm has a cross term
(arXiv 2305.17633, 2405.18194). Shapes: B users, T events, Q queries of a user (padded with zero rows), V
items and padding, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lookup_norms(index_BT: Tensor, gradient_BTD: Tensor) -> Tensor:
    """|Σ_t e(i_t) d_tᵀ|² [B] of a lookup table: Σ_tt' [i_t = i_t'] d_t·d_t'."""
    same = index_BT[:, :, None] == index_BT[:, None, :]
    return (torch.bmm(gradient_BTD, gradient_BTD.mT) * same).sum((1, 2))


def layer_norms(layer: nn.Linear, activations: list[Tensor], gradient: Tensor) -> dict[Tensor, Tensor]:
    """Gradient norms [B] of a linear layer's weight and bias.

    Uses T x T products (Goodfellow, arXiv 1510.01799), or each user's gradient where that is smaller (Bu et
    al., arXiv 2205.10683).

    activations : [B, T, inputs]
    gradient : [B, T, outputs], by the layer's output
    """
    x = activations[0]
    T = x.shape[1]
    if x.shape[2] * gradient.shape[2] >= 2 * T * T:
        squared = (torch.bmm(x, x.mT) * torch.bmm(gradient, gradient.mT)).sum((1, 2)).clamp(min=0)
    else:
        squared = torch.bmm(gradient.mT, x).square().sum((1, 2))
    norms: dict[Tensor, Tensor] = {layer.weight: squared.sqrt()}
    if layer.bias is not None:
        norms[layer.bias] = gradient.sum(1).norm(dim=1)
    return norms


class ScoredTable:
    """Gradient norms of the item table, for a block of users whose hidden states are scored against it.

    Parameters
    ----------
    hidden_BQD : hidden states h_s
    gradient_BQV : gradients p_s of the loss by the scores h_s · e_v
    scores_BQV, length_V : for scores by normalised rows e_v = w_v / |w_v|: the scores, and |w_v|; None: e_v =
        w_v
    """

    def __init__(
        self,
        item_BT: Tensor,
        hidden_BQD: Tensor,
        gradient_BQV: Tensor,
        scores_BQV: Tensor | None = None,
        length_V: Tensor | None = None,
    ) -> None:
        self.item_BT, self.hidden_BQD = item_BT, hidden_BQD
        by_weight = gradient_BQV if length_V is None else gradient_BQV / length_V
        squared = (torch.bmm(by_weight, by_weight.mT) * torch.bmm(hidden_BQD, hidden_BQD.mT)).sum((1, 2))
        self.radial_BT: Tensor | None = None
        if scores_BQV is not None:  # a change of a row's length leaves its direction unchanged
            radial_BV = (by_weight * scores_BQV).sum(1)
            squared = squared - radial_BV.square().sum(1)
            self.radial_BT = radial_BV.gather(1, item_BT)
        self.squared = squared
        self.history_BQT = by_weight.gather(2, item_BT[:, None, :].expand(-1, by_weight.shape[1], -1))

    def table_norms(self, gradient_BTD: Tensor, along_BT: Tensor | None = None) -> Tensor:
        """|G|² [B] of the table.

        gradient_BTD : gradients d_t by the looked-up rows; zero for padding
        along_BT : d_t · e(x_t), for scores by normalised rows
        """
        cross = (self.history_BQT * torch.bmm(self.hidden_BQD, gradient_BTD.mT)).sum((1, 2))
        if self.radial_BT is not None:
            assert along_BT is not None
            cross = cross - (along_BT * self.radial_BT).sum(1)
        return (self.squared + lookup_norms(self.item_BT, gradient_BTD) + 2 * cross).clamp(min=0)
