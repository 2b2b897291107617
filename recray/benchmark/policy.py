"""Measures the gain of a learned attention policy, on synthetic rewards and on real histories, and the
reliability of its promotion criteria.

Synthetic rewards (`policies.rewards.SyntheticRewards`) have an oracle. The figure of a policy is the share of
the oracle's gain over action 0 that it reaches. In the twin all users are alike and action 0 is best, so
every promotion is false. Real data have only the users' next interactions.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policies import baselines, gate
from policies.held_out import HoldoutRewards
from policies.learner import Ppo, learn
from policies.logs import LoggedDecisions, require_usable
from policies.rewards import SyntheticRewards, draw_clicks
from policies.tune import load_queries, measure_decision_share
from recray import cluster
from recray.benchmark import Result
from recray.benchmark.data import train_model
from recray.dataset.reader import History
from recray.evaluation.metrics import bootstrap_means, interval
from recray.evaluation.protocol import EvaluationQuery
from recray.events.log import Entry
from recray.events.rewards import Rewards as OutcomeRewards
from recray.inference import Predictor
from recray.inference.modulation import explore
from recray.inference.observer import Observer
from recray.inference.policy import OBSERVED, ObservationNormalizer, Policy
from recray.report.plots import plot_gap_closed
from recray.serving.experiment import Experiment, is_in_share
from recray.stages import ProgressLog
from recray.training.plan import bundle_settings

SEEDS = 5
EVALUATION_USERS = 20_000  # fresh users on whom every method is measured
# policies, the decisions that each is learned from, and the logs that each is evaluated on
TWINS, TWIN_DECISIONS, LOGS = (10, 20_000, 20)
LOGGED, SIGMA = 10_000, 0.5  # decisions of a log, and the standard deviation of its exploration
WORSE, SHARE, MAX_CANARY_RESPONSES, WORSE_RUNS = 0.9, 0.2, 5_000, 50
VISITS = 3  # mean visits of a user, where users return
NOISE_SHARES = (0.0, 0.1, 0.3)  # noise events, as shares of a history
ACTIONS = ("temperature", "recency")  # on real data
REAL_DECISIONS, REAL_SIGMA = 40_000, 0.3
# users that a search evaluates an action on; steps of gradient descent, and users of each step
SEARCH_USERS, STEPS, STEP_USERS = (512, 150, 64)
HINDSIGHT = 11  # temperatures of the best in hindsight
BUNDLE = "benchmark"

Act = Callable[[np.ndarray], np.ndarray]


def measure_policy(folder: Path, progress: ProgressLog) -> Result:
    """`planted_oracle_gap_closed` by PPO (mean and minimum of five seeds) and by each baseline;
    `twin_false_promotion_rate`, with those of shuffled rewards and A/A tests; how a policy that is 10 % worse
    is refused and rolled back; seconds for 100,000 decisions.
    """
    torch.set_num_threads(1)
    cluster.start()
    metrics = _measure_synthetic(folder, progress)
    metrics |= _measure_twins(progress)
    metrics |= _measure_worse(progress)
    return metrics


def _measure_synthetic(folder: Path, progress: ProgressLog) -> Result:
    rewards = SyntheticRewards()
    observation, cases = rewards.draw(EVALUATION_USERS, np.random.default_rng(10_000))
    paid: dict[str, list[np.ndarray]] = {}
    seconds, policies = [], []
    for seed in range(SEEDS):
        started = time.monotonic()
        policies.append(learn(rewards, Ppo(), BUNDLE, seed=seed))
        seconds.append(time.monotonic() - started)
        for name, act in {
            "ppo": policies[-1].act,
            **_fit_baselines(rewards, policies[-1].normalizer, seed),
        }.items():
            paid.setdefault(name, []).append(rewards.pay(cases, act(observation)))
        progress(
            f"seed {seed}: {policies[-1].about['decisions']:,} decisions in {seconds[-1]:.0f} s, "
            f"{paid['ppo'][-1].mean():.4f} a request"
        )

    none = rewards.pay(cases, np.zeros((EVALUATION_USERS, 1)))
    oracle = rewards.pay(cases, rewards.best(observation))
    oracle_gain = oracle.mean() - none.mean()
    closed = {
        name: [float((values.mean() - none.mean()) / oracle_gain) for values in by_seed]
        for name, by_seed in paid.items()
    }
    ppo = np.mean(paid["ppo"], 0)
    metrics: Result = {
        "planted_oracle_gap_closed": round(float(np.mean(closed["ppo"])), 4),
        "planted_oracle_gap_closed_least": round(min(closed["ppo"]), 4),
        "gap_closed": {name: [round(value, 4) for value in values] for name, values in closed.items()},
        "reward_of_nothing": round(float(none.mean()), 4),
        "reward_of_oracle": round(float(oracle.mean()), 4),
        "ppo_over": _compare_paired(
            ppo, {name: np.mean(by_seed, 0) for name, by_seed in paid.items() if name != "ppo"}
        ),
        "learning_s_for_100000": [round(elapsed_s, 1) for elapsed_s in seconds],
    }

    keep = folder / "keep"
    keep.mkdir(exist_ok=True)
    sample = observation[np.argsort(observation[:1500, 0])]
    (keep / "svg").write_text(
        plot_gap_closed(
            metrics["gap_closed"], sample[:, 0], rewards.best(sample)[:, 0], policies[0].act(sample)[:, 0]
        )
    )
    progress(
        f"{metrics['planted_oracle_gap_closed']:.1%} of the oracle's gain; "
        + ", ".join(f"{name} {np.mean(shares):.1%}" for name, shares in closed.items())
    )
    return metrics


def _fit_baselines(rewards: SyntheticRewards, normalizer: ObservationNormalizer, seed: int) -> dict[str, Act]:
    decisions = Ppo().decisions
    return {
        "best global action": baselines.search_constant(rewards, 4096, seed=seed),
        "global, by gradient": baselines.fit_by_gradient(rewards, normalizer, seed=seed),
        "closed form in length": baselines.fit_by_length(rewards, 4096, seed=seed),
        "LinUCB": baselines.fit_bandit(rewards, normalizer, decisions, thompson=False, seed=seed),
        "Thompson sampling": baselines.fit_bandit(rewards, normalizer, decisions, thompson=True, seed=seed),
        "hyper-network, by the true gradient": baselines.fit_by_gradient(
            rewards, normalizer, hidden=64, seed=seed
        ),
    }


def _compare_paired(
    values: np.ndarray, references: dict[str, np.ndarray], comparisons: int | None = None
) -> dict[str, dict[str, float]]:
    """Differences to each reference, paired by user, with simultaneous 95 % intervals.

    comparisons : number of intervals that hold together (Bonferroni); None: one for each reference
    """
    means = bootstrap_means(np.stack([values - reference for reference in references.values()], 1), 1000, 0)
    differences = {}
    for column, name in enumerate(references):
        low, high = interval(means[:, column], 1 - 0.05 / (comparisons or len(references)))
        differences[name] = {
            "difference": round(float((values - references[name]).mean()), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return differences


def _measure_twins(progress: ProgressLog) -> Result:
    """How often policies without a gain pass the promotion criteria; the logs of each policy have users of
    their own.
    """
    twin, promoted = (
        replace(SyntheticRewards(), twin=True),
        {"twin": 0, "twin_asked_both": 0, "shuffled": 0, "a_a": 0},
    )
    runs = TWINS * LOGS
    for number in range(TWINS):
        policy = learn(twin, replace(Ppo(), decisions=TWIN_DECISIONS), BUNDLE, seed=100 + number)
        other = learn(SyntheticRewards(), replace(Ppo(), decisions=TWIN_DECISIONS), BUNDLE, seed=200 + number)
        for repeat in range(LOGS):
            random = np.random.default_rng([300, number, repeat])
            promoted["twin"] += gate.judge(_draw_log(twin, LOGGED, SIGMA, random), policy).passed
            promoted["twin_asked_both"] += _judge_on_same_users(twin, policy, random).passed
            real = _draw_log(SyntheticRewards(), LOGGED, SIGMA, random)
            promoted["shuffled"] += gate.judge(
                replace(real, reward=random.permutation(real.reward)), other
            ).passed
            promoted["a_a"] += gate.judge(
                _add_control(_draw_log(SyntheticRewards(), LOGGED, SIGMA, random, other.act), random),
                _TwoControlPolicy(other),
            ).passed
        progress(f"{number + 1} policies, {(number + 1) * LOGS} logs of each kind; promoted: {promoted}")
    return {f"{name}_false_promotion_rate": round(count / runs, 4) for name, count in promoted.items()} | {
        "false_promotion_runs": runs
    }


def _draw_log(
    rewards: SyntheticRewards, n: int, sigma: float, random: np.random.Generator, act: Act | None = None
) -> LoggedDecisions:
    """A log with one decision of each user, explored around action 0 or around the actions of a policy."""
    observation, cases = rewards.draw(n, random)
    mean = np.zeros((n, len(rewards.actions)), np.float32) if act is None else act(observation)
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
        np.full(n, BUNDLE),
        np.full(n, ""),
    )


def _judge_on_same_users(
    rewards: SyntheticRewards, policy: Policy, random: np.random.Generator
) -> gate.Verdict:
    """The verdict of `recray tune`, which evaluates both on the same users."""
    observation, cases = rewards.draw(LOGGED, random)
    paid, none = (
        draw_clicks(rewards.pay(cases, action), random)
        for action in (policy.act(observation), np.zeros((LOGGED, len(rewards.actions))))
    )
    return gate.compare(observation, paid, none)


def _add_control(log: LoggedDecisions, random: np.random.Generator) -> LoggedDecisions:
    """The log with a second control, explored around 0, which has no effect."""
    mean = np.zeros((len(log), 1), np.float32)
    action, density = explore(mean, SIGMA, random)
    both = (np.concatenate(pair, 1) for pair in ((log.mean, mean), (log.action, action)))
    return replace(
        log, **dict(zip(("mean", "action"), both, strict=True)), log_density=log.log_density + density
    )


class _TwoControlPolicy:
    """A policy with a second control that has no effect: an A/A test whose weights are not 1."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.normalizer = policy, policy.normalizer

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [self.policy.act(observation), 0.6 * np.tanh(observation[:, 1:2] - 3)], 1
        ).astype(np.float32)


