"""Alternating least squares of implicit on a file of events. Runs in the peer's environment: python implicit_peer.py QUESTION.

The question is that of `rectools_peer.py`; what a matrix factorisation does not have (blocks, heads, history) is not read, and
what is left open is implicit's default. Asked with `patience`, it iterates once to its end: the curve has one line.
"""

import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import threadpoolctl
from implicit.als import AlternatingLeastSquares

K = 10
TRAIN, VALIDATION, TEST = 0, 1, 2
RANKED_USERS = 500  # whose whole catalogue is ranked at once


def main(question: dict[str, Any]) -> dict[str, Any]:
    """What was asked for."""
    events = pd.read_parquet(question["events"])
    shape = (int(events.user.max()) + 1, int(events["item"].max()) + 1)
    trained = _matrix(events[events.part == TRAIN], shape)
    model = AlternatingLeastSquares(factors=question["dim"], num_threads=question["threads"], random_state=question["seed"])
    wall, cpu = time.monotonic(), time.process_time()
    with threadpoolctl.threadpool_limits(1, "blas"):  # as implicit asks for: it has threads of its own
        model.fit(trained, show_progress=False)
        answer: dict[str, Any] = {"epoch_s": [(time.monotonic() - wall) / model.iterations]}
        line = {"epoch": model.iterations, "seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        if "patience" in question:
            asked = events[(events.part == VALIDATION) & events.user.isin(question["validation_users"])]
            ranks = np.array(list(_ranks(model, trained, asked).values()))
            gain = np.where((ranks > 0) & (ranks <= K), 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)
            curve = [{**line, "validation_ndcg": float(gain.mean())}]
            return {"curve": curve, "ranks": _ranks(model, _matrix(events[events.part < TEST], shape), events[events.part == TEST])}
        users = np.unique(events.user[events.part == TRAIN])
        times = []
        for _ in range(question.get("recommend", 0)):
            begun = time.monotonic()
            model.recommend(users, trained[users], N=K, filter_already_liked_items=True)
            times.append(time.monotonic() - begun)
    return answer | {"users": len(users), "recommend_s": times}


def _matrix(events: pd.DataFrame, shape: tuple[int, int]) -> sp.csr_matrix:
    found = sp.csr_matrix((np.ones(len(events), np.float32), (events.user, events["item"])), shape)
    found.data[:] = 1.0  # an item that was met twice was met
    return found


def _ranks(model: AlternatingLeastSquares, met: sp.csr_matrix, wanted: pd.DataFrame) -> dict[int, int]:
    """Rank from 1 of each user's wanted item among all that the user did not meet."""
    ranks: dict[int, int] = {}
    for first in range(0, len(wanted), RANKED_USERS):
        part = wanted[first : first + RANKED_USERS]
        factors = model.recalculate_user(part.user.to_numpy(), met[part.user.to_numpy()])
        scores = np.asarray(factors) @ np.asarray(model.item_factors).T
        scores[met[part.user.to_numpy()].toarray() > 0] = -np.inf
        scores[:, 0] = -np.inf  # items count from 1
        own = scores[np.arange(len(part)), part["item"].to_numpy()]
        found = 1 + (scores > own[:, None]).sum(1)
        ranks |= dict(zip(part.user.tolist(), np.where(np.isfinite(own), found, 0).tolist(), strict=True))
    return ranks


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
