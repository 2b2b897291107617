"""The bundle: the one thing that passes from training to evaluation, scoring and serving.

A sealed directory: `manifest.json`, `config.yaml` (settings that shaped it, no addresses), `model.safetensors`,
`items.parquet` (vocabulary and features), `popularity.parquet`, `privacy.json` (and `privacy.md`), `metrics.json`. Immutable, no pickle.
"""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from recray.dataset.features import VECTORS, Encoded, described, encode, joined
from recray.dataset.popularity import Popularity
from recray.dataset.reader import Dataset, released_day
from recray.errors import ArtifactError, DamagedArtifactError
from recray.model.recommender import Recommender
from recray.model.shape import Shape
from recray.schema import ITEM_ID
from recray.storage import key_of, manifest_digest, open_sealed, sealed_directory
from recray.version import __version__

KIND = "bundle"
LATER = ("items.fusion", "attention.event_bias.weight")  # zero where a bundle was written before they came: the same model


class Bundle:
    """A trained model on disk. Open it with `Bundle.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.key: str = manifest["run_key"]
        self.as_of_s: int = manifest["as_of_s"]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle after every file was verified. Raises MissingArtifactError, DamagedArtifactError."""
        return cls(Path(path), open_sealed(Path(path), KIND))

    @cached_property
    def digest(self) -> str:
        return manifest_digest(self.path)

    @cached_property
    def item_ids(self) -> pa.Array:
        return pq.read_table(self.path / "items.parquet", columns=[ITEM_ID])[0].combine_chunks()

    @cached_property
    def released_day(self) -> np.ndarray | None:
        """Day since which each item can be met, as `Dataset.released_day`."""
        return released_day(self.items) if self.manifest["has_time"] else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that shaped it."""
        found: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text())
        return found

    @cached_property
    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "metrics.json").read_text())
        return found

    @cached_property
    def privacy(self) -> dict[str, Any]:
        """The statement: `differential_privacy`, and where it is true what is promised to whom."""
        found: dict[str, Any] = json.loads((self.path / "privacy.json").read_text())
        return found

    @cached_property
    def items(self) -> pa.Table:
        """The item table that the model was trained with."""
        return pq.read_table(self.path / "items.parquet")

    def newcomers(self, dataset: Dataset) -> pa.Table:
        """Items of a dataset that this bundle does not know and that have a feature: they can be scored by it. None where the
        features are declared otherwise now."""
        features = self.manifest["features"]
        same = dataset.items[ITEM_ID].type == self.item_ids.type and features.items() <= dataset.features.items()
        same = same and self.manifest.get("text_encoder") == dataset.text_encoder
        rows = np.flatnonzero(dataset.translate(self.item_ids)[1:] == 0) if same and features else np.zeros(0, np.int64)
        found = dataset.items.take(pa.array(rows))
        if not len(rows):
            return found
        return found.filter(pa.array(described(self._encode(found), len(rows))))

    def _encode(self, items: pa.Table) -> dict[str, Encoded]:
        """The features of items that the model was not trained with, as it has those of the others."""
        distinct = self.manifest.get("distinct_bins", False)
        return encode(items, self.manifest["features"], self.manifest["shape"]["feature_buckets"], self.items, distinct=distinct)

    def model(self, newcomers: pa.Table | None = None) -> Recommender:
        """The network with its weights. Raises DamagedArtifactError if they are not of this network.

        newcomers : items that it knows by their features alone; they follow the others in the order of the indices
        """
        state = load_file(self.path / "model.safetensors")
        more = len(newcomers) if newcomers is not None else 0
        kinds = self.manifest["features"]
        added = self._encode(newcomers) if newcomers is not None and more else {}
        features = {}
        for i, (name, kind) in enumerate(sorted(kinds.items())):
            pair = [f"items.features.{i}.{buffer}" for buffer in (("values_VC", "present_V") if kind in VECTORS else ("tokens_K", "offsets_V"))]
            first, second = (state[buffer].numpy() for buffer in pair)
            features[name] = joined((first, second), added[name]) if more else (first, second)
            state.update(zip(pair, map(torch.from_numpy, features[name]), strict=True))
        for name in {"items.ids.weight", "items.seen_V"} & state.keys():
            state[name] = torch.cat([state[name], state[name].new_zeros(more, *state[name].shape[1:])])
        if "offset_V" in state:  # nobody met them, so they count least
            state["offset_V"] = torch.cat([state["offset_V"], state["offset_V"].min().expand(more)])
        model = Recommender(Shape(**self.manifest["shape"]), state["items.seen_V"].numpy(), features)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or not all(name.endswith(LATER) for name in missing):
            what = f"bundle {self.key}: the weights do not fit the network: missing {missing}, unexpected {unexpected}"
            raise DamagedArtifactError(what, "read it with the version of recray that wrote it, or train again")
        return model.eval()


def write_bundle(
    path: Path,
    key: str,
    *,
    dataset: Dataset,
    shape: Shape,
    state: dict[str, Tensor],
    features: dict[str, str],
    prior_days: int,
    settings: dict[str, Any],
    metrics: dict[str, Any],
    parent: str | None = None,
    privacy: dict[str, Any] | None = None,
    page: str | None = None,
) -> Bundle:
    """Seal a bundle at `path`, or keep the one that this run key already wrote. Raises OutputExistsError.

    parent : run key of the bundle whose weights the training began with
    privacy : the statement of a private training
    page : the same for a person
    """
    fields = {
        "recray": __version__,
        "dataset": dataset.key,
        "dataset_digest": dataset.digest,
        "as_of_s": dataset.as_of_s,
        "split_kind": dataset.split_kind,
        "trained_until_s": dataset.cut_s("test") or dataset.as_of_s,
        "shape": shape.to_dict(),
        "features": features,
        "distinct_bins": True,
        "event_types": dataset.event_types,
        "default_event": dataset.manifest.get("default_event"),
        "has_time": dataset.has_time,
        "prior_days": prior_days,
        "context": dataset.context,
        "text_encoder": dataset.text_encoder,
        "settings_key": settings_key(settings),
        "parent": parent,
    }
    with sealed_directory(path, KIND, key, fields) as folder:
        save_file({name: tensor.cpu().contiguous() for name, tensor in sorted(state.items())}, folder / "model.safetensors")
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=True))
        (folder / "privacy.json").write_text(json.dumps(privacy or {"differential_privacy": False}, indent=2, sort_keys=True) + "\n")
        if page is not None:
            (folder / "privacy.md").write_text(page)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        pq.write_table(dataset.items.drop_columns(["events"]), folder / "items.parquet")  # how often each was met is nobody's business
        if shape.counts:  # noised, they are among the weights
            Popularity.count_events(np.zeros(0, np.int64), None, dataset.n_items).save(folder / "popularity.parquet")
        elif privacy is not None:
            dataset.public_popularity.save(folder / "popularity.parquet")
        else:
            shutil.copyfile(dataset.path / "popularity.parquet", folder / "popularity.parquet")
    return Bundle.open(path)


def settings_key(settings: dict[str, Any]) -> str:
    """Names the settings of a training apart from its data, to find the last bundle that was trained alike."""
    return key_of("bundle-settings", settings)


def latest_bundle(folder: Path, wanted: str, as_of_s: int) -> Bundle | None:
    """The youngest bundle in `folder` that was trained with these settings (`settings_key`) up to `as_of_s`."""
    found = []
    for path in folder.glob("[!.]*"):
        try:
            content = open_sealed(path, KIND, verify=False)
        except ArtifactError:
            continue  # a damaged bundle is no reason not to use another
        if content["settings_key"] == wanted and content["as_of_s"] <= as_of_s:
            found.append((content["as_of_s"], path.name, path))
    return Bundle.open(max(found)[2]) if found else None
