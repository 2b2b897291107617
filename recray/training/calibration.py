"""Calibration: how much each term of the scores counts, chosen on validation users after training.

A network that has seen the training histories often is too sure of what it remembers of them. Terms of few
parameters (repeat consumption, popularity) are not, and item-to-item evidence has not been weighed at all.
One factor a term, by which the validation targets are most likely with and without repeats, sets that right:
it is temperature scaling (Guo et al., ICML 2017) of each term.

Likelihood looks at all candidates, lists at the first ones. Where a network is weak, as on small logs without
an order, its scores still make targets more likely, but push better evidence off the lists. So with evidence
the network keeps a smaller share where that clearly raises NDCG.

Shapes: Q queries, C candidates, S terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recray.dataset.reader import Dataset
from recray.evaluation.protocol import EvaluationQueries, EvaluationQuery
from recray.inference import Filters, Predictor
from recray.model.cooccurrence import to_log
from recray.model.network import COLDEST, HOTTEST, Network
from recray.model.shape import Batch

LOGARITHM = "evidence.log"
MOST_QUERIES = 1000
FEWEST_QUERIES = 30
BEST, DRAWN = 2048, 2048  # candidates of a query: the best before calibration, half of them by evidence
# alone, and the targets; and others
MOST_SCORES = 1 << 25  # queries x items x terms that are computed at once
SPREAD = 1.0  # of a log factor before anything was seen: few validation users move it little
STEPS = 60
SHARES = (0.7, 0.5, 0.25, 0.125, 0.06)  # of the network beside evidence, that are tried
CLEARLY = 1.5  # standard errors of a paired difference
K = 10


class Scored(NamedTuple):
    """Candidates of queries.

    score_SQC : float32, scores of each term
    is_target_QC, is_seen_QC : whether a candidate is a target, and whether the history has it
    log_weight_QC : log of the number of items that a drawn candidate stands for, 0 for others
    """

    score_SQC: Tensor
    is_target_QC: Tensor
    is_seen_QC: Tensor
    log_weight_QC: Tensor


def calibrate(
    model: Network, dataset: Dataset, *, popularity_prior_days: int, protocols: Sequence[str], seed: int
) -> dict[str, float]:
    """Scale the terms of a model in place, and return their factors; none of a single term, or where there
    are too few validation users.

    protocols : of the evaluation, under which the targets are to be likely
    """
    predictor = Predictor.of(model, dataset, popularity_prior_days)
    sample = EvaluationQueries(dataset, "validation", max_users=MOST_QUERIES, seed=seed)
    queries = [query for batch in sample.batches(MOST_QUERIES) for query in batch]
    queries = [query for query in queries if query.history.item_index.any() and query.target.any()]
    if len(queries) < FEWEST_QUERIES:
        return {}
    names = list(_score(predictor, queries[:1]))
    if len(names) == 1:
        return {}
    size = max(MOST_SCORES // (len(names) * (dataset.n_items + 1)), 1)
    log_scale = 0.0
    if (head := model.cooccurrence) is not None and head.is_attached:
        log_scale = float(head.log_scale)
    parts = [
        _to_scored(predictor, queries[first : first + size], log_scale)
        for first in range(0, len(queries), size)
    ]
    scored = Scored(*(torch.cat(tensors, -2) for tensors in zip(*parts, strict=True)))
    fitted = fit_factors(scored, protocols, is_evidence(names), log_scale)
    if is_evidence(names).any():
        fitted[0] *= choose_share(scored, fitted, protocols, is_evidence(names), log_scale)
    factors = dict(zip([*names, LOGARITHM][: len(fitted)], fitted.tolist(), strict=True))
    scale_terms(model, factors)
    return factors


def measure_cold_gaps(
    model: Network, dataset: Dataset, *, popularity_prior_days: int, filter_seen: bool, seed: int
) -> list[float]:
    """By how much the score at the end of a list of `K` exceeds that of the best cold item, for validation
    users: quantiles of 0, 0.05, … 1. Empty without cold items, or where there are too few validation users.

    filter_seen : of the lists
    """
    predictor = Predictor.of(model, dataset, popularity_prior_days)
    cold = np.flatnonzero(predictor.cold_V)
    sample = EvaluationQueries(dataset, "validation", max_users=MOST_QUERIES, seed=seed)
    if not len(cold) or len(sample) < FEWEST_QUERIES or dataset.n_items < 2 * K:
        return []
    gaps = []
    for queries in sample.batches(100):
        whole, best = (
            predictor.recommend(
                [query.history for query in queries],
                k,
                now=[query.now for query in queries],
                filters=Filters(filter_seen=filter_seen, allow=allow),
                context=[query.context for query in queries],
            ).scores[:, -1]
            for k, allow in ((K, None), (1, cold))
        )
        gaps.append(whole - best)
    gap_Q = np.concatenate(gaps)
    gap_Q = gap_Q[np.isfinite(gap_Q)]
    if len(gap_Q) < FEWEST_QUERIES:
        return []
    return [round(float(gap), 5) for gap in np.quantile(gap_Q, np.linspace(0.0, 1.0, 21))]


def is_evidence(names: Sequence[str]) -> Tensor:
    """Which terms are item-to-item evidence, bool [S]."""
    return torch.tensor([name.startswith("evidence.") for name in names])


def term_scores(model: Network, hidden_ND: Tensor, output_VD: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The scores [N, V] of each term of a model. Their sum are the scores, but for fixed counts, padding and
    the logarithm of the evidence.

    output_VD : `Network.output` of all items
    """
    n_items, every = len(output_VD), slice(None)
    scores = {"similarity": hidden_ND @ output_VD.mT}
    if model.repeat is not None:
        propensity_V = model.repeat_propensity(output_VD)
        scores["repeat"] = model.repeat(hidden_ND, batch, every, n_items, propensity_V)
    if model.prior_scale is not None:
        scores["prior"] = model.prior_scale * batch.prior_PV[batch.day_N]
    if model.freshness is not None:
        scores["freshness"] = model.freshness(batch.fresh_PV.long()).squeeze(-1)[batch.day_N]
    if model.cooccurrence is not None and model.cooccurrence.is_attached:
        for name, scale_SR in model.cooccurrence.terms():
            scores[name] = model.cooccurrence.evidence(batch, every, n_items, scale_SR=scale_SR)
    return scores


