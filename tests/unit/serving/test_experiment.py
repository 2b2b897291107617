"""A challenger on trial: who is answered by it, what ends it, and that the champion is there when it
fails."""

import asyncio
import math
import threading
import time
from types import SimpleNamespace

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from conftest import private_overrides
from harness import DEADLINE_S
from hypothesis import given
from hypothesis import strategies as st

from recray import pipeline
from recray.config import ServeSettings, load_settings
from recray.errors import MissingArtifactError, RefusedError
from recray.events.log import Entry
from recray.events.rewards import Credits, Rewards
from recray.inference import Predictor
from recray.privacy.accounting import Mechanism
from recray.release import Release, begin_experiment, end_experiment
from recray.serving import health
from recray.serving import outcomes as outcome_test
from recray.serving.api import FeedbackRequest, RecommendRequest
from recray.serving.experiment import LEVEL, Experiment, is_in_share
from recray.serving.health import LEAST
from recray.serving.outcomes import OutcomeTest
from recray.serving.sequential import ShareTest
from recray.serving.service import Service
from recray.testing.published import prepare_here, publish_untrained, untrained_bundle

CLICKS = Rewards({"click": 1.0, "skip": 0.0}, 1.0)


@pytest.fixture(scope="module")
def shop(synthetic_settings, synthetic_dataset, tmp_path_factory):
    storage = publish_untrained(synthetic_settings, synthetic_dataset, tmp_path_factory.mktemp("trial"))
    other = load_settings(None, ["train.seed=7"]).train
    challenger = untrained_bundle(
        synthetic_settings.model_copy(update={"train": other}),
        synthetic_dataset,
        storage.bundle("other"),
        "other",
    )
    return storage, challenger, storage.release.read_bytes()


@pytest.fixture
def handler(shop, synthetic_settings):
    storage, _, release = shop
    storage.release.write_bytes(release)
    made = Service(storage, ServeSettings(timeout_s=5.0), synthetic_settings.score)
    yield made
    made.close()
    for file in (storage.root / "state").glob("*"):
        file.unlink()


def ask(handler, user, **body):
    return asyncio.run(handler.recommend(RecommendRequest(user_id=user, k=3, **body)))


def test_users_keep_their_variant_and_the_share_is_the_setting():
    users = [str(user) for user in range(20_000)]
    is_in_small_share = [is_in_share(user, "a", 0.1) for user in users]
    assert np.mean(is_in_small_share) == pytest.approx(0.1, abs=0.01)
    assert is_in_small_share == [is_in_share(user, "a", 0.1) for user in users]
    is_in_large_share = [is_in_share(user, "a", 0.3) for user in users]
    assert all(b for a, b in zip(is_in_small_share, is_in_large_share, strict=True) if a), (
        "who is in a share is in a larger one"
    )
    other = [is_in_share(user, "b", 0.1) for user in users]
    assert np.mean([a and b for a, b in zip(is_in_small_share, other, strict=True)]) == pytest.approx(
        0.01, abs=0.005
    ), "another trial draws anew"


def test_a_challenger_serves_its_share_and_its_responses_are_logged(shop, handler):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5)
    handler.refresh()
    assert handler.models().challenger == "other" and handler.models().share == 0.5
    responses = {user: ask(handler, user) for user in range(40)}
    sides = {user: is_in_share(str(user), "other", 0.5) for user in responses}
    assert {True, False} == set(sides.values())
    for user, answer in responses.items():
        assert (answer.bundle, answer.source) == (
            ("other", "realtime") if sides[user] else ("untrained", "snapshot")
        )
    assert ask(handler, next(user for user in sides if sides[user]), mode="batch").bundle == "untrained"
    assert asyncio.run(handler.recommend(RecommendRequest(k=3))).bundle == "untrained"
    asyncio.run(handler.recorder.writer.append([]))
    bodies = {entry.key: entry.body for _, entry in handler.recorder.writer.log.read(0, 100)}
    assert {
        bodies[answer.request_id]["arm"] == "challenger" for user, answer in responses.items() if sides[user]
    } == {True}
    end_experiment(storage, "by hand")
    handler.refresh()
    assert {ask(handler, user).bundle for user in range(10)} == {"untrained"}
    assert Release.read(storage).rolled_back == ("other",) and "by hand" in Release.read(storage).ended


