"""A challenger on trial: who is answered by it, what ends it, and that the champion is there when it fails."""

import asyncio
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from conftest import prepare_here, private_overrides
from harness import DEADLINE_S

from recray import pipeline, promotion
from recray.benchmark.nights import publish_untrained, untrained
from recray.config import ServeSettings, load_settings
from recray.errors import MissingArtifactError, RefusedError
from recray.inference import Predictor
from recray.privacy.accounting import Mechanism
from recray.release import Release
from recray.serving import trial as trials
from recray.serving.api import FeedbackRequest, RecommendRequest
from recray.serving.handler import Handler
from recray.serving.trial import Outcomes, Trial, answers
from recray.state.log import Entry


@pytest.fixture(scope="module")
def shop(world_settings, world_dataset, tmp_path_factory):
    storage = publish_untrained(world_settings, world_dataset, tmp_path_factory.mktemp("trial"))
    other = load_settings(None, ["train.seed=7"]).train
    challenger = untrained(world_settings.model_copy(update={"train": other}), world_dataset, storage.bundle("other"), "other")
    return storage, challenger, storage.release.read_bytes()


@pytest.fixture
def handler(shop, world_settings):
    storage, _, release = shop
    storage.release.write_bytes(release)
    made = Handler(storage, ServeSettings(timeout_s=5.0), world_settings.score)
    yield made
    made.close()
    for file in (storage.root / "state").glob("*"):
        file.unlink()


def ask(handler, user, **body):
    return asyncio.run(handler.recommend(RecommendRequest(user_id=user, k=3, **body)))


def test_users_keep_their_side_and_the_share_is_what_was_asked_for():
    users = [str(user) for user in range(20_000)]
    chosen = [answers(user, "a", 0.1) for user in users]
    assert np.mean(chosen) == pytest.approx(0.1, abs=0.01)
    assert chosen == [answers(user, "a", 0.1) for user in users]
    more = [answers(user, "a", 0.3) for user in users]
    assert all(b for a, b in zip(chosen, more, strict=True) if a), "who is in a share is in a larger one"
    other = [answers(user, "b", 0.1) for user in users]
    assert np.mean([a and b for a, b in zip(chosen, other, strict=True)]) == pytest.approx(0.01, abs=0.005), "another trial draws anew"


def test_a_challenger_answers_its_share_and_what_it_answered_is_told(shop, handler):
    storage, challenger, _ = shop
    promotion.begin_trial(storage, challenger, 0.5)
    handler.look()
    assert handler.models().challenger == "other" and handler.models().share == 0.5
    found = {user: ask(handler, user) for user in range(40)}
    sides = {user: answers(str(user), "other", 0.5) for user in found}
    assert {True, False} == set(sides.values())
    for user, answer in found.items():
        assert (answer.bundle, answer.source) == (("other", "realtime") if sides[user] else ("untrained", "snapshot"))
    assert ask(handler, next(user for user in sides if sides[user]), mode="batch").bundle == "untrained"
    assert asyncio.run(handler.recommend(RecommendRequest(k=3))).bundle == "untrained"
    asyncio.run(handler.journal.writer.append([]))
    bodies = {entry.key: entry.body for _, entry in handler.journal.writer.log.read(0, 100)}
    assert {bodies[answer.request_id]["arm"] == "challenger" for user, answer in found.items() if sides[user]} == {True}
    promotion.end_trial(storage, "by hand")
    handler.look()
    assert {ask(handler, user).bundle for user in range(10)} == {"untrained"}
    assert Release.read(storage).rolled_back == ("other",) and "by hand" in Release.read(storage).ended


def test_a_shadow_answers_nobody_and_is_logged(shop, handler):
    storage, challenger, _ = shop
    promotion.begin_trial(storage, challenger, 0.5, shadow=True)
    handler.look()

    async def talk():
        answer = await handler.recommend(RecommendRequest(user_id=3, k=3))
        await asyncio.gather(*handler._tasks)
        await handler.journal.writer.append([])
        return answer

    answer = asyncio.run(talk())
    assert answer.bundle == "untrained" and answer.source == "snapshot"
    entries = {entry.key: entry.body for _, entry in handler.journal.writer.log.read(0, 10)}
    shadow = entries[f"{answer.request_id}.shadow"]
    assert shadow["bundle"] == "other" and shadow["arm"] == "shadow" and len(shadow["items"]) == 3
    assert "trial" not in entries[answer.request_id]


def test_a_challenger_that_fails_is_covered_for_and_sent_home(shop, handler, monkeypatch):
    storage, challenger, _ = shop
    promotion.begin_trial(storage, challenger, 0.5)
    handler.look()
    inner = Predictor.recommend

    def sometimes(self, *args, **options):
        if self is handler.arms.challenger.predictor:
            raise FloatingPointError("not finite")
        return inner(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "recommend", sometimes)
        mine = [user for user in range(300) if answers(str(user), "other", 0.5)][: trials.LEAST]
        for user in mine:
            answer = ask(handler, user)
            assert (answer.bundle, answer.source, answer.degraded) == ("untrained", "snapshot", ["model"])
    handler.look()
    assert handler.arms.trial is None and not Release.read(storage).on_trial
    assert "100% of its answers failed" in Release.read(storage).ended


