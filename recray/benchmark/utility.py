"""The cost of privacy in ranking quality: NDCG of holdout users by ε, compared with popularity and with a
transformer under Opacus' defaults.

Each method has the same learning rates at ε = 8, selected on the validation of the holdout users. Measured
cells are written to a file and not measured again, so an interrupted run resumes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from recray.benchmark import vanilla_peer
from recray.benchmark.data import prepare_data
from recray.benchmark.quality import BATCH, CONFIDENCE, RESAMPLES, hr, ndcg, ranks_of
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.errors import SettingsError
from recray.evaluation import metrics as m
from recray.evaluation.protocol import EvaluationQueries, EvaluationQuery, targets_of
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, mechanism_of
from recray.privacy.counts import weighted_counts
from recray.report.plots import plot_utility
from recray.stages import ProgressLog
from recray.storage import key_of, sha256_file
from recray.testing.published import prepare_here
from recray.testing.synthetic import SyntheticShop
from recray.training.batches import TrainingBatches, users_estimated
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop
from recray.version import __version__

EPSILONS = (1.0, 3.0, 8.0)
TUNED_AT = EPSILONS[-1]
REPEATS = 3  # trainings at the last ε, each with its own initial weights, users and noise
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
METHODS = ("full", "public features", "vanilla")
SYNTHETIC = "synthetic"
SPECIFICATION = SyntheticShop(users=100_000, items=2_000, events_per_user=20.0, noise=0.1, repeat=0.0, seed=7)
RUN_COUNTS = (1, 2, 3, 5, 7, 10, 14, 21, 30)

COMMON = (
    *(
        "model.preset=dp",
        "model.dim=32",
        "model.blocks=1",
        "model.dropout=0.1",
        "model.id_dropout=0",
        "model.time_bias=false",
    ),
    *(
        "model.values=false",
        "model.repeat_consumption=false",
        "model.popularity_prior_days=0",
        "data.context=[]",
        "data.available_from=null",
        "split.kind=leave_one_out",
    ),
    *(
        "train.loss=softmax",
        "train.target_baskets=1",
        "train.sequences=last",
        "train.ema_decay=0.95",
        "train.warmup_steps=10",
    ),
    *("train.epochs=100", "train.patience=8"),
    *(
        "train.temperature_jitter=0",
        "evaluate.protocol=filter_seen",
        "evaluate.k=[10]",
        "promotion.must_beat=[]",
    ),
)
OF_DATA = {
    "ml-1m": (
        "model.history=50",
        "split.holdout_users=0.25",
        "privacy.delta=1e-5",
        "privacy.sampling_rate=0.2",
        "privacy.steps=100",
    ),
    SYNTHETIC: (
        "model.history=20",
        "split.holdout_users=0.05",
        "privacy.delta=1e-6",
        "privacy.sampling_rate=0.02",
        "privacy.steps=300",
    ),
}
SYNTHETIC_FEATURES = "{category: categorical, brand: categorical, price: numeric, tags: multi, title: text}"


def measure_utility(
    folder: Path, data: str, overrides: list[str], progress: ProgressLog, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """NDCG@10 and HR@10 by method and ε; `<data>_eps8_over_vanilla` (without hyphens) and
    `<data>_eps8_of_non_private`.

    data : ml-1m (a folder, or its name under $RECRAY_DATA) or synthetic, the synthetic data set
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    name = Path(data).name
    if name not in OF_DATA:
        raise SettingsError(
            f"benchmark privacy: {data} is not one of {', '.join(OF_DATA)}",
            "name one of them, or leave out --data for the cost of a step",
        )
    benches = {
        fixed: UtilityData(folder / f"fixed-{fixed}", data, [*overrides], fixed=fixed)
        for fixed in (False, True)
    }
    plain = benches[False]
    values = bundle_settings(plain.settings)
    code = [sha256_file(Path(file)) for file in (__file__, vanilla_peer.__file__)]
    key = key_of(
        values, [bench.dataset.digest for bench in benches.values()], LEARNING_RATES, __version__, code
    )
    cells = CellStore(out / f"privacy-{name}-{key}.cells.jsonl", progress)
    runs: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        method_bench = benches[method == "public features"]
        candidates = [cells.get(method, TUNED_AT, rate, method_bench.run) for rate in LEARNING_RATES]
        rate = max(candidates, key=lambda cell: cell["validation_ndcg"])["learning_rate"]
        for epsilon in EPSILONS[:-1]:
            runs[f"{method}, ε {epsilon:g}"] = cells.get(method, epsilon, rate, method_bench.run)
        repeats = [cells.get(method, TUNED_AT, rate, method_bench.run, number) for number in range(REPEATS)]
        runs[f"{method}, ε {TUNED_AT:g}"] = _mean(repeats)
        if method != "vanilla":
            # the last rate is for trainings with noise
            not_private = [
                cells.get(method, None, candidate_rate, method_bench.run)
                for candidate_rate in LEARNING_RATES[:-1]
            ]
            runs[f"{method}, not private"] = max(not_private, key=lambda cell: cell["validation_ndcg"])
    runs |= {f"popularity, ε {epsilon:g}": plain.popularity(epsilon) for epsilon in EPSILONS} | {
        "popularity, not private": plain.popularity(None)
    }
    metrics: dict[str, Any] = {
        "users": len(plain.queries["test"]),
        "items": plain.dataset.n_items,
        "learned_from": plain.users,
    }
    metrics["table"] = {
        key: {figure: round(cell[figure], 4) for figure in ("ndcg", "hr")} for key, cell in runs.items()
    }
    metrics["repeats"] = {key: cell["each"] for key, cell in runs.items() if "each" in cell}
    short = name.replace("-", "")
    best = f"full, ε {TUNED_AT:g}"
    for against in (f"vanilla, ε {TUNED_AT:g}", "full, not private"):
        low, high = _ratio_interval(runs[best], runs[against])
        key = f"{short}_eps8_over_vanilla" if "vanilla" in against else f"{short}_eps8_of_non_private"
        metrics |= {
            key: round(runs[best]["ndcg"] / runs[against]["ndcg"], 3),
            f"{key}_low": round(low, 3),
            f"{key}_high": round(high, 3),
        }
        progress(f"{best} / {against}: {metrics[key]} [{low:.3f}, {high:.3f}]")
    keep = folder / "keep"
    keep.mkdir()
    epsilons_by_runs = {f"ε {epsilon:g} a night": plain.total_epsilons(epsilon) for epsilon in EPSILONS}
    (keep / "svg").write_text(
        plot_utility(
            {key: cell["ndcg"] for key, cell in runs.items()}, list(EPSILONS), RUN_COUNTS, epsilons_by_runs
        )
    )
    metrics["nights"] = {"nights": RUN_COUNTS, **epsilons_by_runs}
    return values, metrics


