"""What a benchmark runs on: a data set prepared as its config says, and the same events as a file for the peers."""

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
from recray.stages import Say
from recray.testing.published import prepare_here
from recray.training.trainer import bundle_settings
from recray.training.worker import build_loop

SHIPPED = "demo"  # config of the data that ship
CONFIGS = {"complete-journey": "shop", "online-retail": SHIPPED}  # of data sets that no config is named after
NO_RULES = ["score.caps={}", "score.boosts={}", "score.exclude=[]"]  # which name features that a benchmark may leave out


def prepared(data: str | None, root: Path, overrides: list[str], config: str | None = None) -> tuple[Settings, Dataset]:
    """Settings of a config with overrides, and the dataset that they make, in this process. Raises SettingsError, DataError.

    data : folder of the data set, or its name under $RECRAY_DATA; None: what ships
    config : name of a file in jobs/configs; None: that of the data set
    """
    name = SHIPPED
    if data is not None:
        folder = find_data(data).resolve()
        name = folder.name
        os.environ["RECRAY_DATA"] = str(folder.parent)
    configs = Path(str(resources.files("jobs") / "configs"))
    path = configs / f"{config or CONFIGS.get(name, name)}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in configs.glob("*.yaml")))
        raise SettingsError(f"no config is named after {name}", f"benchmarks know {known}")
    settings = load_settings(path, [f"storage.root={root}", *overrides])
    return settings, prepare_here(settings)


def trained(data: str | None, folder: Path, overrides: list[str], say: Say) -> tuple[Settings, Dataset, Predictor, int]:
    """As `prepared` under a folder, the predictor of a model that was trained on it in this process, and how many epochs that took."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings, dataset = prepared(data, folder / "root", overrides)
    loop = build_loop(str(dataset.path), bundle_settings(settings), torch.device("cpu"))
    epochs = len(list(loop.run()))
    loop.average.load_state_dict(loop.best)
    say(f"{epochs} epochs, validation NDCG {loop.progress.best_ndcg:.4f}")
    return settings, dataset, Predictor.of(loop.average.eval(), dataset, settings.model.prior_days), epochs


def find_data(data: str) -> Path:
    """The folder of a data set, or that of its name under $RECRAY_DATA. Raises DataError."""
    folder = Path(data) if Path(data).is_dir() else Path(os.environ.get("RECRAY_DATA", "")) / data
    if not folder.is_dir():
        raise DataError(f"{folder} is not there", "name the folder of the data set, or set RECRAY_DATA to where it lies")
    return folder


def write_for_peers(dataset: Dataset, path: Path) -> None:
    """All events as Parquet: user (a number), item (index), order in the user's history, and part: 0 train, 1 validation, 2 test, 3 none."""
    users, items, orders, parts = [], [], [], []
    first = 0
    for shard in dataset.shards():
        count = np.diff(shard.offsets)
        owner = np.repeat(np.arange(len(shard)), count)
        place = np.arange(len(owner)) - shard.offsets[owner]
        users.append(first + owner)
        items.append(shard.item_index)
        orders.append(place)
        train_end, validation_end, test_start, test_end = shard.split[owner].T
        validation, test = (place >= train_end) & (place < validation_end), (place >= test_start) & (place < test_end)
        parts.append(np.select([place < train_end, validation, test], [0, 1, 2], 3).astype(np.int8))
        first += len(shard)
    columns = {"user": users, "item": items, "order": orders, "part": parts}
    pq.write_table(pa.table({name: np.concatenate(values) for name, values in columns.items()}), path)
