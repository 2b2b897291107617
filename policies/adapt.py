"""The next policy from the rewards of logged decisions that explored: MARWIL (RLlib), starting from the live
policy; or PPO, with doubly robust estimates as rewards.

A single click is noisy. MARWIL therefore learns from a reward model's prediction for each logged action. The
model is gradient boosting, cross-fitted, so it was fitted on other users. Rounds that contradict the newest
one are left out, since user behaviour has changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import torch
from sklearn.ensemble import HistGradientBoostingRegressor

from policies import gate
from policies.held_out import HoldoutRewards
from policies.learner import Ppo, initialize_state, learn, load_state, make_module_config, to_policy_weights
from policies.logs import ExclusionCounts, LoggedDecisions, filter_usable, require_usable
from policies.rewards import DoublyRobustRewards
from policies.tune import TIMED_QUERIES, measure_decision_share, to_criteria
from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset, hash_to_unit_interval, is_holdout
from recray.errors import RefusedError
from recray.evaluation.criteria import Check
from recray.evaluation.protocol import EvaluationQuery
from recray.inference import Predictor, Rules
from recray.inference.policy import OBSERVED, ObservationNormalizer, Policy, PolicyAbout

FOLDS = 3
MIN_ROUND_DECISIONS = 500  # decisions to learn from; a smaller round cannot contradict older ones
STANDARD_ERRORS = 2.0  # of the difference that is a change
EVALUATION_SHARE = 1 / 3  # of the users
MIN_USERS = 50
INTEGER_ID = re.compile(r"-?\d{1,18}")
MAX_LISTED_USERS = 300  # evaluation users for whom lists are made
MODULE = "default_policy"


@dataclass(frozen=True)
class Marwil:
    """Hyperparameters of MARWIL; `beta` as in Wang et al. 2018, the others by RLlib's names.

    sigma : initial standard deviation of the distribution whose mean is learned
    """

    beta: float = 20.0
    epochs: int = 30
    minibatch: int = 512
    lr: float = 1e-3
    hidden: int = 64
    sigma: float = 0.3


def adapt(
    settings: Settings,
    rounds: list[LoggedDecisions],
    excluded: ExclusionCounts,
    dataset: Dataset,
    bundle: Bundle,
    live: Policy | None,
    policies: set[str],
    level: float,
) -> tuple[Policy, gate.Verdict, ExclusionCounts]:
    """The next policy of a model bundle from rounds of decisions, the verdict of the promotion criteria, and
    the number of excluded decisions by reason.

    A third of the users evaluate: the same users in every round, and nothing is learned from their decisions.
    They evaluate on the decisions of the live policy in the rounds that are learned from.

    Raises RefusedError if the newest round is too small, or if privacy is on and there are no holdout users.

    rounds, excluded : of `policies.logs.read_rounds`
    dataset : with the histories of the evaluation users, for whom lists are made
    policies : run keys of the policies that may have decided, "" for none
    level : probability that a policy without a gain passes
    """
    options = settings.policy
    bound = options.bound if live is None else live.bound
    _require_controls(options.actions, rounds, excluded, live)
    if settings.privacy.enabled:
        is_holdout = _make_holdout_filter(settings, bundle)
        total = sum(map(len, rounds))
        rounds = [log.select(is_holdout(log)) for log in rounds]
        excluded["of users outside the holdout"] = total - sum(map(len, rounds))

    usable, unusable = merge_usable_rounds(rounds, bundle.key, policies)
    log, evaluation_log, outdated = split_recent_rounds(usable, live.about["key"] if live else "")
    excluded = +(excluded + unusable + outdated)
    policy = LEARNERS[options.learner](log, live, settings, bundle.digest)
    policy.about["bound"] = bound

    diversity, latency, listed = _measure_lists(settings, dataset, bundle, policy, evaluation_log)
    verdict = gate.judge(
        evaluation_log,
        policy,
        replace(to_criteria(settings), level=level),
        diversity=diversity,
        latency=latency,
    )
    if listed < MIN_USERS:
        text = (
            f"the dataset has {listed} of the evaluation users, {MIN_USERS} are needed to measure the "
            "diversity and the latency of their lists"
        )
        verdict = replace(verdict, checks=[*verdict.checks, Check("lists", passed=False, text=text)])
    policy.about |= {
        "bundle": bundle.key,
        "promoted": verdict.passed,
        "reason": verdict.reason,
        "set_aside": excluded,
    }
    policy.about |= {"checks": [check.to_record() for check in verdict.checks], "figures": verdict.figures}
    return policy, verdict, excluded


def _require_controls(
    actions: tuple[str, ...], rounds: list[LoggedDecisions], excluded: ExclusionCounts, live: Policy | None
) -> None:
    """Raises RefusedError if the live policy has other controls, or if no decision has these."""
    if live is not None and live.actions != actions:
        raise RefusedError(
            f"the live policy has the controls {', '.join(live.actions)}, policy.actions names "
            f"{', '.join(actions)}",
            "set policy.actions to its controls, or make a policy for the others with recray tune",
        )
    if not rounds:
        reasons = "".join(f"; {count} {reason}" for reason, count in excluded.items())
        raise RefusedError(
            f"no collected decision has the controls {', '.join(actions)}{reasons}",
            "explore: policy.exploration_scale=0.3 policy.exploration_share=0.1",
        )


def merge_usable_rounds(
    rounds: Sequence[LoggedDecisions], bundle: str, policies: set[str]
) -> tuple[list[LoggedDecisions], ExclusionCounts]:
    """The usable decisions, in rounds of which small ones are merged, the newest last; and the number of the
    others by reason. Raises RefusedError if the newest round has too few usable decisions.
    """
    filtered = [filter_usable(log, bundle, policies) for log in rounds]
    parts = group_rounds([int((~_is_evaluation_user(log)).sum()) for log, _ in filtered])
    require_usable(
        rounds[-1] if not len(filtered[-1][0]) else LoggedDecisions.concat(rounds[parts[-1]]),
        bundle,
        policies,
    )
    return [LoggedDecisions.concat([log for log, _ in filtered[part]]) for part in parts], sum(
        (excluded for _, excluded in filtered), ExclusionCounts()
    )


def split_recent_rounds(
    rounds: Sequence[LoggedDecisions], live_key: str
) -> tuple[LoggedDecisions, LoggedDecisions, ExclusionCounts]:
    """The decisions to learn from and those to evaluate on, both of the rounds since user behaviour changed;
    and the number of the others by reason.

    Raises RefusedError if the newest round has too few users for either.

    live_key : run key of the policy on whose decisions the next one is evaluated
    """
    training = [log.select(~_is_evaluation_user(log)) for log in rounds]
    evaluation = [log.select(_is_evaluation_user(log) & (log.policy == live_key)) for log in rounds]
    for log, purpose in ((training[-1], "learn from"), (evaluation[-1], "evaluate on")):
        if _count_users(log) < MIN_USERS:
            raise RefusedError(
                f"{_count_users(log)} users of the newest round to {purpose}, {MIN_USERS} are needed",
                "wait for more decisions, or raise policy.exploration_share",
            )

    sufficient = [index for index, log in enumerate(training) if _count_users(log) >= MIN_USERS]
    recent = sufficient[-count_rounds_since_change([training[index] for index in sufficient]) :]
    excluded = ExclusionCounts()
    for index, log in enumerate(rounds):
        if index not in recent:
            reason = (
                "before user behaviour changed" if index in sufficient else "of a round with too few users"
            )
            excluded[reason] += len(log)
    return (
        LoggedDecisions.concat([training[index] for index in recent]),
        LoggedDecisions.concat([evaluation[index] for index in recent]),
        excluded,
    )


def _count_users(log: LoggedDecisions) -> int:
    return len(set(log.user.tolist()))


def group_rounds(counts: Sequence[int]) -> list[slice]:
    """Groups of rounds, oldest first, with at least `MIN_ROUND_DECISIONS` decisions to learn from, if all
    have as many. The newest group has no more rounds than that needs.
    """
    groups, end, n = [], len(counts), 0
    for index in reversed(range(len(counts))):
        n += counts[index]
        if n >= MIN_ROUND_DECISIONS:
            groups.append(slice(index, end))
            end, n = index, 0
    oldest = slice(0, groups.pop().stop if groups else end)
    return [oldest, *reversed(groups)]


def _is_evaluation_user(log: LoggedDecisions) -> np.ndarray:
    """Which decisions are of evaluation users, bool [n]."""
    return hash_to_unit_interval(pa.array(log.user), "judges") < EVALUATION_SHARE


def _make_holdout_filter(settings: Settings, bundle: Bundle) -> Callable[[LoggedDecisions], np.ndarray]:
    """A function that says which decisions are of holdout users of the bundle. Raises RefusedError if there
    are none.
    """
    split = bundle.settings["split"]
    if not split.get("holdout_users"):
        raise RefusedError(
            "adapt with privacy.enabled needs holdout users: training users are never queried",
            "set split.holdout_users=0.2 and train again",
        )
    return lambda log: is_holdout(pa.array(log.user), split)


def _measure_lists(
    settings: Settings, dataset: Dataset, bundle: Bundle, policy: Policy, evaluation_log: LoggedDecisions
) -> tuple[float | None, float | None, int]:
    """The diversity of the evaluation users' lists under the policy, as a share of the trained model's; a
    decision's share of the response time; and the number of these users. None if the dataset has none of
    them.
    """
    predictor = Predictor.load(bundle.path, dataset=dataset)
    translation = predictor.vocabulary.translation(dataset)
    users = np.random.default_rng(0).permutation(np.unique(evaluation_log.user)).tolist()
    if pa.types.is_integer(dataset.user_type):  # other ids are not in the dataset
        users = [int(user) for user in users if INTEGER_ID.fullmatch(user)]
    stored = (dataset.user_history(user) for user in users[:MAX_LISTED_USERS])
    histories = [translation.history(history) for history in stored if history is not None]
    no_context, no_target = np.zeros(len(predictor.vocabulary.context), np.int64), np.zeros(0, np.int64)
    queries = [
        EvaluationQuery(0, 0, history, no_target, dataset.now_s, no_context)
        for history in histories
        if (history.item_index > 0).any()
    ]
    if not queries:
        return None, None, 0

    filter_seen = settings.score.filter_seen
    rules = Rules.from_settings(settings.score.rules(), dataset, translation.to_bundle, predictor.cold_V)
    rewards = HoldoutRewards(
        predictor,
        queries,
        policy.actions,
        k=settings.evaluate.k[0],
        filter_seen=filter_seen,
        listed_filter_seen=filter_seen,
        rules=rules,
        bound=policy.bound,
    )
    rows = np.arange(len(queries))
    lists, baseline_lists = (
        rewards.recommend(rows, action)
        for action in (policy.act(rewards.observation), np.zeros((len(queries), len(policy.actions))))
    )
    return (
        rewards.relative_diversity(lists, baseline_lists),
        measure_decision_share(predictor, queries[:TIMED_QUERIES], policy),
        len(queries),
    )


def count_rounds_since_change(rounds: Sequence[LoggedDecisions]) -> int:
    """Number of rounds since user behaviour changed: the newest one and those before it whose model predicts
    the newest as well as its own does, back to the first that does not.
    """
    newest, count = rounds[-1], 1
    own_error = (predict_rewards(newest) - newest.reward) ** 2
    for older in reversed(rounds[:-1]):
        worse = (_fit_reward_model(older).predict(_to_features(newest)) - newest.reward) ** 2 - own_error
        if worse.mean() > STANDARD_ERRORS * worse.std() / np.sqrt(len(worse)) + 1e-12:
            break
        count += 1
    return count


def predict_rewards(log: LoggedDecisions, seed: int = 0) -> np.ndarray:
    """Predicted rewards of the logged actions, cross-fitted over users, float64 [n]."""
    codes = log.user_codes
    fold = np.random.default_rng(seed).integers(0, FOLDS, int(codes.max()) + 1)[codes]
    predictions = np.zeros(len(log))
    for number in range(FOLDS):
        predictions[fold == number] = _fit_reward_model(log.select(fold != number)).predict(
            _to_features(log.select(fold == number))
        )
    return predictions


def learn_by_marwil(
    log: LoggedDecisions,
    live: Policy | None,
    actions: tuple[str, ...],
    bundle_digest: str,
    options: Marwil = Marwil(),
    *,
    seed: int = 0,
) -> Policy:
    """The next policy by MARWIL.

    live : policy to start from; None: action 0 for everybody
    """
    normalizer = ObservationNormalizer.of(log.observation)
    normalizer = normalizer if live is None else live.normalizer.widen(normalizer)
    state = normalizer.normalise(log.observation)
    predicted = predict_rewards(log, seed)
    target = ((predicted - predicted.mean()) / max(predicted.std(), 1e-9)).astype(np.float32)

    learner, module = _build_learner(len(actions), options)
    load_state(module, initialize_state(module, options.sigma, live), None)
    random = np.random.default_rng(seed)
    size = min(options.minibatch, len(log))
    for _ in range(options.epochs):
        order = random.permutation(len(log))
        for first in range(0, len(order) - size + 1, size):
            rows = order[first : first + size]
            _update(learner, state[rows], log.action[rows].astype(np.float32), target[rows])
    about: PolicyAbout = {"decisions": len(log), "learner": "marwil", "seed": seed}
    return Policy(actions, normalizer, to_policy_weights(module.state_dict()), bundle_digest, about)


def _learn_by_marwil(
    log: LoggedDecisions, live: Policy | None, settings: Settings, bundle_digest: str
) -> Policy:
    return learn_by_marwil(log, live, settings.policy.actions, bundle_digest)


def learn_by_ppo(log: LoggedDecisions, live: Policy | None, settings: Settings, bundle_digest: str) -> Policy:
    """The next policy by PPO, with doubly robust estimates as rewards. Half of the users fit the reward
    model. Needs a Ray session.
    """
    options = settings.policy
    is_model_user = np.random.default_rng(0).random(int(log.user_codes.max()) + 1)[log.user_codes] < 0.5
    model = _fit_reward_model(log.select(is_model_user))
    rewards = DoublyRobustRewards(
        log.select(~is_model_user),
        options.actions,
        lambda observation, action: model.predict(np.concatenate([observation, action], 1)),
    )
    start = live if live is not None and live.actions == options.actions else None
    return learn(
        rewards,
        Ppo(decisions=options.decisions, penalty=options.penalty),
        bundle_digest,
        seed=settings.split.seed,
        start=start,
    )


LEARNERS = {"marwil": _learn_by_marwil, "ppo": learn_by_ppo}


def _build_learner(K: int, options: Marwil) -> tuple[Any, Any]:
    from ray.rllib.algorithms.marwil import MARWILConfig

    spaces = (
        gymnasium.spaces.Box(-5.0, 5.0, (len(OBSERVED),), np.float32),
        gymnasium.spaces.Box(-1.0, 1.0, (K,), np.float32),
    )
    config = (
        MARWILConfig()  # type: ignore[no-untyped-call]
        .environment(observation_space=spaces[0], action_space=spaces[1])
        .training(beta=options.beta, lr=options.lr, vf_coeff=1.0, grad_clip=1.0)
        .rl_module(model_config=make_module_config(options.hidden))
    )
    learner = config.build_learner(spaces={"__env__": spaces, MODULE: spaces})
    learner.build()
    module = learner.module[MODULE]
    module.get_train_action_dist_cls = make_truncated_normal  # type: ignore[method-assign]
    return learner, module


def make_truncated_normal() -> type:
    """The distribution of the logged actions as a class for RLlib: normal, truncated at -1 and 1, as
    `recray.inference.modulation.explore` draws them.

    With the density of a normal distribution, a mean near an end would drift away from it, since no action
    lies beyond.
    """
    from ray.rllib.core.distribution.torch.torch_distribution import TorchDiagGaussian

    class TruncatedNormal(TorchDiagGaussian):
        def logp(self, value: Any, **_: Any) -> Any:
            mean, scale = self._dist.loc, self._dist.scale
            upper = mean.abs()  # by symmetry; the tails of a mean above 0 keep their digits
            low, high = (torch.special.log_ndtr((upper + end) / scale) for end in (-1.0, 1.0))
            return super().logp(value) - (high + torch.log1p(-torch.exp(low - high))).sum(-1)

    return TruncatedNormal


def _update(learner: Any, state: np.ndarray, action: np.ndarray, target: np.ndarray) -> None:
    """One step on decisions, each an episode; `target` is their value target."""
    from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

    columns = {"obs": state, "actions": action, "value_targets": target}
    batch = SampleBatch({name: torch.from_numpy(value) for name, value in columns.items()})  # type: ignore[no-untyped-call]
    learner.update(batch=MultiAgentBatch({MODULE: batch}, len(state)))


def _fit_reward_model(log: LoggedDecisions) -> HistGradientBoostingRegressor:
    options = {
        "max_iter": 150,
        "max_depth": 4,
        "learning_rate": 0.05,
        "min_samples_leaf": 100,
        "random_state": 0,
    }
    return HistGradientBoostingRegressor(**options).fit(_to_features(log), log.reward)


def _to_features(log: LoggedDecisions) -> np.ndarray:
    return np.concatenate([log.observation, log.action], 1)
