"""The model bundle: the artifact that training hands to evaluation, scoring and serving.

Immutable, without pickle: `manifest.json`, `config.yaml` (settings of the training, no addresses),
`model.safetensors`, `neighbours.safetensors` (of a model with item-to-item evidence), `items.parquet`
(vocabulary and features), `popularity.parquet`, `privacy.json` (and `privacy.md`), `metrics.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from recray.config.formats import to_current_settings, to_first_names
from recray.dataset.features import VECTORS, Encoded, append_items, encode_features, mask_described
from recray.dataset.popularity import Popularity
from recray.dataset.reader import Dataset, released_day
from recray.dataset.schema import ITEM_ID
from recray.errors import ArtifactError, DamagedArtifactError
from recray.model.cooccurrence import Neighbours
from recray.model.network import Network
from recray.model.shape import Shape
from recray.storage import Manifest, immutable_directory, key_of, manifest_digest, open_immutable
from recray.version import __version__

KIND = "bundle"
NEIGHBOURS = "neighbours.safetensors"
# weights that older bundles lack; as zeros they leave the model unchanged
OPTIONAL_WEIGHTS = ("items.fusion", "attention.event_bias.weight", "log_scale")


class CurveLine(TypedDict, total=False):
    """An epoch of a learning curve.

    epoch : number of the epoch, from 1
    steps : optimiser steps up to its end
    loss : mean loss of a query; a private training has none
    validation_ndcg : mean NDCG of the validation users
    seconds : duration of the epoch; only in lines of a running training
    """

    epoch: Required[int]
    steps: Required[int]
    loss: float
    validation_ndcg: Required[float]
    seconds: float


class TrainingMetrics(TypedDict, total=False):
    """The content of `metrics.json`: the progress of the training at its end; empty of untrained weights.

    epoch, step : epochs and optimiser steps
    best_epoch, best_ndcg : the epoch whose weights were kept, and its validation NDCG
    factors : factor of each term of the scores by calibration
    cold_gaps : see `recray.inference.Predictor`
    """

    epoch: int
    step: int
    best_epoch: int
    best_ndcg: float
    curve: list[CurveLine]
    factors: dict[str, float] | None
    cold_gaps: list[float] | None


class PrivacyStatement(TypedDict, total=False):
    """The content of `privacy.json`. Without privacy, it has `differential_privacy` (false) alone.

    epsilon, delta : the guarantee of this training
    sigma, rate, steps, clipping_norm, users, counts_sigma, part, parts : its mechanism, as in
        `recray.privacy.accounting.Mechanism`
    unit, adjacency, accountant, sampling, protected, not_protected, randomness : what they mean, as text
    population, trainings, epsilon_of_all_trainings : the ledger after this training
    cap : maximum ε of all trainings; None: none is set
    held_out : share of the users who are holdout users
    began_with : the initial weights, as text
    """

    differential_privacy: Required[bool]
    epsilon: float
    sigma: float
    rate: float
    steps: int
    clipping_norm: float
    delta: float
    users: int
    counts_sigma: float
    part: int
    parts: int
    unit: str
    adjacency: str
    accountant: str
    sampling: str
    protected: str
    not_protected: list[str]
    randomness: str
    population: str
    trainings: int
    epsilon_of_all_trainings: float
    cap: float | None
    held_out: float
    began_with: str


class Bundle:
    """A trained model on disk. Open it with `Bundle.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.key: str = manifest["run_key"]
        self.as_of_s: int = manifest["as_of_s"]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle and verify every file. Raises MissingArtifactError, DamagedArtifactError."""
        return cls(Path(path), open_immutable(Path(path), KIND))

    @cached_property
    def digest(self) -> str:
        return manifest_digest(self.path)

    @cached_property
    def item_ids(self) -> pa.Array:
        return pq.read_table(self.path / "items.parquet", columns=[ITEM_ID])[0].combine_chunks()

    @cached_property
    def released_day(self) -> np.ndarray | None:
        """Day from which each item is available, as `Dataset.released_day`."""
        return released_day(self.items) if self.manifest["has_time"] else None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the training by section, under today's names."""
        return to_current_settings(yaml.safe_load((self.path / "config.yaml").read_text()))

    @cached_property
    def metrics(self) -> TrainingMetrics:
        result: TrainingMetrics = json.loads((self.path / "metrics.json").read_text())
        return result

    @cached_property
    def privacy(self) -> PrivacyStatement:
        """The privacy statement: `differential_privacy`, and if it is true the guarantee and its unit."""
        result: PrivacyStatement = json.loads((self.path / "privacy.json").read_text())
        return result

    @cached_property
    def items(self) -> pa.Table:
        """The item table that the model was trained with."""
        return pq.read_table(self.path / "items.parquet")

    def cold_items(self, dataset: Dataset) -> pa.Table:
        """Items of a dataset that are not in the vocabulary but have a feature by which they can be scored.

        The table is empty if the dataset declares its features otherwise.
        """
        features = self.manifest["features"]
        has_same_features = (
            dataset.items[ITEM_ID].type == self.item_ids.type
            and features.items() <= dataset.features.items()
            and self.manifest.get("text_encoder") == dataset.text_encoder
        )
        rows = np.zeros(0, np.int64)
        if has_same_features and features:
            rows = np.flatnonzero(dataset.translate(self.item_ids)[1:] == 0)
        items = dataset.items.take(pa.array(rows))
        if not len(rows):
            return items
        return items.filter(pa.array(mask_described(self._encode(items), len(rows))))

    def _encode(self, items: pa.Table) -> dict[str, Encoded]:
        """Features of items outside the vocabulary, encoded as in training."""
        distinct = self.manifest.get("distinct_bins", False)
        return encode_features(
            items,
            self.manifest["features"],
            self.manifest["shape"]["feature_buckets"],
            self.items,
            distinct=distinct,
        )

    def model(self, cold_items: pa.Table | None = None) -> Network:
        """The network with its weights. Raises DamagedArtifactError if the weights do not fit.

        cold_items : items that have features alone; their indices follow the vocabulary
        """
        state = load_file(self.path / "model.safetensors")
        n_cold = len(cold_items) if cold_items is not None else 0
        kinds = self.manifest["features"]
        cold_features = self._encode(cold_items) if cold_items is not None and n_cold else {}
        features = {}
        for i, (name, kind) in enumerate(sorted(kinds.items())):
            pair = [
                f"items.features.{i}.{buffer}"
                for buffer in (("values_VC", "present_V") if kind in VECTORS else ("tokens_K", "offsets_V"))
            ]
            first, second = (state[buffer].numpy() for buffer in pair)
            features[name] = append_items((first, second), cold_features[name]) if n_cold else (first, second)
            state.update(zip(pair, map(torch.from_numpy, features[name]), strict=True))
        for name in {"items.ids.weight", "items.seen_V"} & state.keys():
            state[name] = torch.cat([state[name], state[name].new_zeros(n_cold, *state[name].shape[1:])])
        if "offset_V" in state:  # cold items have no interactions, so they get the minimum
            state["offset_V"] = torch.cat([state["offset_V"], state["offset_V"].min().expand(n_cold)])

        model = Network(Shape(**self.manifest["shape"]), state["items.seen_V"].numpy(), features)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or not all(name.endswith(OPTIONAL_WEIGHTS) for name in missing):
            raise DamagedArtifactError(
                f"bundle {self.key}: the weights do not fit the network: missing {missing}, unexpected "
                f"{unexpected}",
                "read it with the version of recray that wrote it, or train again",
            )
        if model.cooccurrence is not None:
            neighbours = Neighbours(**load_arrays(self.path / NEIGHBOURS))
            grown = [np.pad(part, [(0, n_cold), *[(0, 0)] * (part.ndim - 1)]) for part in neighbours]
            model.cooccurrence.attach(Neighbours(*grown))  # cold items have none
        return model.eval()


def write_bundle(
    path: Path,
    key: str,
    *,
    dataset: Dataset,
    shape: Shape,
    state: dict[str, Tensor],
    settings: Mapping[str, Any],
    metrics: TrainingMetrics,
    parent: str | None = None,
    privacy: PrivacyStatement | None = None,
    page: str | None = None,
    neighbours: Neighbours | None = None,
) -> Bundle:
    """Write a bundle at `path`, or keep the one that this run key already wrote. Raises OutputExistsError.

    settings : from `recray.training.plan.bundle_settings`
    parent : run key of the bundle that initialised the weights
    privacy : the statement of a private training
    page : the same as Markdown
    neighbours : of a model with item-to-item evidence
    """
    fields = {
        "recray": __version__,
        "dataset": dataset.key,
        "dataset_digest": dataset.digest,
        "as_of_s": dataset.as_of_s,
        "split_kind": dataset.split_kind,
        "trained_until_s": dataset.cut_s("test") or dataset.as_of_s,
        "shape": shape.to_dict(),
        "features": settings["data"]["features"],
        "distinct_bins": True,
        "event_types": dataset.event_types,
        "default_event": dataset.manifest.get("default_event"),
        "has_time": dataset.has_time,
        "popularity_prior_days": settings["model"]["popularity_prior_days"] if shape.prior else 0,
        "context": dataset.context,
        "text_encoder": dataset.text_encoder,
        "settings_key": settings_key(settings),
        "parent": parent,
    }
    with immutable_directory(path, KIND, key, fields) as folder:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in sorted(state.items())},
            folder / "model.safetensors",
        )
        if neighbours is not None:
            parts = {name: np.ascontiguousarray(part) for name, part in neighbours._asdict().items()}
            save_arrays(parts, folder / NEIGHBOURS)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=True))
        (folder / "privacy.json").write_text(
            json.dumps(privacy or {"differential_privacy": False}, indent=2, sort_keys=True) + "\n"
        )
        if page is not None:
            (folder / "privacy.md").write_text(page)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        # the numbers of events are not published
        pq.write_table(dataset.items.drop_columns(["events"]), folder / "items.parquet")
        if shape.counts:  # noised counts are among the weights
            Popularity.count_events(np.zeros(0, np.int64), None, dataset.n_items).save(
                folder / "popularity.parquet"
            )
        elif privacy is not None:
            dataset.public_popularity.save(folder / "popularity.parquet")
        else:
            shutil.copyfile(dataset.path / "popularity.parquet", folder / "popularity.parquet")
    return Bundle.open(path)


def settings_key(settings: Mapping[str, Any]) -> str:
    """Key of the settings of a training without its data, to find the last bundle with the same settings."""
    return key_of("bundle-settings", to_first_names(settings))


def find_latest_bundle(folder: Path, key: str, as_of_s: int) -> Bundle | None:
    """The newest bundle in `folder` that was trained with these settings (`settings_key`) up to `as_of_s`."""
    candidates = []
    for path in folder.glob("[!.]*"):
        try:
            content = open_immutable(path, KIND, verify=False)
        except ArtifactError:
            continue  # skip a damaged bundle
        if content["settings_key"] == key and content["as_of_s"] <= as_of_s:
            candidates.append((content["as_of_s"], path.name, path))
    return Bundle.open(max(candidates)[2]) if candidates else None
