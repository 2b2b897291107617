"""The plan of a training, computed once per job: its run key, its initial weights and its network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from recray.bundle import Bundle
from recray.config import Settings, expand_path
from recray.config.formats import RESULTS_SINCE, to_first_names
from recray.dataset.reader import Dataset
from recray.errors import MissingArtifactError, SettingsError
from recray.evaluation.criteria import explain_incomparable
from recray.model.shape import Shape
from recray.privacy.ledger import Ledger
from recray.release import Release
from recray.storage import Storage, key_of
from recray.training.worker import shape_of


@dataclass(frozen=True)
class TrainingPlan:
    """A training of a dataset by some settings.

    key : run key of train; it also names the Ray Train run and the MLflow run
    parent : the bundle whose weights it begins with; None: random weights
    """

    key: str
    parent: Bundle | None


def plan_training(settings: Settings, dataset: Dataset) -> TrainingPlan:
    """Raises SettingsError as `parent_of`."""
    parent = parent_of(settings, dataset)
    shaped_by = to_first_names(bundle_settings(settings))
    key = key_of("train", shaped_by, dataset.key, dataset.digest, parent and parent.digest, RESULTS_SINCE)
    return TrainingPlan(key, parent)


def training_settings(settings: Settings) -> Settings:
    """The settings that a training reads: a private one may not use features of learned items."""
    if settings.privacy.enabled and settings.model.items == "learned":
        return settings.replace("data", features={})  # their part of a gradient's norm is not known exactly
    return settings


def bundle_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape a bundle, given its dataset, as JSON values: what its manifest keeps."""
    sections = ("data", "split", "model", "train", "privacy", "evaluate")
    values = training_settings(settings).result_settings(*sections)
    values["evaluate"] = {name: values["evaluate"][name] for name in ("k", "protocol")}
    values["train"].pop("every_days")
    if (
        settings.privacy.epsilon is not None or settings.privacy.sigma is not None
    ):  # the cap does not plan them
        values["privacy"] |= {"cap": None, "trainings": 1}
    return values


def parent_of(settings: Settings, dataset: Dataset) -> Bundle | None:
    """The bundle whose weights a training begins with: the previous champion, or one of public data.

    None: random weights. Raises SettingsError if the bundle of public data has another network, or cannot be
    of public data.
    """
    champion = _previous_champion(settings, dataset) if settings.train.warm_start else None
    public = settings.privacy.public_start if settings.privacy.enabled else None
    if champion is not None or public is None:
        return champion
    path = expand_path(public, "privacy.public_start").resolve()
    bundle = Bundle.open(path)
    root, is_private = settings.root().resolve(), bool(bundle.privacy["differential_privacy"])
    objections = {
        "was trained privately, and only its own ledger counts its ε": is_private,
        f"is in {settings.root()}, whose users must be protected": path.is_relative_to(root),
        "has another network": not _has_same_network(settings, dataset, bundle),
    }
    for objection, applies in objections.items():
        if applies:
            raise SettingsError(
                f"privacy.public_start: bundle {bundle.key} {objection}",
                "set a bundle of public data with the same model and data settings",
            )
    return bundle


def _previous_champion(settings: Settings, dataset: Dataset) -> Bundle | None:
    """The champion before this run; None if this training cannot begin with it.

    It cannot if the champion has another network, or has learned some of this run's test events, or is not in
    the ledger of a private training. A champion of this run is replaced by its parent, so that a repeated run
    begins with the same weights.
    """
    storage = Storage(settings.root())
    champion = Release.read(storage).champion
    bundle = None if champion is None else champion.open(storage)
    while bundle is not None and _is_of_this_run_or_later(dataset, bundle):
        before = bundle.manifest.get("parent")
        path = before and storage.bundle(before)
        bundle = Bundle.open(path) if path and path.exists() else None
    if bundle is None or explain_incomparable(dataset, bundle):
        return None
    if bundle.settings["split"] != bundle_settings(settings)["split"]:
        return None  # with another split it may have learned the validation events of this run
    if settings.privacy.enabled and not _is_in_ledger(settings, bundle):
        return None
    return bundle if _has_same_network(settings, dataset, bundle) else None


def _is_of_this_run_or_later(dataset: Dataset, bundle: Bundle) -> bool:
    """Whether a bundle is of this run or a later one. Without timestamps, only the data distinguish runs."""
    if dataset.clock == "timestamp" or bundle.as_of_s != dataset.as_of_s:
        return bundle.as_of_s >= dataset.as_of_s
    return bool(bundle.manifest["dataset_digest"] == dataset.digest)


def _is_in_ledger(settings: Settings, bundle: Bundle) -> bool:
    """Whether the training of a bundle is in the ledger of this run."""
    if bundle.privacy.get("population") != settings.privacy.population:
        return False
    try:
        return Ledger.read(settings.ledger_url(), settings.privacy.population).has_committed(bundle.key)
    except MissingArtifactError:
        return False


def network_shape(settings: Settings, dataset: Dataset) -> Shape:
    """Shape of the network that these settings train on a dataset."""
    return shape_of(
        settings.model, dataset, counts=settings.privacy.enabled and settings.privacy.counts_share > 0
    )


def _has_same_network(settings: Settings, dataset: Dataset, bundle: Bundle) -> bool:
    described = {
        "features": training_settings(settings).data.features,
        "context": dataset.context,
        "text_encoder": dataset.text_encoder,
    }
    if any(bundle.manifest.get(name) != value for name, value in described.items()):
        return False
    shape = network_shape(settings, dataset)
    return replace(Shape(**bundle.manifest["shape"]), event_types=shape.event_types) == shape
