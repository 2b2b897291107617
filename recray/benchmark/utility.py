"""What privacy costs in quality: NDCG of users who are held out, by ε, beside popularity and a transformer under Opacus as it comes.

Each method has the same trials of the learning rate at ε = 8, chosen on the validation of the held-out users. A cell that was
measured before lies in a file of cells and is not measured again, so that a run that was stopped goes on.
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
from recray.benchmark.data import prepared
from recray.benchmark.quality import BATCH, CONFIDENCE, RESAMPLES, hr, ndcg, ranks_of
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.errors import SettingsError
from recray.evaluation import metrics as m
from recray.evaluation.plots import utility
from recray.evaluation.protocol import Question, Questions, wanted
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, mechanism_of
from recray.privacy.counts import weighted_counts
from recray.stages import Say
from recray.storage import key_of, sha256_file
from recray.testing.published import prepare_here
from recray.testing.synthetic import SyntheticShop
from recray.training.batches import TrainingBatches, users_estimated
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop
from recray.version import __version__

EPSILONS = (1.0, 3.0, 8.0)
TUNED_AT = EPSILONS[-1]
REPEATS = 3  # of the trainings at the last ε, each with weights, users and noise of its own
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
METHODS = ("full", "public features", "vanilla")
WORLD = "world"
SPECIFICATION = SyntheticShop(users=100_000, items=2_000, events_per_user=20.0, noise=0.1, repeat=0.0, seed=7)
NIGHTS = (1, 2, 3, 5, 7, 10, 14, 21, 30)

COMMON = (
    *("model.preset=dp", "model.dim=32", "model.blocks=1", "model.dropout=0.1", "model.id_dropout=0", "model.time_bias=false"),
    *("model.values=false", "model.repeat=false", "model.prior_days=0", "data.context=[]", "data.released=null", "split.kind=leave_one_out"),
    *("train.loss=softmax", "train.horizon=1", "train.windows=last", "train.average_decay=0.95", "train.warmup_steps=10"),
    *("train.epochs=100", "train.patience=8"),
    *("train.temperature_jitter=0", "evaluate.primary_setting=new_only", "evaluate.k=[10]", "gates.must_beat=[]"),
)
OF_DATA = {
    "ml-1m": ("model.history=50", "split.held_out=0.25", "privacy.delta=1e-5", "privacy.sampling_rate=0.2", "privacy.steps=100"),
    WORLD: ("model.history=20", "split.held_out=0.05", "privacy.delta=1e-6", "privacy.sampling_rate=0.02", "privacy.steps=300"),
}
FEATURES_OF_WORLD = "{category: categorical, brand: categorical, price: numeric, tags: multi, title: text}"


def measure_utility(folder: Path, data: str, overrides: list[str], say: Say, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """NDCG@10 and HR@10 by method and ε; `<data>_eps8_over_vanilla` (without hyphens) and `<data>_eps8_of_non_private`.

    data : ml-1m (a folder, or its name under $RECRAY_DATA) or world, the synthetic one
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    name = Path(data).name
    if name not in OF_DATA:
        raise SettingsError(f"benchmark privacy: {data} is none of {', '.join(OF_DATA)}", "name one, or no --data for the cost of a step")
    bench = {fixed: _Bench(folder / f"fixed-{fixed}", data, [*overrides], fixed=fixed) for fixed in (False, True)}
    plain = bench[False]
    chosen = bundle_settings(plain.settings)
    code = [sha256_file(Path(file)) for file in (__file__, vanilla_peer.__file__)]
    key = key_of(chosen, [one.dataset.digest for one in bench.values()], LEARNING_RATES, __version__, code)
    cells = _Cells(out / f"privacy-{name}-{key}.cells.jsonl", say)
    runs: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        one = bench[method == "public features"]
        trials = [cells.get(method, TUNED_AT, rate, one.run) for rate in LEARNING_RATES]
        rate = max(trials, key=lambda cell: cell["validation_ndcg"])["learning_rate"]
        for epsilon in EPSILONS[:-1]:
            runs[f"{method}, ε {epsilon:g}"] = cells.get(method, epsilon, rate, one.run)
        at_8 = [cells.get(method, TUNED_AT, rate, one.run, number) for number in range(REPEATS)]
        runs[f"{method}, ε {TUNED_AT:g}"] = _mean(at_8)
        if method != "vanilla":
            free = [cells.get(method, None, trial, one.run) for trial in LEARNING_RATES[:-1]]  # the last is for noise alone
            runs[f"{method}, not private"] = max(free, key=lambda cell: cell["validation_ndcg"])
    runs |= {f"popularity, ε {epsilon:g}": plain.popularity(epsilon) for epsilon in EPSILONS} | {"popularity, not private": plain.popularity(None)}
    metrics: dict[str, Any] = {"users": len(plain.asked["test"]), "items": plain.dataset.n_items, "learned_from": plain.users}
    metrics["table"] = {key: {figure: round(cell[figure], 4) for figure in ("ndcg", "hr")} for key, cell in runs.items()}
    metrics["repeats"] = {key: cell["each"] for key, cell in runs.items() if "each" in cell}
    short = name.replace("-", "")
    best = f"full, ε {TUNED_AT:g}"
    for against in (f"vanilla, ε {TUNED_AT:g}", "full, not private"):
        low, high = _ratio_interval(runs[best], runs[against])
        key = f"{short}_eps8_over_vanilla" if "vanilla" in against else f"{short}_eps8_of_non_private"
        metrics |= {key: round(runs[best]["ndcg"] / runs[against]["ndcg"], 3), f"{key}_low": round(low, 3), f"{key}_high": round(high, 3)}
        say(f"{best} over {against}: {metrics[key]} [{low:.3f}, {high:.3f}]")
    keep = folder / "keep"
    keep.mkdir()
    nights = {f"ε {epsilon:g} a night": plain.nights(epsilon) for epsilon in EPSILONS}
    (keep / "svg").write_text(utility({key: cell["ndcg"] for key, cell in runs.items()}, list(EPSILONS), NIGHTS, nights))
    metrics["nights"] = {"nights": NIGHTS, **nights}
    return chosen, metrics


