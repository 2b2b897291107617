"""Everything that one published night is answered from: the nightly lists, and the predictor when something is asked of it.

Pure Python over `Snapshot`, `Dataset` and `Predictor`; knows no HTTP, no Ray and no log but its entries.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recray.bundle import Bundle
from recray.config import ScoreSettings
from recray.dataset.context import asked
from recray.dataset.ids import as_id
from recray.dataset.reader import Dataset, History
from recray.errors import DamagedArtifactError, MissingArtifactError, RequestError, SettingsError, UnavailableError
from recray.inference import Filters, Predictor, Rules, Translation
from recray.inference.policy import LOOKED_AT, Policy, dials, explore
from recray.inference.rules import between, having
from recray.model.controls import Controls
from recray.release import Release
from recray.serving.api import MOST_ANSWERS, Event, KnownEvent, ModelsResponse, Privacy, Range, Reason, RecommendRequest, ScoreRequest, Source
from recray.serving.question import Decision, Explore, Found, Question, UnknownItemError
from recray.snapshot.reader import Snapshot
from recray.state.log import RECENT, Entry
from recray.storage import MANIFEST, Storage, manifest_digest

if TYPE_CHECKING:
    import torch

_EMPTY = History(*(np.zeros(0, np.int64) for _ in range(4)))
REASONS = 3  # named for an item
QUICK_USERS = 32  # requests that a GPU answers by a graph, at once; more keep it busy as they are
STALE_S = 7 * 86_400  # after which without another night nothing is decided: the trained model answers as it is
MASKS = 64  # attribute filters whose items are remembered


@dataclass(frozen=True)
class Night:
    """One published night; replaced as a whole when the next one is published.

    bound : a policy that turns further does not decide
    """

    snapshot: Snapshot
    dataset: Dataset
    predictor: Predictor
    translation: Translation
    rules: Rules | None
    bundle: str
    bundle_digest: str
    policy: str | None
    privacy: dict[str, Any]
    popular_list: tuple[tuple[Any, float], ...]
    loaded_at: dt.datetime
    bound: float = 1.0
    _masks: dict[str, np.ndarray] = field(default_factory=dict)
    _known: dict[tuple[str, ...], bool] = field(default_factory=dict)

    @classmethod
    def load(cls, storage: Storage, device: str | torch.device = "cpu", bound: float = 1.0) -> Night:
        """The published night, answered on a device. Raises MissingArtifactError, DamagedArtifactError."""
        snapshot = Snapshot.latest(storage)
        dataset = Dataset.open(storage.root / snapshot.manifest["dataset"])
        if dataset.digest != snapshot.manifest["dataset_digest"]:
            raise DamagedArtifactError(f"dataset of {snapshot.path} is not the one it was scored with", "score the night again")
        bundle = Bundle.open(storage.root / snapshot.manifest["bundle"])
        if bundle.digest != snapshot.manifest["bundle_digest"]:
            raise DamagedArtifactError(f"bundle of {snapshot.path} is not the one it was scored with", "score the night again")
        popular_only = bool(snapshot.manifest.get("popular_only"))
        return cls._of(snapshot, dataset, bundle, snapshot.manifest.get("policy"), device, bound, popular_only=popular_only)

    @classmethod
    def stand_in(cls, storage: Storage, score: ScoreSettings, device: str | torch.device = "cpu", bound: float = 1.0) -> Night:
        """The champion on the last dataset, without nightly lists. Raises MissingArtifactError, DamagedArtifactError."""
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
        return cls._of(Snapshot.stand_in(storage, manifest), dataset, bundle, champion.policy, device, bound)

    def with_bundle(self, bundle: Bundle, policy: str | None = None) -> Night:
        """The same night with another bundle and policy behind its answers by the model; `policy` of what comes is None where it does not decide.

        Raises MissingArtifactError, DamagedArtifactError of the bundle.
        """
        return self._of(self.snapshot, self.dataset, bundle, policy, self.predictor.device, self.bound)

    @classmethod
    def _of(
        cls,
        snapshot: Snapshot,
        dataset: Dataset,
        bundle: Bundle,
        policy: str | None,
        device: str | torch.device,
        bound: float,
        *,
        popular_only: bool = False,
    ) -> Night:
        decides = None
        if policy is not None:
            decides, why = Policy.sound(Storage(bundle.path.parent.parent).policy(policy), bundle.digest, bound=bound)
            if decides is None:
                logging.getLogger("ray.serve").error("policy %s does not decide, the trained model answers as it is: %s", policy, why)
                policy = None
        predictor = Predictor.load(bundle.path, decides, dataset=dataset, device=device, popular_only=popular_only)
        predictor.quicken(QUICK_USERS)
        declared = snapshot.manifest.get("rules")  # snapshots of 0.1.0 have none
        translation = predictor.translation(dataset)
        rules = None if declared is None else Rules.declared(declared, dataset, translation.to_bundle, predictor.unseen)
        answer = predictor.recommend([_EMPTY], MOST_ANSWERS, now=dataset.now_s, rules=rules)
        real = answer.item_index[0] > 0
        popular = tuple(zip(predictor.ids_of(answer.item_index[0][real]), answer.scores[0][real].tolist(), strict=True))
        now = dt.datetime.now(dt.UTC)
        return cls(snapshot, dataset, predictor, translation, rules, bundle.key, bundle.digest, policy, bundle.privacy, popular, now, bound)

    @property
    def private(self) -> bool:
        """Whether users were protected while the bundle was trained."""
        return bool(self.privacy["differential_privacy"])

    @property
    def name(self) -> str:
        """Of what answers: the bundle, and the policy behind a plus sign where there is one."""
        return self.bundle if self.policy is None else f"{self.bundle}+{self.policy}"

    @property
    def whole(self) -> bool:
        """Whether there are nightly lists."""
        return bool(self.snapshot.manifest["users"])

    @property
    def popular_only(self) -> bool:
        """Whether the popular list answers everybody, since no model was promoted yet."""
        return self.predictor.popular_only

    @cached_property
    def date(self) -> str:
        return str(dt.datetime.fromtimestamp(self.snapshot.as_of_s, dt.UTC).date())

    @cached_property
    def digest(self) -> str:
        return manifest_digest(self.snapshot.path) if self.whole else ""

    @property
    def collected(self) -> dict[str, int]:
        """How far the logs of the endpoint are in this night's histories: a number by the identity of a log."""
        found: dict[str, int] = self.dataset.manifest.get("collected", {})
        return found

    @property
    def begins_s(self) -> float:
        """From when on an event is none of this night's, whatever was collected; infinity where neither times nor an as-of are known."""
        return self.dataset.as_of_s + 1 if self.dataset.clock == "timestamp" or self.dataset.as_of_s else math.inf

    def describe(self) -> ModelsResponse:
        manifest = self.snapshot.manifest
        return ModelsResponse(
            bundle=self.bundle,
            policy=self.policy,
            bundle_digest=manifest["bundle_digest"],
            snapshot=self.digest,
            dataset=self.dataset.key,
            night=self.date,
            users=None if self.private else manifest["users"],
            privacy=Privacy.model_validate(self.privacy, extra="ignore") if self.private else None,
            items=self.predictor.answerable,
            popular_only=self.popular_only,
            loaded_at=self.loaded_at,
        )

    def recommend(self, request: RecommendRequest, fresh: Sequence[Entry] = ()) -> Found:
        """Answer one request now. Raises RequestError where it makes no sense."""
        return self.look_up(request, fresh) or self.answer([self.question(request, fresh)])[0]

    def look_up(self, request: RecommendRequest, fresh: Sequence[Entry] = ()) -> Found | None:
        """The nightly list, or None where it cannot serve the request. Raises RequestError where it makes no sense.

        fresh : events of the user that the night does not know
        """
        if request.mode == "realtime":
            return None
        asks_more = bool(request.history is not None or request.events or request.now is not None or request.context)
        asks_more = asks_more or request.controls is not None
        if request.mode == "batch" and asks_more:
            told = "mode: batch answers with the nightly list, which history, events, now, context and controls cannot change"
            raise RequestError(told, "use auto")
        if asks_more or (fresh and request.mode == "auto"):
            return None
        user = None if request.user_id is None else self.snapshot.find(request.user_id)
        if user is None:
            return self.popular(request) if request.mode == "batch" else None
        if request.mode == "auto" and request.new_only and not self.snapshot.manifest["new_only"]:
            return None
        items: list[tuple[Any, float | None]] = list(zip(user.item_ids, user.scores, strict=True))
        free = self.predictor.answerable
        if self._filtered(request):
            filters = self._filters(request, listed=True)
            index = self.predictor.index_of(user.item_ids)
            keep = np.ones(len(index), bool) if filters.allow is None else np.isin(index, filters.allow)
            denied = np.zeros(0, np.int64) if filters.deny is None else filters.deny
            items = [pair for pair, good in zip(items, keep & ~np.isin(index, denied), strict=True) if good]
            free = free - len(denied) if filters.allow is None else len(np.setdiff1d(filters.allow, denied))
        if request.mode == "auto" and len(items) < min(request.k, free):
            return None
        return Found(items[: request.k], "popular" if user.source == "popular" else "snapshot")

    def question(self, request: RecommendRequest, fresh: Sequence[Entry] = (), exploration: Explore | None = None) -> Question:
        """The request as one for the model, turned by what the request says, or what the policy decides. Raises RequestError where it
        makes no sense.

        exploration : for an answer that explores
        """
        asked = Question(self, *self._asked(request, fresh), k=request.k, filters=self._filters(request))
        if request.controls is not None:
            try:
                dials(list(request.controls), self.predictor.model, self.predictor.event_types)
            except SettingsError as error:
                raise RequestError(error.what.replace("policy.actions", "controls"), error.fix) from None
            return replace(asked, action=request.controls)
        decision = self._decide(request, asked.history, asked.now, exploration)
        if decision is None:
            return asked
        return replace(asked, action=decision.turned(), decision=decision)

    @property
    def stale(self) -> bool:
        """Whether the night is so old that what it saw of users says nothing any more."""
        old = time.time() > self._written_s + STALE_S
        if old and not self._known.setdefault((), False):
            self._known[()] = True
            logging.getLogger("ray.serve").error("no night since %s: nothing is decided or explored, the trained model answers as it is", self.date)
        return old

    @cached_property
    def _written_s(self) -> float:
        return ((self.snapshot if self.whole else self.dataset).path / MANIFEST).stat().st_mtime

    @property
    def lists_as_it_decides(self) -> bool:
        """Whether the nightly lists are of the policy that decides now, which may be released, or taken away, after they were made."""
        return bool(self.snapshot.manifest.get("policy") == self.policy)

    def events_read(self, request: RecommendRequest | ScoreRequest) -> int:
        """How many of a user's last events can change the response: what the model and the policy read, or all where seen items are left out."""
        if isinstance(request, RecommendRequest) and (request.new_only or self.snapshot.manifest["new_only"]):
            return RECENT
        read = self.predictor.model.shape.history
        return min(read if self.predictor.policy is None else max(read, LOOKED_AT), RECENT)

    def state(self, request: RecommendRequest | ScoreRequest) -> np.ndarray | None:
        """What the nightly run saw of the user, where it was this bundle's and is of the stored history; None also where it cannot be read."""
        if request.user_id is None or request.history is not None or self.snapshot.manifest["bundle_digest"] != self.bundle_digest:
            return None
        try:
            user = self.snapshot.find(request.user_id)
        except Exception:  # whatever is wrong with the lists: `look_up` says so
            return None
        return None if user is None or user.state is None else np.array(user.state, np.float32)

    def _decide(self, request: RecommendRequest | ScoreRequest, history: History, now: int, exploration: Explore | None) -> Decision | None:
        policy = self.predictor.policy
        if self.stale:
            return None
        if exploration is not None and not self.explores(exploration):
            exploration = None
        if (policy is None and exploration is None) or not self._asks_model(history):
            return None
        observation = self.predictor.observe(history, now, self.state(request))
        source = exploration if policy is None else policy
        assert source is not None
        mean = np.zeros(len(source.actions), np.float32) if policy is None else policy.act(observation[None])[0]
        played, density, sigma = mean, None, 0.0
        if exploration is not None:
            action, log_density = explore(mean[None], exploration.sigma, exploration.random)
            played, density, sigma = action[0], float(log_density[0]), exploration.sigma
        return Decision(self.policy or "", source.actions, observation, mean, played, density, sigma, source.bound)

    def _asks_model(self, history: History) -> bool:
        """Whether the model answers for a history, rather than the popular list."""
        return not self.popular_only and bool((history.item_index > 0).any())

    def explores(self, exploration: Explore) -> bool:
        """Whether there is something to explore: the policy's controls, or those of `exploration`. What the model does not have is said once."""
        actions = exploration.actions
        if self.stale:
            return False
        if self.policy is not None:
            return True
        if actions not in self._known:
            try:
                dials(actions, self.predictor.model, self.predictor.event_types)
                self._known[actions] = True
            except SettingsError as error:
                self._known[actions] = False
                logging.getLogger("ray.serve").error("bundle %s explores nothing: %s; %s", self.bundle, error.what, error.fix)
        return self._known[actions]

    def candidates(self, request: ScoreRequest, fresh: Sequence[Entry] = ()) -> Question:
        """As `question`, for given items."""
        asked = Question(self, *self._asked(request, fresh), candidates=tuple(request.items))
        decision = self._decide(request, asked.history, asked.now, None)
        return asked if decision is None else replace(asked, action=decision.turned(), decision=decision)

    @staticmethod
    def answer(questions: Sequence[Question]) -> list[Found]:
        """What the models say, a pass for all questions of one night and kind."""
        found: list[Found | None] = [None] * len(questions)
        for night in {id(question.night): question.night for question in questions}.values():
            mine = [place for place, question in enumerate(questions) if question.night is night]
            why = [place for place in mine if questions[place].explain]
            lists = [place for place in mine if questions[place].candidates is None]
            rest = [place for place in mine if questions[place].candidates is not None and not questions[place].explain]
            for places, ask in ((lists, night._best), (rest, night._scores), (why, night._reasons)):
                if places:
                    for place, answer in zip(places, ask([questions[place] for place in places]), strict=True):
                        found[place] = answer
        return [answer for answer in found if answer is not None]

    def popular(self, request: RecommendRequest) -> Found:
        """The popular list, without asking the model."""
        items: list[tuple[Any, float | None]] = list(self.popular_list)
        if self._filtered(request) or self.snapshot.manifest["new_only"]:
            filters = self._filters(request, listed=True)
            barred = set() if filters.deny is None else set(filters.deny.tolist())
            allowed = None if filters.allow is None else set(filters.allow.tolist())
            index = self.predictor.index_of([item for item, _ in items]).tolist()
            items = [pair for pair, place in zip(items, index, strict=True) if place not in barred and (allowed is None or place in allowed)]
        return Found(items[: request.k], "popular")

    def similar(self, item_id: Any, k: int) -> list[tuple[Any, float]]:
        """Items like an item, with their cosines. Raises UnknownItemError, UnavailableError where no model may answer."""
        if self.popular_only:
            raise UnavailableError("no model was promoted yet: the popular list alone is served", "see the report of the last night")
        item = int(self.predictor.index_of([item_id])[0])
        if not item:
            raise UnknownItemError(f"item_id: no item {item_id!r}", "ask for one of the item table")
        index, cosines = self.predictor.similar(item, k, int(time.time()))
        return list(zip(self.predictor.ids_of(index), cosines.tolist(), strict=True))

    def known(self, user_id: Any, fresh: Sequence[Entry], last: int) -> list[KnownEvent]:
        """The last events of a user, oldest first."""
        stored = self.stored_history(user_id) or _EMPTY
        history = self._joined(stored, [_of_log(entry) for entry in fresh], None)
        new = {(int(self.predictor.index_of([entry.body["item_id"]])[0]), int(entry.at_s)) for entry in fresh}
        found = []
        for item, event, time_s, _ in zip(*history.last(last), strict=True):
            name = self.predictor.ids_of(np.array([item]))[0] if item else None
            moment = dt.datetime.fromtimestamp(int(time_s), dt.UTC) if self.predictor.has_time else None
            title = None if name is None else self.title(name)
            kind = self.predictor.event_types[int(event)]
            found.append(KnownEvent(item_id=name, title=title, event=kind, timestamp=moment, fresh=(int(item), int(time_s)) in new))
        return found

    def stored_history(self, user_id: Any) -> History | None:
        """What the night knows of a user, in the bundle's indices."""
        found = self.snapshot.as_user(user_id)
        stored = None if found is None else self.dataset.user_history(found)
        return None if stored is None else self.translation.history(stored)

    def user_key(self, user_id: Any) -> str:
        """A user as the log names them. Raises RequestError for an id that the event log cannot hold."""
        found = self.snapshot.as_user(user_id)
        if found is None:
            integral = self.snapshot.manifest["user_type"] != "string"
            raise RequestError(f"user_id: {user_id!r} is {_no_id(integral, 'users of the event log')}", "send the id of the event log")
        return str(found)

    def item_id(self, item_id: Any, name: str) -> Any:
        """An item's id in the type of the item table. Raises RequestError for one that it cannot hold."""
        integral = pa.types.is_integer(self.predictor.item_ids.type)
        found = as_id(item_id, integral=integral)
        if found is None:
            raise RequestError(f"{name}: {item_id!r} is {_no_id(integral, 'items of the item table')}", "send the id of the item table")
        return found

    def knows(self, item_id: Any, event: str) -> bool:
        """Whether the model knows an item and a type of events."""
        return bool(self.predictor.index_of([item_id])[0]) and event in self.predictor.event_types

    def knows_item(self, item_id: Any) -> bool:
        """Whether an id of a request is that of an item which the model knows."""
        try:
            return bool(self.predictor.index_of([self.item_id(item_id, "item_id")])[0])
        except RequestError:
            return False

    def _best(self, questions: list[Question]) -> list[Found]:
        k = max(question.k for question in questions)
        answer = self.predictor.recommend(
            [question.history for question in questions],
            k,
            now=[question.now for question in questions],
            filters=[question.filters for question in questions],
            rules=self.rules,
            controls=self.predictor.turned([question.action for question in questions]) or Controls(),  # what was decided is in the action
            context=[question.context for question in questions],
        )
        found = []
        for row, question in enumerate(questions):
            index, scores = answer.item_index[row][: question.k], answer.scores[row][: question.k]
            ids = self.predictor.ids_of(index[index > 0])
            source: Source = "realtime" if answer.source[row] == "model" else "popular"
            found.append(Found(list(zip(ids, scores[index > 0].tolist(), strict=True)), source))
        return found

    def _scores(self, questions: list[Question]) -> list[Found]:
        index = [self.predictor.index_of(question.candidates or ()) for question in questions]
        scores = self.predictor.score(
            [question.history for question in questions],
            index,
            now=[question.now for question in questions],
            controls=self.predictor.turned([question.action for question in questions]) or Controls(),
            context=[question.context for question in questions],
        )
        found = []
        for question, places, values in zip(questions, index, scores, strict=True):
            pairs = zip(question.candidates or (), places.tolist(), values.tolist(), strict=True)
            source: Source = "realtime" if self._asks_model(question.history) else "popular"
            found.append(Found([(item, value if place else None) for item, place, value in pairs], source))
        return found

    def _reasons(self, questions: list[Question]) -> list[Found]:
        found = []
        for question in questions:
            ids = question.candidates or ()
            asked: dict[str, Any] = {
                "now": question.now,
                "context": question.context,
                "controls": self.predictor.turned([question.action]) or Controls(),
            }
            told = self.predictor.explain(question.history, self.predictor.index_of(ids), **asked)
            why = [self._named(question.history, told.position, told.attention, drop) for drop in told.drop]
            found.append(Found([(item, None) for item in ids], "realtime", why))
        return found

    def _named(self, history: History, position: np.ndarray, attention: np.ndarray, drop: np.ndarray) -> list[Reason]:
        """The events that carried an item, most of all first; events of one item count together."""
        carried = np.maximum(drop, 0.0)
        share = carried / max(float(carried.sum()), 1e-9)
        item = history.item_index[position]
        reasons: list[Reason] = []
        for index in dict.fromkeys(item[np.argsort(-share, kind="stable")].tolist()):
            same = np.flatnonzero(item == index)
            if share[same].sum() <= 0 or len(reasons) == REASONS:
                break
            last = position[same[-1]]
            reasons.append(
                Reason(
                    item_id=self.predictor.ids_of(np.array([index]))[0],
                    event=self.predictor.event_types[int(history.event_index[last])],
                    timestamp=dt.datetime.fromtimestamp(int(history.timestamp_s[last]), dt.UTC) if self.predictor.has_time else None,
                    share=round(float(share[same].sum()), 4),
                    attention=round(float(attention[same].sum()), 4),
                )
            )
        return sorted(reasons, key=lambda reason: -reason.share)

    def in_words(self, reasons: Sequence[Reason]) -> str:
        """The reasons as a sentence, by the items' titles where there are any."""
        if not reasons:
            return "nothing in the history speaks for it: it is popular"
        return "because of " + ", ".join(f"{self.title(reason.item_id)} ({reason.event}, {reason.share:.0%})" for reason in reasons)

    def title(self, item_id: Any) -> str:
        """An item's title, its id where the item table has none."""
        table = self.dataset.items
        if "title" not in table.column_names:
            return str(item_id)
        place = int(self.translation.to_dataset[int(self.predictor.index_of([item_id])[0])])
        return str(table["title"][place - 1].as_py() or item_id) if place else str(item_id)

    def _asked(self, request: RecommendRequest | ScoreRequest, fresh: Sequence[Entry]) -> tuple[History, int, np.ndarray]:
        """History, moment and context of a request."""
        stored = _EMPTY
        if request.history is not None:
            fresh = ()
        elif request.user_id is not None:
            stored = self.stored_history(request.user_id) or _EMPTY
        sent, known = [*(request.history or ()), *request.events], self.predictor.event_types
        for name, events in (("history", request.history or ()), ("events", request.events)):
            for place, event in enumerate(events):
                if event.event is not None and event.event not in known:
                    raise RequestError(f"{name}.{place}.event: nothing is known of {event.event!r}", f"known: {', '.join(known)}")
        history = self._until(self._joined(stored, [*(_of_log(entry) for entry in fresh), *sent], request.now), request.now)
        now = self.dataset.now_s if request.now is None else int(request.now.timestamp())
        if request.now is None and (sent or fresh) and len(history.timestamp_s):
            now = max(now, int(history.timestamp_s.max()) + 1)
        return history, now, asked(self.predictor.context, request.context, None if request.now is None else now)

    def _joined(self, stored: History, events: Sequence[Event], moment: dt.datetime | None) -> History:
        """A stored history and what came after it, in order of time; nothing is known of an event type that the bundle has not met."""
        events = [event for event in events if event.event is None or event.event in self.predictor.event_types]
        if not events:
            return stored
        if self.predictor.has_time:
            now = self.dataset.now_s if moment is None else int(moment.timestamp())
            times = np.array([now if event.timestamp is None else int(event.timestamp.timestamp()) for event in events], np.int64)
        else:
            times = np.arange(len(events)) + (int(stored.timestamp_s.max()) + 1 if len(stored.timestamp_s) else 0)
        kinds = self.predictor.event_index([event.event for event in events])
        items = self.predictor.index_of([event.item_id for event in events])
        later = History(items, kinds, times, np.array([event.value for event in events], np.float32))
        whole = History(*(np.concatenate(pair) for pair in zip(stored, later, strict=True)))
        order = np.argsort(whole.timestamp_s, kind="stable")
        return History(*(values[order] for values in whole))

    def _until(self, history: History, moment: dt.datetime | None) -> History:
        """A history up to the moment that is asked about."""
        if moment is None or not self.predictor.has_time:
            return history
        before = history.timestamp_s <= int(moment.timestamp())
        return history if before.all() else History(*(values[before] for values in history))

    def _filtered(self, request: RecommendRequest) -> bool:
        """Whether a list that was made before has to be looked through."""
        more = request.new_only and not self.snapshot.manifest["new_only"]
        return bool(more or request.deny or request.allow is not None or request.where)

    def _filters(self, request: RecommendRequest, *, listed: bool = False) -> Filters:
        """What a request leaves. listed : of a list that was made before, whose user's stored items have to be named"""
        allow = None if request.allow is None else np.unique(self.predictor.index_of(request.allow))
        for column, wanted in request.where.items():
            mask = self._having(column, wanted)
            allow = mask if allow is None else np.intersect1d(allow, mask)
        deny = np.unique(self.predictor.index_of(request.deny)) if request.deny else None
        new_only = request.new_only or self.snapshot.manifest["new_only"]
        if listed and new_only and request.user_id is not None and (stored := self.stored_history(request.user_id)) is not None:
            deny = np.union1d(np.zeros(0, np.int64) if deny is None else deny, stored.item_index)
        return Filters(new_only, None if allow is None else allow[allow > 0], None if deny is None else deny[deny > 0])

    def _having(self, column: str, wanted: list[Any] | Range) -> np.ndarray:
        """Indices of the items that an attribute filter leaves. Raises RequestError for a column that is none or holds no numbers."""
        key = json.dumps([column, wanted.model_dump() if isinstance(wanted, Range) else wanted])
        if key not in self._masks:
            if column not in self.dataset.features:
                raise RequestError(f"where: no column {column!r}", f"known: {', '.join(self.dataset.features) or 'none'}")
            if isinstance(wanted, Range):
                kind = self.dataset.items[column].type
                if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
                    raise RequestError(f"where: {column!r} holds no numbers", "name a list of values")
                chosen = between(self.dataset.items[column], wanted.min, wanted.max)
            else:
                chosen = having(self.dataset, column, wanted)
            if len(self._masks) >= MASKS:
                del self._masks[next(iter(self._masks))]
            self._masks[key] = np.unique(self.translation.to_bundle[1:][chosen])
        return self._masks[key]


def _no_id(integral: bool, whose: str) -> str:
    return f"no integer as it is written, as the ids of the {whose} are" if integral else "blank"


def _of_log(entry: Entry) -> Event:
    body = entry.body
    moment = dt.datetime.fromtimestamp(entry.at_s, dt.UTC)
    return Event.model_construct(item_id=body["item_id"], event=body.get("event"), value=body.get("value", 1.0), timestamp=moment)
