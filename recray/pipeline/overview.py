"""The page of `recray validate`: what the rows hold, what will be learned and tested, and what it costs."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.prepare.prepare import DROPPED_WORDS, count_dropped
from recray.prepare.sources import EventSource
from recray.stages import to_date

MEASURED_S = 1.5  # of training steps, for the estimate


def describe_input(source: EventSource, items: int | None, root: Path | None) -> Iterator[str]:
    """Lines about the files."""
    columns = ", ".join(
        name if name == column else f"{name} ← {column}" for name, column in source.columns.items()
    )
    files = f"{len(source.files)} file" + ("s" if len(source.files) > 1 else "")
    yield _line("events", f"{source.rows:,} rows in {files}, ordered by {source.clock}")
    yield _line("columns", columns)
    yield _line("items", "no item table" if items is None else f"{items:,} rows in the item table")
    yield _line("workspace", str(root))


def describe_dataset(dataset: Dataset, settings: Settings, sample: str) -> Iterator[str]:
    """Lines about a dataset.

    sample : names the rows, where they are not all
    """
    manifest = dataset.manifest
    shards = list(dataset.shards())
    lengths = np.concatenate([np.diff(shard.offsets) for shard in shards])
    if sample:
        yield sample
    yield _line("users", f"{dataset.n_users:,}; {_describe_lengths(lengths)}")
    yield _line("items", f"{dataset.n_items:,}; {_describe_items(dataset)}")

    counts = sum(np.bincount(shard.event_index, minlength=len(dataset.event_types)) for shard in shards)
    types = ", ".join(
        f"{name} {count:,}" for name, count in zip(dataset.event_types, np.atleast_1d(counts), strict=False)
    )
    yield _line("events", f"{dataset.n_events:,}{_describe_span(dataset)}: {types}")

    invalid = [f"{count:,} {reason}" for reason, count in sorted(manifest["reasons"].items())]
    yield _line("invalid", ", ".join(invalid) or "0 rows")
    dropped = [f"{count:,} {DROPPED_WORDS[name]}" for name, count in count_dropped(manifest).items()]
    if dropped:
        yield _line("left out", ", ".join(dropped))
    action = "dropped" if settings.data.duplicates == "drop" else "kept"
    yield _line("duplicates", f"{manifest['duplicates']:,} rows equal another and are {action}")
    for name, kind in settings.data.features.items():
        if name in dataset.items.column_names:
            yield _line("feature", f"{name}: {_describe_feature(dataset, name, kind)}")

    split = np.concatenate([shard.split for shard in shards])
    learned = np.concatenate([shard.train_lengths for shard in shards])
    yield _line("training", f"{learned.sum():,} events of {np.count_nonzero(learned):,} users")
    for part, first, last in (("validation", 0, 1), ("test", 2, 3)):
        cut = manifest["cuts"].get(part)
        begins = f", from {to_date(cut)}" if cut else ""
        yield _line(part, f"{int((split[:, last] > split[:, first]).sum()):,} users{begins}")


def describe_cost(dataset: Dataset, settings: Settings, share: float) -> str:
    """A line with the time and memory of a training on this machine's CPUs, from a few of its steps.

    share : of all rows that the dataset holds
    """
    if settings.privacy.enabled:
        return _line("estimate", "none for a private training; recray privacy plan has its steps")
    import torch

    from recray.training.plan import training_settings
    from recray.training.worker import build_loop

    loop = build_loop(dataset, training_settings(settings), torch.device("cpu"))
    loop.model.train()
    tokens, train_s = 0, 0.0
    for number, (batch, targets, queries) in enumerate(loop.batches.epoch(0)):
        if number == 1:  # the first step allocates: it counts only where it is alone
            tokens, train_s = 0, 0.0
        began = time.monotonic()
        loop.train_step(loop.criterion.complete(batch), targets, queries)
        tokens, train_s = tokens + int(batch.item_BT.count_nonzero()), train_s + time.monotonic() - began
        if number and train_s > MEASURED_S:
            break

    lengths = np.concatenate([shard.train_lengths for shard in dataset.shards()])
    if settings.train.sequences == "last":
        lengths = np.minimum(lengths, settings.model.history)
    epoch_s = train_s * lengths.sum() / max(tokens, 1) / share
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    cores = len(os.sched_getaffinity(0))
    limit = f"at most {settings.train.epochs} epochs"
    return _line(
        "estimate", f"{_to_words(epoch_s)} an epoch on {cores} CPUs, {limit}; {peak_gb:.1f} GB of memory"
    )


def _line(label: str, text: str) -> str:
    return f"{label:<11}{text}"


def _describe_lengths(lengths: np.ndarray) -> str:
    middle, high, most = np.quantile(lengths, [0.5, 0.9, 1.0], method="lower") if len(lengths) else (0, 0, 0)
    return f"events of a user: half have up to {middle:,}, nine in ten up to {high:,}, one {most:,}"


def _describe_items(dataset: Dataset) -> str:
    counts = np.sort(dataset.items["events"].to_numpy())[::-1]
    top = counts[: max(1, len(counts) // 10)].sum() / max(1, counts.sum())
    without = int((counts == 0).sum())
    return f"{without:,} without events; a tenth of the items has {top:.0%} of the events"


def _describe_span(dataset: Dataset) -> str:
    if not dataset.has_time:
        return ""
    first = min(int(shard.timestamp_s.min()) for shard in dataset.shards() if len(shard.timestamp_s))
    return f" from {to_date(first)} to {to_date(dataset.as_of_s)}"


def _describe_feature(dataset: Dataset, name: str, kind: str) -> str:
    column = dataset.items[name]
    filled = 1 - column.null_count / max(1, len(column))
    distinct = "" if kind in ("vector", "multi") else f", {len(pc.unique(pc.drop_null(column))):,} values"
    return f"{kind}, {filled:.0%} of the items have one{distinct}"


def _to_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
