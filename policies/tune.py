"""A policy for a bundle, from held-out users: learned on some of what they did next, judged on the others'."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from policies import gate
from policies.held_out import HeldOut
from policies.learner import Ppo, learn
from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset, draw_of
from recray.errors import DataError, RefusedError
from recray.evaluation.evaluate import test_questions
from recray.evaluation.protocol import Question, wanted
from recray.inference import Predictor, Rules, Translation
from recray.inference.modulation import explore
from recray.inference.policy import Policy

LEAST = 200  # users to learn from, and as many to be judged by
JUDGED = 1 / 3  # of the users
TIMED = 200  # requests
BATCH = 256


def tune(
    settings: Settings,
    dataset: Dataset,
    bundle: Bundle,
    *,
    start: Policy | None = None,
    live: Policy | None = None,
    checkpoint: Path | None = None,
    on_metrics: Callable[[int, dict[str, float]], None] = lambda decisions, metrics: None,
) -> tuple[Policy, gate.Verdict]:
    """Learn and judge. Needs a Ray session.

    start : a policy to begin with, of another bundle; live : of this one, which decides now: what is learned has to be better than it
    checkpoint : as `policies.learner.learn`
    Raises DataError for too few users, RefusedError where privacy is on and nobody is held out, SettingsError.
    """
    if settings.privacy.enabled and not settings.split.held_out:
        raise RefusedError("policy.enabled with privacy.enabled: the trained on are not asked", "hold users out: split.held_out=0.2")
    if settings.privacy.enabled and bundle.settings["split"] != settings.result_settings("split")["split"]:
        raise RefusedError(f"bundle {bundle.key} was trained under another split, so others were held out", "tune with the settings of its training")
    predictor = Predictor.load(bundle.path, dataset=dataset)
    questions, new_only = questions_of(settings, dataset, predictor)
    if len(questions) * JUDGED < LEAST:
        raise DataError(f"dataset {dataset.key} has {len(questions)} test users, too few for a policy", f"{round(LEAST / JUDGED)} are needed")
    # the same users every night: what a policy begins with was not learned from those who judge it
    judges = draw_of(pa.array([str(dataset.shard(question.shard).user_ids[question.row]) for question in questions]), "judges") < JUDGED
    options, k = settings.policy, settings.evaluate.k[0]
    rules = Rules.declared(settings.score.rules(), dataset, predictor.translation(dataset).to_bundle, predictor.unseen)
    filtered: dict[str, Any] = {"new_only": new_only, "listed_new_only": settings.score.new_only, "rules": rules, "bound": options.bound}
    judged, learned = (
        HeldOut(predictor, [questions[place] for place in places], options.actions, metric=options.metric, k=k, **filtered)
        for places in (np.flatnonzero(judges), np.flatnonzero(~judges))
    )
    ppo = Ppo(decisions=options.decisions, penalty=options.penalty)
    if start is not None and start.bound != options.bound:
        start = None
    policy = learn(
        learned,
        ppo,
        bundle.digest,
        seed=settings.split.seed,
        floor=options.diversity,
        start=start,
        checkpoint=checkpoint,
        on_metrics=on_metrics,
    )
    policy.about["bound"] = options.bound
    verdict = judge(settings, judged, policy, live)
    policy.about |= {"bundle": bundle.key, "dataset": dataset.key, "as_of_s": dataset.as_of_s, "promoted": verdict.passed, "reason": verdict.reason}
    policy.about |= {"checks": [asdict(check) for check in verdict.checks], "figures": verdict.figures}
    return policy, verdict


def judge(settings: Settings, judged: HeldOut, policy: Policy, live: Policy | None = None) -> gate.Verdict:
    """The gate's verdict by users that the policy was not learned from. live : to be better than; None: than the trained model as it is"""
    places = np.arange(len(judged))
    mine, none = (judged.lists(places, action) for action in (policy.act(judged.observation), np.zeros((len(judged), len(policy.actions)))))
    now = none if live is None else judged.turning(live.actions, live.bound).lists(places, live.act(judged.observation))
    latency = deciding_share(judged.predictor, judged.questions[:TIMED], policy)
    paid, before = (judged.worth(places, found) for found in (mine, now))
    return gate.compare(judged.observation, paid, before, rules_of(settings), diversity=judged.variety(mine, none), latency=latency)


def rules_of(settings: Settings) -> gate.Rules:
    """What the settings ask of a policy."""
    options = settings.policy
    return gate.Rules(threshold=options.threshold, segment=-options.segment, diversity=options.diversity, latency=options.latency)


def deciding_share(predictor: Predictor, questions: list[Question], policy: Policy, sigma: float | None = None) -> float:
    """Median time to observe and decide, and to explore where `sigma` is said, as a share of the median time of the answer itself, one
    request at a time."""
    deciding, answering, random = [], [], np.random.default_rng(0)
    for question in questions:
        begun = time.perf_counter()
        mean = policy.act(predictor.observe(question.history, question.now)[None])
        if sigma is not None:
            explore(mean, sigma, random)
        decided = time.perf_counter()
        predictor.recommend([question.history], 10, now=question.now, context=[question.context])
        deciding.append(decided - begun)
        answering.append(time.perf_counter() - decided)
    return float(np.median(deciding) / np.median(answering))


def questions_of(settings: Settings, dataset: Dataset, predictor: Predictor) -> tuple[list[Question], bool]:
    """The test users with a history and a target that the predictor knows, in its indices, and whether only new items count
    (`evaluate.primary_setting`)."""
    translation, new_only = predictor.translation(dataset), settings.evaluate.primary_setting == "new_only"
    asked = (question for batch in test_questions(settings, dataset).batches(BATCH) for question in batch)
    found = (_translated(question, translation, new_only=new_only) for question in asked)
    return [question for question in found if len(question.target) and (question.history.item_index > 0).any()], new_only


def _translated(question: Question, translation: Translation, *, new_only: bool) -> Question:
    """The question in the bundle's indices; of its targets those that the bundle knows."""
    known = translation.to_bundle[wanted(question, new_only=new_only)]
    history, context = translation.history(question.history), translation.context(question.context)
    return replace(question, history=history, target=np.unique(known[known > 0]), context=context)
