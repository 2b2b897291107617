"""Private trainings at twelve cutoffs of a growing log. Each starts from the weights of the previous one, and
all share one ε.

At each cutoff it is compared with popularity, counted with the noise of the same training, and with a single
training that had the whole ε at the first cutoff. Measured cells are written to a file, and weights to the
user's cache.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recray.benchmark.peers import cache
from recray.benchmark.quality import CONFIDENCE, RESAMPLES, ndcg, ranks_of
from recray.benchmark.utility import COMMON, OF_DATA, SPECIFICATION, SYNTHETIC, ranks_by, select_single_target
from recray.bundle import Bundle, write_bundle
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.evaluation import metrics as m
from recray.evaluation.protocol import EvaluationQueries
from recray.prepare.prepare import prepare, run_in_process
from recray.privacy.accounting import mechanism_of
from recray.stages import ProgressLog
from recray.storage import key_of, sha256_file
from recray.testing.synthetic import START_S
from recray.training.batches import users_estimated
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop
from recray.version import __version__

CUTS, FIRST_DAY, EVERY_DAYS = 12, 65, 5
SEEDS = 3
CAP = 8.0
LAST = 3  # cutoffs at which the reused training is old


def measure_cuts(
    folder: Path, overrides: list[str], progress: ProgressLog, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`lead_over_popularity_least`, the minimum over the cutoffs of the mean difference in NDCG@10, and
    `lead_over_reused`, the mean difference at the last cutoffs. `_low` is the lower end of the interval over
    users, of the mean over seeds.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    SPECIFICATION.write(folder)
    paths = [
        f"data.events=[{folder / 'events'}]",
        f"data.items={folder / 'items.parquet'}",
        f"storage.root={folder / 'root'}",
    ]
    options = [
        *COMMON,
        *OF_DATA[SYNTHETIC],
        "train.learning_rate=0.01",
        "privacy.enabled=true",
        f"privacy.cap={CAP:g}",
        f"privacy.trainings={CUTS}",
    ]
    settings = load_settings(None, [*paths, *options, *overrides])
    values = bundle_settings(settings)
    cutoffs = [
        dt.datetime.fromtimestamp(START_S + 86_400 * (FIRST_DAY + EVERY_DAYS * cut), dt.UTC)
        for cut in range(CUTS)
    ]
    datasets = [prepare(settings, cutoff, run_tasks=run_in_process) for cutoff in cutoffs]
    key = key_of(
        values, [dataset.digest for dataset in datasets], SEEDS, __version__, sha256_file(Path(__file__))
    )
    series = TrainingSeries(
        settings, datasets, cache().parent / "cuts" / key, out / f"privacy-cuts-{key}.cells.jsonl", progress
    )
    cells = [[series.measure(seed, cut) for cut in range(CUTS)] for seed in range(SEEDS)]
    return values, _to_metrics(cells, [str(cutoff.date()) for cutoff in cutoffs], progress)


class TrainingSeries:
    """The trainings of all seeds, and their measured cells at each cutoff."""

    def __init__(
        self, settings: Settings, datasets: list[Dataset], weights: Path, cells: Path, progress: ProgressLog
    ) -> None:
        self.settings, self.datasets, self.weights, self.cells, self.progress = (
            settings,
            datasets,
            weights,
            cells,
            progress,
        )
        cells.parent.mkdir(parents=True, exist_ok=True)
        lines = cells.read_text().split("\n")[:-1] if cells.exists() else []
        cells.write_text("".join(f"{line}\n" for line in lines))
        self._measured: dict[tuple[int, int], dict[str, Any]] = {
            (cell["seed"], cell["cut"]): cell for cell in map(json.loads, lines)
        }

    def measure(self, seed: int, cut: int) -> dict[str, Any]:
        """Ranks of the holdout users' last items by method; a measured cell is returned as it is."""
        if (seed, cut) in self._measured:
            return self._measured[seed, cut]
        started, dataset = time.monotonic(), self.datasets[cut]
        queries = select_single_target(EvaluationQueries(dataset, "test"))
        bundle, reused = self.bundle(seed, cut), self.bundle(seed, 0, alone=True)
        settings = training_settings(self.settings)
        model, offset_V = bundle.model(), bundle.model().offset_V
        assert offset_V is not None
        popular = offset_V.numpy()
        ranks = {
            "private": ranks_of(model, dataset, settings, queries).tolist(),
            "reused": ranks_of(reused.model(), dataset, settings, queries).tolist(),
            "popularity": ranks_by(lambda batch: np.tile(popular, (len(batch), 1)), queries).tolist(),
        }
        cell = {"seed": seed, "cut": cut, "seconds": round(time.monotonic() - started, 1), "ranks": ranks}
        figures = ", ".join(f"{name} {ndcg(np.array(values)).mean():.4f}" for name, values in ranks.items())
        self.progress(f"seed {seed}, cutoff {cut + 1} of {CUTS}: {figures}; {cell['seconds']:.0f} s")
        self._measured[seed, cut] = cell
        with open(self.cells, "a") as file:
            file.write(json.dumps(cell) + "\n")
        return cell

    def bundle(self, seed: int, cut: int, *, alone: bool = False) -> Bundle:
        """The training of a cutoff, which starts from that of the previous one.

        alone : a training with the whole ε
        """
        path = self.weights / f"{seed}-{'alone' if alone else cut}"
        if path.exists():
            return Bundle.open(path)
        parent = str(self.bundle(seed, cut - 1).path) if cut else None
        options = (
            self.settings.privacy if not alone else self.settings.privacy.model_copy(update={"trainings": 1})
        )
        dataset, settings = self.datasets[cut], training_settings(self.settings).replace("train", seed=seed)
        mechanism = mechanism_of(options, users_estimated(dataset)[1])
        loop = build_loop(dataset, settings, torch.device("cpu"), parent, vars(mechanism))
        for _ in loop.run():
            pass
        loop.finish()
        return write_bundle(
            path,
            path.name,
            dataset=dataset,
            shape=loop.model.shape,
            state=loop.best,
            settings=bundle_settings(settings),
            metrics={},
            privacy=mechanism.statement(),
        )