def test_a_challenger_that_is_slow_is_sent_home_and_makes_nobody_else_wait(shop, handler, monkeypatch):
    storage, challenger, _ = shop
    promotion.begin_trial(storage, challenger, 0.5)
    handler.look()
    inner, slow, answered = Predictor.recommend, handler.arms.challenger.predictor, threading.Event()
    now_s = [0.0]  # the handler's clock, so that this machine's own pauses do not count
    monkeypatch.setattr("recray.serving.handler.time", SimpleNamespace(monotonic=lambda: now_s[0], time=time.time))

    def recommend(self, *args, **options):
        if self is slow:
            answered.wait(DEADLINE_S)
            now_s[0] += 1.0
        return inner(self, *args, **options)

    async def together(mine, theirs):
        answered.clear()
        ask = [asyncio.create_task(handler.recommend(RecommendRequest(user_id=user, k=3, mode="realtime"))) for user in [*mine, *theirs]]
        champions = await asyncio.gather(*ask[len(mine) :])
        assert not any(answer.degraded for answer in champions), "the champion's answers wait for the challenger's"
        answered.set()
        await asyncio.gather(*ask)

    monkeypatch.setattr(Predictor, "recommend", recommend)
    mine = [user for user in range(300) if answers(str(user), "other", 0.5)]
    theirs = [user for user in range(300) if user not in mine]
    for start in range(0, trials.LEAST, 5):
        assert handler.arms.trial is not None and handler.arms.trial.ended() is None
        asyncio.run(together(mine[start : start + 5], theirs[start : start + 5]))
    handler.look()
    assert handler.arms.trial is None and "95th percentile" in Release.read(storage).ended


def test_a_shadow_that_is_behind_is_left_out(shop, handler, monkeypatch):
    storage, challenger, _ = shop
    promotion.begin_trial(storage, challenger, 0.5, shadow=True)
    handler.look()
    inner, slow, answered = Predictor.recommend, handler.arms.challenger.predictor, threading.Event()

    def recommend(self, *args, **options):
        if self is slow:
            answered.wait(DEADLINE_S)
        return inner(self, *args, **options)

    async def talk():
        for user in range(20):
            answer = await handler.recommend(RecommendRequest(user_id=user, k=3, mode="realtime"))
            assert not answer.degraded, "answers wait for the shadow's"
        answered.set()
        await asyncio.gather(*handler._tasks)

    monkeypatch.setattr(Predictor, "recommend", recommend)
    asyncio.run(talk())
    assert handler.telemetry.refused["shadow"] >= 15


def test_a_challenger_whose_outcomes_are_worse_is_sent_home(shop, handler):
    storage, challenger, _ = shop
    promotion.begin_trial(storage, challenger, 0.5)
    handler.look()
    random = np.random.default_rng(0)

    async def talk():
        for n in range(900):
            user = int(random.integers(0, 300))
            answer = await handler.recommend(RecommendRequest(user_id=user, k=3))
            good = 0.6 if answer.bundle == "untrained" else 0.1
            if random.random() < good:
                await handler.feedback(FeedbackRequest(request_id=answer.request_id, outcome="click"))
            if n % 300 == 299:
                handler.look()

    asyncio.run(talk())
    handler.look()
    assert handler.arms.trial is None and "outcomes are worth -" in Release.read(storage).ended


def simulated(seed, users, share, champion, challenger, visits=3.0, spread=0.5):
    """The trial's reading of users who come more or less often, with rates of their own around the side's; also whether it ended."""
    random = np.random.default_rng(seed)
    trial, requests = Trial("c", share, shadow=False), 0
    for user in range(users):
        mine = random.random() < share
        rate = (challenger if mine else champion) * (random.gamma(1 / spread, spread) if spread else 1.0)
        for _ in range(random.geometric(1 / visits)):
            requests += 1
            body = {"trial": "c", "share": share, "arm": "challenger" if mine else "champion"}
            trial.outcomes.read(Entry("decision", str(requests), str(user), 0.0, body))
            if random.random() < rate:
                trial.outcomes.read(Entry("outcome", f"o{requests}", None, 0.0, {"request_id": str(requests), "value": 1.0}))
        if user % 20 == 0 and trial.ended():
            return trial, True
    return trial, False


@pytest.mark.parametrize(("share", "users"), [(0.3, 800), (0.05, 2500), (0.02, 6000)])
def test_looking_after_every_step_ends_few_trials_of_equals(share, users):
    ended = [simulated(seed, users, share, 0.05, 0.05)[1] for seed in range(60)]
    assert np.mean(ended) <= trials.ALPHA