Run = Callable[[str, float | None, float, int], dict[str, Any]]
"""(method, ε, learning rate, number) -> figures"""


class CellStore:
    """The measured cells, one line each in a file."""

    def __init__(self, path: Path, progress: ProgressLog) -> None:
        self.path, self.progress = path, progress
        path.parent.mkdir(parents=True, exist_ok=True)
        # a last line without its end is incomplete
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines))
        self._measured: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(
        self, method: str, epsilon: float | None, rate: float, run: Run, number: int = 0
    ) -> dict[str, Any]:
        key = {"method": method, "epsilon": epsilon, "learning_rate": rate, "number": number}
        for cell in self._measured:
            if key.items() <= cell.items():
                return cell
        started = time.monotonic()
        cell = {**key, **run(method, epsilon, rate, number), "seconds": round(time.monotonic() - started, 1)}
        label = f"{method}, {'not private' if epsilon is None else f'ε {epsilon:g}'}, learning rate {rate:g}"
        self.progress(
            f"{label}: validation {cell['validation_ndcg']:.4f}, NDCG@10 {cell['ndcg']:.4f}, HR@10 "
            f"{cell['hr']:.4f}, {cell['seconds']:.0f} s"
        )
        self._measured.append(cell)
        with open(self.path, "a") as file:
            file.write(json.dumps(cell) + "\n")
        return cell


