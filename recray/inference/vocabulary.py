"""What a model has indices for, and what is known of its items: the catalogue that a `Predictor` ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from recray.bundle import Bundle
from recray.dataset.ids import to_typed_id
from recray.dataset.popularity import UNKNOWN_DAY, Popularity
from recray.dataset.reader import Dataset, History
from recray.dataset.schema import ITEM_ID
from recray.errors import RequestError


@dataclass(frozen=True)
class Translation:
    """Index tables between a dataset and a bundle; 0 where the other side does not know the item.

    fields : position of each of the bundle's context fields among the dataset's, -1 where it has none
    """

    to_bundle: np.ndarray
    to_dataset: np.ndarray
    events: np.ndarray
    fields: np.ndarray

    def context(self, codes: np.ndarray) -> np.ndarray:
        """A dataset's context codes [C] as the bundle's; unknown where the dataset has no such field."""
        result: np.ndarray = np.append(codes, 0)[self.fields]  # position -1 is unknown
        return result

    def history(self, history: History) -> History:
        """A dataset's history in the bundle's indices; the predictor skips unknown items, which become 0."""
        return History(
            self.to_bundle[history.item_index],
            self.events[history.event_index],
            history.timestamp_s,
            history.value,
        )


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model, in the order of its indices.

    item_ids : the items, from index 1
    event_types : names in the order of `History.event_index`
    default_event : the type that an event of no type, or of an unknown one, counts as; None: the first
    context : names of the fields of the request context
    """

    item_ids: pa.Array
    event_types: list[str]
    default_event: str | None = None
    context: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.item_ids)

    def index_of(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Item indices int64 [n]; 0 for an id that the model does not know."""
        integral = pa.types.is_integer(self.item_ids.type)
        typed_ids = (to_typed_id(item, is_integral=integral) for item in item_ids)
        return np.array([self._index.get(typed_id, 0) for typed_id in typed_ids], np.int64)

    def ids_of(self, item_index: np.ndarray) -> list[Any]:
        """Ids of item indices above 0."""
        return [self._ids[index - 1] for index in np.asarray(item_index).tolist()]

    def require_indices(self, item_index: np.ndarray) -> None:
        """Raises RequestError for an index outside the vocabulary."""
        if len(item_index) and (item_index.min() < 0 or item_index.max() > len(self)):
            raise RequestError(
                f"item index {item_index.min()} or {item_index.max()} lies outside 0 to {len(self)}",
                "use Vocabulary.index_of",
            )

    def event_index(self, names: Sequence[str | None]) -> np.ndarray:
        """Index of each event type, int64 [n]; of the default for none and for an unknown one."""
        index = {name: i for i, name in enumerate(self.event_types)}
        default = index.get(self.default_event or "", 0)
        return np.array([index.get(name, default) if name else default for name in names], np.int64)

    def translation(self, dataset: Dataset) -> Translation:
        """To a dataset's indices and back: the dataset may know items that came after the training."""
        to_bundle = dataset.translate(self.item_ids)
        to_dataset = np.zeros(len(self) + 1, np.int64)
        to_dataset[to_bundle] = np.arange(dataset.n_items + 1)
        to_dataset[0] = 0
        fields = [dataset.context.index(name) if name in dataset.context else -1 for name in self.context]
        events = self.event_index(dataset.event_types)
        return Translation(to_bundle, to_dataset, events, np.array(fields, np.int64))

    @cached_property
    def _index(self) -> dict[Any, int]:
        return {item: i + 1 for i, item in enumerate(self._ids)}

    @cached_property
    def _ids(self) -> list[Any]:
        result: list[Any] = self.item_ids.to_pylist()
        return result


@dataclass(frozen=True)
class Catalogue:
    """The items that a model ranks, and what is known of them. Arrays are by item index [n_items + 1].

    popularity : dated counts in this vocabulary, for the popularity prior and, unless the model has counts of
        its own, the popularity fallback
    has_time : whether `timestamp_s` is a time
    available_from_day : day since which each item is available, as the model was told it; None: not known
    available_from : the same, for items that are not recommended before that day, unless somebody interacted
        with them before; None: all are
    retired : indices of items that are never recommended
    """

    vocabulary: Vocabulary
    popularity: Popularity
    has_time: bool
    available_from_day: np.ndarray | None = None
    available_from: np.ndarray | None = None
    retired: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of_dataset(cls, dataset: Dataset, *, private: bool = False) -> Catalogue:
        """The items of a dataset, in its indices."""
        vocabulary = Vocabulary(
            dataset.items[ITEM_ID].combine_chunks(),
            dataset.event_types,
            dataset.manifest.get("default_event"),
            dataset.context,
        )
        popularity = dataset.public_popularity if private else dataset.popularity
        return cls(vocabulary, popularity, dataset.has_time, dataset.released_day, dataset.released_day)

    @classmethod
    def of_bundle(cls, bundle: Bundle, dataset: Dataset | None, cold_items: pa.Table | None) -> Catalogue:
        """The items of a bundle, and those that came since.

        dataset : where recent popularity and availability come from; None: the run that trained the bundle
        cold_items : items of the dataset that the bundle knows by their features alone
        """
        private = bool(bundle.privacy["differential_privacy"])
        item_ids, available_from_day = bundle.item_ids, bundle.released_day
        if cold_items is not None and len(cold_items):
            item_ids = pa.concat_arrays([item_ids, cold_items[ITEM_ID].combine_chunks()])
            if available_from_day is not None:
                available_from_day = np.concatenate(
                    [available_from_day, np.full(len(cold_items), UNKNOWN_DAY)]
                )
        manifest = bundle.manifest
        vocabulary = Vocabulary(
            item_ids, manifest["event_types"], manifest.get("default_event"), manifest.get("context", [])
        )
        has_time: bool = manifest["has_time"]
        if dataset is None:
            popularity = Popularity.load(bundle.path / "popularity.parquet", len(item_ids))
            return cls(vocabulary, popularity, has_time, available_from_day, available_from_day)

        position, available_from = dataset.translate(item_ids), None
        if (current := dataset.released_day) is not None:
            if available_from_day is None:
                available_from = np.full(len(item_ids) + 1, UNKNOWN_DAY)
            else:
                available_from = available_from_day.copy()
            available_from[position] = current
            available_from[0] = UNKNOWN_DAY
            available_from_day = None if available_from_day is None else available_from
        counts = dataset.public_popularity if private else dataset.popularity
        retired = np.setdiff1d(np.arange(1, len(item_ids) + 1), position)
        popularity = counts.remap(position, len(item_ids))
        return cls(vocabulary, popularity, has_time, available_from_day, available_from, retired)
