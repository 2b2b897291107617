"""One trial of a search: a training of its own settings, in a folder of its own.

It writes a checkpoint and a line of its curve after each epoch. A search that was killed replays the lines,
so that sampler and scheduler know what they knew, and continues each trial at its checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recray.config import Settings, with_values
from recray.search.space import Domain, own_values
from recray.storage import key_of, read_json, write_json

METRIC = "validation_ndcg"
NEW = "trial.json"


@dataclass(frozen=True)
class Trial:
    """A trial as it ended: values, best validation NDCG (NaN: none), epochs, seconds, why it failed."""

    key: str
    values: dict[str, Any]
    ndcg: float
    epochs: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Search:
    """A search in a folder: of a dataset (its folder), from settings, in a space."""

    folder: Path
    dataset: Path
    settings: Settings
    space: Mapping[str, Domain]

    def trial_folder(self, values: Mapping[str, Any]) -> Path:
        return self.folder / "trials" / key_of(values)

    def trials(self) -> list[Trial]:
        """The trials so far, in the order in which they began."""
        files = sorted(self.folder.glob(f"trials/*/{NEW}"), key=lambda path: (path.stat().st_mtime_ns, path))
        return [read_trial(path.parent) for path in files]


def read_trial(folder: Path) -> Trial:
    """The trial of a folder, as far as it came."""
    curve = read_curve(folder)
    best = max((line[METRIC] for line in curve), default=math.nan)
    reason = (folder / "error.txt").read_text() if (folder / "error.txt").exists() else ""
    seconds = sum(line["seconds"] for line in curve)
    return Trial(folder.name, read_json(folder / NEW), best, len(curve), round(seconds, 1), reason)


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of a trial's curve: epoch, validation NDCG, seconds."""
    path = folder / "curve.json"
    return list(read_json(path)) if path.exists() else []


def run_trial(config: dict[str, Any], search: Search, threads: int) -> None:
    """The function that Ray Tune runs for a trial."""
    import ray.tune

    folder = search.trial_folder(config)
    if not (folder / NEW).exists():
        write_json(folder / NEW, config)
    (folder / "error.txt").unlink(missing_ok=True)
    best = -math.inf

    def report(line: Mapping[str, Any]) -> None:
        nonlocal best
        best = max(best, line[METRIC])
        ray.tune.report({METRIC: best, "epochs": line["epoch"]})

    for line in read_curve(folder):  # of an attempt that was killed
        report(line)
    try:
        for line in _train(config, search, folder, threads):
            report(line)
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()[-3:]
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n" + "\n".join(last))
        raise


def _train(config: Mapping[str, Any], search: Search, folder: Path, threads: int) -> Any:
    """Train on from the last checkpoint; yields the lines of new epochs, each after its checkpoint."""
    import torch

    from recray.training.plan import training_settings
    from recray.training.worker import build_loop, last_checkpoint, load_checkpoint, save_checkpoint

    torch.set_num_threads(threads)
    settings = training_settings(with_values(search.settings, config))
    device = torch.device("cuda" if settings.train.use_gpu else "cpu")
    started = time.monotonic()
    loop = build_loop(str(search.dataset), settings, device)
    curve = read_curve(folder)
    if (checkpoint := last_checkpoint(folder)) is not None:
        load_checkpoint(loop, checkpoint)
        for line in loop.progress.curve[len(curve) :]:  # killed between checkpoint and line
            curve.append({"epoch": line["epoch"], METRIC: line["validation_ndcg"], "seconds": 0.0})
            yield curve[-1]
    for line in loop.run():
        seconds, started = time.monotonic() - started, time.monotonic()
        curve.append({"epoch": line["epoch"], METRIC: line["validation_ndcg"], "seconds": seconds})
        target = folder / "run" / f"checkpoint_{int(line['epoch']):06d}"
        scratch = target.with_name(f".{target.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_checkpoint(loop, scratch)
        os.replace(scratch, target)
        write_json(folder / "curve.json", curve)
        for older in sorted(target.parent.glob("checkpoint_*"))[:-1]:
            shutil.rmtree(older, ignore_errors=True)
        yield curve[-1]


def describe_values(values: Mapping[str, Any], settings: Settings | None = None) -> str:
    """Values as text; with settings, those that differ from theirs."""
    own = {} if settings is None else own_values(settings, dict.fromkeys(values, ()))
    texts = []
    for name, value in values.items():
        if name not in own or own[name] != value:
            texts.append(
                f"{name.partition('.')[2]}={value:.3g}"
                if isinstance(value, float)
                else f"{name.partition('.')[2]}={value}"
            )
    return ", ".join(texts) or "the settings as they are"