class UtilityData:
    """A data set with its queries, and the methods on it."""

    def __init__(self, folder: Path, data: str, overrides: list[str], *, fixed: bool) -> None:
        name = Path(data).name
        options = [
            *COMMON,
            *OF_DATA[name],
            "privacy.enabled=true",
            "privacy.cap=8",
            "train.warm_start=false",
            *overrides,
        ]
        options += ["model.items=features"] if fixed else ["data.features={}"]
        self.settings, self.dataset = (
            _prepare_synthetic(folder, options)
            if name == SYNTHETIC
            else prepare_data(data, folder, options, "video")
        )
        self.training_settings = training_settings(self.settings)
        self.queries = {
            part: select_single_target(EvaluationQueries(self.dataset, part))
            for part in ("validation", "test")
        }
        self.users = users_estimated(self.dataset)[1]

    def total_epsilons(self, epsilon: float) -> list[float]:
        """Total ε of the trainings of each number of runs."""
        mechanism = self.mechanism(epsilon)
        return [
            round(
                epsilon_of(
                    [
                        Steps(mechanism.sigma, mechanism.rate, mechanism.steps * count),
                        *mechanism.releases(count),
                    ],
                    mechanism.delta,
                ),
                2,
            )
            for count in RUN_COUNTS
        ]

    def mechanism(self, epsilon: float, **changed: Any) -> Mechanism:
        """The mechanism of one training at ε.

        changed : settings of section privacy
        """
        options = self.settings.privacy.model_copy(update={"epsilon": epsilon, "sigma": None, **changed})
        return mechanism_of(options, self.users)

    def run(self, method: str, epsilon: float | None, rate: float, number: int) -> dict[str, Any]:
        """Train and evaluate.

        epsilon : None: without privacy, on whole histories, to an early stop
        """
        torch.manual_seed(number)
        if method == "vanilla":
            assert epsilon is not None
            return self._run_vanilla(epsilon, rate)
        sequences = "last" if epsilon else "all"
        settings = self.training_settings.replace(
            "train", learning_rate=rate, seed=number, sequences=sequences
        )
        mechanism = None if epsilon is None else vars(self.mechanism(epsilon))
        loop = build_loop(str(self.dataset.path), settings, torch.device("cpu"), None, mechanism)
        for _ in loop.run():
            pass
        loop.finish()
        return _to_figures(
            {
                part: ranks_of(loop.ema_model.eval(), self.dataset, settings, queries)
                for part, queries in self.queries.items()
            }
        )

    def popularity(self, epsilon: float | None) -> dict[str, Any]:
        """The most popular items among the training users. Each user adds 1/√n to each of their n items; the
        noise is that of ε.
        """
        counts = weighted_counts(self.dataset, 0.0 if epsilon is None else 0.5)
        if epsilon is not None:
            counts += calibrate_gaussian(
                epsilon, self.settings.privacy.delta
            ) * np.random.default_rng().normal(size=len(counts))
        ranks = {
            part: ranks_by(lambda batch: np.tile(counts, (len(batch), 1)), queries)
            for part, queries in self.queries.items()
        }
        return _to_figures(ranks)

    def _run_vanilla(self, epsilon: float, rate: float) -> dict[str, Any]:
        shape = self.training_settings.model
        model = vanilla_peer.Vanilla(
            self.dataset.n_items, shape.dim, shape.blocks, shape.heads, shape.history, shape.dropout
        )
        vanilla_peer.train(
            model, *_rows(self.dataset, shape.history), self.mechanism(epsilon, counts_share=0.0), rate
        )
        model.eval()

        def score(batch: list[EvaluationQuery]) -> np.ndarray:
            item = np.zeros((len(batch), shape.history), np.int64)
            last = []
            for row, query in enumerate(batch):
                items = query.history.item_index[-shape.history :]
                item[row, : len(items)] = items
                last.append(max(len(items) - 1, 0))
            with torch.no_grad():
                result: np.ndarray = model(torch.from_numpy(item))[torch.arange(len(batch)), last].numpy()
                return result

        return _to_figures({part: ranks_by(score, queries) for part, queries in self.queries.items()})


