"""State of serving: one published run with its predictor. It never changes; the next run replaces it as a
whole.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.bundle import Bundle, PrivacyStatement
from recray.config import ScoreSettings
from recray.config.sections import RuleSettings
from recray.dataset.ids import to_typed_id
from recray.dataset.reader import Dataset, History
from recray.dataset.schema import ITEM_ID
from recray.errors import DamagedArtifactError, MissingArtifactError, RefusedError, RequestError
from recray.inference import Predictor, Rules, Translation
from recray.inference.filters import SeenRule
from recray.inference.observer import Observer
from recray.inference.policy import Policy
from recray.release import Release
from recray.serving.api import MAX_K
from recray.snapshot.reader import Snapshot
from recray.storage import MANIFEST, Storage, manifest_digest

if TYPE_CHECKING:
    import torch

EMPTY_HISTORY = History(*(np.zeros(0, np.int64) for _ in range(4)))
GRAPH_REQUESTS = 32  # largest batch with a CUDA graph; a larger one keeps a GPU busy without
STALE_S = 7 * 86_400  # after so long without another run, no policy decides: the unmodified model serves
_LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ServingState:
    """One published run, and the model bundle of its real-time responses.

    artifact : the model bundle
    unavailable : indices of items that must not be recommended now (`recray.serving.items`), ascending
    policy_network : decides the attention modulation; None: the unmodified model serves
    bound : a policy with a larger bound is not used
    item_masks : cache of item indices by attribute filter
    explorable : whether the model has the controls of an exploration, by their names
    surface_rules : cache of rules by surface
    """

    snapshot: Snapshot
    dataset: Dataset
    predictor: Predictor
    translation: Translation
    rules: Rules | None
    artifact: Bundle
    bundle: str
    bundle_digest: str
    policy: str | None
    policy_network: Policy | None
    privacy: PrivacyStatement
    popular_items: tuple[tuple[Any, float], ...]
    loaded_at: dt.datetime
    bound: float = 1.0
    unavailable: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    item_masks: dict[str, np.ndarray] = field(default_factory=dict)
    explorable: dict[tuple[str, ...], bool] = field(default_factory=dict)
    surface_rules: dict[str, Rules | None] = field(default_factory=dict)

    @classmethod
    def load(cls, storage: Storage, device: str | torch.device = "cpu", bound: float = 1.0) -> ServingState:
        """The published run, on a device. Raises MissingArtifactError, DamagedArtifactError."""
        snapshot = Snapshot.latest(storage)
        dataset = Dataset.open(storage.root / snapshot.manifest["dataset"])
        if dataset.digest != snapshot.manifest["dataset_digest"]:
            raise DamagedArtifactError(
                f"dataset of {snapshot.path} is not the one it was scored with", "score the run again"
            )
        bundle = Bundle.open(storage.root / snapshot.manifest["bundle"])
        if bundle.digest != snapshot.manifest["bundle_digest"]:
            raise DamagedArtifactError(
                f"bundle of {snapshot.path} is not the one it was scored with", "score the run again"
            )
        popular_only = bool(snapshot.manifest.get("popular_only"))
        return _build_state(
            snapshot,
            dataset,
            bundle,
            snapshot.manifest.get("policy"),
            device,
            bound,
            popular_only=popular_only,
        )

    def with_bundle(self, bundle: Bundle, policy: str | None = None) -> ServingState:
        """The same run with another bundle and policy; `policy` of the result is None if it cannot be used.

        Raises MissingArtifactError, DamagedArtifactError of the bundle.
        """
        return _build_state(self.snapshot, self.dataset, bundle, policy, self.predictor.device, self.bound)

    def with_items(self, dataset: Dataset, unavailable: np.ndarray) -> ServingState:
        """The same run with other attributes of its items, without those that are unavailable."""
        predictor = self.predictor.without(unavailable) if len(unavailable) else self.predictor
        rules = _build_rules(self.snapshot, dataset, self.translation, predictor)
        return replace(
            self,
            dataset=dataset,
            predictor=predictor,
            rules=rules,
            popular_items=_rank_popular_items(predictor, dataset, rules),
            unavailable=unavailable,
            item_masks={},
            surface_rules={},
        )

    def build_rules(self, change: Callable[[RuleSettings], RuleSettings]) -> Rules | None:
        """Rules from a change of those of the lists. Raises RequestError for a column that the item table
        lacks.
        """
        declared = self.snapshot.manifest.get("rules") or ScoreSettings().rules()
        to_bundle, predictor = self.translation.to_bundle, self.predictor
        try:
            return Rules.from_settings(
                change(declared), self.dataset, to_bundle, predictor.cold_V, predictor.cold_gaps
            )
        except RefusedError as error:
            raise RequestError(f"surface: {error.message}", error.fix) from None

    @cached_property
    def observer(self) -> Observer:
        """Observes requests for the policy."""
        return Observer(self.predictor)

    @property
    def is_private(self) -> bool:
        """Whether the bundle was trained with differential privacy."""
        return bool(self.privacy["differential_privacy"])

    @property
    def name(self) -> str:
        """BUNDLE, or BUNDLE+POLICY."""
        return self.bundle if self.policy is None else f"{self.bundle}+{self.policy}"

    @property
    def has_lists(self) -> bool:
        """Whether there are batch recommendations."""
        return bool(self.snapshot.manifest["users"])

    @property
    def filters_seen(self) -> bool:
        """Whether the lists, and so all responses, have the seen-item filter."""
        return bool(self.snapshot.manifest["filter_seen"])

    @cached_property
    def seen_rule(self) -> SeenRule:
        """What the seen-item filter of the lists leaves out."""
        return SeenRule.from_settings(self.snapshot.manifest.get("seen"))

    @property
    def has_current_lists(self) -> bool:
        """Whether the lists are of the current policy, which may be released or withdrawn after they were
        scored.
        """
        return bool(self.snapshot.manifest.get("policy") == self.policy)

    @cached_property
    def date(self) -> str:
        """The last day of the run's data, UTC."""
        return str(dt.datetime.fromtimestamp(self.snapshot.as_of_s, dt.UTC).date())

    @cached_property
    def digest(self) -> str:
        """Digest of the snapshot's manifest; empty where there are no lists."""
        return manifest_digest(self.snapshot.path) if self.has_lists else ""

    @property
    def collected(self) -> dict[str, int]:
        """Last entry of each event store in this run's histories, by the identity of the store."""
        return dict(self.dataset.manifest.get("collected", {}))

    @property
    def begins_s(self) -> float:
        """Events from this moment on are not in the run, whatever was collected; infinity without times and
        as-of.
        """
        return (
            self.dataset.as_of_s + 1
            if self.dataset.clock == "timestamp" or self.dataset.as_of_s
            else math.inf
        )

    @property
    def is_stale(self) -> bool:
        """Whether the run is too old for policy decisions."""
        return time.time() > self.written_s + STALE_S

    @cached_property
    def written_s(self) -> float:
        """When the run was written, seconds since 1970."""
        return ((self.snapshot if self.has_lists else self.dataset).path / MANIFEST).stat().st_mtime

    def stored_history(self, user_id: Any) -> History:
        """The history of a user in the run, in the bundle's indices; empty for an unknown user."""
        user_id = self.snapshot.to_user_id(user_id)
        history = None if user_id is None else self.dataset.user_history(user_id)
        return EMPTY_HISTORY if history is None else self.translation.history(history)

    def to_user_name(self, user_id: Any) -> str | None:
        """The user as text, as in the event store, however a request wrote the id; None for no user."""
        if user_id is None:
            return None
        typed = self.snapshot.to_user_id(user_id)
        return str(user_id if typed is None else typed)

    def require_user(self, user_id: Any) -> str:
        """The user as text, as in the event store. Raises RequestError for an id that the event log cannot
        contain.
        """
        typed = self.snapshot.to_user_id(user_id)
        if typed is None:
            is_integral = self.snapshot.manifest["user_type"] != "string"
            problem = _describe_invalid_id("users of the event log", is_integral=is_integral)
            raise RequestError(f"user_id: {user_id!r} is {problem}", "send the id of the event log")
        return str(typed)

    def require_item(self, item_id: Any, field: str) -> Any:
        """An item's id in the type of the item table. Raises RequestError, which names the field, for an id
        that the table cannot contain.
        """
        is_integral = pa.types.is_integer(self.predictor.vocabulary.item_ids.type)
        typed = to_typed_id(item_id, is_integral=is_integral)
        if typed is None:
            problem = _describe_invalid_id("items of the item table", is_integral=is_integral)
            raise RequestError(f"{field}: {item_id!r} is {problem}", "send the id of the item table")
        return typed

    def knows_item(self, item_id: Any) -> bool:
        """Whether the model knows the item of a request."""
        try:
            return bool(self.predictor.vocabulary.index_of([self.require_item(item_id, "item_id")])[0])
        except RequestError:
            return False

    @cached_property
    def search_texts(self) -> tuple[pa.Array, pa.Array]:
        """Titles and ids of the items in lower case."""
        items, column = self.dataset.items, self.dataset.title_column
        ids = pc.utf8_lower(items[ITEM_ID].cast(pa.string()).combine_chunks())
        titles = ids if column is None else pc.utf8_lower(items[column].cast(pa.string()).combine_chunks())
        return titles, ids

    def find_title(self, item_id: Any) -> str:
        """An item's title, or its id where it has none."""
        return self.describe_item(item_id).get("title", str(item_id))

    def describe_item(self, item_id: Any) -> dict[str, str]:
        """What people see of an item, see `Dataset.describe_item`; empty for an unknown item."""
        row = int(self.translation.to_dataset[int(self.predictor.vocabulary.index_of([item_id])[0])])
        return self.dataset.describe_item(row) if row else {}