@torch.no_grad()
def scale_terms(model: Network, factors: Mapping[str, float]) -> None:
    """Multiply the scores of terms, by their names in `term_scores`, in the weights of a model."""
    factor = factors.get("similarity", 1.0)
    if model.temperature is not None:
        temperature = model.temperature.clamp(COLDEST, HOTTEST)
        model.temperature.copy_((temperature / factor).clamp(COLDEST, HOTTEST))
        factor = float(temperature / model.temperature)
    else:
        model.norm.weight.mul_(factor)
    if model.repeat is not None:
        model.repeat.gate.weight.div_(factor)  # it reads the hidden states, which have another length now
        model.repeat.log_scale.add_(math.log(factors.get("repeat", 1.0)))
    if model.prior_scale is not None:
        model.prior_scale.mul_(factors.get("prior", 1.0))
    if model.freshness is not None:
        model.freshness.weight.mul_(factors.get("freshness", 1.0))
    if model.cooccurrence is not None:
        names = [name for name, _ in model.cooccurrence.terms()]
        scale = model.cooccurrence.scale
        scale.mul_(scale.new_tensor([factors.get(name, 1.0) for name in names]).view_as(scale))
        model.cooccurrence.log_scale.mul_(factors.get(LOGARITHM, 1.0))


def fit_factors(
    scored: Scored, protocols: Sequence[str], is_evidence_S: Tensor | None = None, log_scale: float = 0.0
) -> Tensor:
    """The factor of each term, float64 [S], by which the targets are most likely under the protocols; with
    item-to-item evidence also that of its logarithm, [S + 1].

    is_evidence_S : bool; None: no term is evidence
    log_scale : scale of its logarithm
    """
    has_evidence = is_evidence_S is not None and bool(is_evidence_S.any())
    is_evidence_S = is_evidence_S if has_evidence else None
    parts = [_mask(scored, protocol) for protocol in protocols]
    log_S = torch.zeros(len(scored.score_SQC) + has_evidence, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_S], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        score_QC = _combine(scored, log_S.exp().float(), is_evidence_S, log_scale) + scored.log_weight_QC
        total = log_S.square().sum() / (2 * SPREAD**2 * len(score_QC))
        for is_hidden_QC, is_target_QC in parts:
            log_share_QC = score_QC.masked_fill(is_hidden_QC, -math.inf).log_softmax(1)
            count_Q = is_target_QC.sum(1)
            sum_Q = log_share_QC.masked_fill(~is_target_QC, 0.0).sum(1)
            total = total - (sum_Q / count_Q.clamp(min=1)).double().sum() / (count_Q > 0).sum().clamp(min=1)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    factors = log_S.detach().exp()
    return factors if bool(factors.isfinite().all()) else torch.ones_like(factors)