class _ConstantPolicy:
    """A policy that plays one action."""

    def __init__(self, action: float, normalizer: ObservationNormalizer) -> None:
        self.action, self.normalizer = action, normalizer

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.full((len(observation), 1), self.action, np.float32)


def _measure_worse(progress: ProgressLog) -> Result:
    """A policy that earns a tenth less: how often the promotion criteria refuse it, and its experiment rolls
    it back.
    """
    rewards = SyntheticRewards()
    random = np.random.default_rng(400)
    observation, cases = rewards.draw(EVALUATION_USERS, random)
    losses = {
        a: float(rewards.pay(cases, np.full((EVALUATION_USERS, 1), a)).mean()) for a in np.linspace(0, 1, 101)
    }
    action = min(losses, key=lambda a: abs(losses[a] - WORSE * losses[0.0]))
    policy = _ConstantPolicy(action, ObservationNormalizer.of(observation))
    verdicts = [gate.judge(_draw_log(rewards, LOGGED, SIGMA, random), policy) for _ in range(WORSE_RUNS)]
    single, repeated = (
        [
            _run_canary(rewards, policy.act, np.random.default_rng([500, seed]), visits)
            for seed in range(WORSE_RUNS)
        ]
        for visits in (1, VISITS)
    )
    ended = [requests for requests in single if requests is not None]
    metrics = {
        "worse_runs": WORSE_RUNS,
        "worse_reward": round(losses[action] / losses[0.0], 4),
        "worse_refused": sum(not verdict.passed for verdict in verdicts) / len(verdicts),
        "worse_returned_within": max(ended) if len(ended) == len(single) else None,
        "worse_returned": len(ended) / len(single),
        "worse_returned_where_users_come_back": sum(requests is not None for requests in repeated)
        / len(repeated),
    }
    progress(
        f"a policy with {metrics['worse_reward']:.1%} of the reward: refused {metrics['worse_refused']:.0%}, "
        f"rolled back within {metrics['worse_returned_within']} requests, "
        f"{metrics['worse_returned_where_users_come_back']:.0%} where users have {VISITS} visits on average"
    )
    return metrics


