"""From answers that explored to the next policy: what is read, what a change of the world makes of older rounds, and what is learned."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from policies import adapt
from policies.logs import Logged, checked, matured, read
from policies.rewards import Planted, clicks
from recray import pipeline
from recray.benchmark.nights import publish_untrained
from recray.bundle import Bundle
from recray.config import load_settings
from recray.errors import RefusedError
from recray.inference.policy import Policy, explore
from recray.release import Release
from recray.serving.api import Event, FeedbackRequest, RecommendRequest
from recray.serving.handler import Handler

pytestmark = pytest.mark.second


def round_of(world, n, seed, sigma=1.0):
    random = np.random.default_rng(seed)
    observation, cases = world.draw(n, random)
    mean = np.zeros((n, 1), np.float32)
    action, density = explore(mean, sigma, random)
    reward = clicks(world.pay(cases, action), random)
    user = np.array([f"{seed}-{row}" for row in range(n)])
    return Logged(observation, mean, action, density, np.full(n, sigma), reward, user, np.full(n, "b"), np.full(n, ""))


def test_rounds_are_looked_back_at_until_the_world_changed():
    old = [round_of(Planted(drift=-1.0), 4000, seed) for seed in range(2)]
    new = [round_of(Planted(), 4000, seed) for seed in (2, 3)]
    assert adapt.since_the_change([*old, *new]) == 2
    assert adapt.since_the_change(new) == 2 and adapt.since_the_change(new[:1]) == 1


def test_small_rounds_speak_together_and_the_newest_are_no_more_than_it_takes():
    assert adapt._together([700, 600]) == [slice(0, 1), slice(1, 2)]
    assert adapt._together([100, 700, 200, 200, 200]) == [slice(0, 2), slice(2, 5)]
    assert adapt._together([900, 100]) == [slice(0, 2)] and adapt._together([10, 20]) == [slice(0, 2)]
    rounds = [round_of(Planted(), 700, seed) for seed in range(10)]
    rounds += [replace(round_of(Planted(), 5000, 10), log_density=np.where(np.arange(5000) < 500, rounds[0].log_density[0], np.nan))]
    rounds[10].log_density[:500] = round_of(Planted(), 5000, 10).log_density[:500]
    sound, aside = adapt._sound(rounds, "b", {""})
    assert aside == {"not explored": 4500} and sum(map(len, sound)) == 7500 and len(sound) == 5
    log, judged, left = adapt._since_the_change(sound, "")
    assert len(log) + len(judged) == 7500 and left == {}
    silent = replace(rounds[0], log_density=np.full(700, np.nan))
    with pytest.raises(RefusedError, match="explored"):
        adapt._sound([*rounds, silent], "b", {""})


def test_most_of_what_is_to_be_had_is_learned_from_clicks():
    world = Planted()
    observation, cases = world.draw(4000, np.random.default_rng(9))
    none, best = world.pay(cases, np.zeros((4000, 1))).mean(), world.pay(cases, world.best(observation)).mean()

    def lead(policy):
        return (world.pay(cases, policy.act(observation)).mean() - none) / (best - none)

    quick = adapt.Marwil(epochs=15)
    first = adapt.learn_from(round_of(world, 8000, 1), None, ("temperature",), "b", quick)
    assert lead(first) > 0.35 and first.about["learner"] == "marwil" and first.bundle_digest == "b"
    second = adapt.learn_from(Logged.joined([round_of(world, 8000, seed) for seed in (1, 2)]), first, ("temperature",), "b", quick)
    assert lead(second) > lead(first) and np.array_equal(second.frozen.mean, first.frozen.mean)
    shuffled = round_of(world, 8000, 1)
    shuffled = replace(shuffled, reward=np.random.default_rng(0).permutation(shuffled.reward))
    assert lead(adapt.learn_from(shuffled, None, ("temperature",), "b", quick)) < 0.2


@pytest.fixture
def shop(world_folder, world_dataset, tmp_path):
    settings = load_settings(
        None,
        [
            f"data.events=[{world_folder / 'events'}]", f"storage.root={tmp_path / 'root'}", "policy.actions=[temperature]", "policy.sigma=1.0",
            "policy.explore=1.0", "policy.share=1.0", "policy.wait_s=0", "policy.latency=0.5", "score.k=20", "data.context=[hour]",
        ],
    )  # fmt: skip
    storage = publish_untrained(settings, world_dataset, settings.root())
    handler = Handler(storage, settings.serve, settings.score, policy=settings.policy)
    handler._exploration = replace(handler._exploration, random=np.random.default_rng(1))  # one round in 400 is refused by chance
    yield settings, storage, handler
    handler.close()


def talk(handler, visits, seed):
    """Users who click where the temperature was turned up."""
    random = np.random.default_rng(seed)

    async def visit(users):
        answers = [await handler.recommend(RecommendRequest(user_id=user, k=3)) for user in users for _ in range(visits)]
        for answer in answers:
            if answer.controls and random.random() < 0.15 + 0.6 * (answer.controls["temperature"] > 0.2):
                await handler.feedback(FeedbackRequest(request_id=answer.request_id, outcome="click"))

    for first in range(0, 300, 10):
        asyncio.run(visit(range(first, first + 10)))


def test_a_round_from_the_endpoint_to_the_next_policy_and_back(shop, world_dataset):
    settings, storage, handler = shop
    with pytest.raises(RefusedError, match="no collected decision"):
        pipeline.run_adapt(settings, None)
    talk(handler, 5, 0)
    for number in range(200):  # guests have histories too, and ids that the event log could not hold
        item = handler.night.popular_list[number % 20][0]
        asyncio.run(handler.recommend(RecommendRequest(user_id=f"!guest {number}", history=[Event(item_id=item)], k=3)))
    asyncio.run(handler.journal.writer.append([]))  # what waits is written
    result = pipeline.run_adapt(settings, None)
    folders = sorted(storage.collected.glob("[!.]*"))
    (found,), aside = read(folders, ("temperature",), until_s=np.inf)
    assert len(found) > 1500 and set(found.reward.tolist()) == {0.0, 1.0} and len(set(found.user.tolist())) > 290
    guest, turned = np.array([str(user).startswith("!guest") for user in found.user]), found.action[:, 0] > 0.2
    assert guest.sum() > 100 and found.reward[guest].max() == 0  # nobody said what they did
    for rate, asked in ((0.75, turned & ~guest), (0.15, ~turned & ~guest)):
        assert found.reward[asked].mean() == pytest.approx(rate, abs=0.06)
    assert aside == {} and checked(found, "untrained", {""})[1] == {}
    assert read(folders, ("recency",), until_s=np.inf) == ([], {"turned other controls, or as far as another bound": len(found)})
    assert read(folders, ("temperature",), until_s=0.0) == ([], {}) and (matured(folders, 0.0), matured(folders, np.inf)) == (0, len(found))
    assert 0 < result.metrics["latency"] < 0.5 and result.metrics["diversity"] > 0.5
    assert result.reason == "" and result.metrics["promoted"] == 1 and result.metrics["dr_low"] > 0, result.reason
    assert Release.read(storage).champion.policy == result.run_key
    waits = settings.model_copy(update={"policy": settings.policy.model_copy(update={"every_hours": 1.0})})
    early = pipeline.run_adapt(waits, None)
    assert (early.status, early.run_key) == ("skipped", result.run_key)
    again = pipeline.run_adapt(settings, None)
    assert (again.status, again.run_key, again.reason) == ("skipped", result.run_key, ""), "released by itself, it is not judged anew"
    (storage.policy("") / "torn").mkdir()
    assert pipeline.run_adapt(waits, None).run_key == result.run_key
    before = handler.night
    handler.look()
    assert handler.night is not before and handler.night.policy == result.run_key
    answer = asyncio.run(handler.recommend(RecommendRequest(user_id=3, k=3)))
    assert answer.policy == result.run_key
    live = Policy.load(storage.policy(result.run_key), handler.night.bundle_digest)
    other = settings.model_copy(update={"policy": settings.policy.model_copy(update={"actions": ("recency",)})})
    with pytest.raises(RefusedError, match="decides turns temperature, policy.actions says recency"):
        adapt.adapt(other, folders, world_dataset, Bundle.open(storage.bundle("untrained")), live, {""}, np.inf)
    with pytest.raises(RefusedError, match=f"no collected decision turned recency; {len(found)} turned other controls"):
        adapt.adapt(other, folders, world_dataset, Bundle.open(storage.bundle("untrained")), None, {""}, np.inf)
    private = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"enabled": True})})
    with pytest.raises(RefusedError, match="privacy"):
        adapt.adapt(private, folders, world_dataset, Bundle.open(storage.bundle("untrained")), None, {""}, np.inf)
