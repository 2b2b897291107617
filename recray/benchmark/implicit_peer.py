"""Alternating least squares of the baseline library implicit, on a file of events. Runs in the library's
environment: python implicit_peer.py REQUEST.

The request is that of `rectools_peer.py`. Fields that a matrix factorisation does not have (blocks, heads,
history) are ignored; the other parameters are implicit's defaults. With `patience` it trains once to its end,
so the curve has one line.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import threadpoolctl
from implicit.als import AlternatingLeastSquares

if TYPE_CHECKING:  # the library's environment has no recray
    from recray.benchmark.peers import LibraryRequest

K = 10
TRAIN, VALIDATION, TEST = 0, 1, 2
RANKED_USERS = 500  # whose whole catalogue is ranked at once


def main(request: LibraryRequest) -> Mapping[str, Any]:
    """Train, and return what the request asks for."""
    events = pd.read_parquet(request["events"])
    shape = (int(events.user.max()) + 1, int(events["item"].max()) + 1)
    trained = _to_matrix(events[events.part == TRAIN], shape)
    model = AlternatingLeastSquares(
        factors=request["dim"], num_threads=request["threads"], random_state=request["seed"]
    )
    wall, cpu = time.monotonic(), time.process_time()
    with threadpoolctl.threadpool_limits(1, "blas"):  # as implicit recommends: it has its own threads
        model.fit(trained, show_progress=False)
        epoch_s = [(time.monotonic() - wall) / model.iterations]
        line = {
            "epoch": model.iterations,
            "seconds": time.monotonic() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
        if "patience" in request:
            queries = events[(events.part == VALIDATION) & events.user.isin(request["validation_users"])]
            ranks = np.array(list(_rank_targets(model, trained, queries).values()))
            gain = np.where((ranks > 0) & (ranks <= K), 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)
            curve = [{**line, "validation_ndcg": float(gain.mean())}]
            return {
                "curve": curve,
                "ranks": _rank_targets(
                    model, _to_matrix(events[events.part < TEST], shape), events[events.part == TEST]
                ),
            }
        users = np.unique(events.user[events.part == TRAIN])
        times = []
        for _ in range(request.get("recommend", 0)):
            started = time.monotonic()
            model.recommend(users, trained[users], N=K, filter_already_liked_items=True)
            times.append(time.monotonic() - started)
    return {"epoch_s": epoch_s, "users": len(users), "recommend_s": times}


def _to_matrix(events: pd.DataFrame, shape: tuple[int, int]) -> sp.csr_matrix:
    matrix = sp.csr_matrix((np.ones(len(events), np.float32), (events.user, events["item"])), shape)
    matrix.data[:] = 1.0  # duplicates were added up
    return matrix


def _rank_targets(
    model: AlternatingLeastSquares, seen: sp.csr_matrix, targets: pd.DataFrame
) -> dict[int, int]:
    """Rank from 1 of each user's target among the unseen items; 0 for a target that is not ranked."""
    ranks: dict[int, int] = {}
    for first in range(0, len(targets), RANKED_USERS):
        part = targets[first : first + RANKED_USERS]
        factors = model.recalculate_user(part.user.to_numpy(), seen[part.user.to_numpy()])
        scores = np.asarray(factors) @ np.asarray(model.item_factors).T
        scores[seen[part.user.to_numpy()].toarray() > 0] = -np.inf
        scores[:, 0] = -np.inf  # padding
        target_scores = scores[np.arange(len(part)), part["item"].to_numpy()]
        position = 1 + (scores > target_scores[:, None]).sum(1)
        ranks |= dict(
            zip(part.user.tolist(), np.where(np.isfinite(target_scores), position, 0).tolist(), strict=True)
        )
    return ranks


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