async def other_tasks_end():
    """The shadow's answers come in the background."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))


def test_a_shadow_answers_nobody_and_is_logged(shop, handler):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5, shadow=True)
    handler.refresh()

    async def talk():
        answer = await handler.recommend(RecommendRequest(user_id=3, k=3))
        await other_tasks_end()
        await handler.recorder.writer.append([])
        return answer

    answer = asyncio.run(talk())
    assert answer.bundle == "untrained" and answer.source == "snapshot"
    entries = {entry.key: entry.body for _, entry in handler.recorder.writer.log.read(0, 10)}
    shadow = entries[f"{answer.request_id}.shadow"]
    assert shadow["bundle"] == "other" and shadow["arm"] == "shadow" and len(shadow["items"]) == 3
    assert "trial" not in entries[answer.request_id]


def fails(monkeypatch, handler):
    """From now on the challenger's model fails."""
    inner, broken = Predictor.recommend, handler.deployments.current.challenger.predictor

    def sometimes(self, *args, **options):
        if self is broken:
            raise FloatingPointError("not finite")
        return inner(self, *args, **options)

    monkeypatch.setattr(Predictor, "recommend", sometimes)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("realtime", "of its responses failed, of the champion's 0.0%"),
        ("auto", "where the champion serves batch recommendations"),
    ],
)
def test_a_challenger_that_fails_is_covered_for_and_rolled_back(shop, handler, monkeypatch, mode, said):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5)
    handler.refresh()
    with monkeypatch.context() as patch:
        fails(patch, handler)
        for user in range(60):
            answer = ask(handler, user, mode=mode)
            if is_in_share(str(user), "other", 0.5):
                assert (answer.bundle, answer.source, answer.degraded) == ("untrained", "snapshot", ["model"])
    asyncio.run(handler.recorder.writer.append([]))
    handler.refresh()
    assert handler.deployments.current.experiment is None and not Release.read(storage).has_experiment
    assert said in Release.read(storage).ended


def test_replicas_come_to_one_decision_from_the_log_that_they_share(
    shop, handler, synthetic_settings, monkeypatch
):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5)
    other = Service(storage, ServeSettings(timeout_s=5.0), synthetic_settings.score)
    handler.refresh()
    experiment = other.deployments.current.experiment
    with monkeypatch.context() as patch:
        fails(patch, handler)
        for user in range(60):
            ask(handler, user, mode="realtime")
    asyncio.run(handler.recorder.writer.append([]))
    assert experiment.find_reason_to_end() is None
    other.refresh()
    assert (
        other.deployments.current.experiment is None
        and "of its responses failed" in Release.read(storage).ended
    )
    other.close()


def test_a_shadow_that_fails_is_rolled_back_too(shop, handler, monkeypatch):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5, shadow=True)
    handler.refresh()

    async def talk():
        for user in range(60):
            answer = await handler.recommend(RecommendRequest(user_id=user, k=3, mode="realtime"))
            assert not answer.degraded
            await other_tasks_end()
        await handler.recorder.writer.append([])

    with monkeypatch.context() as patch:
        fails(patch, handler)
        asyncio.run(talk())
    handler.refresh()
    assert (
        handler.deployments.current.experiment is None
        and "100.0% of its responses failed" in Release.read(storage).ended
    )


