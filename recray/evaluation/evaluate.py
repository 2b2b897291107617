"""The evaluate stage: model and baselines on the test users, in both settings, with intervals and segments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import DataError
from recray.evaluation import metrics as m
from recray.evaluation.baselines import baselines
from recray.evaluation.protocol import SETTINGS, Question, Questions, Ranker, wanted
from recray.inference import Filters, Predictor
from recray.storage import Storage, is_sealed, key_of, sealed_directory
from recray.version import __version__

KIND = "evaluation"
MODEL = "recray"
BATCH = 256
LENGTH_BANDS = {"history 1-9": (1, 9), "history 10-49": (10, 49), "history 50-199": (50, 199), "history 200+": (200, np.inf)}
SEGMENTS = (*LENGTH_BANDS, "warm targets", "cold targets")

Table = dict[str, Any]
"""setting -> ranker -> {metric@k: mean, metric@k_low, metric@k_high, coverage@k, popularity_share@k, segments, …}"""


def evaluate_key(settings: Settings, dataset: Dataset, bundle: Bundle) -> str:
    """Run key of evaluate."""
    return key_of("evaluate", settings.result_settings("evaluate"), dataset.key, dataset.digest, bundle.digest, __version__)


def evaluate(settings: Settings, key: str, dataset: Dataset, bundle: Bundle) -> Table:
    """Evaluate a bundle on the test part of a dataset; writes and returns the table. Raises DataError without test users."""
    path = Storage(settings.root()).evaluation(key)
    if not is_sealed(path, KIND, key):
        table, ndcg = compare(settings, dataset, Predictor.load(bundle.path, dataset=dataset))
        with sealed_directory(path, KIND, key, {"bundle": bundle.key, "dataset": dataset.key}) as folder:
            (folder / "metrics.json").write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
            for setting, values in ndcg.items():
                np.save(folder / f"ndcg_{setting}.npy", values)
    return read_table(path)


def read_table(path: Path) -> Table:
    """The table of an evaluation directory, rankers in their order."""
    table = json.loads((path / "metrics.json").read_text())
    return {setting: {name: table[setting][name] for name in order(table[setting])} for setting in SETTINGS}


def read_ndcg(path: Path, setting: str) -> np.ndarray:
    """The model's headline NDCG of each test user that has a target in `setting`, float64 [U]."""
    found: np.ndarray = np.load(path / f"ndcg_{setting}.npy", allow_pickle=False)
    return found


def order(names: dict[str, Any]) -> list[str]:
    """The model first, then the baselines as they were tried."""
    return sorted(names, key=lambda name: names[name].get("order", 0))


def test_questions(settings: Settings, dataset: Dataset) -> Questions:
    """The test users of a dataset. Raises DataError if there are none."""
    questions = Questions(dataset, "test", max_users=settings.evaluate.max_users, seed=settings.evaluate.seed)
    if not len(questions):
        raise DataError(f"dataset {dataset.key} has no test users", "move split.test_from earlier, or use another split.kind")
    return questions


def compare(settings: Settings, dataset: Dataset, predictor: Predictor) -> tuple[Table, dict[str, np.ndarray]]:
    """The table of a predictor and all baselines, and by setting the predictor's NDCG of each user. Raises DataError without test users."""
    options = settings.evaluate
    questions = test_questions(settings, dataset)
    told_V = told_popularity(predictor, dataset)
    judge = Judge(settings, dataset, questions, told_V)
    reference = judge.run(model_ranker(predictor, dataset), {})
    table: Table = {setting: {MODEL: {**row, "order": 0}} for setting, (row, _) in reference.items()}
    rankers = baselines(dataset, questions, ease_max_items=options.ease_max_items, ease_l2=options.ease_l2, told_V=told_V)
    for number, (name, ranker) in enumerate(rankers, start=1):
        if isinstance(ranker, str):
            rows = {setting: {"skipped": ranker} for setting in SETTINGS}
        else:
            rows = {setting: row for setting, (row, _) in judge.run(ranker, {s: values for s, (_, values) in reference.items()}).items()}
        for setting in SETTINGS:
            if name == "personal frequency" and setting == "new_only":
                rows[setting] = {"skipped": "ranks what the user met"}
            table[setting][name] = {**rows[setting], "order": number}
    return table, {setting: ndcg for setting, (_, ndcg) in reference.items()}


def told_popularity(predictor: Predictor, dataset: Dataset) -> np.ndarray | None:
    """What may be told of how popular each item of a dataset is, float32 [n_items + 1], where users were protected; None where all may."""
    if not predictor.private:
        return None
    found = np.zeros(dataset.n_items + 1, np.float32)
    if predictor.model.offset_V is not None:
        found[predictor.translation(dataset).to_dataset] = predictor.counts()
    else:  # of those who are asked, up to what they are asked
        for shard in dataset.shards():
            place = np.arange(len(shard.item_index)) - np.repeat(shard.offsets[:-1], np.diff(shard.offsets))
            before = place < np.repeat(np.where(shard.asked, shard.split[:, 2], 0), np.diff(shard.offsets))
            found += np.bincount(shard.item_index[before], minlength=len(found))
    found[0] = 0.0
    return found


