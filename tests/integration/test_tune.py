"""`recray tune` on a published night: learned on held-out users, judged on others, sealed once, told to
MLflow, released or not.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from policies import gate
from policies import tune as tuning
from policies.adapt import learn_by_ppo
from policies.held_out import HoldoutRewards
from policies.logs import LoggedDecisions
from policies.rewards import DoublyRobustRewards, SyntheticRewards, draw_clicks
from recray import pipeline
from recray.bundle import Bundle
from recray.config import load_settings
from recray.errors import DataError, RefusedError
from recray.inference import Predictor
from recray.inference.modulation import explore
from recray.inference.observer import Observer
from recray.inference.policy import OBSERVED, Policy
from recray.release import Release
from recray.snapshot.reader import Snapshot
from recray.stages.policy import open_published_dataset
from recray.storage import Storage
from recray.testing.published import prepare_here, publish_untrained, skip_training
from recray.testing.synthetic import SyntheticShop
from recray.tracking.runs import Tracking


@pytest.fixture(scope="module")
def settings(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    SyntheticShop(users=900, items=80, events_per_user=14, seed=3).write(folder)
    return load_settings(
        None,
        [
            f"data.events=[{folder / 'events'}]", f"storage.root={folder / 'root'}",
            "split.kind=leave_one_out", "model.dim=16", "model.history=32",
            "score.k=10", "policy.decisions=3000", "policy.experiment_share=0.3",
            "policy.actions=[temperature]",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def storage(settings):
    publish_untrained(settings, prepare_here(settings), settings.root())
    return Storage(settings.root())


def test_a_policy_is_made_judged_and_kept(settings, storage):
    from mlflow import MlflowClient

    before = storage.release.read_bytes()
    result = pipeline.run("tune", settings, None)
    bundle = Bundle.open(storage.bundle("untrained"))
    policy = Policy.load(storage.policy(result.run_key), bundle.digest)
    assert policy.actions == ("temperature",) and policy.about["decisions"] >= 3000
    names = [check["name"] for check in policy.about["checks"]]
    assert names == [
        "gain",
        "segment short histories",
        "segment middle histories",
        "segment long histories",
        "diversity",
        "latency",
    ]
    assert 0 < policy.about["figures"]["latency"] < 1 and policy.about["figures"]["users"] >= tuning.MIN_USERS
    assert bool(result.metrics["promoted"]) == (result.reason == "") == Release.read(storage).has_experiment
    if not result.metrics["promoted"]:
        assert storage.release.read_bytes() == before
    tracking = Tracking(settings.tracking, storage)
    run_id = tracking.run("untrained", "")
    run = MlflowClient(tracking.uri).get_run(run_id)
    assert run.data.metrics["policy_gain"] == pytest.approx(policy.about["figures"]["gain"])
    repeated = pipeline.run("tune", settings, None)
    assert repeated.status == "skipped" and repeated.run_key == result.run_key


def test_what_passes_enters_an_experiment_and_what_is_refused_is_not_adopted(settings, storage, monkeypatch):
    verdict = gate.Verdict([gate.Check("gain", True, "gains")], {"gain": 1.0})
    monkeypatch.setattr(tuning, "judge", lambda *_: verdict)
    before = storage.release.read_bytes()
    result = pipeline.run(
        "tune",
        settings.model_copy(update={"policy": settings.policy.model_copy(update={"decisions": 600})}),
        None,
    )
    release = Release.read(storage)
    assert (
        result.reason == ""
        and release.challenger.name == f"untrained+{result.run_key}"
        and release.share == 0.3
    )
    storage.release.write_bytes(before)
    monkeypatch.setattr(
        tuning, "judge", lambda *_: gate.Verdict([gate.Check("gain", False, "gains nothing")])
    )
    refused = pipeline.run(
        "tune",
        settings.model_copy(update={"policy": settings.policy.model_copy(update={"decisions": 700})}),
        None,
    )
    assert refused.reason == "gains nothing" and storage.release.read_bytes() == before
    with pytest.raises(RefusedError, match="gains nothing"):
        pipeline.run("promote", settings, None, bundle=f"untrained+{refused.run_key}")
    pipeline.run("promote", settings, None, bundle=f"untrained+{result.run_key}")
    assert Release.read(storage).champion.policy == result.run_key
    next_tune = pipeline.run(
        "tune",
        settings.model_copy(update={"policy": settings.policy.model_copy(update={"decisions": 600})}),
        None,
    )
    assert next_tune.status == "skipped" and next_tune.run_key == result.run_key, (
        "what it made itself is not what it is judged against"
    )
    storage.release.write_bytes(before)


@pytest.mark.usefixtures("storage")
def test_a_nightly_run_learns_a_policy_for_its_new_bundle_and_scores_with_it(settings, monkeypatch, tmp_path):
    changes = {
        "storage": {"root": str(tmp_path)},
        "policy": {"enabled": True, "experiment_share": 1.0, "decisions": 600},
        "train": {"epochs": 1},
        "promotion": {"must_beat": (), "margin": 1.0},
    }
    nightly = settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=values) for name, values in changes.items()}
    )
    decided = []
    before = pipeline.run(
        "tune", settings, None
    ).run_key  # made before; now it decides for the champion of another root
    old = Storage(settings.root())
    storage = publish_untrained(settings, prepare_here(settings), tmp_path)
    shutil.copytree(old.policy(before), storage.policy(before))
    release = Release.read(storage)
    assert release.champion.digest == Bundle.open(old.bundle("untrained")).digest
    Release(champion=replace(release.champion, policy=before)).write(storage)

    def judge(*_):
        decided.append(Release.read(storage).champion)
        return gate.Verdict([gate.Check("gain", True, "gains")], {"gain": 1.0})

    monkeypatch.setattr(tuning, "judge", judge)
    skip_training(nightly)
    assert pipeline.run("nightly", nightly, None).status == "ok"
    champion = Release.read(storage).champion
    policy = Policy.load(storage.policy(champion.policy), champion.digest)
    assert (
        policy.about["bundle"] == champion.run_key != "untrained"
        and Snapshot.latest(storage).manifest["policy"] == champion.policy
    )
    assert [(member.run_key, member.policy) for member in decided] == [(champion.run_key, None)], (
        "a new bundle begins without one"
    )
    assert champion.policy != before


def test_a_policy_has_to_be_better_than_the_one_that_decides(settings, storage):
    bundle = Bundle.open(storage.bundle("untrained"))
    live = Policy.load(storage.policy(pipeline.run("tune", settings, None).run_key), bundle.digest)
    dataset = open_published_dataset(storage)
    predictor = Predictor.load(bundle.path, dataset=dataset)
    questions, filter_seen = tuning.load_queries(settings, dataset, predictor)
    judged = HoldoutRewards(predictor, questions, ["temperature"], filter_seen=filter_seen)
    strong = Policy(
        ("recency", "temperature"),
        live.normalizer,
        {"weight_0": torch.zeros(2, len(OBSERVED)), "bias_0": torch.ones(2)},
        bundle.digest,
        {},
    )
    places = np.arange(len(judged))
    ours, theirs = (
        judged.with_controls(policy.actions, 1.0).pay(places, policy.act(judged.observation)).mean()
        for policy in (live, strong)
    )
    assert abs(ours - theirs) > 1e-6
    assert tuning.judge(settings, judged, live, strong).figures["gain"] == pytest.approx(
        ours - theirs, abs=1e-9
    )
    itself = tuning.judge(settings, judged, live, live)
    assert itself.figures["gain"] == 0.0 and not itself.passed


def test_what_is_learned_at_one_moment_decides_at_others(settings, storage, monkeypatch, tmp_path):
    """Under a split by time all are asked at the cut, and the night and the endpoint ask later."""
    monkeypatch.setattr(tuning, "MIN_USERS", 50)
    split = settings.split.model_copy(update={"kind": "time"})
    at_cut = settings.model_copy(
        update={"split": split, "storage": settings.storage.model_copy(update={"root": str(tmp_path)})}
    )
    dataset = prepare_here(at_cut)
    bundle = Bundle.open(publish_untrained(at_cut, dataset, at_cut.root()).bundle("untrained"))
    policy, _ = tuning.tune(at_cut, dataset, bundle)
    assert np.isinf(policy.normalizer.scale).sum() == 3, "the clock stood still"
    predictor = Predictor.load(bundle.path, dataset=dataset)
    histories = [
        predictor.vocabulary.translation(dataset).history(dataset.user_history(user)) for user in range(300)
    ]
    observer = Observer(predictor)
    observations = np.stack([observer.observe(history, dataset.now_s + 3600) for history in histories])
    assert (policy.act(observations) != 0).mean() > 0.8


def test_invalid_contexts_are_named(settings, storage, synthetic_settings, synthetic_dataset, tmp_path):
    bundle = Bundle.open(
        publish_untrained(synthetic_settings, synthetic_dataset, tmp_path / "small").bundle("untrained")
    )
    with pytest.raises(DataError, match="too few for a policy"):
        tuning.tune(synthetic_settings, synthetic_dataset, bundle)
    private = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"enabled": True})})
    with pytest.raises(RefusedError, match="privacy"):
        tuning.tune(private, synthetic_dataset, bundle)


def test_outcomes_pay_by_propensity(settings):
    """PPO learns from clicks what is to be had, from shuffled ones nothing."""
    rewards, random = SyntheticRewards(), np.random.default_rng(1)
    observation, cases = rewards.draw(12_000, random)
    mean, sigma = np.zeros((12_000, 1), np.float32), np.full(12_000, 0.7)
    action, density = explore(mean, sigma[:, None], random)
    reward, user = draw_clicks(rewards.pay(cases, action), random), np.arange(12_000)
    log = LoggedDecisions(
        observation, mean, action, density, sigma, reward, user, np.full(12_000, "b"), np.full(12_000, "")
    )
    paid = DoublyRobustRewards(
        log, ("temperature",), lambda observations, played: np.full(len(observations), reward.mean())
    )
    for value in (-0.5, 0.5):  # of who explores around it
        played = explore(np.full((12_000, 1), value, np.float32), 0.7, random)[0]
        assert paid.pay(user, np.full((12_000, 1), value)).mean() == pytest.approx(
            rewards.pay(cases, played).mean(), abs=0.02
        )

    few = settings.model_copy(update={"policy": settings.policy.model_copy(update={"decisions": 14_000})})
    observations, best_actions = rewards.draw(4000, np.random.default_rng(2))
    none, best = (
        rewards.pay(best_actions, np.zeros((4000, 1))).mean(),
        rewards.pay(best_actions, rewards.best(observations)).mean(),
    )

    def learned_gain(log):
        return (
            rewards.pay(best_actions, learn_by_ppo(log, None, few, "b").act(observations)).mean() - none
        ) / (best - none)

    assert learned_gain(log) > 0.35
    assert learned_gain(replace(log, reward=random.permutation(reward))) < 0.2
