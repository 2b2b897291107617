"""The gate of policies: what it lets pass, what it refuses and why, and which logs it does not listen to."""

from dataclasses import replace

import numpy as np
import pytest

from policies import baselines, gate
from policies.logs import LoggedDecisions, require_usable
from policies.rewards import SyntheticRewards, draw_clicks
from recray.errors import RefusedError
from recray.inference.modulation import explore
from recray.inference.policy import OBSERVED, ObservationNormalizer


class Plays:
    """A policy that plays a function."""

    def __init__(self, act, normalizer):
        self.act, self.normalizer = act, normalizer


def log_of(rewards, n=8000, sigma=0.5, seed=0):
    random = np.random.default_rng(seed)
    observation, cases = rewards.draw(n, random)
    mean = np.zeros((n, 1), np.float32)
    action, density = explore(mean, sigma, random)
    reward = draw_clicks(rewards.pay(cases, action), random)
    return LoggedDecisions(
        observation,
        mean,
        action,
        density,
        np.full(n, sigma),
        reward,
        np.arange(n),
        np.full(n, "b"),
        np.full(n, ""),
    )


@pytest.fixture(scope="module")
def normalizer():
    return ObservationNormalizer.of(SyntheticRewards().draw(4096, np.random.default_rng(1))[0])


@pytest.fixture(scope="module")
def good(normalizer):
    return Plays(baselines.fit_by_gradient(SyntheticRewards(), normalizer, hidden=32), normalizer)


def test_a_better_policy_passes_and_the_verdict_says_how_much(good):
    verdict = gate.judge(log_of(SyntheticRewards()), good)
    assert verdict.passed and verdict.reason == ""
    assert 0 < verdict.figures["dr_low"] < verdict.figures["dr"] < verdict.figures["dr_high"]
    assert any("gain +" in check.text for check in verdict.checks)


def test_a_better_policy_is_not_refused_by_chance(good):
    verdicts = [gate.judge(log_of(SyntheticRewards(), seed=seed), good) for seed in range(20)]
    assert [verdict.reason for verdict in verdicts if not verdict.passed] == []
    assert np.mean([verdict.figures["shuffled"] for verdict in verdicts]) < 0.1, "95 % intervals miss 5 %"


def test_a_worse_one_is_refused_in_words(normalizer):
    verdict = gate.judge(
        log_of(SyntheticRewards()), Plays(baselines.repeat_action(np.array([0.6])), normalizer)
    )
    assert not verdict.passed and "gain -" in verdict.reason
    assert any(check.name.startswith("segment") and not check.passed for check in verdict.checks)


def test_where_nothing_is_to_be_gained_nothing_passes(good):
    assert not any(
        gate.judge(log_of(SyntheticRewards(twin=True), seed=seed), good).passed for seed in range(10)
    )
    log = log_of(SyntheticRewards())
    shuffled = [
        replace(log, reward=np.random.default_rng(seed).permutation(log.reward)) for seed in range(10)
    ]
    assert sum(gate.judge(one, good).passed for one in shuffled) <= 1
    assert not gate.judge(
        log, Plays(lambda observation: np.zeros((len(observation), 1), np.float32), good.normalizer)
    ).passed, "the same again"


def test_a_policy_whose_actions_change_nothing_is_not_promoted(good):
    """An A/A test: both play alike but for a control that nobody feels, so weights are not 1 and rewards
    are."""
    passed = 0
    for seed in range(20):
        log, random = log_of(SyntheticRewards(), n=4000, seed=seed), np.random.default_rng(seed)
        mean = np.concatenate([log.mean, np.zeros((4000, 1), np.float32)], 1)
        actions, density = explore(mean[:, 1:], 0.5, random)
        both = replace(
            log,
            mean=mean,
            action=np.concatenate([log.action, actions], 1),
            log_density=log.log_density + density,
        )
        other = Plays(
            lambda observations: np.stack(
                [0 * observations[:, 0], 0.6 * np.tanh(observations[:, 1] - 3)], 1
            ).astype(np.float32),
            good.normalizer,
        )
        assert gate.importance_weights(both, other.act(log.observation)).std() > 0.1
        passed += gate.judge(both, other).passed
    assert passed <= 2


def test_densities_of_something_else_are_noticed(good):
    log = log_of(SyntheticRewards())
    verdict = gate.judge(replace(log, log_density=log.log_density + 0.2), good)
    assert (
        "not played with the logged densities" in verdict.reason
        and "not 1" not in gate.judge(log, good).reason
    )