def test_a_challenger_that_is_slow_is_rolled_back_and_makes_nobody_else_wait(shop, handler, monkeypatch):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5)
    handler.refresh()
    inner, slow, answered = (
        Predictor.recommend,
        handler.deployments.current.challenger.predictor,
        threading.Event(),
    )
    now_s = [0.0]  # the handler's clock, so that this machine's own pauses do not count
    monkeypatch.setattr(
        "recray.serving.ranker.time", SimpleNamespace(monotonic=lambda: now_s[0], time=time.time)
    )

    def recommend(self, *args, **options):
        if self is slow:
            answered.wait(DEADLINE_S)
            now_s[0] += 1.0
        return inner(self, *args, **options)

    async def together(of_challenger, theirs):
        answered.clear()
        ask = [
            asyncio.create_task(handler.recommend(RecommendRequest(user_id=user, k=3, mode="realtime")))
            for user in [*of_challenger, *theirs]
        ]
        champions = await asyncio.gather(*ask[len(of_challenger) :])
        assert not any(answer.degraded for answer in champions), (
            "the champion's answers wait for the challenger's"
        )
        answered.set()
        await asyncio.gather(*ask)

    monkeypatch.setattr(Predictor, "recommend", recommend)
    of_challenger = [user for user in range(300) if is_in_share(str(user), "other", 0.5)]
    theirs = [user for user in range(300) if user not in of_challenger]
    for start in range(0, LEAST + 40, 2):  # of those that are slow together one counts
        assert handler.deployments.current.experiment is not None
        asyncio.run(together(of_challenger[start : start + 2], theirs[start : start + 2]))
    asyncio.run(handler.recorder.writer.append([]))
    handler.refresh()
    assert (
        handler.deployments.current.experiment is None
        and "quantile of latency" in Release.read(storage).ended
    )


def test_a_shadow_that_is_behind_is_left_out(shop, handler, monkeypatch):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5, shadow=True)
    handler.refresh()
    inner, slow, answered = (
        Predictor.recommend,
        handler.deployments.current.challenger.predictor,
        threading.Event(),
    )

    def recommend(self, *args, **options):
        if self is slow:
            answered.wait(DEADLINE_S)
        return inner(self, *args, **options)

    async def talk():
        for user in range(20):
            answer = await handler.recommend(RecommendRequest(user_id=user, k=3, mode="realtime"))
            assert not answer.degraded, "answers wait for the shadow's"
        answered.set()
        await other_tasks_end()

    monkeypatch.setattr(Predictor, "recommend", recommend)
    asyncio.run(talk())
    assert handler.telemetry.refused["shadow"] >= 15


def test_a_challenger_whose_outcomes_are_worse_is_rolled_back(shop, handler):
    storage, challenger, _ = shop
    begin_experiment(storage, challenger, 0.5)
    handler.refresh()
    random = np.random.default_rng(0)

    async def talk():
        for n in range(900):
            user = int(random.integers(0, 300))
            answer = await handler.recommend(RecommendRequest(user_id=user, k=3))
            good = 0.6 if answer.bundle == "untrained" else 0.1
            if random.random() < good:
                await handler.intake.feedback(FeedbackRequest(request_id=answer.request_id, outcome="click"))
            if n % 300 == 299:
                handler.refresh()

    asyncio.run(talk())
    handler.refresh()
    assert (
        handler.deployments.current.experiment is None
        and "outcomes are worth -" in Release.read(storage).ended
    )


def simulated(seed, users, share, champion, challenger, visits=3.0, spread=0.5):
    """The trial's reading of users who come more or less often, with rates of their own around the variant's;
    also whether it ended.
    """
    random = np.random.default_rng(seed)
    experiment, requests = Experiment("c", share, shadow=False, rewards=CLICKS), 0
    for user in range(users):
        is_challenger = random.random() < share
        rate = (challenger if is_challenger else champion) * (
            random.gamma(1 / spread, spread) if spread else 1.0
        )
        for _ in range(random.geometric(1 / visits)):
            requests += 1
            experiment.add_entry(response(requests, user, is_challenger, share))
            if random.random() < rate:
                experiment.add_entry(click(requests))
        if user % 20 == 0 and experiment.find_reason_to_end():
            return experiment, True
    return experiment, False


def response(request_id, user, is_challenger, share=0.5, items=("a",), **fields):
    body = {
        "trial": "c",
        "share": share,
        "arm": "challenger" if is_challenger else "champion",
        "items": list(items),
        "degraded": [],
        **fields,
    }
    return Entry("decision", str(request_id), str(user), 0.0, body)


