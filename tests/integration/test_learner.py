"""RLlib learns a policy: in a planted world most of what is to be had, goes on from a checkpoint and from
another policy.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from policies.environment import DecisionEnvironment
from policies.learner import Ppo, learn
from policies.rewards import SyntheticRewards
from recray.errors import DamagedArtifactError
from recray.inference.policy import OBSERVED, ObservationNormalizer

QUICK = Ppo(decisions=12_000, at_once=256, batch=2048, lr=5e-3)


pytestmark = pytest.mark.usefixtures("ray_session")


def share(rewards, act):
    """Of the oracle's lead."""
    observation, cases = rewards.draw(5000, np.random.default_rng(99))
    none = rewards.pay(cases, np.zeros((5000, 1))).mean()
    return (rewards.pay(cases, act(observation)).mean() - none) / (
        rewards.pay(cases, rewards.best(observation)).mean() - none
    )


def test_an_episode_is_one_decision_and_the_next_one_asks_for_others(monkeypatch):
    draws, draw = [], SyntheticRewards.draw

    def remembered(self, n, random):
        draws.append(draw(self, n, random))
        return draws[-1]

    monkeypatch.setattr(SyntheticRewards, "draw", remembered)
    rewards = SyntheticRewards()
    normalizer = ObservationNormalizer.of(rewards.draw(500, np.random.default_rng(0))[0])
    environment = DecisionEnvironment(rewards, normalizer, 64, penalty=0.1)
    first, _ = environment.reset(seed=3)
    assert first.shape == (64, len(OBSERVED)) and environment.observation_space.contains(first)
    _, cases = draws[-1]
    _, reward, over, _, _ = environment.step(np.full((64, 1), 5.0))
    assert over.all(), "one decision"
    np.testing.assert_allclose(reward, rewards.pay(cases, np.ones((64, 1))) - 0.1, rtol=1e-5)
    second, nothing, over, _, _ = environment.step(np.zeros((64, 1)))
    assert not nothing.any() and not over.any() and not np.array_equal(first, second)
    assert not np.array_equal(environment.reset(seed=3)[0], first), (
        "RLlib says the same seed before every batch"
    )


class Narrow(SyntheticRewards):
    """What pays narrows the lists."""

    def pay(self, cases, action_NK):
        return 0.3 + 0.2 * action_NK[:, 0]

    def pay_with_diversity(self, cases, action_NK):
        return self.pay(cases, action_NK), 1.0 - 0.5 * action_NK[:, 0]


def test_lists_that_lack_variety_are_charged_for_until_they_have_it():
    rewards = Narrow()
    normalizer = ObservationNormalizer.of(rewards.draw(500, np.random.default_rng(0))[0])
    environment = DecisionEnvironment(rewards, normalizer, 64, min_diversity=0.9)
    paid = []
    for _ in range(40):
        environment.reset()
        paid.append(environment.step(np.ones((64, 1)))[1].mean())
    assert paid[0] > 0.3 and paid[-1] < 0.0, "an action that narrows gets dearer"
    for _ in range(200):
        environment.reset()
        environment.step(-np.ones((64, 1)))
    assert environment.price == 0.0, "and costs nothing while lists are varied enough"
    assert DecisionEnvironment(SyntheticRewards(), normalizer, 8, min_diversity=0.9).min_diversity is None


def test_it_learns_to_keep_lists_varied():
    free, kept = (
        learn(Narrow(), replace(QUICK, penalty=0.0), "b", min_diversity=floor) for floor in (None, 0.9)
    )
    observation = Narrow().draw(2000, np.random.default_rng(5))[0]
    assert free.act(observation).mean() > 0.6
    assert 1.0 - 0.5 * kept.act(observation).mean() > 0.8


def test_what_lists_lack_costs_as_much_after_a_resume(tmp_path, monkeypatch):
    kept, began = tmp_path / "state.safetensors", []
    learn(Narrow(), replace(QUICK, decisions=3000, penalty=0.0), "b", min_diversity=0.9, checkpoint=kept)
    price = float(load_file(kept)["price"])
    monkeypatch.setattr(
        "policies.learner.DecisionEnvironment",
        lambda *arguments, **named: began.append(named["price"]) or DecisionEnvironment(*arguments, **named),
    )
    learn(Narrow(), replace(QUICK, decisions=4000, penalty=0.0), "b", min_diversity=0.9, checkpoint=kept)
    assert price > 0 and began == [price]


def test_it_begins_as_the_trained_model():
    rewards = SyntheticRewards()
    running: list[str] = []

    def note_threads(decisions: int, metrics: dict[str, float]) -> None:
        running.extend(type(thread).__name__ for thread in threading.enumerate())

    options = replace(QUICK, decisions=1, minibatch=256, batch=256, lr=1e-9, last_lr=1e-9)
    policy = learn(rewards, options, "b", on_metrics=note_threads)
    assert running and "UtilMonitor" not in running, "stopped before it began, it would never end"
    assert np.abs(policy.act(rewards.draw(200, np.random.default_rng(0))[0])).max() < 1e-3


def test_it_learns_goes_on_from_a_checkpoint_and_from_a_policy(tmp_path):
    rewards, kept, reports = SyntheticRewards(), tmp_path / "state.safetensors", []
    first = learn(
        rewards,
        QUICK,
        "bundle",
        seed=1,
        checkpoint=kept,
        on_metrics=lambda decisions, metrics: reports.append((decisions, metrics["reward"])),
    )
    best_share = share(rewards, first.act)
    assert best_share > 0.4 and first.about["decisions"] >= 12_000 and len(reports) >= 5
    assert int(load_file(kept)["decisions"]) == reports[-1][0] == first.about["decisions"]
    continued = learn(rewards, replace(QUICK, decisions=24_000), "bundle", seed=1, checkpoint=kept)
    assert continued.about["decisions"] >= 24_000 and share(rewards, continued.act) > best_share
    assert np.array_equal(continued.normalizer.mean, first.normalizer.mean)
    warm = learn(
        rewards, replace(QUICK, decisions=1, lr=1e-9, last_lr=1e-9), "bundle", seed=2, start=continued
    )
    np.testing.assert_allclose(warm.weights["weight_0"], continued.weights["weight_0"], atol=1e-4)
    with pytest.raises(DamagedArtifactError, match="another shape"):
        learn(rewards, replace(QUICK, hidden=16), "bundle", checkpoint=kept)