def load_without_lists(
    storage: Storage, score: ScoreSettings, device: str | torch.device = "cpu", bound: float = 1.0
) -> ServingState:
    """The champion on the last dataset, where no batch recommendations can be read. Raises
    MissingArtifactError, DamagedArtifactError.
    """
    datasets = [Dataset.open(path) for path in sorted((storage.root / "datasets").glob("[!.]*"))]
    if not datasets:
        raise MissingArtifactError(
            f"no dataset in {storage.root}", "run `recray nightly` first, or check storage.root"
        )
    champion = Release.read(storage).champion
    if champion is None:
        raise MissingArtifactError(
            f"no champion in {storage.root}", "run `recray nightly` first, or check storage.root"
        )
    dataset, bundle = max(datasets, key=lambda dataset: dataset.as_of_s), champion.open(storage)
    manifest = {
        "as_of_s": dataset.as_of_s,
        "bundle": f"bundles/{bundle.key}",
        "bundle_digest": bundle.digest,
        "filter_seen": score.filter_seen,
        "seen": score.seen(),
        "user_type": str(dataset.user_type),
        "rules": score.rules(),
    }
    return _build_state(
        Snapshot.create_empty(storage, manifest), dataset, bundle, champion.policy, device, bound
    )


def _build_state(
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
        loaded, reason = Policy.load_usable(
            Storage(bundle.path.parent.parent).policy(policy), bundle.digest, bound=bound
        )
        if loaded is None:
            _LOG.error("policy %s is not used, the unmodified model serves: %s", policy, reason)
            policy = None
    predictor = Predictor.load(bundle, dataset=dataset, device=device, popular_only=popular_only)
    predictor.encoder.capture_graphs(GRAPH_REQUESTS, () if loaded is None else loaded.actions)
    translation = predictor.vocabulary.translation(dataset)
    rules = _build_rules(snapshot, dataset, translation, predictor)
    return ServingState(
        snapshot=snapshot,
        dataset=dataset,
        predictor=predictor,
        translation=translation,
        rules=rules,
        artifact=bundle,
        bundle=bundle.key,
        bundle_digest=bundle.digest,
        policy=policy,
        policy_network=loaded,
        privacy=bundle.privacy,
        popular_items=_rank_popular_items(predictor, dataset, rules),
        loaded_at=dt.datetime.now(dt.UTC),
        bound=bound,
    )


def rebuild_state(state: ServingState, dataset: Dataset) -> ServingState:
    """The same run on another dataset, whose new items the model knows by their features."""
    return _build_state(
        state.snapshot,
        dataset,
        state.artifact,
        state.policy,
        state.predictor.device,
        state.bound,
        popular_only=state.predictor.popular_only,
    )


def _build_rules(
    snapshot: Snapshot, dataset: Dataset, translation: Translation, predictor: Predictor
) -> Rules | None:
    declared = snapshot.manifest.get("rules")  # snapshots of 0.1.0 have none
    if declared is None:
        return None
    return Rules.from_settings(
        declared, dataset, translation.to_bundle, predictor.cold_V, predictor.cold_gaps
    )


def _rank_popular_items(
    predictor: Predictor, dataset: Dataset, rules: Rules | None
) -> tuple[tuple[Any, float], ...]:
    """What an unknown user gets, at most `MAX_K` items."""
    popular = predictor.recommend([EMPTY_HISTORY], MAX_K, now=dataset.now_s, rules=rules)
    filled = popular.item_index[0] > 0
    ids = predictor.vocabulary.ids_of(popular.item_index[0][filled])
    return tuple(zip(ids, popular.scores[0][filled].tolist(), strict=True))


def _describe_invalid_id(owners: str, *, is_integral: bool) -> str:
    return f"not an integer, as the ids of the {owners} are" if is_integral else "blank"
