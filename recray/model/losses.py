"""Losses over the catalogue, computed in blocks of queries: the full [queries x items] matrix never exists.

Each loss overwrites a block of scores with its gradient. Two matrix products then give the gradients of
hidden states and item table, without an autograd graph. Shapes: N queries, U candidate items and padding (all
items or a sample), D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recray.model.controls import Controls
from recray.model.network import Network
from recray.model.shape import Batch
from recray.plugins import load_plugin

BLOCK_SCORES = {
    "cpu": 1 << 20,
    "cuda": 1 << 27,
}  # scores of a block: enough to keep a GPU busy, and few enough for a CPU's cache


class Targets(NamedTuple):
    """Target items of the queries.

    Query i has the items item[offsets[i]:offsets[i + 1]]. Each occurrence has a share in proportion to its
    weight, and the query counts by their mean weight; None: all weights are 1.
    """

    offsets: Tensor
    item: Tensor
    weight: Tensor | None = None

    def to(self, device: torch.device) -> Targets:
        weight = None if self.weight is None else self.weight.to(device)
        return Targets(self.offsets.to(device), self.item.to(device), weight)

    def shares(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query and share of each target, int64 and float32 [t], and the weight of each query, float32 [N];
        None: 1.
        """
        count_N = self.offsets.diff()
        query_t = torch.repeat_interleave(
            torch.arange(len(count_N), device=count_N.device), count_N, output_size=len(self.item)
        )
        if self.weight is None:
            return query_t, (1.0 / count_N.float())[query_t], None
        sum_N = self.weight.new_zeros(len(count_N)).index_add_(0, query_t, self.weight)
        return query_t, self.weight / sum_N[query_t], sum_N / count_N


