"""Answers requests from one published night: snapshot look-up, or the predictor when something is asked of it.

Pure Python over `Snapshot`, `Dataset` and `Predictor`; knows no HTTP and no Ray.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np

from recray.dataset.context import asked
from recray.dataset.reader import Dataset, History
from recray.errors import DamagedArtifactError, RequestError
from recray.inference import Filters, Predictor, Rules, Translation
from recray.serving.api import Event, Item, ModelsResponse, RecommendRequest, RecommendResponse
from recray.snapshot.reader import Snapshot
from recray.storage import Storage, manifest_digest

_EMPTY = History(*(np.zeros(0, np.int64) for _ in range(4)))


@dataclass(frozen=True)
class Night:
    """Everything that one night is answered from; replaced as a whole when the next one is published."""

    snapshot: Snapshot
    dataset: Dataset
    predictor: Predictor
    translation: Translation
    rules: Rules | None
    loaded_at: dt.datetime

    @classmethod
    def load(cls, storage: Storage) -> Night:
        """The published night. Raises MissingArtifactError, DamagedArtifactError."""
        snapshot = Snapshot.latest(storage)
        dataset = Dataset.open(storage.root / snapshot.manifest["dataset"])
        bundle = storage.root / snapshot.manifest["bundle"]
        predictor = Predictor.load(bundle, dataset=dataset)
        for name, digest in (("bundle", manifest_digest(bundle)), ("dataset", dataset.digest)):
            if digest != snapshot.manifest[f"{name}_digest"]:
                raise DamagedArtifactError(f"{name} of {snapshot.path} is not the one it was scored with", "score the night again")
        declared = snapshot.manifest.get("rules")  # snapshots of 0.1.0 have none
        translation = predictor.translation(dataset)
        rules = None if declared is None else Rules.declared(declared, dataset, translation.to_bundle, predictor.unseen)
        return cls(snapshot, dataset, predictor, translation, rules, dt.datetime.now(dt.UTC))

    @property
    def date(self) -> str:
        return str(dt.datetime.fromtimestamp(self.snapshot.as_of_s, dt.UTC).date())

    @property
    def bundle(self) -> str:
        return str(self.snapshot.manifest["bundle"]).rsplit("/", 1)[-1]

    def describe(self) -> ModelsResponse:
        manifest = self.snapshot.manifest
        return ModelsResponse(
            bundle=self.bundle,
            bundle_digest=manifest["bundle_digest"],
            snapshot=manifest_digest(self.snapshot.path),
            dataset=self.dataset.key,
            night=self.date,
            users=manifest["users"],
            items=self.predictor.answerable,
            loaded_at=self.loaded_at,
        )

    def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Answer one request. Raises RequestError for an event type that the bundle does not know."""
        if request.history is None and request.now is None and not request.context and request.user_id is not None:
            answer = self._from_snapshot(request)
            if answer is not None:
                return answer
        return self._realtime(request)

    def _from_snapshot(self, request: RecommendRequest) -> RecommendResponse | None:
        """The nightly list, or None where it cannot serve the request."""
        assert request.user_id is not None
        if request.new_only and not self.snapshot.manifest["new_only"]:
            return None
        user = self.snapshot.find(request.user_id)
        if user is None:
            return None
        excluded = {str(item) for item, known in zip(request.exclude, self.predictor.index_of(request.exclude), strict=True) if known}
        pairs = [(item, score) for item, score in zip(user.item_ids, user.scores, strict=True) if str(item) not in excluded]
        if len(pairs) < min(request.k, self.predictor.answerable - len(excluded)):
            return None
        items = [Item(item_id=item, score=score) for item, score in pairs[: request.k]]
        return self._answer(items, "popular" if user.source == "popular" else "snapshot")

    def _realtime(self, request: RecommendRequest) -> RecommendResponse:
        history = self._history(request)
        now = self.dataset.now_s
        if request.history and len(history.timestamp_s):
            now = max(now, int(history.timestamp_s.max()) + 1)
        if request.now is not None:
            now = _seconds(request.now)
        new_only = request.new_only or self.snapshot.manifest["new_only"]
        filters = Filters(new_only=new_only, deny=self.predictor.index_of(request.exclude) if request.exclude else None)
        context = asked(self.predictor.context, request.context, None if request.now is None else now)
        answer = self.predictor.recommend([history], request.k, now=now, filters=filters, rules=self.rules, context=[context])
        real = answer.item_index[0] > 0
        ids = self.predictor.ids_of(answer.item_index[0][real])
        items = [Item(item_id=item, score=float(score)) for item, score in zip(ids, answer.scores[0][real], strict=True)]
        return self._answer(items, "realtime" if answer.source[0] == "model" else "popular")

    def _history(self, request: RecommendRequest) -> History:
        if request.history is not None:
            return self._sent(request.history, request.now)
        if request.user_id is None:
            return _EMPTY
        user_id = self.snapshot.as_user(request.user_id)
        stored = None if user_id is None else self.dataset.user_history(user_id)
        return _EMPTY if stored is None else self.translation.history(stored)

    def _sent(self, events: list[Event], now: dt.datetime | None) -> History:
        types = self.predictor.event_types
        for event in events:
            if event.event is not None and event.event not in types:
                raise RequestError(f"history: unknown event {event.event!r}", f"known: {', '.join(types)}")
        if self.predictor.has_time:
            moment = self.dataset.now_s if now is None else _seconds(now)
            times = np.array([moment if event.timestamp is None else _seconds(event.timestamp) for event in events], np.int64)
        else:
            times = np.arange(len(events))
        order = np.argsort(times, kind="stable")
        items = self.predictor.index_of([event.item_id for event in events])
        kinds = np.array([0 if event.event is None else types.index(event.event) for event in events], np.int64)
        values = np.array([event.value for event in events], np.float32)
        return History(items[order], kinds[order], times[order], values[order])

    def _answer(self, items: list[Item], source: str) -> RecommendResponse:
        return RecommendResponse(items=items, source=source, night=self.date, bundle=self.bundle)


def _seconds(moment: dt.datetime) -> int:
    return int((moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp())
