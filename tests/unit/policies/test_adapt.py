"""From answers that explored to the next policy: what is read, what a change of the world makes of older
rounds, and what is learned.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from harness import wait_for

from policies import adapt, ope
from policies.gate import spend_level
from policies.logs import LoggedDecisions, count_fresh, digest, read_rounds, require_usable
from policies.rewards import SyntheticRewards, draw_clicks
from recray import pipeline
from recray.bundle import Bundle
from recray.config import load_settings, render_yaml
from recray.errors import RefusedError, StateError
from recray.events.collect import collect, collected_folders
from recray.events.log import Entry
from recray.events.rewards import Rewards
from recray.events.sqlite import SqliteLog
from recray.inference.modulation import explore, log_density
from recray.inference.policy import OBSERVED, Policy
from recray.pipeline.follow import run_follow
from recray.release import Release
from recray.serving.api import Event, FeedbackRequest, RecommendRequest
from recray.serving.modulation import Exploration
from recray.serving.service import Service
from recray.stages import JobResult
from recray.storage import Storage, read_json
from recray.storage.lease import hold_exclusively
from recray.testing.published import publish_untrained

pytestmark = pytest.mark.second


def round_of(rewards, n, seed, sigma=1.0):
    random = np.random.default_rng(seed)
    observation, cases = rewards.draw(n, random)
    mean = np.zeros((n, 1), np.float32)
    action, density = explore(mean, sigma, random)
    reward = draw_clicks(rewards.pay(cases, action), random)
    user = np.array([f"{seed}-{row}" for row in range(n)])
    return LoggedDecisions(
        observation, mean, action, density, np.full(n, sigma), reward, user, np.full(n, "b"), np.full(n, "")
    )


def test_earlier_rounds_count_until_rewards_changed():
    old = [round_of(SyntheticRewards(drift=-1.0), 4000, seed) for seed in range(2)]
    new = [round_of(SyntheticRewards(), 4000, seed) for seed in (2, 3)]
    assert adapt.count_rounds_since_change([*old, *new]) == 2
    assert adapt.count_rounds_since_change(new) == 2 and adapt.count_rounds_since_change(new[:1]) == 1


def test_small_rounds_speak_together_and_the_newest_are_no_more_than_it_takes():
    assert adapt.group_rounds([700, 600]) == [slice(0, 1), slice(1, 2)]
    assert adapt.group_rounds([100, 700, 200, 200, 200]) == [slice(0, 2), slice(2, 5)]
    assert adapt.group_rounds([900, 100]) == [slice(0, 2)] and adapt.group_rounds([10, 20]) == [slice(0, 2)]
    rounds = [round_of(SyntheticRewards(), 700, seed) for seed in range(10)]
    rounds += [
        replace(
            round_of(SyntheticRewards(), 5000, 10),
            log_density=np.where(np.arange(5000) < 500, rounds[0].log_density[0], np.nan),
        )
    ]
    rounds[10].log_density[:500] = round_of(SyntheticRewards(), 5000, 10).log_density[:500]
    sound, aside = adapt.merge_usable_rounds(rounds, "b", {""})
    assert aside == {"not explored": 4500} and sum(map(len, sound)) == 7500 and len(sound) == 5
    log, judged, left = adapt.split_recent_rounds(sound, "")
    assert len(log) + len(judged) == 7500 and left == {}
    silent = replace(rounds[0], log_density=np.full(700, np.nan))
    with pytest.raises(RefusedError, match="explored"):
        adapt.merge_usable_rounds([*rounds, silent], "b", {""})


def test_most_of_what_is_to_be_had_is_learned_from_clicks():
    rewards = SyntheticRewards()
    observation, cases = rewards.draw(4000, np.random.default_rng(9))
    none, best = (
        rewards.pay(cases, np.zeros((4000, 1))).mean(),
        rewards.pay(cases, rewards.best(observation)).mean(),
    )

    def relative_gain(policy):
        return (rewards.pay(cases, policy.act(observation)).mean() - none) / (best - none)

    quick = adapt.Marwil(epochs=15)
    first = adapt.learn_by_marwil(round_of(rewards, 8000, 1), None, ("temperature",), "b", quick)
    assert relative_gain(first) > 0.35 and first.about["learner"] == "marwil" and first.bundle_digest == "b"
    second = adapt.learn_by_marwil(
        LoggedDecisions.concat([round_of(rewards, 8000, seed) for seed in (1, 2)]),
        first,
        ("temperature",),
        "b",
        quick,
    )
    assert relative_gain(second) > relative_gain(first) and np.array_equal(
        second.normalizer.mean, first.normalizer.mean
    )
    shuffled = round_of(rewards, 8000, 1)
    shuffled = replace(shuffled, reward=np.random.default_rng(0).permutation(shuffled.reward))
    assert relative_gain(adapt.learn_by_marwil(shuffled, None, ("temperature",), "b", quick)) < 0.2


@pytest.fixture
def shop(synthetic_folder, synthetic_dataset, tmp_path, monkeypatch):
    settings = load_settings(
        None,
        [
            f"data.events=[{synthetic_folder / 'events'}]", f"storage.root={tmp_path / 'root'}",
            "policy.actions=[temperature]", "policy.exploration_scale=1.0",
            "policy.exploration_share=1.0", "policy.experiment_share=1.0", "policy.attribution_window_s=0",
            "policy.latency=0.5", "score.k=20", "data.context=[hour]",
        ],
    )  # fmt: skip
    storage = publish_untrained(settings, synthetic_dataset, settings.root())

    def explore_alike(sigma, actions, bound, random):
        return Exploration(sigma, actions, bound, np.random.default_rng(1))

    # one round in 400 is refused by chance
    monkeypatch.setattr("recray.serving.service.Exploration", explore_alike)
    handler = Service(storage, settings.serve, settings.score, policy=settings.policy)
    yield settings, storage, handler
    handler.close()


def talk(handler, visits, seed):
    """Users who click where the temperature was turned up."""
    random = np.random.default_rng(seed)

    async def visit(users):
        answers = [
            await handler.recommend(RecommendRequest(user_id=user, k=3))
            for user in users
            for _ in range(visits)
        ]
        for answer in answers:
            if answer.controls and random.random() < 0.15 + 0.6 * (answer.controls["temperature"] > 0.2):
                await handler.intake.feedback(FeedbackRequest(request_id=answer.request_id, outcome="click"))

    for first in range(0, 300, 10):
        asyncio.run(visit(range(first, first + 10)))


def test_a_round_from_the_endpoint_to_the_next_policy_and_back(shop, synthetic_dataset):
    settings, storage, handler = shop
    with pytest.raises(RefusedError, match="no collected decision"):
        pipeline.run("adapt", settings, None)
    talk(handler, 5, 0)
    for number in range(200):  # guests have histories too, and ids that the event log could not hold
        item = handler.state.popular_items[number % 20][0]
        asyncio.run(
            handler.recommend(
                RecommendRequest(user_id=f"!guest {number}", history=[Event(item_id=item)], k=3)
            )
        )
    asyncio.run(handler.recorder.writer.append([]))  # what waits is written
    result = pipeline.run("adapt", settings, None)
    folders, rewards = collected_folders(storage), Rewards.declared(settings.serve)
    ripe = read_rounds(folders, settings.policy, rewards, until_s=np.inf)
    (sample,), aside = ripe.rounds, ripe.excluded
    assert (
        len(sample) > 1500
        and set(sample.reward.tolist()) == {0.0, 1.0}
        and len(set(sample.user.tolist())) > 290
    )
    guest, is_modulated = (
        np.array([str(user).startswith("!guest") for user in sample.user]),
        sample.action[:, 0] > 0.2,
    )
    assert guest.sum() > 100 and sample.reward[guest].max() == 0  # nobody said what they did
    for rate, is_query in ((0.75, is_modulated & ~guest), (0.15, ~is_modulated & ~guest)):
        assert sample.reward[is_query].mean() == pytest.approx(rate, abs=0.06)
    assert aside == {} and require_usable(sample, "untrained", {""})[1] == {}
    shown_only = settings.policy.model_copy(update={"shown_only": True})
    assert read_rounds(folders, shown_only, rewards, until_s=np.inf).excluded == {
        "not reported as shown": len(sample)
    }
    recency = settings.policy.model_copy(update={"actions": ("recency",)})
    others = read_rounds(folders, recency, rewards, until_s=np.inf)
    assert (others.rounds, others.excluded) == ([], {"of other controls or another bound": len(sample)})
    none = read_rounds(folders, settings.policy, rewards, until_s=0.0)
    assert (none.rounds, none.excluded) == ([], {})
    count = partial(count_fresh, folders, settings.policy)
    assert [
        count(after_s=0.0, until_s=0.0),
        count(after_s=0.0, until_s=np.inf),
        count(after_s=ripe.newest_s, until_s=np.inf),
    ] == [0, len(sample), 0]
    assert 0 < result.metrics["latency"] < 0.5 and result.metrics["diversity"] > 0.5
    assert result.reason == "" and result.metrics["promoted"] == 1 and result.metrics["dr_low"] > 0, (
        result.reason
    )
    assert Release.read(storage).champion.policy == result.run_key
    waits = settings.model_copy(update={"policy": settings.policy.model_copy(update={"every_hours": 1.0})})
    early = pipeline.run("adapt", waits, None)
    assert (early.status, early.run_key) == ("skipped", result.run_key)
    repeated = pipeline.run("adapt", settings, None)
    assert (repeated.status, repeated.run_key, repeated.reason) == ("skipped", result.run_key, ""), (
        "released by itself, it is not judged anew"
    )
    (storage.policy("") / "torn").mkdir()
    assert pipeline.run("adapt", waits, None).run_key == result.run_key
    before = handler.state
    handler.refresh()
    assert handler.state is not before and handler.state.policy == result.run_key
    answer = asyncio.run(handler.recommend(RecommendRequest(user_id=3, k=3)))
    assert answer.policy == result.run_key
    live = Policy.load(storage.policy(result.run_key), handler.state.bundle_digest)
    bundle = Bundle.open(storage.bundle("untrained"))
    other = settings.model_copy(update={"policy": recency})
    with pytest.raises(
        RefusedError, match="live policy has the controls temperature, policy.actions names recency"
    ):
        adapt.adapt(other, ripe.rounds, ripe.excluded, synthetic_dataset, bundle, live, {""}, 0.025)
    with pytest.raises(
        RefusedError, match=f"no collected decision has the controls recency; {len(sample)} of other controls"
    ):
        adapt.adapt(other, others.rounds, others.excluded, synthetic_dataset, bundle, None, {""}, 0.025)
    private = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"enabled": True})})
    with pytest.raises(RefusedError, match="privacy"):
        adapt.adapt(private, ripe.rounds, ripe.excluded, synthetic_dataset, bundle, None, {""}, 0.025)


def test_how_often_was_collected_changes_nothing_of_what_is_learned_from(tmp_path):
    """A collect a minute, an hour, or whenever, with outcomes that come late, twice, or before their
    decision.
    """
    random = np.random.default_rng(3)
    options = load_settings(
        None,
        [
            "policy.actions=[temperature]",
            "policy.rounds=4",
            "policy.round_s=600",
            "policy.round_decisions=150",
        ],
    ).policy
    observation, entries = np.zeros(len(OBSERVED)).tolist(), []
    for number in range(2400):
        at_s, key = 1e9 + 5.0 * number, f"r{number}"
        body = {
            "policy": "",
            "actions": ["temperature"],
            "observation": observation,
            "mean": [0.0],
            "action": [0.1],
            "sigma": 1.0,
            "bound": 1.0,
        }
        body["log_density"] = float(random.normal()) if number % 3 else None
        answer = {
            "items": ["a", "b"],
            "source": "realtime",
            "night": "n",
            "bundle": "b",
            "degraded": [],
            "ms": 1.0,
            "decision": body,
        }
        entries.append((at_s, Entry("decision", key, f"u{number % 40}", at_s, answer)))
        if random.random() < 0.4:
            repeated_at_s = at_s + float(random.choice([-2.0, 1.0, 400.0]))
            for copy in range(int(random.integers(1, 3))):
                click = {"request_id": key, "outcome": "click", "item_id": "a", "value": 1.0}
                entries.append(
                    (
                        repeated_at_s,
                        Entry(
                            "outcome" if repeated_at_s > at_s else "set_aside",
                            f"{key} {copy}",
                            None,
                            repeated_at_s,
                            click,
                        ),
                    )
                )
    entries.sort(key=lambda pair: pair[0])

    def collected(every_s, name):
        storage, log = Storage(tmp_path / name), SqliteLog(tmp_path / name / "log.sqlite")
        stretches = [
            [entry for _, entry in some]
            for _, some in itertools.groupby(entries, lambda pair: pair[0] // every_s)
        ]
        for some in stretches:
            log.append(some)
            collect(storage, log)
        log.close()
        return collected_folders(storage)

    rewards = Rewards({"click": 1.0}, 1.0)
    ways = {
        name: collected(every_s, name)
        for name, every_s in (("minute", 60.0), ("hour", 3600.0), ("once", 1e10))
    }
    rounds = {
        name: read_rounds(folders, options, rewards, until_s=1e9 + 11_000) for name, folders in ways.items()
    }
    assert [len(folders) for folders in ways.values()][0] > 150 and len(ways["once"]) == 1
    assert len({digest(ripe.rounds) for ripe in rounds.values()}) == 1 and len(rounds["once"].rounds) == 4
    fresh = [
        count_fresh(folders, options, after_s=1e9 + 10_000, until_s=1e9 + 11_000) for folders in ways.values()
    ]
    assert fresh[0] == fresh[1] == fresh[2] > 100 and {ripe.newest_s for ripe in rounds.values()} == {
        1e9 + 11_000
    }
    assert all(int((~np.isnan(log.log_density)).sum()) >= 150 for log in rounds["once"].rounds) and {
        *rounds["once"].rounds[0].reward
    } == {0.0, 1.0}


def test_the_distribution_that_is_fitted_is_the_one_that_was_logged():
    random = np.random.default_rng(0)
    action, mean, sigma = (
        random.uniform(-1, 1, (200, 2)),
        random.normal(0, 1.5, (200, 2)),
        random.uniform(0.05, 2.0, (200, 1)),
    )
    logits = torch.tensor(np.concatenate([mean, np.log(np.repeat(sigma, 2, 1))], 1))
    fitted = adapt.make_truncated_normal().from_logits(logits).logp(torch.tensor(action)).numpy()
    assert fitted == pytest.approx(log_density(action, mean, sigma), rel=1e-9)


@pytest.mark.slow
def test_a_best_action_at_the_end_of_its_range_is_learned_and_kept():
    rewards, random = Edge(), np.random.default_rng(0)
    for start in (0.0, 1.0):
        policy, mean = None, np.full((8000, 1), start, np.float32)
        rounds = []
        for seed in range(5):
            observation, cases = rewards.draw(8000, np.random.default_rng([seed, 7]))
            if policy is not None:
                mean = policy.act(observation)
            action, density = explore(mean, 0.5, random)
            reward = draw_clicks(rewards.pay(cases, action), random)
            user, names = (
                np.array([f"{seed}-{row}" for row in range(8000)]),
                (np.full(8000, "b"), np.full(8000, "")),
            )
            rounds.append(
                LoggedDecisions(observation, mean, action, density, np.full(8000, 0.5), reward, user, *names)
            )
            policy = adapt.learn_by_marwil(
                LoggedDecisions.concat(rounds), policy, ("temperature",), "b", adapt.Marwil(epochs=6)
            )
        observation, cases = rewards.draw(4000, np.random.default_rng(99))
        none, best, ours = (
            rewards.pay(cases, played).mean()
            for played in (np.zeros((4000, 1)), np.ones((4000, 1)), policy.act(observation))
        )
        assert (ours - none) / (best - none) >= 0.97


class Edge(SyntheticRewards):
    """A world in which the farthest that can be turned suits everybody."""

    def best(self, observation_ND):
        return np.ones((len(observation_ND), 1))


def test_a_follower_learns_when_enough_is_ripe_alone_in_its_workspace_until_it_is_stopped(shop, tmp_path):
    settings, storage, handler = shop
    (tmp_path / "settings.yaml").write_text(render_yaml(settings, "of the test"))
    words = [
        sys.executable,
        "-m",
        "recray.cli",
        "adapt",
        "--follow",
        "--config",
        str(tmp_path / "settings.yaml"),
        "policy.round_decisions=2100",
    ]
    follower = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:

        def followed():
            path = storage.follow
            return read_json(path) if path.exists() else {"looked_s": 0.0, "rounds": 0}

        wait_for("a look", lambda: followed()["looked_s"], ended=follower.poll)
        assert followed()["rounds"] == 0 and Release.read(storage).champion.policy is None
        with pytest.raises(RefusedError, match="another adapt --follow .process"):
            pipeline.run("adapt", settings, None, follow=True)
        talk(handler, 7, 0)
        asyncio.run(handler.recorder.writer.append([]))
        done = wait_for("a round", lambda: followed() if followed()["rounds"] else None, ended=follower.poll)
        assert (done["promoted"], done["refusals"], done["reason"]) == (1, 0, "") and done[
            "policy"
        ] == Release.read(storage).champion.policy
        assert done["over_trained"] > done["over_trained_low"] > 0 and 0 < done["outcome_age_s"] < 3600
        looked_s = done["looked_s"]
        wait_for("another look", lambda: followed()["looked_s"] > looked_s, ended=follower.poll)
        assert followed()["rounds"] == 1, "nothing new is ripe"
    finally:
        follower.terminate()
    out, said = follower.communicate()
    result = json.loads(out.splitlines()[-1])
    assert follower.returncode == 0 and (result["status"], result["metrics"]["rounds"]) == ("ok", 1), said[
        -2000:
    ]


def test_a_follower_goes_on_whatever_a_round_ends_with(tmp_path):
    ends = iter(
        [
            RefusedError("too little"),
            StateError("the log is away"),
            ValueError("unexpected"),
            None,
            KeyboardInterrupt(),
        ]
    )

    def round_():
        end = next(ends)
        if end is not None:
            raise end
        return JobResult("adapt", "skipped")

    said = []
    settings = load_settings(None, [f"storage.root={tmp_path}", "policy.attribution_window_s=0"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recray.pipeline.follow.MIN_WAIT_S", 0.0)
        result = run_follow(settings, round_, lambda message, **_: said.append(message))
    assert result.status == "ok" and result.metrics["refusals"] == 3 and result.metrics["rounds"] == 0
    assert all(
        any(word in line for line in said)
        for word in ("too little", "the log is away", "ValueError: unexpected")
    )
    with hold_exclusively(tmp_path, "adapt --follow"):
        pass


def test_all_rounds_of_the_gate_have_one_level():
    levels = [spend_level(number) for number in range(1, 100_001)]
    assert (
        sum(levels) < 0.1
        and levels == sorted(levels, reverse=True)
        and levels[0] > 0.015
        and levels[199] > 1e-5
    )
    p = np.random.default_rng(0).random((4000, 200))
    assert (p <= levels[:200]).any(1).mean() <= 0.1


@pytest.mark.parametrize(("zipf", "rate"), [(0.0, 0.05), (1.3, 0.05), (1.3, 0.3)])
def test_the_bound_of_a_gain_holds_where_users_come_in_clusters(zipf, rate):
    """On logs in which nothing is gained, and users differ in how often they come and what they do."""
    random, level, above = np.random.default_rng(1), 0.025, 0
    share = 1 / np.arange(1, 401) ** zipf
    for _ in range(300):
        user = np.unique(random.choice(400, 3000, p=share / share.sum()), return_inverse=True)[1]
        own = random.gamma(1.0, rate, 400).clip(0, 1)[user] - rate
        weight = random.normal(0, 1.0, 400)[user]
        above += ope.lower_bound(weight * own * random.lognormal(0, 1, 3000), user, level) > 0
    assert above / 300 <= 0.03
