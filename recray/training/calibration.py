"""Calibration: how much each term of the scores counts, chosen on validation users after training.

A network that has seen the training histories often is too sure of what it remembers of them. Terms of few
parameters (repeat consumption, popularity) are not, and item-to-item evidence has not been weighed at all.
One factor a term, by which the validation targets are most likely with and without repeats, sets that right:
it is temperature scaling (Guo et al., ICML 2017) of each term. Shapes: Q queries, C candidates, S terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recray.dataset.reader import Dataset
from recray.evaluation.protocol import EvaluationQueries, EvaluationQuery
from recray.inference import Predictor
from recray.model.network import Network

MOST_QUERIES = 1000
FEWEST_QUERIES = 30
MOST_CANDIDATES = 4096  # of a query: the best of the uncalibrated scores, and the targets
MOST_SCORES = 1 << 25  # queries x items x terms that are computed at once
PULL = 1e-3  # of each log factor towards 0
STEPS = 60


class Scored(NamedTuple):
    """Candidates of queries.

    score_SQC : float32, scores of each term
    is_target_QC, is_seen_QC : whether a candidate is a target, and whether the history has it
    """

    score_SQC: Tensor
    is_target_QC: Tensor
    is_seen_QC: Tensor


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
    parts = [_to_scored(predictor, queries[first : first + size]) for first in range(0, len(queries), size)]
    scored = Scored(*(torch.cat(tensors, -2) for tensors in zip(*parts, strict=True)))
    factors = dict(zip(names, fit_factors(scored, protocols).tolist(), strict=True))
    model.scale_terms(factors)
    return factors


def fit_factors(scored: Scored, protocols: Sequence[str]) -> Tensor:
    """The factor of each term, float64 [S], by which the targets are most likely under the protocols."""
    _, is_target_QC, is_seen_QC = scored
    by_protocol = {
        "with_repeats": (torch.zeros_like(is_seen_QC), is_target_QC),
        "filter_seen": (is_seen_QC, is_target_QC & ~is_seen_QC),
    }
    parts = [by_protocol[protocol] for protocol in protocols]
    log_S = torch.zeros(len(scored.score_SQC), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_S], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        score_QC = torch.einsum("sqc,s->qc", scored.score_SQC, log_S.exp().float())
        total = PULL * log_S.square().sum()
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


def _to_scored(predictor: Predictor, queries: list[EvaluationQuery]) -> Scored:
    score_SQV = torch.stack(list(_score(predictor, queries).values()))
    score_SQV[:, :, 0] = -1e9  # padding
    is_target_QV = torch.zeros(score_SQV.shape[1:], dtype=torch.bool)
    is_seen_QV = torch.zeros_like(is_target_QV)
    for row, query in enumerate(queries):
        is_target_QV[row, torch.from_numpy(np.asarray(query.target, np.int64))] = True
        is_seen_QV[row, torch.from_numpy(np.asarray(query.history.item_index, np.int64))] = True
    is_target_QV[:, 0] = False
    total_QV = score_SQV.sum(0)
    count = min(MOST_CANDIDATES, total_QV.shape[1])
    best_QC = total_QV.masked_fill(is_target_QV, math.inf).topk(count, 1).indices
    score_SQC = score_SQV.gather(2, best_QC.expand(len(score_SQV), -1, -1))
    return Scored(score_SQC, is_target_QV.gather(1, best_QC), is_seen_QV.gather(1, best_QC))


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
    return {name: scores.cpu() for name, scores in encoder.term_scores(hidden, batch).items()}
