"""Private trainings night after night: at twelve cuts of a growing log, each begins where the one before ended, and all share one ε.

At each cut it stands beside popularity, counted with the noise that the same training pays for, and beside one training that had the whole ε at the
first cut and is only used after it. What was measured is kept, cell by cell, and the weights under the user's cache.
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
from recray.benchmark.utility import COMMON, OF_DATA, SPECIFICATION, WORLD, ranks_by, single
from recray.bundle import Bundle, write_bundle
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.evaluation import metrics as m
from recray.evaluation.protocol import Questions
from recray.prepare.prepare import one_by_one, prepare
from recray.privacy.accounting import mechanism_of
from recray.stages import Say
from recray.storage import key_of, sha256_file
from recray.testing.synthetic import START_S
from recray.training.batches import users_estimated
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop
from recray.version import __version__

CUTS, FIRST_DAY, EVERY_DAYS = 12, 65, 5
SEEDS = 3
CAP = 8.0
LAST = 3  # cuts at which the reused training is old


def measure_cuts(folder: Path, overrides: list[str], say: Say, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`lead_over_popularity_least`, the smallest over the cuts of the mean lead in NDCG@10, and `lead_over_reused`, the mean lead at the last cuts;
    each `_low` is the lower end of its interval, over users, of the mean of the seeds."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    SPECIFICATION.write(folder)
    named = [f"data.events=[{folder / 'events'}]", f"data.items={folder / 'items.parquet'}", f"storage.root={folder / 'root'}"]
    fixed = [*COMMON, *OF_DATA[WORLD], "train.learning_rate=0.01", "privacy.enabled=true", f"privacy.cap={CAP:g}", f"privacy.trainings={CUTS}"]
    settings = load_settings(None, [*named, *fixed, *overrides])
    chosen = bundle_settings(settings)
    moments = [dt.datetime.fromtimestamp(START_S + 86_400 * (FIRST_DAY + EVERY_DAYS * cut), dt.UTC) for cut in range(CUTS)]
    datasets = [prepare(settings, moment, each=one_by_one) for moment in moments]
    key = key_of(chosen, [dataset.digest for dataset in datasets], SEEDS, __version__, sha256_file(Path(__file__)))
    nights = Nights(settings, datasets, cache().parent / "cuts" / key, out / f"privacy-cuts-{key}.cells.jsonl", say)
    found = [[nights.cell(seed, cut) for cut in range(CUTS)] for seed in range(SEEDS)]
    return chosen, _metrics(found, [str(moment.date()) for moment in moments], say)


class Nights:
    """The trainings of all seeds, and what was measured of them at each cut."""

    def __init__(self, settings: Settings, datasets: list[Dataset], weights: Path, cells: Path, say: Say) -> None:
        self.settings, self.datasets, self.weights, self.cells, self.say = settings, datasets, weights, cells, say
        cells.parent.mkdir(parents=True, exist_ok=True)
        lines = cells.read_text().split("\n")[:-1] if cells.exists() else []
        cells.write_text("".join(f"{line}\n" for line in lines))
        self.known: dict[tuple[int, int], dict[str, Any]] = {(cell["seed"], cell["cut"]): cell for cell in map(json.loads, lines)}

    def cell(self, seed: int, cut: int) -> dict[str, Any]:
        """Ranks of what the users who are held out met last, by what answers; measured unless it is known."""
        if (seed, cut) in self.known:
            return self.known[seed, cut]
        begun, dataset = time.monotonic(), self.datasets[cut]
        asked = single(Questions(dataset, "test"))
        bundle, reused = self.bundle(seed, cut), self.bundle(seed, 0, alone=True)
        chosen = bundle_settings(self.settings)
        mine, offset_V = bundle.model(), bundle.model().offset_V
        assert offset_V is not None
        popular = offset_V.numpy()
        ranks = {
            "private": ranks_of(mine, dataset, chosen, asked).tolist(),
            "reused": ranks_of(reused.model(), dataset, chosen, asked).tolist(),
            "popularity": ranks_by(lambda batch: np.tile(popular, (len(batch), 1)), asked).tolist(),
        }
        found = {"seed": seed, "cut": cut, "seconds": round(time.monotonic() - begun, 1), "ranks": ranks}
        figures = ", ".join(f"{name} {ndcg(np.array(values)).mean():.4f}" for name, values in ranks.items())
        self.say(f"seed {seed}, cut {cut + 1} of {CUTS}: {figures}; {found['seconds']:.0f} s")
        self.known[seed, cut] = found
        with open(self.cells, "a") as file:
            file.write(json.dumps(found) + "\n")
        return found

    def bundle(self, seed: int, cut: int, *, alone: bool = False) -> Bundle:
        """The training of a cut, which begins with that of the cut before; `alone`: one that has the whole ε for itself."""
        path = self.weights / f"{seed}-{'alone' if alone else cut}"
        if path.exists():
            return Bundle.open(path)
        parent = str(self.bundle(seed, cut - 1).path) if cut else None
        options = self.settings.privacy if not alone else self.settings.privacy.model_copy(update={"trainings": 1})
        dataset, chosen = self.datasets[cut], bundle_settings(self.settings)
        chosen = {**chosen, "train": {**chosen["train"], "seed": seed}}
        mechanism = mechanism_of(options, users_estimated(dataset)[1])
        loop = build_loop(dataset, chosen, torch.device("cpu"), parent, vars(mechanism))
        for _ in loop.run():
            pass
        loop.average.load_state_dict(loop.best)
        named: dict[str, Any] = {"dataset": dataset, "shape": loop.model.shape, "state": loop.best, "features": {}, "prior_days": 0}
        return write_bundle(path, path.name, **named, settings=chosen, metrics={}, privacy=mechanism.statement())


def _metrics(found: list[list[dict[str, Any]]], dates: list[str], say: Say) -> dict[str, Any]:
    """Figures of the cells [seeds][cuts]."""

    def users(cut: int, name: str) -> np.ndarray:
        each: np.ndarray = np.mean([ndcg(np.array(cells[cut]["ranks"][name])) for cells in found], 0)
        return each

    table, leads = [], []
    for cut, date in enumerate(dates):
        private, popular, reused = (users(cut, name) for name in ("private", "popularity", "reused"))
        leads.append(_interval(private - popular))
        table.append([date, *(round(float(values.mean()), 4) for values in (private, popular, reused)), len(private)])
        say(f"{date}: private {private.mean():.4f}, popularity {popular.mean():.4f}, reused {reused.mean():.4f}; {len(private)} users")
    least = min(leads)
    old = np.concatenate([users(cut, "private") - users(cut, "reused") for cut in range(len(dates) - LAST, len(dates))])
    mean, low, high = _interval(old)
    metrics: dict[str, Any] = {"table": table, "lead_over_popularity_least": round(least[0], 5), "lead_over_popularity_least_low": round(least[1], 5)}
    return {**metrics, "lead_over_reused": round(mean, 5), "lead_over_reused_low": round(low, 5), "lead_over_reused_high": round(high, 5)}


def _interval(lead: np.ndarray) -> tuple[float, float, float]:
    """Mean, and its bootstrap interval over users."""
    low, high = m.interval(m.bootstrap_means(lead[:, None], RESAMPLES, 0)[:, 0], CONFIDENCE)
    return float(lead.mean()), low, high
