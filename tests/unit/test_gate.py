"""The gate of policies: what it lets pass, what it refuses and why, and which logs it does not listen to."""

from dataclasses import replace

import numpy as np
import pytest

from policies import baselines, gate
from policies.logs import Logged, checked
from policies.rewards import Planted, clicks
from recray.errors import RefusedError
from recray.inference.policy import OBSERVED, Frozen, explore


class Plays:
    """A policy that plays a function."""

    def __init__(self, act, frozen):
        self.act, self.frozen = act, frozen


def log_of(world, n=8000, sigma=0.5, seed=0):
    random = np.random.default_rng(seed)
    observation, cases = world.draw(n, random)
    mean = np.zeros((n, 1), np.float32)
    action, density = explore(mean, sigma, random)
    reward = clicks(world.pay(cases, action), random)
    return Logged(observation, mean, action, density, np.full(n, sigma), reward, np.arange(n), np.full(n, "b"), np.full(n, ""))


@pytest.fixture(scope="module")
def frozen():
    return Frozen.of(Planted().draw(4096, np.random.default_rng(1))[0])


@pytest.fixture(scope="module")
def good(frozen):
    return Plays(baselines.by_gradient(Planted(), frozen, hidden=32), frozen)


def test_a_better_policy_passes_and_the_verdict_says_how_much(good):
    verdict = gate.judge(log_of(Planted()), good)
    assert verdict.passed and verdict.reason == ""
    assert 0 < verdict.figures["dr_low"] < verdict.figures["dr"] < verdict.figures["dr_high"]
    assert any("gains +" in check.text for check in verdict.checks)


def test_a_better_policy_is_not_refused_by_chance(good):
    verdicts = [gate.judge(log_of(Planted(), seed=seed), good) for seed in range(30)]
    assert [verdict.reason for verdict in verdicts if not verdict.passed] == []
    assert np.mean([verdict.figures["shuffled"] for verdict in verdicts]) < 0.1, "95 % intervals miss 5 %"


def test_a_worse_one_is_refused_in_words(frozen):
    verdict = gate.judge(log_of(Planted()), Plays(baselines.constant(np.array([0.6])), frozen))
    assert not verdict.passed and "gains -" in verdict.reason
    assert any(check.name.startswith("segment") and not check.passed for check in verdict.checks)


def test_where_nothing_is_to_be_gained_nothing_passes(good):
    assert not any(gate.judge(log_of(Planted(twin=True), seed=seed), good).passed for seed in range(10))
    log = log_of(Planted())
    shuffled = [replace(log, reward=np.random.default_rng(seed).permutation(log.reward)) for seed in range(10)]
    assert sum(gate.judge(one, good).passed for one in shuffled) <= 1
    assert not gate.judge(log, Plays(lambda observation: np.zeros((len(observation), 1), np.float32), good.frozen)).passed, "an A/A test"


def test_too_little_support_and_too_slow_a_decision_are_refused(good):
    assert "effective samples" in gate.judge(log_of(Planted(), n=1000, sigma=0.2), good).reason
    assert "of the Predictor's time" in gate.judge(log_of(Planted()), good, latency=0.2).reason


def test_a_segment_that_loses_stops_a_policy_that_gains_on_the_whole(frozen):
    world = Planted()
    best = baselines.by_gradient(world, frozen, hidden=32)
    length = OBSERVED.index("log_length")

    def act(observation):
        short = observation[:, [length]] < np.log1p(16)
        return np.where(short, -best(observation), best(observation)).astype(np.float32)

    verdict = gate.judge(log_of(world, n=20_000), Plays(act, frozen))
    assert "short histories: -" in verdict.reason


def test_rows_that_say_nothing_are_set_aside_with_their_reason():
    log = log_of(Planted(), n=1000)
    density, reward, bundle, policy, mean = (x.copy() for x in (log.log_density, log.reward, log.bundle, log.policy, log.mean))
    density[:10], reward[10:30], bundle[30:60], policy[60:100], density[100:150], mean[150:210] = np.nan, np.nan, "o", "?", 3.0, np.inf
    left, aside = checked(replace(log, log_density=density, reward=reward, bundle=bundle, policy=policy, mean=mean), "b", {""})
    assert len(left) == 790
    assert aside == {
        "of another bundle": 30, "of a policy that is not known": 40, "not explored": 10, "not finite": 60, "reward is not finite": 20,
        "density is not that of the action": 50,
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
        checked(replace(log_of(Planted(), n=1000), **change), "b", {""})
