"""The evaluate stage: model and baselines on the test users, under both protocols, with confidence intervals
and segments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from recray.bundle import Bundle
from recray.config import Settings
from recray.config.formats import PROTOCOLS as RENAMED
from recray.config.formats import RESULTS_SINCE, first_protocol
from recray.dataset.reader import Dataset
from recray.errors import DataError
from recray.evaluation import metrics as m
from recray.evaluation.baselines import fit_baselines
from recray.evaluation.protocol import PROTOCOLS, EvaluationQueries, EvaluationQuery, Ranker, targets_of
from recray.inference import Filters, Predictor
from recray.plugins import list_plugins
from recray.storage import Storage, immutable_directory, is_complete, key_of

KIND = "evaluation"
MODEL = "recray"
BATCH = 256
LENGTH_BANDS = {
    "history 1-9": (1, 9),
    "history 10-49": (10, 49),
    "history 50-199": (50, 199),
    "history 200+": (200, np.inf),
}
SEGMENTS = (*LENGTH_BANDS, "warm targets", "cold targets")

Row = dict[str, Any]
"""The results of a ranker under a protocol: `users`; metric@k, its mean over the users, with metric@k_low and
metric@k_high; coverage@k and popularity_share@k; `segments` (name -> `Segment`). In a table also `order`, and
for a baseline `model_lead`, the model's NDCG minus its own, with `model_lead_low` and `model_lead_high`. A
ranker that cannot be evaluated has only `skipped`, the reason.
"""

Table = dict[str, dict[str, Row]]
"""protocol -> ranker -> its row"""


class Segment(TypedDict):
    """Headline NDCG of a part of the users or targets; None without users."""

    users: int
    ndcg: float | None


def evaluate_key(settings: Settings, dataset: Dataset, bundle: Bundle) -> str:
    """Run key of evaluate."""
    return key_of(
        "evaluate",
        settings.key_settings("evaluate"),
        dataset.key,
        dataset.digest,
        bundle.digest,
        RESULTS_SINCE,
        *list_plugins("metrics").items(),
    )


def evaluate(settings: Settings, key: str, dataset: Dataset, bundle: Bundle) -> Table:
    """Evaluate a bundle on the test part of a dataset; write and return the table. Raises DataError without
    test users.
    """
    path = Storage(settings.root()).evaluation(key)
    if not is_complete(path, KIND, key):
        table, ndcg = compare(settings, dataset, Predictor.load(bundle.path, dataset=dataset))
        with immutable_directory(path, KIND, key, {"bundle": bundle.key, "dataset": dataset.key}) as folder:
            (folder / "metrics.json").write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
            for protocol, values in ndcg.items():
                np.save(folder / f"ndcg_{protocol}.npy", values)
    return read_table(path)


def read_table(path: Path) -> Table:
    """The table of an evaluation folder, with the rankers in order."""
    content = json.loads((path / "metrics.json").read_text())
    table = {RENAMED.get(protocol, protocol): rows for protocol, rows in content.items()}
    return {
        protocol: {name: table[protocol][name] for name in order_rankers(table[protocol])}
        for protocol in PROTOCOLS
    }


def read_ndcg(path: Path, protocol: str) -> np.ndarray:
    """The model's headline NDCG of each test user that has a target under `protocol`, float64 [U]."""
    file = path / f"ndcg_{protocol}.npy"
    if not file.exists():
        file = path / f"ndcg_{first_protocol(protocol)}.npy"
    result: np.ndarray = np.load(file, allow_pickle=False)
    return result


def order_rankers(rows: dict[str, Row]) -> list[str]:
    """Names of the rankers: the model first, then the baselines in the order of their evaluation."""
    return sorted(rows, key=lambda name: rows[name].get("order", 0))


def select_test_queries(settings: Settings, dataset: Dataset) -> EvaluationQueries:
    """The test users of a dataset. Raises DataError if there are none."""
    queries = EvaluationQueries(
        dataset, "test", max_users=settings.evaluate.max_users, seed=settings.evaluate.seed
    )
    if not len(queries):
        raise DataError(
            f"dataset {dataset.key} has no test users",
            "move split.test_from earlier, or use another split.kind",
        )
    return queries


def compare(
    settings: Settings, dataset: Dataset, predictor: Predictor
) -> tuple[Table, dict[str, np.ndarray]]:
    """The table of a predictor and all baselines, and by protocol the predictor's NDCG of each user. Raises
    DataError without test users.
    """
    options = settings.evaluate
    queries = select_test_queries(settings, dataset)
    public_popularity_V = count_public_popularity(predictor, dataset)
    evaluator = Evaluator(settings, dataset, queries, public_popularity_V)
    reference = evaluator.run(to_ranker(predictor, dataset), {})
    reference_ndcg = {protocol: ndcg for protocol, (_, ndcg) in reference.items()}
    table: Table = {protocol: {MODEL: {**row, "order": 0}} for protocol, (row, _) in reference.items()}

    baselines = fit_baselines(
        dataset,
        queries,
        ease_max_items=options.ease_max_items,
        ease_l2=options.ease_l2,
        public_popularity_V=public_popularity_V,
    )
    for number, (name, ranker) in enumerate(baselines, start=1):
        rows: dict[str, Row]
        if isinstance(ranker, str):
            rows = {protocol: {"skipped": ranker} for protocol in PROTOCOLS}
        else:
            results = evaluator.run(ranker, reference_ndcg)
            rows = {protocol: row for protocol, (row, _) in results.items()}
        for protocol in PROTOCOLS:
            if name == "personal frequency" and protocol == "filter_seen":
                rows[protocol] = {"skipped": "ranks seen items"}
            table[protocol][name] = {**rows[protocol], "order": number}
    return table, reference_ndcg