def _prepare_synthetic(folder: Path, overrides: list[str]) -> tuple[Settings, Dataset]:
    SPECIFICATION.write(folder)
    paths = [
        f"data.events=[{folder / 'events'}]",
        f"data.items={folder / 'items.parquet'}",
        f"data.features={SYNTHETIC_FEATURES}",
    ]
    settings = load_settings(None, [*paths, f"storage.root={folder / 'root'}", *overrides])
    return settings, prepare_here(settings)


def select_single_target(queries: EvaluationQueries) -> list[EvaluationQuery]:
    """The queries with one unseen target."""
    return [
        query
        for batch in queries.batches(BATCH)
        for query in batch
        if len(targets_of(query, filter_seen=True)) == 1
    ]


def _rows(dataset: Dataset, history: int) -> tuple[np.ndarray, np.ndarray]:
    """The last items of each training user, and the item after each, [users, history] each; padding 0 on the
    right.
    """
    batches = TrainingBatches(
        dataset, history=history, batch_tokens=1, sequences="last", popularity_prior_days=0, seed=0
    )
    sequences = batches.last_sequences()
    item, following = np.zeros((2, len(sequences), history), np.int64)
    for row in range(len(sequences)):
        index = dataset.shard(int(sequences.shard[row])).item_index
        start, stop = int(sequences.start[row]), int(sequences.stop[row])
        item[row, : stop - start] = index[start:stop]
        following[row, : stop - start] = index[start + 1 : stop + 1]
    return item, following


def ranks_by(
    score: Callable[[list[EvaluationQuery]], np.ndarray], queries: list[EvaluationQuery]
) -> np.ndarray:
    """Rank from 1 of each query's target among the unseen items, ties by index."""
    ranks = []
    for first in range(0, len(queries), BATCH):
        batch = queries[first : first + BATCH]
        for query, row in zip(batch, score(batch), strict=True):
            target = int(targets_of(query, filter_seen=True)[0])
            free = np.ones(len(row), bool)
            free[0] = False
            free[query.history.item_index] = False
            above = (row > row[target]) | ((row == row[target]) & (np.arange(len(row)) < target))
            ranks.append(1 + int((above & free).sum()))
    return np.array(ranks)


def _to_figures(ranks: dict[str, np.ndarray]) -> dict[str, Any]:
    test = ranks["test"]
    figures = {
        "validation_ndcg": float(ndcg(ranks["validation"]).mean()),
        "ndcg": float(ndcg(test).mean()),
        "hr": float(hr(test).mean()),
    }
    return {**figures, "ranks": test.tolist()}


def _mean(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over repeated trainings; `ranks` has those of each."""
    means = {figure: float(np.mean([cell[figure] for cell in cells])) for figure in ("ndcg", "hr")}
    return {
        **means,
        "ranks": [cell["ranks"] for cell in cells],
        "each": [round(cell["ndcg"], 4) for cell in cells],
    }


def _ratio_interval(cell: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Bootstrap interval over users of the ratio of mean NDCG; each user's NDCG is the mean over repeats."""
    both = np.stack([ndcg(np.atleast_2d(np.array(row["ranks"]))).mean(0) for row in (cell, reference)], 1)
    means = m.bootstrap_means(both, RESAMPLES, 0)
    return m.interval(means[:, 0] / np.maximum(means[:, 1], 1e-9), CONFIDENCE)


def calibrate_gaussian(epsilon: float, delta: float) -> float:
    """The smallest σ of a Gaussian mechanism of sensitivity 1 (Balle and Wang, arXiv 1805.06530)."""

    def excess_delta(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        actual_delta = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(
            -0.5 / sigma - epsilon * sigma
        )
        return float(actual_delta - delta)

    return math.exp(float(brentq(excess_delta, -5.0, 10.0)))