def choose_share(
    scored: Scored, factor_S: Tensor, protocols: Sequence[str], is_evidence_S: Tensor, log_scale: float
) -> float:
    """By what the network's factor, the first one, is to be multiplied: the one of `SHARES` with the highest
    NDCG, if it is clearly higher than with the factors as they are; else 1.

    Arguments as for `fit_factors`, whose result `factor_S` is.
    """

    def measure(share: float) -> list[Tensor]:
        changed_S = factor_S.float().clone()
        changed_S[0] *= share
        score_QC = _combine(scored, changed_S, is_evidence_S, log_scale)
        score_QC = score_QC.masked_fill(scored.log_weight_QC == -math.inf, -math.inf)
        return [_ndcg(score_QC, *_mask(scored, protocol)) for protocol in protocols]

    before, best, highest = measure(1.0), 1.0, 0.0
    for share in SHARES:
        gains = [after_Q - before_Q for after_Q, before_Q in zip(measure(share), before, strict=True)]
        gain = sum(float(gain_Q.mean()) for gain_Q in gains if len(gain_Q))
        error = math.sqrt(sum(float(gain_Q.var()) / len(gain_Q) for gain_Q in gains if len(gain_Q) > 1))
        if gain > highest and gain > CLEARLY * error:
            best, highest = share, gain
    return best


def _mask(scored: Scored, protocol: str) -> tuple[Tensor, Tensor]:
    """Under a protocol: which candidates are hidden, and which are targets, bool [Q, C] each."""
    _, is_target_QC, is_seen_QC, _ = scored
    if protocol == "filter_seen":
        return is_seen_QC, is_target_QC & ~is_seen_QC
    return torch.zeros_like(is_seen_QC), is_target_QC


def _combine(scored: Scored, factor_S: Tensor, is_evidence_S: Tensor | None, log_scale: float) -> Tensor:
    """The candidates' scores [Q, C] with a factor for each term, and one for the logarithm of the evidence.

    is_evidence_S : bool; None: no term is evidence
    """
    n_terms = len(scored.score_SQC)
    score_QC = torch.einsum("sqc,s->qc", scored.score_SQC, factor_S[:n_terms])
    if is_evidence_S is None:
        return score_QC
    evidence_QC = torch.einsum("sqc,s->qc", scored.score_SQC, factor_S[:n_terms] * is_evidence_S)
    return score_QC + factor_S[-1] * log_scale * to_log(evidence_QC)