def _run_canary(
    rewards: SyntheticRewards, act: Act, random: np.random.Generator, visits: float
) -> int | None:
    """Responses of a challenger until its experiment ended; None if it went on.

    visits : mean visits of a user
    """
    experiment = Experiment("worse", SHARE, shadow=False, rewards=OutcomeRewards({"click": 1.0}, 1.0))
    challenger_responses = number = 0
    while challenger_responses < MAX_CANARY_RESPONSES:
        observation, cases = rewards.draw(500, random)
        better, worse = rewards.pay(cases, np.zeros((500, 1))), rewards.pay(cases, act(observation))
        for row in range(500):
            user = f"{random.integers(1 << 40)}"
            is_challenger = is_in_share(user, "worse", SHARE)
            body = {
                "trial": "worse",
                "share": SHARE,
                "arm": "challenger" if is_challenger else "champion",
                "items": (),
                "degraded": (),
            }
            for _ in range(random.geometric(1 / visits)):
                number += 1
                challenger_responses += is_challenger
                experiment.add_entry(Entry("decision", str(number), user, 0.0, body))
                if random.random() < (worse if is_challenger else better)[row]:
                    clicked = {"request_id": str(number), "outcome": "click", "value": 1.0}
                    experiment.add_entry(Entry("outcome", f"o{number}", None, 0.0, clicked))
        if experiment.find_reason_to_end():
            return challenger_responses
    return None


