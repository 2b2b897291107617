"""Earlier runs and sample lists, as a report shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from recray.dataset.reader import Dataset, Shard
from recray.dataset.schema import ITEM_ID, USER_ID
from recray.evaluation.evaluate import KIND as EVALUATION
from recray.evaluation.evaluate import MODEL, read_table
from recray.inference import Vocabulary
from recray.snapshot.reader import Snapshot
from recray.storage import SNAPSHOT, Storage, read_json, read_manifest

MOST_RUNS = 30
SAMPLES, SAMPLE_ITEMS, SAMPLE_EVENTS = 4, 5, 5
LEAST_EVENTS = 3  # of a user whose list is shown


@dataclass(frozen=True)
class Run:
    """A published run. None: not known."""

    date: str
    ndcg: float | None
    coverage: float | None
    events: int | None
    users: int | None
    items: int | None


@dataclass(frozen=True)
class Sample:
    """The last events of a user, newest first, as type and title, and titles of the list."""

    events: list[tuple[str, str]]
    n_events: int
    items: list[str]
    source: str


def list_runs(storage: Storage, protocol: str, k: int, until_s: int) -> list[Run]:
    """The published runs up to an as-of, oldest first, the last `MOST_RUNS`."""
    evaluations = _find_evaluations(storage)
    by_date: dict[str, tuple[int, Run]] = {}
    for path in sorted(storage.scores.glob("dt=*/run=*")):
        if path.name.startswith(".") or not (path / "manifest.json").exists():
            continue
        manifest = read_manifest(path, SNAPSHOT)
        if manifest["as_of_s"] > until_s:
            continue
        dataset_file = storage.root / manifest["dataset"] / "manifest.json"
        dataset = read_json(dataset_file) if dataset_file.exists() else {}
        key = (Path(manifest["dataset"]).name, Path(manifest["bundle"]).name)
        row = evaluations.get(key, {}).get(protocol, {}).get(MODEL, {})
        run = Run(
            path.parent.name.removeprefix("dt="),
            row.get(f"ndcg@{k}"),
            manifest.get("coverage@10"),
            dataset.get("events"),
            dataset.get("users"),
            dataset.get("items"),
        )
        if run.date not in by_date or manifest["as_of_s"] >= by_date[run.date][0]:
            by_date[run.date] = (manifest["as_of_s"], run)
    return [run for _, run in sorted(by_date.values(), key=lambda pair: pair[0])][-MOST_RUNS:]


def _find_evaluations(storage: Storage) -> dict[tuple[str, str], Any]:
    """The tables of evaluations, by data set and bundle."""
    tables = {}
    for path in sorted((storage.root / "evaluations").glob("[!.]*")):
        if (path / "manifest.json").exists():
            manifest = read_manifest(path, EVALUATION)
            tables[manifest["dataset"], manifest["bundle"]] = read_table(path)
    return tables


def find_previous_as_of(storage: Storage, dataset: Dataset) -> int | None:
    """The as-of of the last data set before this one."""
    manifests = [read_json(path) for path in sorted((storage.root / "datasets").glob("[!.]*/manifest.json"))]
    earlier = [manifest["as_of_s"] for manifest in manifests if manifest["as_of_s"] < dataset.as_of_s]
    return max(earlier, default=None)


def sample_lists(snapshot: Snapshot, dataset: Dataset, *, holdout_only: bool = False) -> list[Sample]:
    """Lists of a few users with a history, the same ones in every report of a snapshot, without their ids.

    holdout_only : of holdout users alone, as privacy demands
    """
    samples: list[Sample] = []
    for number in range(dataset.n_shards):
        shard = dataset.shard(number)
        for row in range(len(shard)):
            if len(samples) == SAMPLES:
                return samples
            if holdout_only and not shard.queried[row]:
                continue
            if (sample := _sample(snapshot, dataset, shard, row)) is not None:
                samples.append(sample)
    return samples


def _sample(snapshot: Snapshot, dataset: Dataset, shard: Shard, row: int) -> Sample | None:
    history = shard.history(row)
    if len(history.item_index) < LEAST_EVENTS:
        return None
    scored = snapshot.find(shard.user_ids[row].as_py())
    if scored is None or not scored.item_ids:
        return None
    last = history.last(SAMPLE_EVENTS)
    vocabulary = Vocabulary(dataset.items[ITEM_ID].combine_chunks(), dataset.event_types)
    titles = to_titles(
        dataset, [*last.item_index[::-1], *vocabulary.index_of(scored.item_ids[:SAMPLE_ITEMS])]
    )
    types = [dataset.event_types[event] for event in last.event_index[::-1]]
    return Sample(
        list(zip(types, titles[: len(types)], strict=True)),
        len(history.item_index),
        titles[len(types) :],
        scored.source,
    )


def sample_invalid_rows(quarantine: Path) -> dict[str, str]:
    """An invalid row for each reason, without its user: what stood in the other columns."""
    examples: dict[str, str] = {}
    for file in sorted(quarantine.glob("[!.]*.parquet")):
        table = pq.read_table(file)
        for reason in pc.unique(table["reason"]).to_pylist():
            if reason in examples:
                continue
            row = table.filter(pc.equal(table["reason"], reason)).slice(0, 1).to_pylist()[0]
            values = {
                name.removeprefix("given_"): value
                for name, value in row.items()
                if name == ITEM_ID or name.startswith("given_")
            }
            shown = {name: value for name, value in values.items() if value is not None and name != USER_ID}
            examples[reason] = ", ".join(f"{name} {value!r:.80}" for name, value in shown.items())
    return examples


def to_titles(dataset: Dataset, item_index: list[int]) -> list[str]:
    """Titles of items of a data set, or their ids where there is no title."""
    ids = dataset.items[ITEM_ID]
    return [
        dataset.describe_item(int(index)).get("title", str(ids[int(index) - 1].as_py())) if index else "?"
        for index in item_index
    ]