def model_ranker(predictor: Predictor, dataset: Dataset) -> Ranker:
    """The predictor as a ranker over a dataset's item indices."""
    translation = predictor.translation(dataset)

    def rank(questions: list[Question], k: int, *, new_only: bool) -> np.ndarray:
        histories = [translation.history(question.history) for question in questions]
        moments, contexts = [question.now for question in questions], [translation.context(question.context) for question in questions]
        answer = predictor.recommend(histories, k, now=moments, filters=Filters(new_only=new_only), context=contexts)
        found: np.ndarray = translation.to_dataset[answer.item_index]
        return found

    return rank


class Judge:
    """Runs rankers over the same users and reduces their lists to one row of the table. `told_V` as `told_popularity` has it."""

    def __init__(self, settings: Settings, dataset: Dataset, questions: Questions, told_V: np.ndarray | None = None) -> None:
        self.options, self.dataset, self.questions = settings.evaluate, dataset, questions
        self.popularity = dataset.popularity.total() if told_V is None else told_V
        self.trained = dataset.trained_items() if told_V is None else np.ones(dataset.n_items + 1, bool)

    def run(self, ranker: Ranker, reference: dict[str, np.ndarray]) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
        """By setting: the row, and the headline NDCG of each user. `reference` is the model's, for paired differences."""
        return {setting: self._setting(ranker, setting == "new_only", reference.get(setting)) for setting in SETTINGS}

    def _setting(self, ranker: Ranker, new_only: bool, reference: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray]:
        options, ks = self.options, self.options.k
        lists, targets, lengths = self._lists(ranker, new_only)
        if not targets:
            return {"skipped": "no test user has a target that is new"}, np.zeros(0)
        names = [f"{metric}@{k}" for k in ks for metric in m.METRICS]
        columns = np.stack([column for k in ks for column in m.per_user(lists, targets, k).values()], 1)
        headline = columns[:, names.index(f"ndcg@{ks[0]}")]
        joined = columns if reference is None else np.column_stack([columns, reference - headline])
        samples = m.bootstrap_means(joined, options.bootstrap, options.seed)
        row: dict[str, Any] = {"users": len(targets)}
        for column, name in enumerate(names):
            row[name] = float(columns[:, column].mean())
            row[f"{name}_low"], row[f"{name}_high"] = m.interval(samples[:, column], options.confidence)
        if reference is not None:
            row["model_lead"] = float((reference - headline).mean())
            row["model_lead_low"], row["model_lead_high"] = m.interval(samples[:, -1], options.confidence)
        for k in ks:
            row[f"coverage@{k}"] = m.coverage(lists, k, self.dataset.n_items)
            row[f"popularity_share@{k}"] = m.popularity_share(lists, k, self.popularity)
        row["segments"] = self._segments(lists, targets, lengths, headline)
        return row, headline

    def _lists(self, ranker: Ranker, new_only: bool) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        lists, targets, lengths = [], [], []
        for asked, asked_targets in self._asked(new_only):
            lists.append(ranker(asked, max(self.options.k), new_only=new_only))
            targets += asked_targets
            lengths += [len(question.history.item_index) for question in asked]
        return np.concatenate(lists) if lists else np.zeros((0, 0), np.int64), targets, np.array(lengths)

    def _asked(self, new_only: bool) -> Iterator[tuple[list[Question], list[np.ndarray]]]:
        for batch in self.questions.batches(BATCH):
            kept = [(question, items) for question in batch if len(items := wanted(question, new_only=new_only))]
            if kept:
                yield [question for question, _ in kept], [items for _, items in kept]

    def _segments(self, lists: np.ndarray, targets: list[np.ndarray], lengths: np.ndarray, ndcg: np.ndarray) -> dict[str, Any]:
        """Headline NDCG by history length, and for the targets that training never saw (cold) or saw (warm)."""
        segments: dict[str, Any] = {}
        for name, (low, high) in LENGTH_BANDS.items():
            segments[name] = _segment(ndcg[(lengths >= low) & (lengths <= high)])
        k = self.options.k[0]
        for name, is_warm in (("warm targets", True), ("cold targets", False)):
            kept = [(row, items[self.trained[items] == is_warm]) for row, items in enumerate(targets)]
            kept = [(row, items) for row, items in kept if len(items)]
            values = m.per_user(lists[[row for row, _ in kept]], [items for _, items in kept], k)["ndcg"] if kept else np.zeros(0)
            segments[name] = _segment(values)
        return segments


def _segment(values: np.ndarray) -> dict[str, Any]:
    return {"users": len(values), "ndcg": float(values.mean()) if len(values) else None}