def measure_real(
    folder: Path, data: str, overrides: list[str], progress: ProgressLog
) -> tuple[Mapping[str, Any], Result]:
    """On the histories of a data set, clean and with noise events: NDCG of half of the test users under each
    method, learned on the others.

    Methods with random seeds are learned five times and averaged by user. `promoted`: how many of the five
    policies pass on the same users, as in `recray tune`; `promoted_by_log`: on a log that explored, as in
    `recray adapt`. `hindsight`: the best of eleven temperatures for each user.
    """
    settings, dataset, predictor, epochs = train_model(data, folder, overrides, progress)
    cluster.start()
    queries, filter_seen = load_queries(settings, dataset, predictor)
    np.random.default_rng(0).shuffle(queries)
    metrics: Result = {"epochs": epochs, "actions": ACTIONS, **_measure_decisions(predictor, queries)}
    progress(
        f"a decision takes {metrics['deciding_share']:.1%} of a response's time, with exploration "
        f"{metrics['exploring_share']:.1%}"
    )
    for share in NOISE_SHARES:
        random = np.random.default_rng(1)
        noisy = [_add_noise(query, share, predictor.n_items, random) for query in queries]
        half = len(noisy) // 2
        training, evaluation = (
            HoldoutRewards(predictor, part, ACTIONS, filter_seen=filter_seen, listed_filter_seen=filter_seen)
            for part in (noisy[:half], noisy[half:])
        )
        figures = _measure_on_histories(training, evaluation, min(settings.policy.decisions, REAL_DECISIONS))
        metrics[f"noise {share:.0%}"] = figures
        progress(
            f"{share:.0%} noise: NDCG {figures['ndcg']}, gain {figures['over_nothing']}, "
            f"{figures['promoted']} of {SEEDS} promoted {figures['reasons']}, "
            f"{figures['promoted_by_log']} by a log"
        )
    return bundle_settings(settings), metrics


def _measure_on_histories(training: HoldoutRewards, evaluation: HoldoutRewards, decisions: int) -> Result:
    """Figures of policies and baselines that are learned on `training`."""
    policies = [
        learn(training, replace(Ppo(), decisions=decisions), BUNDLE, seed=seed) for seed in range(SEEDS)
    ]
    methods: dict[str, list[Act]] = {
        "ppo": [policy.act for policy in policies],
        **_fit_real_baselines(training, policies[0].normalizer, decisions),
    }
    rows = np.arange(len(evaluation))
    none = evaluation.pay(rows, np.zeros((len(evaluation), len(ACTIONS))))
    by_seed = {
        name: [evaluation.pay(rows, act(evaluation.observation)) for act in acts]
        for name, acts in methods.items()
    }
    paid = {name: np.mean(values, 0) for name, values in by_seed.items()}
    by_temperature = [
        evaluation.pay(rows, np.repeat([[temperature, 0.0]], len(evaluation), 0))
        for temperature in np.linspace(-1, 1, HINDSIGHT)
    ]

    random = np.random.default_rng(2)
    action, density = explore(np.zeros((len(evaluation), len(ACTIONS)), np.float32), REAL_SIGMA, random)
    log = LoggedDecisions(
        evaluation.observation,
        np.zeros_like(action),
        action,
        density,
        np.full(len(evaluation), REAL_SIGMA),
        evaluation.pay(rows, action),
        rows,
        np.full(len(evaluation), BUNDLE),
        np.full(len(evaluation), ""),
    )
    usable = require_usable(log, BUNDLE, {""})[0]
    baseline_lists = evaluation.recommend(rows, np.zeros((len(evaluation), len(ACTIONS))))
    diversities = [
        evaluation.relative_diversity(
            evaluation.recommend(rows, policy.act(evaluation.observation)), baseline_lists
        )
        for policy in policies
    ]
    on_same_users = [
        gate.compare(evaluation.observation, values, none, diversity=share)
        for values, share in zip(by_seed["ppo"], diversities, strict=True)
    ]
    by_log = [
        gate.judge(usable, policy, diversity=share)
        for policy, share in zip(policies, diversities, strict=True)
    ]
    zero = np.zeros(len(evaluation))
    return {
        "users": len(evaluation),
        "decisions": decisions,
        "ndcg": {
            "nothing": round(float(none.mean()), 4),
            **{name: round(float(values.mean()), 4) for name, values in paid.items()},
        },
        "ndcg_by_seed": {
            name: [round(float(values.mean()), 4) for values in by_seed[name]] for name in by_seed
        },
        # simultaneous 95 % intervals over users, for what these seeds learned
        "over_nothing": {
            name: _compare_paired(values - none, {"": zero}, comparisons=len(paid))[""]
            for name, values in paid.items()
        },
        "ppo_over": _compare_paired(
            paid["ppo"], {name: values for name, values in paid.items() if name != "ppo"}
        ),
        "hindsight": round(float(np.max(by_temperature, 0).mean()), 4),
        "mean_action": [round(float(value), 3) for value in policies[0].act(evaluation.observation).mean(0)],
        "promoted": sum(verdict.passed for verdict in on_same_users),
        "reasons": sorted({verdict.reason for verdict in on_same_users if not verdict.passed}),
        "promoted_by_log": sum(verdict.passed for verdict in by_log),
        "reasons_by_log": sorted({verdict.reason for verdict in by_log if not verdict.passed}),
    }


