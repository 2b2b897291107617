"""Histories in, ranked items out: pure torch, no Ray, no MLflow.

Owns the one path from a history to scores, so that the nightly batch, the endpoint, evaluation and the rewards of a
policy agree by construction: equal bits for the same batch, 1e-5 of their scale across batch shapes, ties broken by item index. Between a
CPU and a GPU they agree to 1e-4; in half the bits, which is asked for, to 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from recray.bundle import Bundle
from recray.dataset.ids import as_id
from recray.dataset.popularity import DAY_S, NEVER_SAID, Popularity
from recray.dataset.reader import Dataset, History
from recray.errors import RequestError
from recray.inference.filters import ANY_ITEM, Barred, Filters, Later
from recray.inference.graphs import Graphs
from recray.inference.inputs import Inputs, make_room
from recray.inference.modulation import find_slots, to_controls
from recray.inference.policy import observe, popularity_rank
from recray.inference.rules import Rules
from recray.inference.topk import merge, top_k
from recray.model.controls import Controls
from recray.model.recommender import Recommender
from recray.model.shape import Batch
from recray.schema import ITEM_ID

if TYPE_CHECKING:
    from torch import Tensor

POPULAR_DAYS = 7
POSITIONS = 1 << 14  # history positions of one forward pass, padding included
ROWS = 512  # histories of one, at most
ITEM_BLOCK = 1 << 16  # items scored at once

_Score = Callable[[int, Rules | None], "Tensor"]


@dataclass(frozen=True)
class Recommendations:
    """Answers to B requests: item_index int64 [B, k] (0 where fewer items are allowed), scores float32 [B, k], and the
    source of each answer: `model`, or `popular` for a history without a known item.

    state float32 [B, 2], where it was asked for: entropy in nats of the last block's attention, and how much the best score is above the
    second; NaN for `popular`.
    """

    item_index: np.ndarray
    scores: np.ndarray
    source: list[str]
    state: np.ndarray | None = None


@dataclass(frozen=True)
class Translation:
    """Index tables between a dataset and a bundle; 0 where the other side does not know the item."""

    to_bundle: np.ndarray
    to_dataset: np.ndarray
    events: np.ndarray
    fields: np.ndarray  # place of each of the bundle's context fields among the dataset's, -1 where it has none

    def context(self, codes: np.ndarray) -> np.ndarray:
        """A dataset's context codes [C] as the bundle's; unknown where the dataset has no such field."""
        known = np.append(codes, 0)  # place -1
        found: np.ndarray = known[self.fields]
        return found

    def history(self, history: History) -> History:
        """A dataset's history in the bundle's indices; unknown items become 0 and are skipped by the predictor."""
        return History(self.to_bundle[history.item_index], self.events[history.event_index], history.timestamp_s, history.value)


@dataclass(frozen=True)
class Explanation:
    """What carried the scores of k items of one user.

    position int64 [n]: the events that were looked at, as places in the history that was given, latest last;
    attention float32 [n]: how much of each reached the answer through the attention (roll-out), of one for the whole history;
    drop float32 [k, n]: how much lower the score of each item is without the event (occlusion).
    """

    position: np.ndarray
    attention: np.ndarray
    drop: np.ndarray


class Predictor:
    """Scores items for histories. Open a bundle with `Predictor.load`.

    Parameters
    ----------
    item_ids : the vocabulary in the order of its indices, from 1
    event_types : names in the order of `History.event_index`
    default_event : the one of them that an event of no type, or of another one, counts as; None: the first
    popularity : dated counts in this vocabulary, for the prior and, unless the model has counts of its own, the popular list
    private : whether users were protected while the model was trained
    prior_days : days of the popularity prior, 0 for none
    has_time : whether `timestamp_s` is a time
    context : names of the fields of the request context
    released_day : since when each item can be met, as `Dataset.released_day`, from which the model is told how fresh it is
    barred_until : the same, for what is not answered before that day, unless it was met before; None: nothing is
    retired : indices of items that are never answered
    popular_only : every history is answered with the popular list, as one without a known item is
    half : a CPU's products of the histories in bfloat16, those with the items in float32; answers agree to some 1e-2 of their scale alone
    """

    def __init__(
        self,
        model: Recommender,
        item_ids: pa.Array,
        event_types: list[str],
        popularity: Popularity,
        *,
        prior_days: int,
        has_time: bool,
        private: bool = False,
        default_event: str | None = None,
        context: Sequence[str] = (),
        released_day: np.ndarray | None = None,
        barred_until: np.ndarray | None = None,
        retired: np.ndarray | None = None,
        popular_only: bool = False,
        half: bool = False,
    ) -> None:
        self.model = model
        self.item_ids = item_ids
        self.event_types = event_types
        self.default_event = default_event if default_event in event_types else event_types[0]
        self.popularity, self.private = popularity, private
        self.has_time = has_time
        self.context = list(context)
        self.device = next(model.parameters()).device
        self.retired = torch.from_numpy(np.zeros(0, np.int64) if retired is None else np.asarray(retired, np.int64)).to(self.device)
        self.popular_only, self.half = popular_only, half
        self._later = Later.of(barred_until, popularity, self.device) if barred_until is not None and has_time else None
        self._inputs = Inputs(
            popularity,
            prior_days=0 if model.prior_scale is None else prior_days,
            has_time=has_time,
            event_types=model.shape.event_types,
            released_day=released_day if model.shape.fresh else None,
        )
        self._index: dict[Any, int] | None = None
        self._populars: dict[int, Tensor] = {}
        self._graphs: Graphs | None = None
        self.refresh()

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        *,
        dataset: Dataset | None = None,
        device: str | torch.device = "cpu",
        popular_only: bool = False,
        half: bool = False,
    ) -> Predictor:
        """Predictor of a bundle, after its digests were verified.

        With `dataset`, recent popularity and release days come from there instead of from the night the bundle was trained in; items that came
        since are scored by their features, and those that are gone are not answered. Raises MissingArtifactError, DamagedArtifactError.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        private = bool(opened.privacy["differential_privacy"])
        newcomers = None if dataset is None else opened.newcomers(dataset)
        item_ids, released, retired = opened.item_ids, opened.released_day, None
        if newcomers is not None and len(newcomers):
            item_ids = pa.concat_arrays([item_ids, newcomers[ITEM_ID].combine_chunks()])
            released = None if released is None else np.concatenate([released, np.full(len(newcomers), NEVER_SAID)])
        if dataset is None:
            popularity, barred_until = Popularity.load(opened.path / "popularity.parquet", len(item_ids)), released
        else:
            place, barred_until = dataset.translate(item_ids), None
            if (tonight := dataset.released_day) is not None:
                barred_until = np.full(len(item_ids) + 1, NEVER_SAID) if released is None else released.copy()
                barred_until[place] = tonight
                barred_until[0] = NEVER_SAID
                released = None if released is None else barred_until
            popularity = (dataset.public_popularity if private else dataset.popularity).remap(place, len(item_ids))
            retired = np.setdiff1d(np.arange(1, len(item_ids) + 1), place)
        return cls(
            opened.model(newcomers).to(device),
            item_ids,
            opened.manifest["event_types"],
            popularity,
            prior_days=opened.manifest["prior_days"],
            has_time=opened.manifest["has_time"],
            private=private,
            default_event=opened.manifest.get("default_event"),
            context=opened.manifest.get("context", []),
            released_day=released,
            barred_until=barred_until,
            retired=retired,
            popular_only=popular_only,
            half=half,
        )

    @classmethod
    def of(cls, model: Recommender, dataset: Dataset, prior_days: int, *, private: bool = False, half: bool = False) -> Predictor:
        """Predictor of a model that was built for a dataset, in that dataset's indices."""
        return cls(
            model,
            dataset.items[ITEM_ID].combine_chunks(),
            dataset.event_types,
            dataset.public_popularity if private else dataset.popularity,
            prior_days=prior_days,
            has_time=dataset.has_time,
            private=private,
            default_event=dataset.manifest.get("default_event"),
            context=dataset.context,
            released_day=dataset.released_day,
            barred_until=dataset.released_day,
            half=half,
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's current weights, as they answer: nothing is dropped, whatever mode the model is in."""
        was_training = self.model.training
        self.model.eval()
        self._parts_MVD = self.model.items.parts()
        self._table_VD = self.model.items()
        self._output_VD = self.model.output(self._table_VD)
        known_V = self.model.items.present().any(0)
        self._nothing = (~known_V[1:]).nonzero()[:, 0] + 1
        if len(self._nothing) and known_V.any():  # neither learned nor told: such an item scores as all others do on average
            self._output_VD = self._output_VD.index_copy(0, self._nothing, self._output_VD[known_V].mean(0).expand(len(self._nothing), -1))
        self.model.train(was_training)
        self._populars.clear()
        self._graphs = None  # they read the item vectors where they were

    def capture_graphs(self, users: int, controls: Sequence[str] = ()) -> None:
        """On a GPU, record the forward pass of up to so many requests at once as CUDA graphs, before the first one comes; on a CPU nothing.

        They hold until `refresh`. controls : that requests may have
        """
        if self.device.type != "cuda":
            return
        one, moment = History(*(np.ones(1, kind) for kind in (np.int64, np.int64, np.int64, np.float32))), np.zeros(1, np.int64)
        batch = self._inputs.batch([one], moment, np.zeros((1, self.model.shape.context), np.int64)).to(self.device)
        turned: list[Controls | None] = [None]
        if controls:
            turned.append(Controls(*(None if part is None else part.to(self.device) for part in self.controls_of([dict.fromkeys(controls, 0.0)]))))
        self.model.eval()
        self._graphs = Graphs(self._hidden, (batch, turned), users, self.model.shape.history)

    @property
    def vectors(self) -> Tensor:
        """Of the items, [n_items + 1, D]."""
        found: Tensor = self._table_VD
        return found

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def unseen(self) -> np.ndarray:
        """Which items are known by their features alone, since training never saw them, bool [n_items + 1]."""
        items = self.model.items
        found: np.ndarray = (items.present().any(0) & ~items.seen_V).cpu().numpy()
        return found

    @property
    def answerable(self) -> int:
        """Items that may be answered: all but those that are gone."""
        return self.n_items - len(self.retired)

    def index_of(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Item indices int64 [n]; 0 for an id that the bundle does not know."""
        if self._index is None:
            self._index = {item: i + 1 for i, item in enumerate(self._outside)}
        integral = pa.types.is_integer(self.item_ids.type)
        return np.array([self._index.get(as_id(item, integral=integral), 0) for item in item_ids], np.int64)

    def ids_of(self, item_index: np.ndarray) -> list[Any]:
        """Outside ids of item indices above 0."""
        return [self._outside[index - 1] for index in np.asarray(item_index).tolist()]

    @cached_property
    def _outside(self) -> list[Any]:
        """The vocabulary as Python has it."""
        found: list[Any] = self.item_ids.to_pylist()
        return found

    @torch.no_grad()
    def similar(self, item: int, k: int, now: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The items whose vectors are most like that of an item, int64 [up to k], and their cosines, float32 [up to k].

        An item of which nothing is known is like no other. With `now`, what cannot be met at that moment (seconds) is left out.
        Raises RequestError for an index outside the vocabulary.
        """
        if not 0 < item <= self.n_items:
            raise RequestError(f"item index {item} lies outside 1 to {self.n_items}", "use Predictor.index_of")
        wanted = torch.nn.functional.normalize(self._table_VD[item], dim=0)
        if torch.isin(item, self._nothing):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        best: tuple[Tensor, Tensor] | None = None
        barred = torch.cat([self.retired, self._nothing, torch.tensor([0, item], device=self.device)])
        if self._later is not None and now is not None:
            barred = torch.cat([barred, self._later.than(now // DAY_S).items])
        for first in range(0, self.n_items + 1, ITEM_BLOCK):
            found = torch.nn.functional.normalize(self._table_VD[first : first + ITEM_BLOCK], dim=1) @ wanted
            index = torch.arange(first, first + len(found), device=found.device)
            found[torch.isin(index, barred)] = -torch.inf
            places, values = top_k(found[None], min(k, self.n_items))
            best = merge(best, (places + first, values), k)
        assert best is not None
        index_k, values_k = (tensor[0].cpu().numpy() for tensor in best)
        real = np.isfinite(values_k)
        return index_k[real], values_k[real]

    def translation(self, dataset: Dataset) -> Translation:
        """Between a dataset's indices and the bundle's: the dataset may know items that came after the training."""
        to_bundle = dataset.translate(self.item_ids)
        to_dataset = np.zeros(self.n_items + 1, np.int64)
        to_dataset[to_bundle] = np.arange(dataset.n_items + 1)
        to_dataset[0] = 0
        events = self.event_index(dataset.event_types)
        fields = np.array([dataset.context.index(name) if name in dataset.context else -1 for name in self.context], np.int64)
        return Translation(to_bundle, to_dataset, events, fields)

    def event_index(self, names: Sequence[str | None]) -> np.ndarray:
        """Index of each type of events, int64 [n]; of the default for none and for one that the model does not know."""
        known = {name: place for place, name in enumerate(self.event_types)}
        return np.array([known.get(name or self.default_event, known[self.default_event]) for name in names], np.int64)

    @cached_property
    def _rank_V(self) -> np.ndarray:
        return popularity_rank(self.counts())

    def counts(self) -> np.ndarray:
        """How often each item was met, float64 [n_items + 1]; where privacy was on while the model was trained, its noised counts alone."""
        own = self.model.offset_V
        return self.popularity.total() if own is None else own.double().exp().cpu().numpy()

    def observe(self, history: History, now: int, state: np.ndarray | None = None) -> np.ndarray:
        """What a policy sees of a request, float32 [len(OBSERVED)]. state : [2] of `Recommendations.state`, as the last night had it"""
        return observe(history, now, self._rank_V, has_time=self.has_time, state=state)

    def observe_all(self, histories: Sequence[History], now: int, states: np.ndarray) -> np.ndarray:
        """As `observe`, float32 [N, len(OBSERVED)]. states : [N, 2]"""
        return np.stack([self.observe(history, now, state) for history, state in zip(histories, states, strict=True)])

    def controls_of(self, actions: Sequence[Mapping[str, float]]) -> Controls:
        """The controls of requests that are each modulated by what their names say (see `recray.inference.modulation.find_slots`).

        Raises SettingsError for a name that the model does not have.
        """
        names = list(dict.fromkeys(name for action in actions for name in action))
        if not names:
            return Controls()
        values = np.array([[action.get(name, 0.0) for name in names] for action in actions])
        return to_controls(values, find_slots(names, self.model, self.event_types), self.model, self.event_types)

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
        watched: bool = False,
    ) -> Recommendations:
        """The k best items for each history at the moment `now` (seconds; ignored where no time is known).

        `controls`: None is the trained model as it is. `rules` may choose others and another order (see `Rules`). `context` holds the codes [C] of
        each request's context (see `recray.dataset.context.asked`); None: unknown. `watched`: say the state of the responses.
        Raises RequestError for a k below 1 or an index outside the vocabulary.
        """
        if k < 1:
            raise RequestError(f"k is {k}", "ask for at least one item")
        k = min(k, self.n_items + 1)
        each = [filters] * len(histories) if isinstance(filters, Filters) else list(filters)
        item_index, scores = np.zeros((len(histories), k), np.int64), np.full((len(histories), k), -np.inf, np.float32)
        known = [self._known(history) for history in histories]
        seen = np.full((len(histories), 2), np.nan, np.float32)
        days = np.broadcast_to(np.asarray(now, np.int64), len(histories)) // DAY_S
        for rows, score, entropy in self._chunks(known, now, controls, context, watched=watched):
            barred = Barred([(histories[row].item_index, each[row]) for row in rows], self.device, self._later, days[rows])
            *best, margin = self._best(score, barred, k, rules)
            item_index[rows], scores[rows] = (tensor.cpu().numpy() for tensor in best)
            if entropy is not None:
                seen[rows] = torch.stack([entropy, margin], 1).cpu().numpy()
        source = ["model" if len(history.item_index) else "popular" for history in known]
        return Recommendations(item_index, scores, source, seen if watched else None)

    def _best(self, score: _Score, barred: Barred, k: int, rules: Rules | None) -> tuple[Tensor, Tensor, Tensor]:
        """Items and scores [rows, k] of a chunk, and how much the best one that may be answered is above the second [rows]."""
        pool = max(k, 2) if rules is None else min(rules.pool(max(k, 2)), self.n_items + 1)
        index, values = self._first(score, barred, pool, rules)
        margin = torch.nan_to_num(values[:, 0] - values[:, 1], nan=0.0, posinf=0.0)  # nothing else, or nothing at all
        if rules is None:
            return index[:, :k], values[:, :k], margin
        chosen, scores = rules.choose(index, values, self._table_VD, k)
        filled = min(k, rules.room)
        short = ((chosen[:, filled - 1] == 0) & (index[:, -1] > 0)).nonzero()[:, 0] if filled else index.new_zeros(0)
        while len(short) and pool <= self.n_items:  # caps left places empty although there is more to choose from
            pool = min(4 * pool, self.n_items + 1)
            index, values = self._first(score, barred, pool, rules, short)
            chosen[short], scores[short] = rules.choose(index, values, self._table_VD, k)
            short = short[(chosen[short, filled - 1] == 0) & (index[:, -1] > 0)]
        return chosen, scores, margin

    def _first(self, score: _Score, barred: Barred, n: int, rules: Rules | None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The n best items that may be answered, and their scores, of a chunk or of some of its rows; 0 and -inf where there are fewer."""
        best: tuple[Tensor, Tensor] | None = None
        for first in range(0, self.n_items + 1, ITEM_BLOCK):
            found = score(first, rules)
            gone = self.retired[(self.retired >= first) & (self.retired < first + ITEM_BLOCK)] - first
            if len(gone):
                found = found.index_fill(1, gone, -torch.inf)
            found = barred.apply(found, first)
            index, values = top_k(found if rows is None else found[rows], n)
            best = merge(best, (torch.where(values == -torch.inf, 0, index + first), values), n)
        assert best is not None
        return best

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
        """Scores float32 of given item indices, one array a history; 0 is an item that is not known, whose score says nothing.

        Raises RequestError for an index outside the vocabulary.
        """
        for index in candidates:
            self._inside(np.asarray(index))
        found = [np.zeros(len(items), np.float32) for items in candidates]
        for rows, score, _ in self._chunks([self._known(history) for history in histories], now, controls, context):
            for first in range(0, self.n_items + 1, ITEM_BLOCK):
                scores = score(first, None).cpu().numpy()
                for place, row in enumerate(rows):
                    inside = np.asarray(candidates[row]) - first
                    chosen = (inside >= 0) & (inside < scores.shape[1])
                    found[row][chosen] = scores[place, inside[chosen]]
        return found

    def log_probability(
        self,
        histories: Sequence[History],
        targets: Sequence[np.ndarray],
        *,
        now: Sequence[int],
        controls: Controls,
        context: Sequence[np.ndarray],
    ) -> Tensor:
        """Mean log-probability of each history's targets (item indices) under a softmax over all items [B], with the controls' gradient."""
        found: list[tuple[int, Tensor]] = []
        for rows, score, _ in self._chunks([self._known(history) for history in histories], now, controls, context):
            log_share = torch.cat([score(first, None) for first in range(0, self.n_items + 1, ITEM_BLOCK)], 1).log_softmax(1)
            found += [(int(row), log_share[place, torch.from_numpy(targets[row])].mean()) for place, row in enumerate(rows)]
        return torch.stack([value for _, value in sorted(found, key=lambda pair: pair[0])])

    @torch.no_grad()
    def explain(
        self,
        history: History,
        items: np.ndarray,
        *,
        now: int,
        context: np.ndarray | None = None,
        controls: Controls | None = None,
        events: int = 32,
    ) -> Explanation:
        """Which events of a history carried the scores of some items (indices).

        The attention says which `events` are looked at more closely; each of these is then left out, and the items scored again. Without its
        only event a history has no score: the drop is then what an item's score is above the mean of all.
        """
        kept = np.flatnonzero(np.asarray(history.item_index) > 0)[-self.model.shape.history :]
        known = self._known(history)
        if not len(known.item_index):
            kept = kept[:0]
            return Explanation(kept, np.zeros(0, np.float32), np.zeros((len(items), 0), np.float32))
        fields = np.zeros(self.model.shape.context, np.int64) if context is None else context
        batch = self._inputs.batch([known], np.array([now], np.int64), fields[None]).to(self.device)
        was_training = self.model.training
        self.model.eval()
        reach = self.model.roll_out(self.model.embed(batch, self._table_VD), batch)[0].cpu().numpy()
        self.model.train(was_training)
        again = np.isin(known.item_index, items)  # what the copy term reads without any attention
        looked_at = np.sort(np.lexsort((reach, again))[-events:])
        if len(kept) == 1:
            every = self.score([known], [np.arange(self.n_items + 1)], now=now, controls=controls, context=None if context is None else [context])[0]
            return Explanation(kept, reach, (every[items] - every[1:].mean())[:, None])
        without = [History(*(np.delete(values, place) for values in known)) for place in looked_at]
        asked = [known, *without]
        each = None if controls is None else Controls(*(None if t is None else t.expand(len(asked), *t.shape[1:]) for t in controls))
        told = None if context is None else [context] * len(asked)
        scores = np.stack(self.score(asked, [items] * len(asked), now=now, controls=each, context=told))
        return Explanation(kept[looked_at], reach[looked_at], (scores[:1] - scores[1:]).T)

    def _chunks(
        self,
        known: list[History],
        now: int | Sequence[int],
        controls: Controls | None,
        context: Sequence[np.ndarray] | None,
        *,
        watched: bool = False,
    ) -> Iterator[tuple[np.ndarray, _Score, Tensor | None]]:
        """Rows of similar length, their scores [rows, ITEM_BLOCK] of the items from `first` on, and if `watched` the entropy of the attention."""
        if controls is not None and all(tensor is None for tensor in controls):
            controls = None
        moments = np.broadcast_to(np.asarray(now, np.int64), len(known))
        fields = self.model.shape.context
        context_BC = np.zeros((len(known), fields), np.int64) if context is None else np.reshape(context, (len(known), fields)).astype(np.int64)
        length = np.array([len(history.item_index) for history in known], np.int64)
        order = np.argsort(-length, kind="stable")
        order, unknown = order[length[order] > 0], order[length[order] == 0]
        for start in range(0, len(unknown), ROWS):
            rows = unknown[start : start + ROWS]
            yield rows, partial(self._popular_scores, moments[rows]), None
        start = 0
        while start < len(order):
            rows = order[start : start + max(min(POSITIONS // int(length[order[start]]), ROWS), 1)]
            start += len(rows)
            batch = self._inputs.batch([known[row] for row in rows], moments[rows], context_BC[rows]).to(self.device)
            chosen = None if controls is None else Controls(*(None if t is None else t[rows].to(self.device) for t in controls))
            was_training = self.model.training
            if was_training:  # turning every module takes as long as a block of one history
                self.model.eval()
            entropy = None
            if watched:
                hidden, entropy = self._watched(batch, chosen)
            else:
                replayed = None if self._graphs is None or torch.is_grad_enabled() else self._graphs(batch, chosen)
                hidden = self._hidden(batch, chosen) if replayed is None else replayed
            if was_training:
                self.model.train()
            yield rows, partial(self._model_scores, hidden, batch), entropy

    def _hidden(self, batch: Batch, controls: Controls | None) -> Tensor:
        with self._products():
            return self.model.hidden(batch, self._table_VD, self._parts_MVD, controls, masked=True).float()

    def _watched(self, batch: Batch, controls: Controls | None) -> tuple[Tensor, Tensor]:
        """Hidden states, and the entropy of the attention that is not turned."""
        with self._products():
            before = self.model.before_last(self.model.embed(batch, self._table_VD, self._parts_MVD, controls), batch, controls)
            hidden = self.model.asked(before, batch, controls).float()
        return hidden, self.model.entropy(before.float(), batch)

    def _products(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half and self.device.type == "cpu")

    def _model_scores(self, hidden: Tensor, batch: Batch, first: int, rules: Rules | None) -> Tensor:
        found = self.model.scores(hidden, self._output_VD[first : first + ITEM_BLOCK], batch, first=first)
        return found if rules is None else rules.of_scores(found, first)

    def _popular_scores(self, moments: np.ndarray, first: int, rules: Rules | None) -> Tensor:
        found = torch.stack([self._popular(int(moment))[first : first + ITEM_BLOCK] for moment in moments])
        if rules is None:
            return found
        return rules.of_counts(found, first) if self.model.offset_V is None else rules.boosted(found, first)

    def _known(self, history: History) -> History:
        """The last events of items that the bundle knows; none where the model is not to be asked."""
        index = np.asarray(history.item_index)
        self._inside(index)
        if self.popular_only:
            return History(*(np.asarray(values)[:0] for values in history))
        if not index.all():
            keep = index > 0
            history = History(*(np.asarray(a)[keep] for a in history))
        return history.last(self.model.shape.history)

    def _inside(self, index: np.ndarray) -> None:
        if len(index) and (index.min() < 0 or index.max() > self.n_items):
            raise RequestError(f"item index {index.min()} or {index.max()} lies outside 0 to {self.n_items}", "use Predictor.index_of")

    def _popular(self, now_s: int) -> Tensor:
        """Scores of the popular list [V]."""
        own = self.model.offset_V
        day = now_s // DAY_S if self.has_time and own is None else 0
        if day not in self._populars:
            make_room(self._populars)
            counts = self.popularity.popular(now_s if self.has_time else None, POPULAR_DAYS) if own is None else own.cpu().numpy().copy()
            counts[0] = -np.inf
            self._populars[day] = torch.from_numpy(counts).to(self.device)
        return self._populars[day]