def test_worse_challengers_are_found_and_better_ones_are_not_ended():
    assert all(simulated(seed, 4000, 0.3, 0.3, 0.1)[1] for seed in range(5))
    trial, over = simulated(1, 3000, 0.3, 0.1, 0.3)
    difference, bound = trial.outcomes.difference()
    assert not over and difference == pytest.approx(0.2, abs=bound) and 0 < bound < 0.2


@pytest.mark.parametrize("visits", [1.0, 3.0, 10.0])
def test_a_tenth_less_is_found_however_often_users_come(visits):
    """Within the answers of its own that are planned with."""
    users = int(trials.PLANNED / 0.2 / visits)
    assert sum(simulated(seed, users, 0.2, 0.5, 0.45, visits, spread=0.0)[1] for seed in range(10)) >= 8


def test_with_privacy_a_trial_is_judged_by_users_who_were_held_out(world_folder, tmp_path):
    settings = load_settings(None, private_overrides(world_folder, tmp_path))
    dataset = prepare_here(settings)
    said = Mechanism(2.0, 0.1, 100, 1.0, 1e-5, 200).statement() | {"population": "users", "epsilon_of_all_trainings": 5.0}
    storage = publish_untrained(settings, dataset, settings.root(), said)
    promotion.begin_trial(storage, untrained(settings, dataset, storage.bundle("other"), "other", said), 0.5)
    found = {}
    for private in (False, True):
        made = Handler(storage, ServeSettings(timeout_s=5.0), settings.score, private=private)
        told = made.night.describe()
        assert (told.users, told.privacy.epsilon_of_all_trainings) == (None, 5.0), "how many users there are is nobody's business"
        for user in range(200):
            ask(made, user, mode="realtime")
        asyncio.run(made.journal.writer.append([]))
        made.look()
        found[private] = sum(made.arms.trial.outcomes.users.values())
        counted = {user for user in range(200) if made.arms.trial.counted(str(user))}
        made.close()
    held_out = {user for shard in dataset.shards() for user in shard.user_ids.filter(pa.array(shard.held_out)).to_pylist()}
    assert found == {False: 200, True: len(held_out & set(range(200)))} and counted == held_out & set(range(200)) and 20 < len(counted) < 80


def test_outcomes_that_come_in_parts_count_as_their_sum_and_other_trials_not_at_all():
    one, parts = Outcomes("c", 0.5), Outcomes("c", 0.5)
    for outcomes in (one, parts):
        for number in range(6):
            body = {"trial": "c", "share": 0.5, "arm": "challenger" if number % 2 else "champion"}
            outcomes.read(Entry("decision", str(number), f"u{number}", 0.0, body))
    one.read(Entry("outcome", "o", None, 0.0, {"request_id": "1", "value": 3.0}))
    for value in (1.0, 2.0):
        parts.read(Entry("outcome", f"o{value}", None, 0.0, {"request_id": "1", "value": value}))
    parts.read(Entry("outcome", "x", None, 0.0, {"request_id": "unheard of", "value": 9.0}))
    for body in (
        {"trial": "c", "share": 0.1, "arm": "champion"},
        {"trial": "b", "share": 0.5, "arm": "champion"},
        {"trial": "c", "share": 0.5, "arm": "shadow"},
    ):
        parts.read(Entry("decision", f"other {body}", "u9", 0.0, body))
    assert one.difference() == pytest.approx(parts.difference()) and one.difference()[0] == pytest.approx(1.0)
    assert parts.users == {True: 3, False: 3} and Outcomes("c", 0.5).difference() == (0.0, math.inf)


def test_a_trial_that_cannot_begin_or_end_is_refused(shop, world_settings):
    storage, challenger, release = shop
    storage.release.write_bytes(release)
    settings = world_settings.model_copy(update={"storage": world_settings.storage.model_copy(update={"root": str(storage.root)})})
    with pytest.raises(RefusedError, match="no challenger on trial"):
        promotion.end_trial(storage, "by hand")
    with pytest.raises(RefusedError, match="is the champion"):
        pipeline.run_canary(settings, "untrained", 0.1, shadow=False)
    with pytest.raises(MissingArtifactError, match="nowhere"):
        pipeline.run_canary(settings, "nowhere", 0.1, shadow=False)
    assert storage.release.read_bytes() == release
    pipeline.run_canary(settings, "other", 0.1, shadow=False)
    assert Release.read(storage).roles_of("other") == ["challenger", "answers 10%"]
    promotion.end_trial(storage, "of another", "someone else")
    assert Release.read(storage).on_trial
    pipeline.run_serve_rollback(settings, None)
    assert Release.read(storage).ended == "bundle other: ended by hand"
    with pytest.raises(RefusedError, match="the last one's ended: bundle other"):
        pipeline.run_serve_rollback(settings, None)
    storage.release.write_bytes(release)