def test_a_small_gain_shows_though_the_log_explored_far(normalizer):
    """What is played is nearly the same under both, as far as the log explored: half as far it is not."""
    rewards, passed = SyntheticRewards(), []
    for seed in range(10):
        random = np.random.default_rng(seed)
        observation, cases = rewards.draw(3000, random)
        mean = (0.8 * rewards.best(observation)).astype(np.float32)
        action, density = explore(mean, 1.0, random)
        reward, n = draw_clicks(rewards.pay(cases, action), random), len(mean)
        log = LoggedDecisions(
            observation,
            mean,
            action,
            density,
            np.ones(n),
            reward,
            np.arange(n),
            np.full(n, "b"),
            np.full(n, "p"),
        )
        passed.append(gate.judge(log, Plays(rewards.best, normalizer)).passed)
    assert sum(passed) >= 8, passed


def test_what_pays_only_while_it_explores_is_refused(normalizer):
    """Most users do not explore: they get 0.55 itself, beyond the best 0.25; whoever explores around it
    mostly gets what lies between.
    """
    log = log_of(SyntheticRewards(), n=20_000, sigma=1.0)
    reward = draw_clicks(
        0.6 - 0.4 * (log.action[:, 0].astype(np.float64) - 0.25) ** 2, np.random.default_rng(0)
    )
    verdict, better = (
        gate.judge(replace(log, reward=reward), Plays(baselines.repeat_action(np.array([a])), normalizer))
        for a in (0.55, 0.3)
    )
    assert verdict.figures["dr_low"] > 0 and "without exploration -" in verdict.reason and better.passed, (
        verdict.reason,
        better.reason,
    )


def test_too_little_support_and_too_slow_a_decision_are_refused(good):
    assert "effective samples" in gate.judge(log_of(SyntheticRewards(), n=1000, sigma=0.2), good).reason
    assert "of the Predictor's time" in gate.judge(log_of(SyntheticRewards()), good, latency=0.2).reason


def test_a_segment_that_loses_stops_a_policy_that_gains_on_the_whole(normalizer):
    rewards = SyntheticRewards()
    best = baselines.fit_by_gradient(rewards, normalizer, hidden=32)
    length = OBSERVED.index("log_length")

    def act(observation):
        short = observation[:, [length]] < np.log1p(16)
        return np.where(short, -best(observation), best(observation)).astype(np.float32)

    verdict = gate.judge(log_of(rewards, n=20_000), Plays(act, normalizer))
    assert "short histories: -" in verdict.reason


def test_a_segment_may_lose_no_more_than_a_share_of_its_own(normalizer):
    """Users with short histories earn a tenth of what others do, and lose a thirtieth of that: less than a
    hundredth of what all earn.
    """
    observation, _ = SyntheticRewards().draw(3000, np.random.default_rng(0))
    parts, random = gate.split_by_history_length(observation), np.random.default_rng(1)
    none = np.where(parts["short histories"], 0.03, 0.3)
    paid = none + np.where(parts["short histories"], -0.001, 0.02) + 0.001 * random.standard_normal(3000)
    verdict = gate.compare(observation, paid, none)
    assert verdict.figures["gain_low"] > 0 and "short histories: -0.0010 of 0.0300" in verdict.reason
    assert gate.compare(observation, paid, none, gate.Criteria(segment=-0.05)).passed
    log = log_of(SyntheticRewards(), n=3000)
    short = gate.split_by_history_length(log.observation)["short histories"]
    by_log = gate.judge(
        replace(log, reward=np.where(short, 0.03, 0.3)),
        Plays(baselines.repeat_action(np.array([0.1])), normalizer),
    )
    assert any(
        check.text.startswith("short histories: ") and " of 0.0300," in check.text for check in by_log.checks
    )


def test_rows_that_say_nothing_are_set_aside_with_their_reason():
    log = log_of(SyntheticRewards(), n=1000)
    density, reward, bundle, policy, mean = (
        x.copy() for x in (log.log_density, log.reward, log.bundle, log.policy, log.mean)
    )
    density[210:215] = -np.inf
    density[:10], reward[10:30], bundle[30:60], policy[60:100], density[100:150], mean[150:210] = (
        np.nan,
        np.nan,
        "o",
        "?",
        3.0,
        np.inf,
    )
    left, aside = require_usable(
        replace(log, log_density=density, reward=reward, bundle=bundle, policy=policy, mean=mean), "b", {""}
    )
    assert len(left) == 785
    assert aside == {
        "of another bundle": 30, "of an unknown policy": 40, "not explored": 10, "not finite": 60,
                                 "reward is not finite": 20,
        "of propensity zero or infinite": 5, "density is not that of the action": 50,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"log_density": np.full(1000, np.nan)}, "explored"),
        ({"sigma": np.zeros(1000)}, "explored"),
        ({"bundle": np.full(1000, "other")}, "another bundle"),
        ({"reward": np.full(1000, np.nan)}, "1000 reward is not finite"),
    ],
)
def test_logs_that_no_estimate_can_be_made_of_are_refused(change, why):
    with pytest.raises(RefusedError, match=why):
        require_usable(replace(log_of(SyntheticRewards(), n=1000), **change), "b", {""})
