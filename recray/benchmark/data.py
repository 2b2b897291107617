"""Data of the benchmarks: a data set prepared by its config, and its events as a file for baseline
libraries.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.errors import DataError, SettingsError
from recray.inference import Predictor
from recray.stages import ProgressLog
from recray.testing.published import prepare_here
from recray.training.plan import training_settings
from recray.training.worker import build_loop

SHIPPED = "demo"  # config of the shipped data
CONFIGS = {"complete-journey": "shop", "online-retail": SHIPPED}  # of data sets with another name
# the rules name features, which a benchmark may leave out
NO_RULES = ["score.caps={}", "score.boosts={}", "score.exclude=[]"]


def prepare_data(
    data: str | None, root: Path, overrides: list[str], config: str | None = None
) -> tuple[Settings, Dataset]:
    """Settings of a config with overrides, and their dataset, prepared in this process. Raises SettingsError,
    DataError.

    data : folder of the data set, its name under $RECRAY_DATA, or a file of settings; None: the shipped data
    config : name of a file in jobs/configs; None: that of the data set
    """
    name = SHIPPED
    if data is not None:
        folder = find_data(data).resolve()
        if folder.is_file():
            settings = load_settings(folder, [f"storage.root={root}", *overrides])
            return settings, prepare_here(settings)
        name = folder.name
        os.environ["RECRAY_DATA"] = str(folder.parent)
    configs = Path(str(resources.files("jobs") / "configs"))
    path = configs / f"{config or CONFIGS.get(name, name)}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in configs.glob("*.yaml")))
        raise SettingsError(f"no config for the data set {name}", f"configs: {names}")
    settings = load_settings(path, [f"storage.root={root}", *overrides])
    return settings, prepare_here(settings)


def train_model(
    data: str | None, folder: Path, overrides: list[str], progress: ProgressLog
) -> tuple[Settings, Dataset, Predictor, int]:
    """As `prepare_data`; and the predictor of a model that was trained on it in this process, and its number
    of epochs.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings, dataset = prepare_data(data, folder / "root", overrides)
    loop = build_loop(str(dataset.path), training_settings(settings), torch.device("cpu"))
    epochs = len(list(loop.run()))
    loop.finish()
    progress(f"{epochs} epochs, validation NDCG {loop.progress.best_ndcg:.4f}")
    return (
        settings,
        dataset,
        Predictor.of(loop.ema_model.eval(), dataset, settings.model.popularity_prior_days),
        epochs,
    )


def find_data(data: str) -> Path:
    """The folder of a data set, or that of its name under $RECRAY_DATA, or a file of settings. Raises
    DataError.
    """
    if Path(data).suffix in (".yaml", ".yml") and Path(data).is_file():
        return Path(data)
    folder = Path(data) if Path(data).is_dir() else Path(os.environ.get("RECRAY_DATA", "")) / data
    if not folder.is_dir():
        raise DataError(
            f"{folder} does not exist",
            "name the folder of the data set, or a file of settings, or set RECRAY_DATA to the folder above",
        )
    return folder


def count_users(dataset: Dataset) -> np.ndarray:
    """Number of the first user of each shard, as `write_events` counts them, and the number of all."""
    return np.concatenate([[0], np.cumsum([len(shard) for shard in dataset.shards()])])


def write_events(dataset: Dataset, path: Path, *, with_time: bool = False) -> None:
    """Write all events as Parquet: user (a number), item (index), order in the user's history, and part: 0
    train, 1 validation, 2 test, 3 none.

    with_time : also the time in seconds
    """
    users, items, orders, times, parts = [], [], [], [], []
    first = 0
    for shard in dataset.shards():
        count = np.diff(shard.offsets)
        owner = np.repeat(np.arange(len(shard)), count)
        position = np.arange(len(owner)) - shard.offsets[owner]
        users.append(first + owner)
        items.append(shard.item_index)
        orders.append(position)
        times.append(np.asarray(shard.timestamp_s))
        train_end, validation_end, test_start, test_end = shard.split[owner].T
        validation, test = (
            (position >= train_end) & (position < validation_end),
            (position >= test_start) & (position < test_end),
        )
        parts.append(np.select([position < train_end, validation, test], [0, 1, 2], 3).astype(np.int8))
        first += len(shard)
    columns = {"user": users, "item": items, "order": orders, "part": parts}
    columns |= {"time": times} if with_time else {}
    pq.write_table(pa.table({name: np.concatenate(values) for name, values in columns.items()}), path)