def _fit_real_baselines(
    training: HoldoutRewards, normalizer: ObservationNormalizer, decisions: int
) -> dict[str, list[Act]]:
    users, table, seeds = min(len(training), SEARCH_USERS), baselines.TabulatedRewards(training), range(SEEDS)
    fit = partial(baselines.fit_by_gradient, training, normalizer, steps=STEPS, at_once=STEP_USERS)
    return {
        "best global action": [baselines.search_constant(training, users)],
        "global, by gradient": [fit(seed=seed) for seed in seeds],
        "closed form in length": [baselines.fit_by_length(training, users)],
        "LinUCB": [
            baselines.fit_bandit(table, normalizer, decisions, thompson=False, seed=seed) for seed in seeds
        ],
        "Thompson sampling": [
            baselines.fit_bandit(table, normalizer, decisions, thompson=True, seed=seed) for seed in seeds
        ],
        "hyper-network, by gradient": [fit(hidden=64, seed=seed) for seed in seeds],
    }


def _add_noise(
    query: EvaluationQuery, share: float, n_items: int, random: np.random.Generator
) -> EvaluationQuery:
    """The query with events of random items inserted into its history, so that they are this share of it."""
    history = query.history
    n = len(history.item_index)
    extra = round(n * share / (1 - share))
    if not extra or not n:
        return query
    position = np.sort(random.integers(0, n, extra))
    event, time_s = np.asarray(history.event_index)[position], np.asarray(history.timestamp_s)[position]
    noise = History(random.integers(1, n_items + 1, extra), event, time_s, np.ones(extra, np.float32))
    return replace(
        query,
        history=History(
            *(
                np.insert(np.asarray(column), position, inserted)
                for column, inserted in zip(history, noise, strict=True)
            )
        ),
    )


def _measure_decisions(predictor: Predictor, queries: Sequence[EvaluationQuery]) -> dict[str, float]:
    """The time of a decision by a network of the default size, as a share of a response's, on one thread."""
    torch.set_num_threads(1)
    sizes = [len(OBSERVED), Ppo().hidden, Ppo().hidden, len(ACTIONS)]
    weights = {f"weight_{n}": torch.zeros(b, a) for n, (a, b) in enumerate(itertools.pairwise(sizes))}
    weights |= {f"bias_{n}": torch.zeros(b) for n, b in enumerate(sizes[1:])}
    observer = Observer(predictor)
    observation = np.stack([observer.observe(query.history, query.now) for query in queries[:300]])
    policy = Policy(ACTIONS, ObservationNormalizer.of(observation), weights, BUNDLE, {})
    shares = {
        name: round(measure_decision_share(predictor, list(queries[:300]), policy, sigma), 4)
        for name, sigma in (("deciding_share", None), ("exploring_share", REAL_SIGMA))
    }
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return shares
