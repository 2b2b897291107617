"""A policy behind a night and an endpoint: what it decides is in lists, answers and the log, and users may
explore around it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policies.logs import LoggedDecisions, require_usable
from recray import stages
from recray.bundle import Bundle
from recray.config import PolicySettings, ServeSettings
from recray.dataset.reader import Dataset
from recray.errors import RefusedError, RequestError, UnavailableError
from recray.events.log import Entry
from recray.inference import Predictor
from recray.inference.modulation import controls_of
from recray.inference.observer import Observer
from recray.inference.policy import OBSERVED, ObservationNormalizer, Policy
from recray.pipeline.operate import is_policy_withdrawn
from recray.release import (
    Member,
    Release,
    adopt_policy,
    begin_experiment,
    end_experiment,
    read_policy_key,
    release_policy,
    roll_back,
)
from recray.serving import deployment
from recray.serving.api import RecommendRequest, ScoreRequest, SimilarRequest
from recray.serving.deployment import Deployment
from recray.serving.modulation import read_run_observation
from recray.serving.query import resolve_query
from recray.serving.service import Service, describe_deployment
from recray.serving.state import ServingState
from recray.snapshot.score import ScoringModel, write_snapshot
from recray.stages.policy import require_usable_policy
from recray.testing.published import publish_untrained, score_buckets

ACTIONS = ("temperature", "recency")


def steady(predictor, histories, now, digest, value):
    """A policy that always decides the same, whether or not it is told of the night."""
    state = predictor.recommend(histories, 2, now=now, with_state=True).state
    pairs = zip([*histories, *histories], [*state, *np.full_like(state, np.nan)], strict=True)
    observations = np.stack(
        [Observer(predictor).observe(history, now, night_state) for history, night_state in pairs]
    )
    weights = {"weight_0": torch.zeros(2, len(OBSERVED)), "bias_0": torch.tensor(value)}
    return Policy(
        ACTIONS, ObservationNormalizer.of(observations), weights, digest, {"promoted": True, "reason": ""}
    )


def decided_by(storage, bundle, policy, predictor, histories, now):
    """The controls that a policy decides for some histories, as a nightly run makes them, without what it saw
    of the users.
    """
    observed = Observer(predictor).observe_all(histories, now, np.full((len(histories), 2), np.nan))
    return Policy.load(storage.policy(policy), bundle.digest).controls(
        observed, predictor.model, predictor.vocabulary.event_types
    )


@pytest.fixture(scope="module")
def shop(synthetic_settings, synthetic_dataset, tmp_path_factory):
    storage = publish_untrained(synthetic_settings, synthetic_dataset, tmp_path_factory.mktemp("steered"))
    bundle = Bundle.open(storage.bundle("untrained"))
    predictor = Predictor.load(bundle.path, dataset=synthetic_dataset)
    histories = [
        predictor.vocabulary.translation(synthetic_dataset).history(synthetic_dataset.user_history(user))
        for user in range(300)
    ]
    steady(predictor, histories, synthetic_dataset.now_s, bundle.digest, [0.9, -0.8]).save(
        storage.policy("p"), "p"
    )
    return storage, bundle, predictor, histories, storage.release.read_bytes(), storage.latest.read_bytes()


@pytest.fixture
def root(shop):
    storage, _, _, _, release, latest = shop
    yield storage
    storage.release.write_bytes(release)
    storage.latest.write_bytes(latest)
    for file in (storage.root / "state").glob("*"):
        file.unlink()


def with_section(settings, name, **changes):
    return settings.model_copy(update={name: getattr(settings, name).model_copy(update=changes)})


def made(storage, settings, **policy):
    return Service(storage, ServeSettings(timeout_s=5.0), settings.score, policy=PolicySettings(**policy))


def ask(handler, user, **body):
    return asyncio.run(handler.recommend(RecommendRequest(user_id=user, k=5, **body)))


def logged(handler):
    asyncio.run(handler.recorder.writer.append([]))
    return {entry.key: entry.body for _, entry in handler.recorder.writer.log.read(0, 1000)}


def test_nightly_lists_and_live_answers_are_what_the_policy_decides(
    shop, root, synthetic_settings, synthetic_dataset
):
    storage, bundle, plain, histories, *_ = shop
    write_snapshot(
        storage,
        "steered",
        Dataset.open(storage.dataset(synthetic_dataset.key)),
        ScoringModel(bundle, "p"),
        synthetic_settings.score,
        score_buckets,
    )
    release_policy(storage, bundle, "p", 1.0)
    served_state = ServingState.load(storage)
    assert (
        served_state.policy == "p"
        and served_state.name == "untrained+p"
        and describe_deployment(Deployment(served_state)).policy == "p"
    )
    now = synthetic_dataset.now_s
    expected = plain.recommend(
        histories[:50], 5, now=now, controls=decided_by(storage, bundle, "p", plain, histories[:50], now)
    )
    modulated = plain.recommend(
        histories[:50],
        5,
        now=now,
        controls=controls_of(
            [{"temperature": 0.9, "recency": -0.8}] * 50, plain.model, plain.vocabulary.event_types
        ),
    )
    assert np.array_equal(expected.item_index, modulated.item_index)
    assert not np.array_equal(expected.scores, plain.recommend(histories[:50], 5, now=now).scores)
    handler = made(storage, synthetic_settings)
    for user in range(50):
        ids = plain.vocabulary.ids_of(expected.item_index[user])
        listed, live = ask(handler, user), ask(handler, user, mode="realtime")
        assert (listed.source, live.source) == ("snapshot", "realtime")
        assert [item.item_id for item in listed.items] == [item.item_id for item in live.items] == ids
        assert live.policy == "p" and live.controls == pytest.approx({"temperature": 0.9, "recency": -0.8})
    body = logged(handler)[live.request_id]["decision"]
    assert body["policy"] == "p" and body["log_density"] is None and body["mean"] == body["action"]
    state = plain.recommend(histories[49:50], 2, now=now, with_state=True).state[0]
    assert body["observation"][-3:] == pytest.approx([*state, 1.0], rel=1e-4), (
        "what the night saw, of the trained model as it is"
    )
    other = resolve_query(RecommendRequest(user_id=49, history=[]), served_state)
    assert read_run_observation(other, served_state) is None, "of another history nothing is known"
    assert (
        read_run_observation(resolve_query(RecommendRequest(user_id=10**9), served_state), served_state)
        is None
    )
    handler.close()


def test_before_a_model_was_promoted_every_query_gets_the_popularity_fallback(shop, root, synthetic_settings):
    storage, bundle, plain, histories, *_ = shop
    dataset = Dataset.open(storage.dataset(bundle.manifest["dataset"]))
    write_snapshot(
        storage,
        "meanwhile",
        dataset,
        ScoringModel(bundle, popular_only=True),
        synthetic_settings.score,
        score_buckets,
    )
    handler = made(storage, synthetic_settings, exploration_scale=0.5, exploration_share=1.0)
    popular = [item.item_id for item in ask(handler, None).items]
    item = plain.vocabulary.ids_of(histories[7].item_index[-1:])[0]
    for query in (
        {},
        {"mode": "batch"},
        {"mode": "realtime"},
        {"events": [{"item_id": item}]},
        {"history": [{"item_id": item}]},
    ):
        answer = ask(handler, 7, **query)
        assert (
            answer.source == "popular"
            and [item.item_id for item in answer.items] == popular
            and answer.policy is None
        ), query
    assert all("decision" not in body for body in logged(handler).values()), "nothing is explored"
    scores = asyncio.run(handler.score(ScoreRequest(user_id=7, items=popular)))
    assert scores.source == "popular" and [item.score for item in scores.items] == sorted(
        (item.score for item in scores.items), reverse=True
    )
    explained = asyncio.run(
        handler.recommend(RecommendRequest(user_id=7, k=2, mode="realtime", explain=True))
    )
    assert explained.source == "popular" and not any(item.why for item in explained.items)
    with pytest.raises(UnavailableError, match="no model was promoted yet"):
        asyncio.run(handler.catalogue.similar(SimilarRequest(item_id=item)))
    assert handler.models().popular_only
    handler.close()


def test_a_request_sets_attention_controls_and_unknown_names_are_refused(shop, root, synthetic_settings):
    _, _, plain, *_ = shop
    handler = made(root, synthetic_settings)
    before, none, modulated = (
        ask(handler, 7, mode="realtime", controls=controls) for controls in (None, {}, {"temperature": 1.0})
    )
    assert [item.score for item in before.items] == pytest.approx([item.score for item in none.items])
    assert [item.score for item in modulated.items] != pytest.approx([item.score for item in none.items])

    async def together():
        bodies = [
            RecommendRequest(user_id=user, k=5, mode="realtime", controls={"temperature": user / 10})
            for user in range(8)
        ]
        return await asyncio.gather(*(handler.recommend(request) for request in bodies))

    for user, answer in enumerate(asyncio.run(together())):
        alone = ask(handler, user, mode="realtime", controls={"temperature": user / 10})
        assert [item.score for item in answer.items] == pytest.approx(
            [item.score for item in alone.items], rel=1e-5
        )
    with pytest.raises(RequestError, match="controls: nothing"):
        ask(handler, 7, controls={"nothing": 0.5})
    with pytest.raises(RequestError, match="controls cannot change"):
        ask(handler, 7, mode="batch", controls={"temperature": 0.5})
    handler.close()


def test_not_at_all_is_the_trained_model_also_where_a_policy_decides(
    shop, root, synthetic_settings, synthetic_dataset, monkeypatch
):
    storage, bundle, plain, histories, *_ = shop
    release_policy(storage, bundle, "p", 1.0)
    handler = made(storage, synthetic_settings)
    expected = plain.recommend(histories[7:8], 5, now=synthetic_dataset.now_s)
    answer = ask(handler, 7, controls={})
    assert answer.source == "realtime" and answer.controls is None
    assert [item.score for item in answer.items] == pytest.approx(expected.scores[0].tolist(), rel=1e-5)
    decided = ask(handler, 7, mode="realtime")
    assert decided.controls and [item.score for item in decided.items] != pytest.approx(
        expected.scores[0].tolist(), rel=1e-5
    )
    now, listed = ask(handler, 7), ask(handler, 7, mode="batch")
    assert (now.source, now.policy, now.items) == ("realtime", "p", decided.items), (
        "the list was made before the policy was released"
    )
    assert listed.source == "snapshot" and listed.policy is None

    def broken(*_, **__):
        raise FloatingPointError

    monkeypatch.setattr(Predictor, "recommend", broken)
    answer = ask(handler, 7, controls={"temperature": 0.5})
    assert (answer.source, answer.degraded) == ("snapshot", ["model"])
    handler.close()


def test_with_privacy_a_policy_of_all_users_decides_nothing(shop, root, synthetic_settings):
    storage, bundle, *_ = shop
    settings = with_section(synthetic_settings, "privacy", enabled=True)
    policy = Policy.load(storage.policy("p"), bundle.digest)
    with pytest.raises(RefusedError, match="learned from all users"):
        require_usable_policy(settings, policy, "p")
    require_usable_policy(synthetic_settings, policy, "p")
    refused = Policy(
        policy.actions,
        policy.normalizer,
        policy.weights,
        bundle.digest,
        {"promoted": False, "reason": "gains nothing"},
    )
    with pytest.raises(RefusedError, match="gains nothing"):
        require_usable_policy(synthetic_settings, refused, "p")


def test_actions_that_the_model_does_not_have_are_not_explored(root, synthetic_settings, caplog):
    handler = made(
        root, synthetic_settings, exploration_scale=0.4, exploration_share=1.0, actions=("event.nothing",)
    )
    answer = ask(handler, 7)
    assert (
        answer.source == "snapshot" and answer.degraded == [] and caplog.text.count("explores nothing") == 1
    )
    assert ask(handler, 8).source == "snapshot" and caplog.text.count("explores nothing") == 1
    handler.close()


def test_who_explores_is_answered_now_and_the_log_can_be_evaluated(shop, root, synthetic_settings):
    handler = made(root, synthetic_settings, exploration_scale=0.4, exploration_share=0.5)
    answers = {user: ask(handler, user) for user in range(290)}
    explored = {user for user, answer in answers.items() if answer.controls is not None}
    assert 110 < len(explored) < 180
    assert {answers[user].source for user in explored} == {"realtime"}
    assert {answer.source for user, answer in answers.items() if user not in explored} == {"snapshot"}
    assert {user for user in answers if ask(handler, user).controls is not None} == explored, (
        "a user explores or does not"
    )
    bodies = logged(handler)
    rows = [bodies[answers[user].request_id]["decision"] for user in sorted(explored)]
    columns = {
        name: np.array([row[name] for row in rows])
        for name in ("observation", "mean", "action", "log_density", "sigma")
    }
    n = len(rows)
    log = LoggedDecisions(
        **columns,
        reward=np.ones(n),
        user=np.arange(n),
        bundle=np.full(n, "b"),
        policy=np.array([row["policy"] for row in rows]),
    )
    left, aside = require_usable(log, "b", {""})
    assert len(left) == n and aside == {}, "densities are those of the actions that were played"
    assert np.ptp(columns["action"]) > 0.5 and not columns["mean"].any()
    handler.close()


def test_without_a_policy_and_exploration_nothing_is_decided(root, synthetic_settings):
    handler = made(root, synthetic_settings)
    answer = ask(handler, 7, mode="realtime")
    assert (
        answer.controls is None
        and answer.policy is None
        and "decision" not in logged(handler)[answer.request_id]
    )
    handler.close()


def test_a_policy_in_an_experiment_serves_its_share_and_is_rolled_back_like_a_bundle(
    shop, root, synthetic_settings
):
    storage, bundle, *_ = shop
    release, why = release_policy(storage, bundle, "p", 0.5)
    assert (
        why == ""
        and release.challenger.name == "untrained+p"
        and release.has_experiment
        and release.champion.policy is None
    )
    handler = made(storage, synthetic_settings)
    policies = {ask(handler, user).policy for user in range(40)}
    assert policies == {None, "p"} and handler.models().challenger == "untrained+p"
    end_experiment(storage, "worse", "untrained+p")
    handler.refresh()
    assert {ask(handler, user).policy for user in range(40)} == {None}
    release, why = release_policy(storage, bundle, "p", 0.5)
    assert "an experiment with policy p has ended" in why and not release.has_experiment
    handler.close()


def test_a_bounded_policy_changes_less_also_where_it_explores(
    shop, root, synthetic_settings, synthetic_dataset, caplog
):
    storage, bundle, plain, histories, *_ = shop
    whole = Policy.load(storage.policy("p"), bundle.digest)
    if not storage.policy("half").exists():
        Policy(ACTIONS, whole.normalizer, whole.weights, bundle.digest, {**whole.about, "bound": 0.5}).save(
            storage.policy("half"), "half"
        )
    release_policy(storage, bundle, "half", 1.0)
    handler = made(storage, synthetic_settings)
    answer = ask(handler, 7, mode="realtime")
    assert answer.controls == pytest.approx({"temperature": 0.45, "recency": -0.4})
    halved = {
        "controls": controls_of(
            [{"temperature": 0.45, "recency": -0.4}], plain.model, plain.vocabulary.event_types
        ),
        "now": synthetic_dataset.now_s,
    }
    expected = plain.recommend(histories[7:8], 5, **halved).scores[0].tolist()
    assert [item.score for item in answer.items] == pytest.approx(expected, rel=1e-5)
    nightly = decided_by(storage, bundle, "half", plain, histories[7:8], synthetic_dataset.now_s)
    np.testing.assert_allclose(
        plain.recommend(histories[7:8], 5, now=synthetic_dataset.now_s, controls=nightly).scores[0],
        expected,
        rtol=1e-5,
    )
    handler.close()
    explores = made(storage, synthetic_settings, exploration_scale=2.0, exploration_share=1.0)
    temperatures = [ask(explores, user).controls["temperature"] for user in range(100)]
    assert 0.4 < max(map(abs, temperatures)) <= 0.5
    last = ask(explores, 7).request_id
    body = logged(explores)[last]["decision"]
    assert body["bound"] == 0.5 and abs(body["mean"][0] - 0.9) < 1e-6, (
        "the log has the action itself, of which densities are"
    )
    explores.close()
    free = made(storage, synthetic_settings, exploration_scale=2.0, exploration_share=1.0, bound=0.1)
    assert free.state.policy is None and "its bound is 0.5, and policy.bound is 0.1" in caplog.text
    assert max(abs(ask(free, user).controls["temperature"]) for user in range(50)) <= 0.1
    roll_back(storage)
    free.refresh()
    assert max(abs(ask(free, user).controls["temperature"]) for user in range(50)) <= 0.1
    free.close()


def test_a_policy_waits_for_the_first_snapshot_of_its_bundle(shop, root, synthetic_settings):
    """Else its side would have the new bundle, and the other the old one."""
    storage, *_ = shop
    new = Member("next", "digest", 0)
    Release(champion=new, challenger=Member("next", "digest", 0, "p"), share=0.5, since_s=1.0).write(storage)
    handler = made(storage, synthetic_settings)
    assert handler.deployments.current.experiment is None and {
        ask(handler, user).bundle for user in range(20)
    } == {"untrained"}
    handler.close()


def test_an_old_nightly_run_neither_decides_nor_explores(shop, root, synthetic_settings, caplog):
    storage, bundle, *_ = shop
    release_policy(storage, bundle, "p", 1.0)
    manifest = storage.root / json.loads(storage.latest.read_text())["snapshot"] / "manifest.json"
    try:
        os.utime(manifest, (time.time() - 8 * 86_400,) * 2)
        handler = made(storage, synthetic_settings, exploration_scale=0.5, exploration_share=1.0)
        answers = [ask(handler, 7), ask(handler, 7, mode="realtime")]
        assert [answer.controls for answer in answers] == [None, None] and caplog.text.count(
            "no run since"
        ) == 1
        handler.close()
        os.utime(manifest)
        handler = made(storage, synthetic_settings)
        assert ask(handler, 7, mode="realtime").controls
        handler.close()
    finally:
        os.utime(manifest)


def test_with_too_many_queries_lists_of_before_the_policy_are_served(
    shop, root, synthetic_settings, monkeypatch
):
    storage, bundle, *_ = shop
    release_policy(storage, bundle, "p", 1.0)
    handler = made(storage, synthetic_settings)

    async def busy(*_, **__):
        raise UnavailableError("too many wait", "retry later")

    monkeypatch.setattr(handler.ranker, "run_model", busy)
    answer = ask(handler, 7)
    assert (answer.source, answer.policy, answer.controls) == ("snapshot", None, None)
    with pytest.raises(UnavailableError):
        ask(handler, 7, mode="realtime")
    handler.close()


def test_a_rollback_that_was_stopped_before_it_scored_takes_nothing_more_away(
    shop, root, synthetic_settings, synthetic_dataset
):
    storage, bundle, *_ = shop
    dataset = Dataset.open(storage.dataset(synthetic_dataset.key))
    write_snapshot(
        storage, "steered again", dataset, ScoringModel(bundle, "p"), synthetic_settings.score, score_buckets
    )
    release_policy(storage, bundle, "p", 1.0)
    assert not is_policy_withdrawn(storage, Release.read(storage))
    assert is_policy_withdrawn(storage, roll_back(storage))
    write_snapshot(
        storage, "plain again", dataset, ScoringModel(bundle), synthetic_settings.score, score_buckets
    )
    assert not is_policy_withdrawn(storage, Release.read(storage))


def test_a_policy_that_cannot_be_read_stops_nobody(shop, root, synthetic_settings, caplog, monkeypatch):
    storage, bundle, plain, histories, *_ = shop
    Policy.load(storage.policy("p"), bundle.digest).save(storage.policy("broken"), "broken")
    (storage.policy("broken") / "policy.safetensors").write_bytes(b"")
    release_policy(storage, bundle, "broken", 1.0)
    handler = made(storage, synthetic_settings)
    answer = ask(handler, 7)
    assert answer.policy is None and answer.degraded == [] and "policy broken is not used" in caplog.text
    said = []
    context = SimpleNamespace(storage=storage, settings=synthetic_settings, warn=said.append)
    assert (
        stages.load_usable_policy(context, bundle, "broken") is None
        and "recray tune" not in said[0]
        and "broken" in said[0]
    )
    assert stages.load_usable_policy(context, bundle, "gone") is None and "recray tune" in said[1]
    assert stages.load_usable_policy(context, bundle, "p").actions == ACTIONS and len(said) == 2
    context.settings = with_section(synthetic_settings, "privacy", enabled=True)
    assert stages.load_usable_policy(context, bundle, "p") is None and "learned from all users" in said[2]
    context.settings = with_section(synthetic_settings, "policy", bound=0.5)
    assert (
        stages.load_usable_policy(context, bundle, "p") is None
        and "its bound is 1, and policy.bound is 0.5" in said[3]
    )
    good = (storage.policy("p") / "policy.safetensors").read_bytes()
    (storage.policy("broken") / "policy.safetensors").write_bytes(good)
    monkeypatch.setattr(handler.deployments, "_released_retry_at", 0.0)
    handler.refresh()
    assert ask(handler, 7).policy == "broken", "it is tried again after a while"
    (storage.policy("broken") / "policy.safetensors").write_bytes(b"")
    handler.close()
    Release(champion=Member.of(bundle)).write(storage)
    release_policy(storage, bundle, "broken", 0.5)
    handler = made(storage, synthetic_settings)
    assert (
        handler.deployments.current.experiment is None and "of the experiment cannot be used" in caplog.text
    )
    handler.close()


def tell_of_a_trial(handler, name, share, better):
    """Decisions of many users on both sides of a trial, and clicks of most of those on the better side."""
    random, entries = np.random.default_rng(0), []
    for number in range(1500):
        arm = "challenger" if random.random() < share else "champion"
        body = {"trial": name, "share": share, "arm": arm, "items": ["a"], "degraded": []}
        entries.append(Entry("decision", f"r{number}", f"u{number}", time.time(), body))
        if random.random() < (0.6 if arm == better else 0.2):
            entries.append(
                Entry(
                    "outcome",
                    f"o{number}",
                    None,
                    time.time(),
                    {"request_id": f"r{number}", "outcome": "click", "value": 1.0},
                )
            )
    handler.recorder.writer.log.append(entries)


@pytest.mark.parametrize(("better", "decides"), [("challenger", "p"), ("champion", None)])
def test_an_experiment_is_decided_also_by_what_was_logged_before_a_restart(
    shop, root, synthetic_settings, better, decides, monkeypatch
):
    monkeypatch.setattr(deployment, "JUST_S", 0.0)
    storage, bundle, *_ = shop
    release, _ = release_policy(storage, bundle, "p", 0.5)
    first = made(storage, synthetic_settings)
    tell_of_a_trial(first, "untrained+p", 0.5, better)
    first.close()
    restarted = made(storage, synthetic_settings)  # looks once
    after = Release.read(storage)
    assert (
        after.champion.policy == decides
        and not after.has_experiment
        and (after.ended is None) == (decides is not None)
    )
    restarted.refresh()
    assert {ask(restarted, user).policy for user in range(20)} == {
        decides
    } and restarted.deployments.current.experiment is None
    restarted.close()
    if decides is None:  # brought back by hand
        assert begin_experiment(storage, bundle, 0.5, policy="p").since_s > release.since_s
        next_service = made(storage, synthetic_settings)
        assert next_service.deployments.current.experiment.outcomes.users == {True: 0, False: 0}, (
            "what came before is of another trial"
        )
        next_service.close()


def test_an_undecided_experiment_ends_after_its_days(shop, root):
    storage, bundle, *_ = shop
    experiment, _ = release_policy(storage, bundle, "p", 0.5)
    same, why = release_policy(storage, bundle, "p", 0.5, experiment_s=0.0)
    assert same == experiment and why == "", "the trial goes on as it began"
    release, why = release_policy(storage, bundle, "q", 0.5, experiment_s=3600.0)
    assert "an experiment with untrained+p is running" in why and release == experiment
    release, why = release_policy(storage, bundle, "q", 0.5, experiment_s=0.0)
    assert (
        why == ""
        and release.challenger.policy == "q"
        and release.since_s > experiment.since_s
        and release.rolled_back == ()
    )
    assert adopt_policy(storage, "untrained+p", experiment.since_s) == release, "it is not on trial any more"


def test_a_policy_is_adopted_and_rolled_back_to_the_trained_model(shop, root):
    storage, bundle, *_ = shop
    release_policy(storage, bundle, "p", 0.5)
    release, why = release_policy(storage, bundle, "p", 1.0)
    assert (
        why == ""
        and release.champion.name == "untrained+p"
        and not release.has_experiment
        and read_policy_key(storage) == "p"
    )
    back = roll_back(storage)
    assert (
        back.champion.name == "untrained"
        and back.rolled_back == ("untrained+p",)
        and Release.read(storage) == back
    )
    assert release_policy(storage, bundle, "p", 1.0)[1]
    with pytest.raises(RefusedError):
        roll_back(storage)
