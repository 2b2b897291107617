"""Histories in, ranked items out: pure torch, no Ray, no MLflow.

The nightly batch, the endpoint, evaluation and the rewards of a policy all score through `Predictor`, so they
agree by construction: equal bits for the same batch, 1e-5 of their scale across batch shapes, ties broken by
item index. A CPU and a GPU agree to 1e-4; bfloat16, which is off by default, to 1e-2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from recray.bundle import Bundle
from recray.dataset.popularity import DAY_S
from recray.dataset.reader import Dataset, History
from recray.errors import RequestError
from recray.inference.candidates import CandidateSelector, ScoreBlock, item_blocks
from recray.inference.encoder import HistoryEncoder
from recray.inference.fallback import PopularityFallback
from recray.inference.filters import ANY_ITEM, AvailabilityFilter, ExcludedItems, Filters
from recray.inference.rules import Rules
from recray.inference.vocabulary import Catalogue
from recray.model.controls import Controls
from recray.model.network import Network
from recray.model.shape import Batch

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 1 << 14  # of one forward pass, padding included
ROWS = 512  # histories of one forward pass, at most


@dataclass(frozen=True)
class Recommendations:
    """Recommendation lists of B requests.

    item_index : int64 [B, k], 0 where fewer items are allowed
    scores : float32 [B, k]
    source : `model`, or `popular` for a history without a known item
    state : float32 [B, 2], where it was asked for: entropy in nats of the last block's attention, and by how
        much the best score exceeds the second; NaN for `popular`
    """

    item_index: np.ndarray
    scores: np.ndarray
    source: list[str]
    state: np.ndarray | None = None


class Predictor:
    """Scores the items of a catalogue for histories. Open a bundle with `Predictor.load`.

    Parameters
    ----------
    popularity_prior_days : days of the popularity prior, 0 for none
    private : whether users were protected while the model was trained
    popular_only : every history gets the popularity fallback
    bfloat16 : see `HistoryEncoder`

    `cold_gaps`: quantiles over users of how much a list's last score exceeds that of the best cold item,
    empty where that was not measured; see `recray.training.calibration.measure_cold_gaps`.
    `retired` are the items that are never recommended, `n_available` is how many others there are.
    """

    def __init__(
        self,
        model: Network,
        catalogue: Catalogue,
        *,
        popularity_prior_days: int,
        private: bool = False,
        popular_only: bool = False,
        bfloat16: bool = False,
    ) -> None:
        self.catalogue, self.vocabulary = catalogue, catalogue.vocabulary
        self.private, self.popular_only = private, popular_only
        self.cold_gaps: tuple[float, ...] = ()
        self.encoder = HistoryEncoder(
            model, catalogue, popularity_prior_days=popularity_prior_days, bfloat16=bfloat16
        )
        self.device = self.encoder.device
        self._retire(np.asarray(catalogue.retired, np.int64))
        self.availability: AvailabilityFilter | None = None
        if catalogue.available_from is not None and catalogue.has_time:
            self.availability = AvailabilityFilter.from_days(
                catalogue.available_from, catalogue.popularity, self.device
            )
        self._take_over_model()

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        *,
        dataset: Dataset | None = None,
        device: str | torch.device = "cpu",
        popular_only: bool = False,
        bfloat16: bool = False,
    ) -> Predictor:
        """Predictor of a bundle, after its digests were verified.

        With `dataset`, recent popularity and availability come from there instead of from the run that
        trained the bundle; items that came since are scored by their features, and items that are not in it
        are not recommended. Raises MissingArtifactError, DamagedArtifactError.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        cold_items = None if dataset is None else opened.cold_items(dataset)
        predictor = cls(
            opened.model(cold_items).to(device),
            Catalogue.of_bundle(opened, dataset, cold_items),
            popularity_prior_days=opened.manifest["popularity_prior_days"],
            private=bool(opened.privacy["differential_privacy"]),
            popular_only=popular_only,
            bfloat16=bfloat16,
        )
        predictor.cold_gaps = tuple(opened.metrics.get("cold_gaps") or ())
        return predictor

    @classmethod
    def of(
        cls,
        model: Network,
        dataset: Dataset,
        popularity_prior_days: int,
        *,
        private: bool = False,
        bfloat16: bool = False,
    ) -> Predictor:
        """Predictor of a model that was built for a dataset, in that dataset's indices."""
        catalogue = Catalogue.of_dataset(dataset, private=private)
        return cls(
            model, catalogue, popularity_prior_days=popularity_prior_days, private=private, bfloat16=bfloat16
        )

    @property
    def model(self) -> Network:
        """The network, as the encoder reads it."""
        return self.encoder.model

    def refresh(self, model: Network | None = None) -> None:
        """Take over the current weights, as in inference.

        model : another model of the same shape and catalogue from now on; None: the same one
        """
        self.encoder.model = model or self.encoder.model
        self.encoder.refresh()
        self._take_over_model()

    def without(self, item_index: np.ndarray) -> Predictor:
        """The same predictor, which does not recommend some more items."""
        smaller = copy.copy(self)
        smaller._retire(np.union1d(self.retired.cpu().numpy(), item_index))
        smaller._selector = CandidateSelector(self.encoder.table_VD, smaller.retired)
        return smaller

    @property
    def n_items(self) -> int:
        return len(self.vocabulary)

    def _retire(self, item_index: np.ndarray) -> None:
        """Set the items that are never recommended, int64 [n]."""
        self.retired = torch.from_numpy(item_index).to(self.device)
        self.n_available = self.n_items - len(item_index)

    @property
    def cold_V(self) -> np.ndarray:
        """Which items are cold, bool [n_items + 1]: training never saw them, but they have features."""
        items = self.model.items
        return (items.present().any(0) & ~items.seen_V).cpu().numpy()

    def has_neighbours(self, item_index: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Whether item-to-item evidence connects each item with one of the candidates, bool [n]."""
        head = self.model.cooccurrence
        if head is None or not head.is_attached:
            return np.zeros(len(item_index), bool)
        neighbour_nM = head.item[torch.from_numpy(np.asarray(item_index, np.int64))].cpu().numpy()
        return np.asarray(np.isin(neighbour_nM, np.setdiff1d(candidates, [0])).any(1))

    def counts(self) -> np.ndarray:
        """Interactions with each item, float64 [n_items + 1]; of a private model its noised counts alone."""
        return self._fallback.counts()

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[History],
        k: int,
        *,
        now: int | Sequence[int],
        filters: Filters | Sequence[Filters] = ANY_ITEM,
        controls: Controls | None = None,
        rules: Rules | None = None,
        context: Sequence[np.ndarray] | None = None,
        with_state: bool = False,
    ) -> Recommendations:
        """The k best items for each history at the moment `now` (seconds; ignored where no time is known).

        controls : None is the trained model as it is
        rules : may choose other items and another order, see `Rules`
        context : codes [C] of each request, see `recray.dataset.context.encode_request`; None: unknown
        with_state : whether the state of the responses is computed

        Raises RequestError for a k below 1 or an index outside the vocabulary.
        """
        if k < 1:
            raise RequestError(f"k is {k}", "ask for at least one item")
        k = min(k, self.n_items + 1)
        each = [filters] * len(histories) if isinstance(filters, Filters) else list(filters)
        item_index = np.zeros((len(histories), k), np.int64)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        state = np.full((len(histories), 2), np.nan, np.float32)
        readable = [self.readable(history) for history in histories]
        days = np.broadcast_to(np.asarray(now, np.int64), len(histories)) // DAY_S

        for rows, score, entropy in self._chunks(readable, now, controls, context, with_entropy=with_state):
            pairs = [(histories[row], each[row]) for row in rows]
            excluded = ExcludedItems(pairs, self.device, self.availability, days[rows])
            *best, margin = self._selector.select(score, excluded, k, rules)
            item_index[rows], scores[rows] = (tensor.cpu().numpy() for tensor in best)
            if entropy is not None:
                state[rows] = torch.stack([entropy, margin], 1).cpu().numpy()

        source = ["model" if len(history.item_index) else "popular" for history in readable]
        return Recommendations(item_index, scores, source, state if with_state else None)

    @torch.no_grad()
    def score(
        self,
        histories: Sequence[History],
        candidates: Sequence[np.ndarray],
        *,
        now: int | Sequence[int],
        controls: Controls | None = None,
        context: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Scores float32 of item indices, one array a history. The score of index 0, an unknown item, has no
        meaning.

        Raises RequestError for an index outside the vocabulary.
        """
        for index in candidates:
            self.vocabulary.require_indices(np.asarray(index))
        result = [np.zeros(len(items), np.float32) for items in candidates]
        readable = [self.readable(history) for history in histories]
        for rows, score, _ in self._chunks(readable, now, controls, context):
            for items in item_blocks(self.n_items):
                scores = score(items, None).cpu().numpy()
                for position, row in enumerate(rows):
                    offset = np.asarray(candidates[row]) - items.start
                    inside = (offset >= 0) & (offset < scores.shape[1])
                    result[row][inside] = scores[position, offset[inside]]
        return result

    def log_probability(
        self,
        histories: Sequence[History],
        targets: Sequence[np.ndarray],
        *,
        now: Sequence[int],
        controls: Controls,
        context: Sequence[np.ndarray],
    ) -> Tensor:
        """Mean log-probability of each history's targets (item indices) under a softmax over all items [B],
        with the controls' gradient.
        """
        mean_by_row: dict[int, Tensor] = {}
        readable = [self.readable(history) for history in histories]
        for rows, score, _ in self._chunks(readable, now, controls, context):
            blocks = [score(items, None) for items in item_blocks(self.n_items)]
            log_share = torch.cat(blocks, 1).log_softmax(1)
            for position, row in enumerate(rows):
                mean_by_row[int(row)] = log_share[position, torch.from_numpy(targets[row])].mean()
        return torch.stack([mean_by_row[row] for row in range(len(histories))])

    def readable(self, history: History) -> History:
        """What the model reads of a history: its last events of known items; none with `popular_only`.

        Raises RequestError for an index outside the vocabulary.
        """
        index = np.asarray(history.item_index)
        self.vocabulary.require_indices(index)
        if self.popular_only:
            return History(*(np.asarray(values)[:0] for values in history))
        if not index.all():
            is_known = index > 0
            history = History(*(np.asarray(values)[is_known] for values in history))
        return history.last(self.model.shape.history)

    def _take_over_model(self) -> None:
        self._fallback = PopularityFallback(self.catalogue, self.model.offset_V, self.device)
        self._selector = CandidateSelector(self.encoder.table_VD, self.retired)

    def _chunks(
        self,
        histories: list[History],
        now: int | Sequence[int],
        controls: Controls | None,
        context: Sequence[np.ndarray] | None,
        *,
        with_entropy: bool = False,
    ) -> Iterator[tuple[np.ndarray, ScoreBlock, Tensor | None]]:
        """Rows of similar length, their scores, and the entropy of their attention where it is wanted."""
        if controls is not None and all(tensor is None for tensor in controls):
            controls = None
        moments = np.broadcast_to(np.asarray(now, np.int64), len(histories))
        context_BC = np.zeros((len(histories), self.model.shape.context), np.int64)
        if context is not None:
            context_BC = np.reshape(context, context_BC.shape).astype(np.int64)
        length = np.array([len(history.item_index) for history in histories], np.int64)
        order = np.argsort(-length, kind="stable")
        order, empty = order[length[order] > 0], order[length[order] == 0]

        for start in range(0, len(empty), ROWS):
            rows = empty[start : start + ROWS]
            yield rows, partial(self._fallback.score_block, moments[rows]), None

        start = 0
        while start < len(order):
            rows = order[start : start + max(min(TOKENS // int(length[order[start]]), ROWS), 1)]
            start += len(rows)
            batch = self.encoder.batch([histories[row] for row in rows], moments[rows], context_BC[rows])
            selected = None if controls is None else controls.select(torch.from_numpy(rows), self.device)
            hidden, entropy = self.encoder.encode(batch, selected, with_entropy=with_entropy)
            yield rows, partial(self._score_block, hidden, batch), entropy

    def _score_block(self, hidden: Tensor, batch: Batch, items: slice, rules: Rules | None) -> Tensor:
        scores = self.encoder.score_block(hidden, batch, items)
        return scores if rules is None else rules.adjust_scores(scores, items.start)
