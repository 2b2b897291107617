"""A policy for a model bundle from holdout users: learned on the next interactions of some, evaluated on
those of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from policies import gate
from policies.held_out import HoldoutRewards
from policies.learner import Ppo, learn
from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset, hash_to_unit_interval
from recray.errors import DataError, RefusedError
from recray.evaluation.evaluate import select_test_queries
from recray.evaluation.protocol import EvaluationQuery, targets_of
from recray.inference import Predictor, Rules, Translation
from recray.inference.modulation import explore
from recray.inference.observer import Observer
from recray.inference.policy import Policy

MIN_USERS = 200  # to learn from, and as many to evaluate on
EVALUATION_SHARE = 1 / 3  # of the users
TIMED_QUERIES = 200
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
    """Learn a policy and check it against the promotion criteria. Needs a Ray session.

    Raises DataError for too few users, RefusedError if privacy is on without holdout users of this bundle,
    and SettingsError.

    start : policy of another bundle to start from
    live : live policy of this bundle, which the new one has to improve on; None: there is none
    checkpoint, on_metrics : as in `policies.learner.learn`
    """
    if settings.privacy.enabled and not settings.split.holdout_users:
        raise RefusedError(
            "policy.enabled with privacy.enabled needs holdout users: training users are never queried",
            "set split.holdout_users=0.2",
        )
    if settings.privacy.enabled and bundle.settings["split"] != settings.result_settings("split")["split"]:
        raise RefusedError(
            f"bundle {bundle.key} was trained under another split, with other holdout users",
            "tune with the settings of its training",
        )
    predictor = Predictor.load(bundle.path, dataset=dataset)
    queries, filter_seen = load_queries(settings, dataset, predictor)
    if len(queries) * EVALUATION_SHARE < MIN_USERS:
        raise DataError(
            f"dataset {dataset.key} has {len(queries)} test users, too few for a policy",
            f"at least {round(MIN_USERS / EVALUATION_SHARE)} are needed",
        )
    # the same users in every run, so that `start` was not learned from the users who evaluate it
    is_evaluation_user = (
        hash_to_unit_interval(
            pa.array([str(dataset.shard(query.shard).user_ids[query.row]) for query in queries]), "judges"
        )
        < EVALUATION_SHARE
    )
    options, k = settings.policy, settings.evaluate.k[0]
    rules = Rules.from_settings(
        settings.score.rules(), dataset, predictor.vocabulary.translation(dataset).to_bundle, predictor.cold_V
    )
    evaluation, training = (
        HoldoutRewards(
            predictor,
            [queries[row] for row in rows],
            options.actions,
            metric=options.metric,
            k=k,
            filter_seen=filter_seen,
            listed_filter_seen=settings.score.filter_seen,
            rules=rules,
            bound=options.bound,
        )
        for rows in (np.flatnonzero(is_evaluation_user), np.flatnonzero(~is_evaluation_user))
    )

    ppo = Ppo(decisions=options.decisions, penalty=options.penalty)
    if start is not None and start.bound != options.bound:
        start = None
    policy = learn(
        training,
        ppo,
        bundle.digest,
        seed=settings.split.seed,
        min_diversity=options.diversity,
        start=start,
        checkpoint=checkpoint,
        on_metrics=on_metrics,
    )
    policy.about["bound"] = options.bound
    verdict = judge(settings, evaluation, policy, live)
    policy.about |= {
        "bundle": bundle.key,
        "dataset": dataset.key,
        "as_of_s": dataset.as_of_s,
        "promoted": verdict.passed,
        "reason": verdict.reason,
    }
    policy.about |= {"checks": [check.to_record() for check in verdict.checks], "figures": verdict.figures}
    return policy, verdict


def judge(
    settings: Settings, rewards: HoldoutRewards, policy: Policy, live: Policy | None = None
) -> gate.Verdict:
    """The verdict of the promotion criteria.

    rewards : of users that the policy was not learned from
    live : the policy to improve on; None: the trained model
    """
    rows = np.arange(len(rewards))
    lists, baseline_lists = (
        rewards.recommend(rows, action)
        for action in (policy.act(rewards.observation), np.zeros((len(rewards), len(policy.actions))))
    )
    live_lists = (
        baseline_lists
        if live is None
        else rewards.with_controls(live.actions, live.bound).recommend(rows, live.act(rewards.observation))
    )
    latency = measure_decision_share(rewards.predictor, rewards.queries[:TIMED_QUERIES], policy)
    paid, before = (rewards.score_lists(rows, items) for items in (lists, live_lists))
    return gate.compare(
        rewards.observation,
        paid,
        before,
        to_criteria(settings),
        diversity=rewards.relative_diversity(lists, baseline_lists),
        latency=latency,
    )


def to_criteria(settings: Settings) -> gate.Criteria:
    """The promotion criteria of the settings."""
    options = settings.policy
    return gate.Criteria(
        threshold=options.threshold,
        segment=-options.segment,
        diversity=options.diversity,
        latency=options.latency,
    )


def measure_decision_share(
    predictor: Predictor, queries: list[EvaluationQuery], policy: Policy, sigma: float | None = None
) -> float:
    """Median time to observe and decide, and to explore if `sigma` is set, as a share of the median time of
    the recommendation itself, one request at a time.
    """
    observer = Observer(predictor)
    decision_s, response_s, random = [], [], np.random.default_rng(0)
    for query in queries:
        started = time.perf_counter()
        mean = policy.act(observer.observe(query.history, query.now)[None])
        if sigma is not None:
            explore(mean, sigma, random)
        decided = time.perf_counter()
        predictor.recommend([query.history], 10, now=query.now, context=[query.context])
        decision_s.append(decided - started)
        response_s.append(time.perf_counter() - decided)
    return float(np.median(decision_s) / np.median(response_s))


def load_queries(
    settings: Settings, dataset: Dataset, predictor: Predictor
) -> tuple[list[EvaluationQuery], bool]:
    """The test users with a history and a target in the predictor's vocabulary, in its indices; and whether
    the seen-item filter applies (`evaluate.protocol`).
    """
    translation = predictor.vocabulary.translation(dataset)
    filter_seen = settings.evaluate.protocol == "filter_seen"
    stored = (query for batch in select_test_queries(settings, dataset).batches(BATCH) for query in batch)
    translated = (_translate(query, translation, filter_seen=filter_seen) for query in stored)
    return [
        query for query in translated if len(query.target) and (query.history.item_index > 0).any()
    ], filter_seen


def _translate(query: EvaluationQuery, translation: Translation, *, filter_seen: bool) -> EvaluationQuery:
    """The query in the bundle's indices, with the targets that are in its vocabulary."""
    target = translation.to_bundle[targets_of(query, filter_seen=filter_seen)]
    history, context = translation.history(query.history), translation.context(query.context)
    return replace(query, history=history, target=np.unique(target[target > 0]), context=context)
