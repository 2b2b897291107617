"""Losses over the catalogue, computed in blocks of queries so that [queries x items] never exists at once.

Each loss turns a block of scores into its gradient in place; the gradients of hidden states and item table follow by two
matrix products, without a graph. Shapes: N queries, U candidate items and padding (all of them, or a sample), D width.
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
from recray.model.recommender import Recommender
from recray.model.shape import Batch

BLOCK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 27}  # scores at once: what a CPU's cache holds, what a GPU is busy with


class Targets(NamedTuple):
    """What the queries should have answered: query i has the items item[offsets[i]:offsets[i + 1]], equal shares each time one occurs."""

    offsets: Tensor
    item: Tensor


class Loss(Protocol):
    """How the scores of a block of queries are judged."""

    def __call__(self, scores_nU: Tensor, item: Tensor, row: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over the block, and its gradient [n, U] by the scores, which may be overwritten.

        scores_nU : -inf for what does not compete
        item, row, share : int64, int64, float [t] of the block's targets: the item, its query, and its share of the query
        """


def softmax(scores_nU: Tensor, item: Tensor, row: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over what competes, -Σ share · log softmax(scores)[item]; its gradient is softmax(scores) - shares."""
    wanted, best = scores_nU[row, item], scores_nU.amax(1)
    gradient = torch.softmax(scores_nU, 1, out=scores_nU)
    log_mass = best - gradient.amax(1).log()
    gradient.index_put_((row, item), -share, accumulate=True)
    return (share * (log_mass[row] - wanted)).sum(), gradient


def gbce(beta: float) -> Loss:
    """gBCE (Petrov and Macdonald, arXiv 2308.07192): -β log σ(target) - Σ over the other candidates of log(1 - σ(score)).

    beta : see `gbce_beta`; 1 is binary cross-entropy
    """

    def judge(scores_nU: Tensor, item: Tensor, row: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        wanted = scores_nU[row, item]
        negative = F.softplus(scores_nU)
        negative[row, item] = 0.0
        rest = negative.sum()
        gradient = scores_nU.sigmoid_()
        gradient[row, item] = 0.0
        gradient.index_put_((row, item), -beta * share * torch.sigmoid(-wanted), accumulate=True)
        return rest + (beta * share * F.softplus(-wanted)).sum(), gradient

    return judge


def gbce_beta(negatives: int, items: int, calibration: float) -> float:
    """β = α (t (1 - 1/α) + 1/α) with α = negatives / (items - 1); t 0 is binary cross-entropy, 1 restores calibration."""
    alpha = min(negatives / max(items - 1, 1), 1.0)
    return alpha * (calibration * (1.0 - 1.0 / alpha) + 1.0 / alpha)


class Candidates(NamedTuple):
    """The items that compete in a batch: `item_U` int64, item indices ascending with padding first, and `correction_U`
    float32, added to the scores of those that a query did not ask for: -log of the chance that a batch has the item.
    Items of the histories are among them for their vectors; only those that were drawn compete."""

    item_U: Tensor
    correction_U: Tensor

    def place(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """The batch and its targets in indices of the candidates."""
        item_BT, item = torch.searchsorted(self.item_U, batch.item_BT), torch.searchsorted(self.item_U, targets.item)
        return batch._replace(item_BT=item_BT), targets._replace(item=item)


def draw_mixed(batch: Batch, targets: Targets, share_V: Tensor, negatives: int) -> Candidates:
    """The batch's targets and `negatives` uniform draws compete (mixed negative sampling, Yang et al., WWW 2020).

    The chance of item i is 1 - (1 - share_i)^targets (1 - 1/items)^negatives. Divided by it, the sum over competitors is an
    unbiased estimate of the sum over all items.

    share_V : float32 [V], share of each item in the training events; padding 0
    """
    uniform = torch.randint(1, len(share_V), (negatives,), device=share_V.device)
    index, competes = _index(batch, targets, torch.cat([targets.item, uniform]))
    items = len(share_V) - 1
    by_chance = negatives * math.log1p(-1.0 / items) if items > 1 else -math.inf
    missed = len(targets.item) * torch.log1p(-share_V[index].double().clamp(max=0.5)) + by_chance
    return Candidates(index, torch.where(competes, -torch.log(-torch.expm1(missed)), -math.inf).float())


def draw_uniform(batch: Batch, targets: Targets, share_V: Tensor, negatives: int) -> Candidates:
    """`negatives` uniform draws compete, uncorrected."""
    index, competes = _index(batch, targets, torch.randint(1, len(share_V), (negatives,), device=share_V.device))
    return Candidates(index, torch.where(competes, 0.0, -math.inf))


def _index(batch: Batch, targets: Targets, competing: Tensor) -> tuple[Tensor, Tensor]:
    """All items that a batch needs, ascending with padding first, and which of them compete."""
    needed = torch.cat([competing.new_zeros(1), competing, targets.item, batch.item_BT.flatten()])
    index: Tensor = torch.unique(needed)
    competes = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    competes[torch.searchsorted(index, competing)] = True
    return index, competes


Dated = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


class Criterion:
    """Forward and backward of a batch under a loss.

    Parameters
    ----------
    loss : softmax, sampled, gbce, or auto: softmax up to `full_items` items, else sampled
    share_V : float32 [V], share of each item in the training events; padding 0
    negatives : items drawn for a batch by sampled and gbce
    calibration : of gbce
    half : products with the item table in bfloat16
    dated : what is known on days [P] of the items that compete (indices ascending, None: all): popularity prior and bucket of
        freshness [P, items]
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
        self.judge = softmax
        if self.loss == "gbce":
            distinct = round(items * -math.expm1(negatives * math.log1p(-1.0 / items))) if items > 1 else 1
            self.judge = gbce(gbce_beta(distinct, items, calibration))

    def complete(self, batch: Batch) -> Batch:
        """The batch with what is known on its days, which `backward` adds itself where only some items compete. For where batches are made:
        before they go to a GPU."""
        return self._dated(batch, None) if self.loss == "softmax" else batch

    def _dated(self, batch: Batch, index: Tensor | None) -> Batch:
        if self.dated is None:
            return batch
        found = self.dated(batch.prior_PV.cpu().numpy(), None if index is None else index.cpu().numpy())
        prior_PV, fresh_PV = (torch.from_numpy(rows).to(batch.prior_PV.device) for rows in found)
        return batch._replace(prior_PV=prior_PV, fresh_PV=fresh_PV)

    def backward(self, model: Recommender, batch: Batch, targets: Targets, scale: float, controls: Controls | None = None) -> Tensor:
        """The loss summed over the queries of a batch that is complete; gradients of `scale` times it are left in every `.grad`."""
        correction = index = None
        if self.loss != "softmax":
            draw = draw_mixed if self.loss == "sampled" else draw_uniform
            candidates = draw(batch, targets, self.share_V, self.negatives)
            batch, targets = candidates.place(batch, targets)
            index, correction = candidates
            batch = self._dated(batch, index)
        table = model.items(index)
        hidden, output = model.hidden(batch, table, None, controls), model.output(table)
        return backward_in_blocks(model, hidden, output, batch, targets, scale, judge=self.judge, correction_U=correction, half=self.half)


def backward_in_blocks(
    model: Recommender,
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
    """The loss summed over the queries; gradients of `scale` times it are left in every `.grad`.

    output_UD : vectors that the scores compare with (`Recommender.output`), of all items or of the candidates
    correction_U : `Candidates.correction`
    half : products in bfloat16, everything else in float32
    block : queries at once; None: as many as the cache (the GPU's memory) holds
    """
    dtype = torch.bfloat16 if half else torch.float32
    hidden, table = hidden_ND.detach().to(dtype), output_UD.detach().to(dtype)
    block = block or max(BLOCK_SCORES[hidden.device.type] // len(table), 16)
    count = targets.offsets.diff()
    query_t = torch.repeat_interleave(torch.arange(len(count), device=count.device), count, output_size=len(targets.item))
    share_t = (1.0 / count.float())[query_t]
    bounds = targets.offsets.tolist() if block < len(hidden) else {0: 0, len(hidden): len(targets.item)}  # a GPU is not waited for
    again_U = model.again(output_UD)
    again = None if again_U is None else again_U.detach().requires_grad_()
    total = torch.zeros((), device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_table = torch.zeros_like(output_UD, dtype=torch.float32)
    room = hidden.new_empty(min(block, len(hidden)), len(table))  # one for all blocks: fresh memory costs page faults
    for start in range(0, len(hidden), block):
        queries = slice(start, min(start + block, len(hidden)))
        asked = slice(bounds[queries.start], bounds[queries.stop])
        item, row, share = targets.item[asked], query_t[asked] - start, share_t[asked]
        scores = torch.mm(hidden[queries], table.mT, out=room[: queries.stop - start]).float()
        scores[:, 0] = -math.inf
        asking = hidden_ND[queries].detach().requires_grad_()
        extra = model.extra(asking, batch, queries, len(table), again)
        if extra is not None:
            scores += extra.detach()
        if correction_U is not None:
            own = scores[row, item]
            scores += correction_U
            scores[row, item] = own
        judged, gradient = judge(scores, item, row, share)
        total += judged
        part = gradient.to(dtype)
        torch.mm(part, table, out=grad_hidden[queries])
        if half:
            grad_table += part.mT @ hidden[queries]
        else:
            grad_table.addmm_(part.mT, hidden[queries])
        if extra is not None:
            torch.autograd.backward(extra, gradient.mul_(scale).to(extra.dtype))
            if asking.grad is not None:
                grad_hidden[queries] += asking.grad / scale
    roots = [(hidden_ND, grad_hidden.to(hidden_ND.dtype) * scale), (output_UD, grad_table.to(output_UD.dtype) * scale)]
    if again_U is not None and again is not None and again.grad is not None:
        roots.append((again_U, again.grad))
    torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
    return total