def count_public_popularity(predictor: Predictor, dataset: Dataset) -> np.ndarray | None:
    """Popularity of each item that may be published where users are protected, float32 [n_items + 1]; None
    where all of it may be.
    """
    if not predictor.private:
        return None
    counts = np.zeros(dataset.n_items + 1, np.float32)
    if predictor.model.offset_V is not None:
        counts[predictor.vocabulary.translation(dataset).to_dataset] = predictor.counts()
    else:  # events of the holdout users, before their test targets
        for shard in dataset.shards():
            lengths = np.diff(shard.offsets)
            position = np.arange(len(shard.item_index)) - np.repeat(shard.offsets[:-1], lengths)
            is_before = position < np.repeat(np.where(shard.queried, shard.split[:, 2], 0), lengths)
            counts += np.bincount(shard.item_index[is_before], minlength=len(counts))
    counts[0] = 0.0
    return counts


def to_ranker(predictor: Predictor, dataset: Dataset) -> Ranker:
    """The predictor as a ranker over a dataset's item indices."""
    translation = predictor.vocabulary.translation(dataset)

    def rank(queries: list[EvaluationQuery], k: int, /, *, filter_seen: bool) -> np.ndarray:
        histories = [translation.history(query.history) for query in queries]
        lists = predictor.recommend(
            histories,
            k,
            now=[query.now for query in queries],
            filters=Filters(filter_seen=filter_seen),
            context=[translation.context(query.context) for query in queries],
        )
        result: np.ndarray = translation.to_dataset[lists.item_index]
        return result

    return rank


class Evaluator:
    """Runs rankers over the same users and reduces their lists to one row of the table.

    public_popularity_V : see `count_public_popularity`
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        queries: EvaluationQueries,
        public_popularity_V: np.ndarray | None = None,
    ) -> None:
        self.options, self.dataset, self.queries = settings.evaluate, dataset, queries
        if public_popularity_V is None:
            self.popularity, self.trained = dataset.popularity.total(), dataset.mask_trained_items()
        else:
            self.popularity, self.trained = public_popularity_V, np.ones(dataset.n_items + 1, bool)

    def run(self, ranker: Ranker, reference: dict[str, np.ndarray]) -> dict[str, tuple[Row, np.ndarray]]:
        """By protocol: the row, and the headline NDCG of each user.

        reference : the model's NDCG by protocol, for paired differences
        """
        return {
            protocol: self._evaluate(ranker, protocol == "filter_seen", reference.get(protocol))
            for protocol in PROTOCOLS
        }

    def _evaluate(
        self, ranker: Ranker, filter_seen: bool, reference: np.ndarray | None
    ) -> tuple[Row, np.ndarray]:
        options, ks = self.options, self.options.k
        lists, targets, lengths = self._rank_all(ranker, filter_seen)
        if not targets:
            return {"skipped": "no test user has a target among unseen items"}, np.zeros(0)

        values = {
            f"{metric}@{k}": column
            for k in ks
            for metric, column in {
                **m.per_user(lists, targets, k),
                **m.own_per_user(lists, targets, k),
            }.items()
        }
        names, columns = list(values), np.stack(list(values.values()), 1)
        headline = columns[:, names.index(f"ndcg@{ks[0]}")]
        paired = columns if reference is None else np.column_stack([columns, reference - headline])
        samples = m.bootstrap_means(paired, options.bootstrap, options.seed)

        row: Row = {"users": len(targets)}
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

    def _rank_all(self, ranker: Ranker, filter_seen: bool) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Lists, targets and history lengths of all users who have a target."""
        lists, targets, lengths = [], [], []
        for queries, query_targets in self._batches(filter_seen):
            lists.append(ranker(queries, max(self.options.k), filter_seen=filter_seen))
            targets += query_targets
            lengths += [len(query.history.item_index) for query in queries]
        return np.concatenate(lists) if lists else np.zeros((0, 0), np.int64), targets, np.array(lengths)

    def _batches(self, filter_seen: bool) -> Iterator[tuple[list[EvaluationQuery], list[np.ndarray]]]:
        for batch in self.queries.batches(BATCH):
            with_targets = [
                (query, items) for query in batch if len(items := targets_of(query, filter_seen=filter_seen))
            ]
            if with_targets:
                yield [query for query, _ in with_targets], [items for _, items in with_targets]

    def _segments(
        self, lists: np.ndarray, targets: list[np.ndarray], lengths: np.ndarray, ndcg: np.ndarray
    ) -> dict[str, Segment]:
        """Headline NDCG by history length, and for warm targets (seen in training) and cold ones."""
        segments: dict[str, Segment] = {}
        for name, (low, high) in LENGTH_BANDS.items():
            segments[name] = _summarize(ndcg[(lengths >= low) & (lengths <= high)])

        k = self.options.k[0]
        for name, is_warm in (("warm targets", True), ("cold targets", False)):
            with_targets = [(row, items[self.trained[items] == is_warm]) for row, items in enumerate(targets)]
            with_targets = [(row, items) for row, items in with_targets if len(items)]
            values = np.zeros(0)
            if with_targets:
                rows = [row for row, _ in with_targets]
                values = m.per_user(lists[rows], [items for _, items in with_targets], k)["ndcg"]
            segments[name] = _summarize(values)
        return segments


def _summarize(values: np.ndarray) -> Segment:
    return {"users": len(values), "ndcg": float(values.mean()) if len(values) else None}