def click(request_id, outcome="click", item=None, value=1.0, kind="outcome"):
    body = {"request_id": str(request_id), "outcome": outcome, "item_id": item, "value": value}
    return Entry(kind, f"{request_id} {outcome} {item} {value}", None, 0.0, body)


@pytest.mark.parametrize(
    ("share", "users"), [(0.3, 800), (0.05, 2500), pytest.param(0.02, 6000, marks=pytest.mark.slow)]
)
def test_looking_after_every_step_ends_few_experiments_of_equals(share, users):
    ended = [simulated(seed, users, share, 0.05, 0.05)[1] for seed in range(60)]
    assert np.mean(ended) <= LEVEL


def test_worse_challengers_are_found_and_better_ones_are_not_ended():
    assert all(simulated(seed, 4000, 0.3, 0.3, 0.1)[1] for seed in range(5))
    experiment, over = simulated(1, 3000, 0.3, 0.1, 0.3)
    difference, bound = experiment.outcomes.estimate_difference(0.05)
    assert (
        not over and difference == pytest.approx(0.2, abs=bound) and 0 < bound < 0.2 and experiment.has_won()
    )


@pytest.mark.parametrize("visits", [1.0, 3.0, 10.0])
def test_a_tenth_less_is_found_however_often_users_come(visits):
    """Within the responses of its own that are planned with."""
    users = int(outcome_test.PLANNED / 0.2 / visits)
    assert sum(simulated(seed, users, 0.2, 0.5, 0.45, visits, spread=0.0)[1] for seed in range(10)) >= 8


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
def test_outcomes_that_all_pay_the_same_decide_nothing(reward):
    experiment = Experiment("c", 0.3, shadow=False, rewards=Rewards({"click": reward}, 1.0))
    for user in range(2000):
        experiment.add_entry(response(user, user, user % 3 == 0, 0.3))
        experiment.add_entry(click(user))
        assert experiment.find_reason_to_end() is None and not experiment.has_won()


def test_half_the_clicks_and_twice_the_skips_never_win():
    random, experiment = np.random.default_rng(0), Experiment("c", 0.5, shadow=False, rewards=CLICKS)
    for n in range(4000):
        is_challenger = bool(random.random() < 0.5)
        experiment.add_entry(response(n, n, is_challenger))
        if random.random() < (0.1 if is_challenger else 0.2):
            experiment.add_entry(click(n))
        if random.random() < (0.6 if is_challenger else 0.3):
            experiment.add_entry(click(n, "skip"))
        assert not experiment.has_won()
        if experiment.find_reason_to_end():
            break
    assert "outcomes are worth -" in experiment.find_reason_to_end()


@given(data=st.data())
@hypothesis.settings(max_examples=50)
def test_what_counts_is_declared_bounded_of_the_list_and_once_in_whatever_order_it_comes(data):
    """Against a plain reading of the rule; every outcome delivered twice changes nothing, one hostile outcome
    no more than its bound.
    """
    rewards = Rewards({"click": 1.0, "purchase": 5.0, "skip": 0.0, "dislike": -2.0}, 3.0)
    lists = data.draw(
        st.dictionaries(st.sampled_from(["r1", "r2", "r3"]), st.lists(st.sampled_from("abcd"), unique=True))
    )
    one = st.tuples(
        st.sampled_from(["r1", "r2", "r3", "r4"]),
        st.sampled_from(["click", "purchase", "skip", "dislike", "undeclared"]),
        st.sampled_from([None, "a", "b", "e"]),
        st.just(1.0) | st.floats(-1e300, 1e300),
    )
    outcomes = data.draw(st.lists(one, max_size=12))
    first = {}
    for request, outcome, item, value in outcomes:
        if request in lists and (item is None or item in lists[request]):
            first.setdefault(
                (request, outcome, item), rewards.worth.get(outcome, 0.0) * min(max(value, 0.0), 3.0)
            )
    order = data.draw(st.permutations([*lists, *range(len(outcomes))]))
    received = sorted(position for position in order if isinstance(position, int))
    places = iter(received + received)  # outcomes keep their order, and come twice
    credits, total = Credits(rewards), 0.0
    for step in [*order, *received]:
        total += (
            credits.add_response(step, lists[step])
            if isinstance(step, str)
            else credits.add_outcome(*outcomes[next(places)])
        )
    assert total == pytest.approx(sum(first.values()))
    before = total
    total += credits.add_outcome("r1", "purchase", None, float("1e308"))
    assert abs(total - before) <= 15.0