def _to_metrics(cells: list[list[dict[str, Any]]], dates: list[str], progress: ProgressLog) -> dict[str, Any]:
    """Figures of the cells [seeds][cutoffs]."""

    def user_ndcg(cut: int, name: str) -> np.ndarray:
        result: np.ndarray = np.mean([ndcg(np.array(by_cut[cut]["ranks"][name])) for by_cut in cells], 0)
        return result

    table, differences = [], []
    for cut, date in enumerate(dates):
        private, popular, reused = (user_ndcg(cut, name) for name in ("private", "popularity", "reused"))
        differences.append(_interval(private - popular))
        table.append(
            [date, *(round(float(values.mean()), 4) for values in (private, popular, reused)), len(private)]
        )
        progress(
            f"{date}: private {private.mean():.4f}, popularity {popular.mean():.4f}, reused "
            f"{reused.mean():.4f}; {len(private)} users"
        )
    least = min(differences)
    over_reused = np.concatenate(
        [user_ndcg(cut, "private") - user_ndcg(cut, "reused") for cut in range(len(dates) - LAST, len(dates))]
    )
    mean, low, high = _interval(over_reused)
    metrics: dict[str, Any] = {
        "table": table,
        "lead_over_popularity_least": round(least[0], 5),
        "lead_over_popularity_least_low": round(least[1], 5),
    }
    return {
        **metrics,
        "lead_over_reused": round(mean, 5),
        "lead_over_reused_low": round(low, 5),
        "lead_over_reused_high": round(high, 5),
    }


def _interval(difference: np.ndarray) -> tuple[float, float, float]:
    """Mean, and its bootstrap interval over users."""
    low, high = m.interval(m.bootstrap_means(difference[:, None], RESAMPLES, 0)[:, 0], CONFIDENCE)
    return float(difference.mean()), low, high