def _ndcg(score_QC: Tensor, is_hidden_QC: Tensor, is_target_QC: Tensor) -> Tensor:
    """NDCG of the queries that have a target, float64 [at most Q]."""
    best_QK = score_QC.masked_fill(is_hidden_QC, -math.inf).topk(min(K, score_QC.shape[1]), 1).indices
    discount_K = 1.0 / torch.arange(2, best_QK.shape[1] + 2, dtype=torch.float64).log2()
    gain_Q = (is_target_QC.gather(1, best_QK) * discount_K).sum(1)
    count_Q = is_target_QC.sum(1)
    ideal_Q = discount_K.cumsum(0)[count_Q.clamp(1, len(discount_K)) - 1]
    return (gain_Q / ideal_Q)[count_Q > 0]


def _to_scored(predictor: Predictor, queries: list[EvaluationQuery], log_scale: float) -> Scored:
    scores = _score(predictor, queries)
    score_SQV = torch.stack(list(scores.values()))
    score_SQV[0, :, 0] = -1e9  # padding
    evidence_QV = score_SQV[is_evidence(list(scores))].sum(0)
    sum_QV = score_SQV.sum(0) + log_scale * to_log(evidence_QV)
    is_target_QV = torch.zeros(score_SQV.shape[1:], dtype=torch.bool)
    is_seen_QV = torch.zeros_like(is_target_QV)
    for row, query in enumerate(queries):
        is_target_QV[row, torch.from_numpy(np.asarray(query.target, np.int64))] = True
        is_seen_QV[row, torch.from_numpy(np.asarray(query.history.item_index, np.int64))] = True
    is_target_QV[:, 0] = False
    is_chosen_QV = is_target_QV
    if log_scale and sum_QV.shape[1] > BEST:  # with another share of the network these come first
        most_QC = evidence_QV.topk(BEST // 2, 1).indices
        is_chosen_QV = is_target_QV.scatter(1, most_QC, True).index_fill(1, torch.tensor([0]), False)
    index_QC, log_weight_QC = _choose(sum_QV.masked_fill(is_chosen_QV, math.inf))
    score_SQC = score_SQV.gather(2, index_QC.expand(len(score_SQV), -1, -1))
    is_target_QC = is_target_QV.gather(1, index_QC) & log_weight_QC.isfinite()
    return Scored(score_SQC, is_target_QC, is_seen_QV.gather(1, index_QC), log_weight_QC)


def _choose(score_QV: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [Q, C], and the log of how many items each stands for: the best ones for themselves, and
    draws for the rest, since the best alone would make the scores look worse than they are.
    """
    Q, V = score_QV.shape
    if V <= BEST + DRAWN:
        return torch.arange(V).expand(Q, -1), torch.zeros(Q, V)
    best_QC = score_QV.topk(BEST, 1).indices
    drawn_QC = torch.randint(1, V, (Q, DRAWN), generator=torch.Generator().manual_seed(V))
    is_best_QV = torch.zeros(Q, V, dtype=torch.bool).scatter_(1, best_QC, True)
    is_other_QC = ~is_best_QV.gather(1, drawn_QC)
    stands_for = (V - BEST) / is_other_QC.sum(1, keepdim=True).clamp(min=1)
    log_weight_QC = torch.where(is_other_QC, stands_for.log(), -math.inf)
    return torch.cat([best_QC, drawn_QC], 1), torch.cat([torch.zeros(Q, BEST), log_weight_QC], 1)


@torch.no_grad()
def _score(predictor: Predictor, queries: list[EvaluationQuery]) -> dict[str, Tensor]:
    """Scores [Q, V] of each term, on the CPU."""
    encoder = predictor.encoder
    batch = encoder.batch(
        [predictor.readable(query.history) for query in queries],
        np.array([query.now for query in queries], np.int64),
        np.stack([query.context for query in queries]).astype(np.int64),
    )
    hidden, _ = encoder.encode(batch, None, with_entropy=False)
    scores = term_scores(encoder.model, hidden, encoder.output_VD, batch)
    return {name: tensor.cpu() for name, tensor in scores.items()}