def test_outcomes_of_another_item_or_of_no_declared_name_count_nothing_and_late_responses_all_the_same():
    experiment = Experiment("c", 0.5, shadow=False, rewards=CLICKS)
    experiment.add_entry(click("1", item="a", kind="set_aside"))
    for number in range(6):
        experiment.add_entry(response(number, f"u{number}", bool(number % 2)))
    for wrong in (
        click("1", item="z"),
        click("1", "undeclared"),
        click("1", item="a"),
        click("1", item="a", value=9.0),
        click("unheard of"),
    ):
        experiment.add_entry(wrong)
    for body in (
        {"trial": "c", "share": 0.1, "arm": "champion"},
        {"trial": "b", "share": 0.5, "arm": "champion"},
    ):
        experiment.add_entry(
            Entry("decision", f"other {body}", "u9", 0.0, {**body, "items": [], "degraded": []})
        )
    assert experiment.outcomes.estimate_difference(0.05)[0] == pytest.approx(
        1 / 3
    ) and experiment.outcomes.users == {True: 3, False: 3}
    assert OutcomeTest(0.5, CLICKS).estimate_difference(0.05) == (0.0, math.inf)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_evidence_reaches_its_level_in_few_runs_of_equals_and_soon_where_one_variant_is_affected_more(share):
    random = np.random.default_rng(0)

    def significant(rate, users=600):
        test = ShareTest(share, 0.05)
        for user in range(users):
            test.count_user(str(user), 0, is_challenger=bool(random.random() < rate))
            if test.is_significant:
                return True
        return False

    assert sum(significant(share) for _ in range(400)) <= 25
    challenger_rate = 4 * share / (1 - share + 4 * share)
    assert sum(significant(challenger_rate, 200) for _ in range(50)) >= 48


def test_a_user_counts_once_a_day_and_no_clock_that_goes_back_begins_one():
    test = ShareTest(0.5, 0.05)
    for _ in range(100):
        test.count_user("one who comes often", 0, is_challenger=True)
    assert not test.is_significant
    for user in range(20):
        test.count_user(str(user), 1, is_challenger=True)
    assert test.is_significant
    test.count_user("late", 0, is_challenger=False)
    assert test.is_significant
    test.count_user("new day", 2, is_challenger=True)
    assert not test.is_significant


@pytest.mark.parametrize("waiting", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16)), 24])
def test_queues_that_overflow_together_end_nothing_however_many_came_and_one_that_always_does_is_found(
    waiting,
):
    """A queue of each variant: of those who come at once, the ones after the first `waiting` are affected.
    How many that are says how the crowd was split, which is no fault of the variant that more of it came to.
    """
    random = np.random.default_rng(waiting)

    def significant(bursts=200, also=False):
        test, user = ShareTest(0.5, 0.05), 0
        for _ in range(bursts):
            sides = random.random(40) < 0.5
            places = np.where(sides, np.cumsum(sides), np.cumsum(~sides))
            for time_s, is_challenger in sorted(
                zip(places.tolist(), sides.tolist(), strict=True)
            ):  # as they were responded to
                test.add_response(
                    str(user),
                    0,
                    is_challenger=is_challenger,
                    affected=time_s > waiting or (also and is_challenger),
                )
                if test.is_significant:
                    return True
                user += 1
        return False

    assert sum(significant() for _ in range(60)) <= 6
    assert significant(also=True)


def test_an_overload_that_slows_everybody_ends_nothing_and_neither_do_failures_of_both():
    random, experiment, number = (
        np.random.default_rng(1),
        Experiment("c", 0.5, shadow=False, rewards=CLICKS),
        0,
    )
    for burst in range(60):
        slow = burst % 3 == 0
        for position in range(120):
            number += 1
            failed = slow and position > 100
            ms = (5.0 + position * slow) * float(random.lognormal(0, 0.3))
            experiment.add_entry(
                response(
                    number,
                    number,
                    bool(random.random() < 0.5),
                    model_ms=ms,
                    degraded=["model"] if failed else [],
                )
            )
        assert experiment.find_reason_to_end() is None