class Loss(Protocol):
    """Loss of the scores of a block of queries."""

    def __call__(self, scores_nU: Tensor, item: Tensor, row: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over the block and its gradient [n, U] by the scores; may overwrite the scores.

        scores_nU : -inf for items that do not compete
        item, row, share : int64, int64, float [t] of the block's targets: the item, its query, and its share
            of the query
        """


def softmax(scores_nU: Tensor, item: Tensor, row: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the competing items: -Σ share · log softmax(scores)[item].

    The gradient is softmax(scores) - shares.
    """
    target_scores, best = scores_nU[row, item], scores_nU.amax(1)
    gradient = torch.softmax(scores_nU, 1, out=scores_nU)
    log_mass = best - gradient.amax(1).log()
    gradient.index_put_((row, item), -share, accumulate=True)
    return (share * (log_mass[row] - target_scores)).sum(), gradient


def gbce(beta: float) -> Loss:
    """gBCE (Petrov and Macdonald, arXiv 2308.07192): -β log σ(target) - Σ log(1 - σ(other candidate)).

    beta : see `gbce_beta`; 1 is binary cross-entropy
    """

    def judge(scores_nU: Tensor, item: Tensor, row: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        target_scores = scores_nU[row, item]
        negative = F.softplus(scores_nU)
        negative[row, item] = 0.0
        rest = negative.sum()
        gradient = scores_nU.sigmoid_()
        gradient[row, item] = 0.0
        gradient.index_put_((row, item), -beta * share * torch.sigmoid(-target_scores), accumulate=True)
        return rest + (beta * share * F.softplus(-target_scores)).sum(), gradient

    return judge


def gbce_beta(negatives: int, items: int, calibration: float) -> float:
    """β = α (t (1 - 1/α) + 1/α) with α = negatives / (items - 1).

    calibration : t; 0 is binary cross-entropy, 1 restores calibration
    """
    alpha = min(negatives / max(items - 1, 1), 1.0)
    return alpha * (calibration * (1.0 - 1.0 / alpha) + 1.0 / alpha)


class Candidates(NamedTuple):
    """Candidate items of a batch. Items of the histories are included for their vectors, but do not compete.

    item_U : int64, item indices in ascending order, padding first
    correction_U : float32, added to the scores of items that are no target of the query: minus the log
        probability that a batch has the item; -inf for items that do not compete
    """

    item_U: Tensor
    correction_U: Tensor

    def reindex(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """The batch and its targets with items as indices of the candidates."""
        item_BT = torch.searchsorted(self.item_U, batch.item_BT)
        item = torch.searchsorted(self.item_U, targets.item)
        return batch._replace(item_BT=item_BT), targets._replace(item=item)


def draw_mixed(batch: Batch, targets: Targets, share_V: Tensor, negatives: int) -> Candidates:
    """The batch's targets and `negatives` uniform draws (mixed negative sampling, Yang et al., WWW 2020).

    Item i is drawn with probability 1 - (1 - share_i)^targets (1 - 1/items)^negatives. Divided by it, the sum
    over the candidates is an unbiased estimate of the sum over all items.

    share_V : float32 [V], share of each item in the training events; padding 0
    """
    uniform = torch.randint(1, len(share_V), (negatives,), device=share_V.device)
    index, competes = _index(batch, targets, torch.cat([targets.item, uniform]))
    items = len(share_V) - 1
    log_uniform_miss = negatives * math.log1p(-1.0 / items) if items > 1 else -math.inf
    log_miss = len(targets.item) * torch.log1p(-share_V[index].double().clamp(max=0.5)) + log_uniform_miss
    return Candidates(index, torch.where(competes, -torch.log(-torch.expm1(log_miss)), -math.inf).float())


def hash_to_unit_interval(batch: Batch, targets: Targets, share_V: Tensor, negatives: int) -> Candidates:
    """`negatives` uniform draws without correction."""
    index, competes = _index(
        batch, targets, torch.randint(1, len(share_V), (negatives,), device=share_V.device)
    )
    return Candidates(index, torch.where(competes, 0.0, -math.inf))


def _index(batch: Batch, targets: Targets, competing: Tensor) -> tuple[Tensor, Tensor]:
    """All items that a batch needs, in ascending order with padding first, and whether each competes."""
    needed = torch.cat([competing.new_zeros(1), competing, targets.item, batch.item_BT.flatten()])
    index: Tensor = torch.unique(needed)
    competes = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    competes[torch.searchsorted(index, competing)] = True
    return index, competes


Dated = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


class Criterion:
    """Runs forward and backward of a batch under a loss.

    Parameters
    ----------
    loss : softmax, sampled, gbce, auto (softmax up to `full_items` items, else sampled), or the name of a
        loss of another package over all items (`recray.plugins`)
    share_V : float32 [V], share of each item in the training events; padding 0
    negatives : items that sampled and gbce draw for a batch
    calibration : calibration of gbce
    half : products with the item table in bfloat16
    dated : function of days [P] and candidate items (indices ascending, None: all) that gives their
        popularity prior and bucket of freshness [P, items]
    """

    def __init__(
        self,
        loss: str,
        share_V: Tensor,
        *,
        full_items: int = 50_000,
        negatives: int = 4096,
        calibration: float = 0.75,
        half: bool = False,
        dated: Dated | None = None,
    ) -> None:
        items = len(share_V) - 1
        self.share_V, self.negatives, self.half, self.dated = share_V, negatives, half, dated
        self.loss = ("softmax" if items <= full_items else "sampled") if loss == "auto" else loss
        self.judge: Loss = softmax
        self.is_sampled = self.loss in ("sampled", "gbce")
        if self.loss == "gbce":
            distinct = round(items * -math.expm1(negatives * math.log1p(-1.0 / items))) if items > 1 else 1
            self.judge = gbce(gbce_beta(distinct, items, calibration))
        elif self.loss not in ("softmax", "sampled"):
            self.judge = load_plugin("losses", self.loss)

    def complete(self, batch: Batch) -> Batch:
        """The batch with popularity prior and freshness of its days, where all items compete.

        Call it where batches are built, before they go to a GPU. For sampled candidates, `backward` adds
        both.
        """
        return batch if self.is_sampled else self._dated(batch, None)

    def _dated(self, batch: Batch, index: Tensor | None) -> Batch:
        if self.dated is None:
            return batch
        dated_rows = self.dated(batch.prior_PV.cpu().numpy(), None if index is None else index.cpu().numpy())
        prior_PV, fresh_PV = (torch.from_numpy(rows).to(batch.prior_PV.device) for rows in dated_rows)
        return batch._replace(prior_PV=prior_PV, fresh_PV=fresh_PV)

    def backward(
        self, model: Network, batch: Batch, targets: Targets, scale: float, controls: Controls | None = None
    ) -> Tensor:
        """The loss summed over the queries of a completed batch.

        Accumulates the gradients of `scale` times the loss in every `.grad`.
        """
        correction = index = None
        if self.is_sampled:
            draw = draw_mixed if self.loss == "sampled" else hash_to_unit_interval
            candidates = draw(batch, targets, self.share_V, self.negatives)
            batch, targets = candidates.reindex(batch, targets)
            index, correction = candidates
            batch = self._dated(batch, index)
        table = model.items(index)
        hidden, output = model.hidden(batch, table, None, controls), model.output(table)
        return backward_in_blocks(
            model,
            hidden,
            output,
            batch,
            targets,
            scale,
            judge=self.judge,
            correction_U=correction,
            half=self.half,
        )


def backward_in_blocks(
    model: Network,
    hidden_ND: Tensor,
    output_UD: Tensor,
    batch: Batch,
    targets: Targets,
    scale: float,
    *,
    judge: Loss = softmax,
    correction_U: Tensor | None = None,
    half: bool = False,
    block: int | None = None,
) -> Tensor:
    """The loss summed over the queries; accumulates gradients of `scale` times the loss, each query by its
    weight, in every `.grad`.

    output_UD : `Network.output` of all items or of the candidates
    correction_U : `Candidates.correction_U`
    half : products in bfloat16, everything else in float32
    block : queries of a block; None: as many as the cache (a GPU's memory) holds
    """
    dtype = torch.bfloat16 if half else torch.float32
    hidden, table = hidden_ND.detach().to(dtype), output_UD.detach().to(dtype)
    block = block or max(BLOCK_SCORES[hidden.device.type] // len(table), 16)
    query_t, share_t, weight_N = targets.shares()
    # a single block needs no offsets on the host, which would wait for the GPU
    bounds = targets.offsets.tolist() if block < len(hidden) else {0: 0, len(hidden): len(targets.item)}

    propensity_U = model.repeat_propensity(output_UD)
    propensity = None if propensity_U is None else propensity_U.detach().requires_grad_()
    total = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_table = torch.zeros_like(output_UD, dtype=torch.float32)
    # one buffer for all blocks: new memory costs page faults
    buffer = hidden.new_empty(min(block, len(hidden)), len(table))

    for start in range(0, len(hidden), block):
        queries = slice(start, min(start + block, len(hidden)))
        block_targets = slice(bounds[queries.start], bounds[queries.stop])
        item, row, share = targets.item[block_targets], query_t[block_targets] - start, share_t[block_targets]
        scores = torch.mm(hidden[queries], table.mT, out=buffer[: queries.stop - start]).float()
        scores[:, 0] = -math.inf
        block_hidden = hidden_ND[queries].detach().requires_grad_()
        extra = model.extra_scores(block_hidden, batch, queries, len(table), propensity)
        if extra is not None:
            scores += extra.detach()
        if correction_U is not None:
            own = scores[row, item]
            scores += correction_U
            scores[row, item] = own

        block_loss, gradient = judge(scores, item, row, share)
        total += block_loss
        if weight_N is not None:
            gradient = gradient.mul_(weight_N[queries, None])
        block_gradient = gradient.to(dtype)
        torch.mm(block_gradient, table, out=grad_hidden[queries])
        if half:
            grad_table += block_gradient.mT @ hidden[queries]
        else:
            grad_table.addmm_(block_gradient.mT, hidden[queries])
        if extra is not None:
            torch.autograd.backward(extra, gradient.mul_(scale).to(extra.dtype))
            if block_hidden.grad is not None:
                grad_hidden[queries] += block_hidden.grad / scale

    roots = [
        (hidden_ND, grad_hidden.to(hidden_ND.dtype) * scale),
        (output_UD, grad_table.to(output_UD.dtype) * scale),
    ]
    if propensity_U is not None and propensity is not None and propensity.grad is not None:
        roots.append((propensity_U, propensity.grad))
    torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
    return total