Run = Callable[[str, float | None, float, int], dict[str, Any]]
"""(method, ε, learning rate, number) -> figures"""


class _Cells:
    """What was measured, a line a cell."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.say = path, say
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a last line without its end is torn
        path.write_text("".join(f"{line}\n" for line in lines))
        self.known: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, method: str, epsilon: float | None, rate: float, run: Run, number: int = 0) -> dict[str, Any]:
        key = {"method": method, "epsilon": epsilon, "learning_rate": rate, "number": number}
        for cell in self.known:
            if key.items() <= cell.items():
                return cell
        begun = time.monotonic()
        cell = {**key, **run(method, epsilon, rate, number), "seconds": round(time.monotonic() - begun, 1)}
        named = f"{method}, {'not private' if epsilon is None else f'ε {epsilon:g}'}, learning rate {rate:g}"
        self.say(f"{named}: validation {cell['validation_ndcg']:.4f}, NDCG@10 {cell['ndcg']:.4f}, HR@10 {cell['hr']:.4f}, {cell['seconds']:.0f} s")
        self.known.append(cell)
        with open(self.path, "a") as file:
            file.write(json.dumps(cell) + "\n")
        return cell


class _Bench:
    """A data set with the users who are asked, and the methods on it."""

    def __init__(self, folder: Path, data: str, overrides: list[str], *, fixed: bool) -> None:
        name = Path(data).name
        more = [*COMMON, *OF_DATA[name], "privacy.enabled=true", "privacy.cap=8", "train.warm_start=false", *overrides]
        more += ["model.items=features"] if fixed else ["data.features={}"]
        self.settings, self.dataset = _world(folder, more) if name == WORLD else prepared(data, folder, more, "video")
        self.chosen = bundle_settings(self.settings)
        self.asked = {part: single(Questions(self.dataset, part)) for part in ("validation", "test")}
        self.users = users_estimated(self.dataset)[1]

    def nights(self, epsilon: float) -> list[float]:
        """ε of so many trainings together."""
        one = self.mechanism(epsilon)
        return [round(epsilon_of([Steps(one.sigma, one.rate, one.steps * count), *one.releases(count)], one.delta), 2) for count in NIGHTS]

    def mechanism(self, epsilon: float, **changed: Any) -> Mechanism:
        """One training at ε, with settings of section privacy changed."""
        options = self.settings.privacy.model_copy(update={"epsilon": epsilon, "sigma": None, **changed})
        return mechanism_of(options, self.users)

    def run(self, method: str, epsilon: float | None, rate: float, number: int) -> dict[str, Any]:
        """Train and ask; epsilon None: without privacy, on whole histories, to an early stop."""
        torch.manual_seed(number)
        if method == "vanilla":
            assert epsilon is not None
            return self._vanilla(epsilon, rate)
        train = {**self.chosen["train"], "learning_rate": rate, "seed": number, "windows": "last" if epsilon else "all"}
        chosen = {**self.chosen, "train": train}
        watched = None if epsilon is None else vars(self.mechanism(epsilon))
        loop = build_loop(str(self.dataset.path), chosen, torch.device("cpu"), None, watched)
        for _ in loop.run():
            pass
        loop.average.load_state_dict(loop.best)
        return _figures({part: ranks_of(loop.average.eval(), self.dataset, chosen, asked) for part, asked in self.asked.items()})

    def popularity(self, epsilon: float | None) -> dict[str, Any]:
        """The most popular items among the users who are learned from; each adds 1/√n to each of its n items, and noise what ε asks."""
        counts = weighted_counts(self.dataset, 0.0 if epsilon is None else 0.5)
        if epsilon is not None:
            counts += _gaussian(epsilon, self.settings.privacy.delta) * np.random.default_rng().normal(size=len(counts))
        found = {part: ranks_by(lambda batch: np.tile(counts, (len(batch), 1)), asked) for part, asked in self.asked.items()}
        return _figures(found)

    def _vanilla(self, epsilon: float, rate: float) -> dict[str, Any]:
        shape = self.chosen["model"]
        model = vanilla_peer.Vanilla(self.dataset.n_items, shape["dim"], shape["blocks"], shape["heads"], shape["history"], shape["dropout"])
        vanilla_peer.train(model, *_rows(self.dataset, shape["history"]), self.mechanism(epsilon, counts_share=0.0), rate)
        model.eval()

        def scores(batch: list[Question]) -> np.ndarray:
            item = np.zeros((len(batch), shape["history"]), np.int64)
            last = []
            for row, question in enumerate(batch):
                known = question.history.item_index[-shape["history"] :]
                item[row, : len(known)] = known
                last.append(max(len(known) - 1, 0))
            with torch.no_grad():
                found: np.ndarray = model(torch.from_numpy(item))[torch.arange(len(batch)), last].numpy()
            return found

        return _figures({part: ranks_by(scores, asked) for part, asked in self.asked.items()})


def _world(folder: Path, overrides: list[str]) -> tuple[Settings, Dataset]:
    SPECIFICATION.write(folder)
    named = [f"data.events=[{folder / 'events'}]", f"data.items={folder / 'items.parquet'}", f"data.features={FEATURES_OF_WORLD}"]
    settings = load_settings(None, [*named, f"storage.root={folder / 'root'}", *overrides])
    return settings, prepare_here(settings)


def single(questions: Questions) -> list[Question]:
    """The questions that want one item which is new to the user."""
    return [question for batch in questions.batches(BATCH) for question in batch if len(wanted(question, new_only=True)) == 1]


def _rows(dataset: Dataset, history: int) -> tuple[np.ndarray, np.ndarray]:
    """The last events of each user who is learned from, and what followed each; padding 0 on the right."""
    batches = TrainingBatches(dataset, history=history, batch_positions=1, windows="last", prior_days=0, seed=0)
    windows = batches.last_windows()
    item, following = np.zeros((2, len(windows), history), np.int64)
    for row in range(len(windows)):
        index = dataset.shard(int(windows.shard[row])).item_index
        start, stop = int(windows.start[row]), int(windows.stop[row])
        item[row, : stop - start] = index[start:stop]
        following[row, : stop - start] = index[start + 1 : stop + 1]
    return item, following


def ranks_by(scores: Callable[[list[Question]], np.ndarray], asked: list[Question]) -> np.ndarray:
    """Rank from 1 of the wanted item among all that the user did not meet, ties by index."""
    ranks = []
    for first in range(0, len(asked), BATCH):
        batch = asked[first : first + BATCH]
        for question, row in zip(batch, scores(batch), strict=True):
            target = int(wanted(question, new_only=True)[0])
            free = np.ones(len(row), bool)
            free[0] = False
            free[question.history.item_index] = False
            above = (row > row[target]) | ((row == row[target]) & (np.arange(len(row)) < target))
            ranks.append(1 + int((above & free).sum()))
    return np.array(ranks)


def _figures(ranks: dict[str, np.ndarray]) -> dict[str, Any]:
    test = ranks["test"]
    found = {"validation_ndcg": float(ndcg(ranks["validation"]).mean()), "ndcg": float(ndcg(test).mean()), "hr": float(hr(test).mean())}
    return {**found, "ranks": test.tolist()}


def _mean(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over repeats; `ranks` holds those of each."""
    found = {figure: float(np.mean([cell[figure] for cell in cells])) for figure in ("ndcg", "hr")}
    return {**found, "ranks": [cell["ranks"] for cell in cells], "each": [round(cell["ndcg"], 4) for cell in cells]}


def _ratio_interval(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Bootstrap interval over users of the ratio of mean NDCG, each user's the mean over the repeats."""
    both = np.stack([ndcg(np.atleast_2d(np.array(cell["ranks"]))).mean(0) for cell in (ours, theirs)], 1)
    means = m.bootstrap_means(both, RESAMPLES, 0)
    return m.interval(means[:, 0] / np.maximum(means[:, 1], 1e-9), CONFIDENCE)


def _gaussian(epsilon: float, delta: float) -> float:
    """The smallest σ of a Gaussian mechanism of sensitivity 1 (Balle and Wang, arXiv 1805.06530)."""

    def beyond(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        inside = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)
        return float(inside - delta)

    return math.exp(float(brentq(beyond, -5.0, 10.0)))
