"""What requests are served from: one published run, with the predictor behind it. It never changes; the next run replaces it as a whole."""

from __future__ import annotations

import datetime as dt
import logging
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recray.bundle import Bundle
from recray.config import ScoreSettings
from recray.dataset.ids import as_id
from recray.dataset.reader import Dataset, History
from recray.errors import DamagedArtifactError, MissingArtifactError, RequestError
from recray.inference import Predictor, Rules, Translation
from recray.inference.policy import Policy
from recray.release import Release
from recray.serving.api import MOST_ANSWERS
from recray.snapshot.reader import Snapshot
from recray.storage import MANIFEST, Storage, manifest_digest

if TYPE_CHECKING:
    import torch

EMPTY_HISTORY = History(*(np.zeros(0, np.int64) for _ in range(4)))
GRAPH_REQUESTS = 32  # that a GPU serves by a CUDA graph, at once; more keep it busy as they are
STALE_S = 7 * 86_400  # after which, without another run, nothing is decided: the trained model serves as it is
_LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ServingState:
    """One published run, and the model bundle behind its real-time responses.

    policy_network : decides how the attention is modulated; None: the trained model serves as it is
    bound : a policy that modulates further does not decide
    item_masks : item indices by attribute filter, remembered by `recray.serving.sources`
    explorable : whether the model has the controls of an exploration, by their names
    """

    snapshot: Snapshot
    dataset: Dataset
    predictor: Predictor
    translation: Translation
    rules: Rules | None
    bundle: str
    bundle_digest: str
    policy: str | None
    policy_network: Policy | None
    privacy: dict[str, Any]
    popular_items: tuple[tuple[Any, float], ...]
    loaded_at: dt.datetime
    bound: float = 1.0
    item_masks: dict[str, np.ndarray] = field(default_factory=dict)
    explorable: dict[tuple[str, ...], bool] = field(default_factory=dict)

    @classmethod
    def load(cls, storage: Storage, device: str | torch.device = "cpu", bound: float = 1.0) -> ServingState:
        """The published run, on a device. Raises MissingArtifactError, DamagedArtifactError."""
        snapshot = Snapshot.latest(storage)
        dataset = Dataset.open(storage.root / snapshot.manifest["dataset"])
        if dataset.digest != snapshot.manifest["dataset_digest"]:
            raise DamagedArtifactError(f"dataset of {snapshot.path} is not the one it was scored with", "score the night again")
        bundle = Bundle.open(storage.root / snapshot.manifest["bundle"])
        if bundle.digest != snapshot.manifest["bundle_digest"]:
            raise DamagedArtifactError(f"bundle of {snapshot.path} is not the one it was scored with", "score the night again")
        popular_only = bool(snapshot.manifest.get("popular_only"))
        return cls._create(snapshot, dataset, bundle, snapshot.manifest.get("policy"), device, bound, popular_only=popular_only)

    @classmethod
    def without_lists(cls, storage: Storage, score: ScoreSettings, device: str | torch.device = "cpu", bound: float = 1.0) -> ServingState:
        """The champion on the last dataset, where no lists can be read. Raises MissingArtifactError, DamagedArtifactError."""
        datasets = [Dataset.open(path) for path in sorted((storage.root / "datasets").glob("[!.]*"))]
        if not datasets:
            raise MissingArtifactError(f"no dataset in {storage.root}", "run `recray nightly` first, or check storage.root")
        champion = Release.read(storage).champion
        if champion is None:
            raise MissingArtifactError(f"no champion in {storage.root}", "run `recray nightly` first, or check storage.root")
        dataset, bundle = max(datasets, key=lambda dataset: dataset.as_of_s), champion.open(storage)
        manifest = {
            "as_of_s": dataset.as_of_s,
            "bundle": f"bundles/{bundle.key}",
            "bundle_digest": bundle.digest,
            "new_only": score.new_only,
            "user_type": str(dataset.user_type),
            "rules": score.rules(),
        }
        return cls._create(Snapshot.stand_in(storage, manifest), dataset, bundle, champion.policy, device, bound)

    def with_bundle(self, bundle: Bundle, policy: str | None = None) -> ServingState:
        """The same run with another bundle and policy behind it; `policy` of what is returned is None where it does not decide.

        Raises MissingArtifactError, DamagedArtifactError of the bundle.
        """
        return self._create(self.snapshot, self.dataset, bundle, policy, self.predictor.device, self.bound)

    @classmethod
    def _create(
        cls,
        snapshot: Snapshot,
        dataset: Dataset,
        bundle: Bundle,
        policy: str | None,
        device: str | torch.device,
        bound: float,
        *,
        popular_only: bool = False,
    ) -> ServingState:
        loaded = None
        if policy is not None:
            loaded, reason = Policy.sound(Storage(bundle.path.parent.parent).policy(policy), bundle.digest, bound=bound)
            if loaded is None:
                _LOG.error("policy %s does not decide, the trained model answers as it is: %s", policy, reason)
                policy = None
        predictor = Predictor.load(bundle, dataset=dataset, device=device, popular_only=popular_only)
        predictor.capture_graphs(GRAPH_REQUESTS, () if loaded is None else loaded.actions)
        declared = snapshot.manifest.get("rules")  # snapshots of 0.1.0 have none
        translation = predictor.translation(dataset)
        rules = None if declared is None else Rules.declared(declared, dataset, translation.to_bundle, predictor.unseen)

        most_popular = predictor.recommend([EMPTY_HISTORY], MOST_ANSWERS, now=dataset.now_s, rules=rules)
        filled = most_popular.item_index[0] > 0
        ids, scores = predictor.ids_of(most_popular.item_index[0][filled]), most_popular.scores[0][filled].tolist()
        popular_items = tuple(zip(ids, scores, strict=True))
        return cls(
            snapshot=snapshot,
            dataset=dataset,
            predictor=predictor,
            translation=translation,
            rules=rules,
            bundle=bundle.key,
            bundle_digest=bundle.digest,
            policy=policy,
            policy_network=loaded,
            privacy=bundle.privacy,
            popular_items=popular_items,
            loaded_at=dt.datetime.now(dt.UTC),
            bound=bound,
        )

    @property
    def is_private(self) -> bool:
        """Whether users were protected while the bundle was trained."""
        return bool(self.privacy["differential_privacy"])

    @property
    def name(self) -> str:
        """Of what serves: the bundle, and the policy behind a plus sign where there is one."""
        return self.bundle if self.policy is None else f"{self.bundle}+{self.policy}"

    @property
    def has_lists(self) -> bool:
        """Whether there are nightly lists."""
        return bool(self.snapshot.manifest["users"])

    @property
    def filters_seen(self) -> bool:
        """Whether the lists, and so all responses, leave out the items of the history."""
        return bool(self.snapshot.manifest["new_only"])

    @property
    def lists_are_current(self) -> bool:
        """Whether the lists are of the policy that decides now, which may be released, or taken away, after they were made."""
        return bool(self.snapshot.manifest.get("policy") == self.policy)

    @cached_property
    def date(self) -> str:
        """The day with which the run's data end, UTC."""
        return str(dt.datetime.fromtimestamp(self.snapshot.as_of_s, dt.UTC).date())

    @cached_property
    def digest(self) -> str:
        """Of the snapshot's manifest; empty where there are no lists."""
        return manifest_digest(self.snapshot.path) if self.has_lists else ""

    @property
    def collected(self) -> dict[str, int]:
        """How far event stores are in this run's histories: a number by the identity of a store."""
        return dict(self.dataset.manifest.get("collected", {}))

    @property
    def begins_s(self) -> float:
        """From when on an event is none of this run's, whatever was collected; infinity where neither times nor an as-of are known."""
        return self.dataset.as_of_s + 1 if self.dataset.clock == "timestamp" or self.dataset.as_of_s else math.inf

    @property
    def is_stale(self) -> bool:
        """Whether the run is so old that what it saw of users says nothing any more."""
        return time.time() > self._written_s + STALE_S

    @cached_property
    def _written_s(self) -> float:
        return ((self.snapshot if self.has_lists else self.dataset).path / MANIFEST).stat().st_mtime

    def stored_history(self, user_id: Any) -> History:
        """What the run knows of a user, in the bundle's indices; an empty one for somebody unknown."""
        user_id = self.snapshot.as_user(user_id)
        history = None if user_id is None else self.dataset.user_history(user_id)
        return EMPTY_HISTORY if history is None else self.translation.history(history)

    def name_of_user(self, user_id: Any) -> str | None:
        """The user as the event store has them, however a request wrote the id; None for nobody."""
        if user_id is None:
            return None
        typed = self.snapshot.as_user(user_id)
        return str(user_id if typed is None else typed)

    def require_user(self, user_id: Any) -> str:
        """A user as the event store names them. Raises RequestError for an id that the event log cannot hold."""
        typed = self.snapshot.as_user(user_id)
        if typed is None:
            integral = self.snapshot.manifest["user_type"] != "string"
            raise RequestError(f"user_id: {user_id!r} is {_no_id(integral, 'users of the event log')}", "send the id of the event log")
        return str(typed)

    def require_item(self, item_id: Any, field: str) -> Any:
        """An item's id in the type of the item table. Raises RequestError, which names the field, for one that it cannot hold."""
        integral = pa.types.is_integer(self.predictor.item_ids.type)
        typed = as_id(item_id, integral=integral)
        if typed is None:
            raise RequestError(f"{field}: {item_id!r} is {_no_id(integral, 'items of the item table')}", "send the id of the item table")
        return typed

    def knows_item(self, item_id: Any) -> bool:
        """Whether an id of a request is that of an item which the model knows."""
        try:
            return bool(self.predictor.index_of([self.require_item(item_id, "item_id")])[0])
        except RequestError:
            return False

    def title(self, item_id: Any) -> str:
        """An item's title, its id where the item table has none."""
        table = self.dataset.items
        if "title" not in table.column_names:
            return str(item_id)
        row = int(self.translation.to_dataset[int(self.predictor.index_of([item_id])[0])])
        return str(table["title"][row - 1].as_py() or item_id) if row else str(item_id)


def _no_id(integral: bool, whose: str) -> str:
    return f"no integer as it is written, as the ids of the {whose} are" if integral else "blank"