def test_a_challenger_that_fails_a_little_more_or_is_a_little_slower_stays(monkeypatch):
    random, experiment = np.random.default_rng(2), Experiment("c", 0.5, shadow=False, rewards=CLICKS)
    for number in range(30_000):
        is_challenger = bool(random.random() < 0.5)
        failed = random.random() < (0.004 if is_challenger else 0.001)
        ms = (6.0 if is_challenger else 5.0) * float(random.lognormal(0, 0.3))
        experiment.add_entry(
            response(number, number, is_challenger, model_ms=ms, degraded=["model"] if failed else [])
        )
        if number % 500 == 0:
            assert experiment.find_reason_to_end() is None
    monkeypatch.setattr(health, "FAILED", -1.0)
    monkeypatch.setattr(health, "SLOWER", 0.0)
    assert "of the champion's" in experiment.errors.find_failure(), "it was significant, but too little"
    assert "75% quantile" in experiment.latency.find_failure()


def test_with_privacy_an_experiment_is_judged_by_holdout_users(synthetic_folder, tmp_path):
    settings = load_settings(None, private_overrides(synthetic_folder, tmp_path))
    dataset = prepare_here(settings)
    said = Mechanism(2.0, 0.1, 100, 1.0, 1e-5, 200).statement() | {
        "population": "users",
        "epsilon_of_all_trainings": 5.0,
    }
    storage = publish_untrained(settings, dataset, settings.root(), said)
    begin_experiment(
        storage, untrained_bundle(settings, dataset, storage.bundle("other"), "other", said), 0.5
    )
    verdicts = {}
    for private in (False, True):
        made = Service(storage, ServeSettings(timeout_s=5.0), settings.score, private=private)
        models = made.models()
        assert (models.users, models.privacy.epsilon_of_all_trainings) == (None, 5.0), (
            "how many users there are is nobody's business"
        )
        for user in range(200):
            ask(made, user, mode="realtime")
        asyncio.run(made.recorder.writer.append([]))
        made.refresh()
        verdicts[private] = sum(made.deployments.current.experiment.outcomes.users.values())
        counted = {user for user in range(200) if made.deployments.current.experiment.is_counted(str(user))}
        made.close()
    held_out = {
        user
        for shard in dataset.shards()
        for user in shard.user_ids.filter(pa.array(shard.holdout)).to_pylist()
    }
    assert (
        verdicts == {False: 200, True: len(held_out & set(range(200)))}
        and counted == held_out & set(range(200))
        and 20 < len(counted) < 80
    )


def test_an_experiment_that_cannot_begin_or_end_is_refused(shop, synthetic_settings):
    storage, challenger, release = shop
    storage.release.write_bytes(release)
    settings = synthetic_settings.model_copy(
        update={"storage": synthetic_settings.storage.model_copy(update={"root": str(storage.root)})}
    )
    with pytest.raises(RefusedError, match="no running experiment"):
        end_experiment(storage, "by hand")
    with pytest.raises(RefusedError, match="is the champion"):
        pipeline.run("canary", settings, bundle="untrained", share=0.1)
    with pytest.raises(MissingArtifactError, match="nowhere"):
        pipeline.run("canary", settings, bundle="nowhere", share=0.1)
    assert storage.release.read_bytes() == release
    pipeline.run("canary", settings, bundle="other", share=0.1)
    assert Release.read(storage).list_roles("other") == ["challenger", "serves 10%"]
    end_experiment(storage, "of another", "someone else")
    assert Release.read(storage).has_experiment
    pipeline.run("serve_rollback", settings, None)
    assert Release.read(storage).ended == "bundle other: ended by hand"
    with pytest.raises(RefusedError, match="the last one ended: bundle other"):
        pipeline.run("serve_rollback", settings, None)
    storage.release.write_bytes(release)
