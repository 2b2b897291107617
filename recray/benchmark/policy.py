"""What a learned attention policy is worth, where the truth is known and on real histories, and whether the gate can tell.

Planted worlds (`policies.rewards.Planted`) have an oracle: the share of its lead over action 0 that a policy reaches is its figure. In
the twin nobody differs and action 0 is best, so every promotion is false. On real data nothing is known but what users did next.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policies import baselines, gate
from policies.held_out import HeldOut
from policies.learner import Ppo, learn
from policies.logs import Logged, checked
from policies.rewards import Planted, clicks
from policies.tune import deciding_share, questions_of
from recray import cluster
from recray.benchmark.data import trained
from recray.dataset.reader import History
from recray.evaluation.metrics import bootstrap_means, interval
from recray.evaluation.plots import gap_closed
from recray.evaluation.protocol import Question
from recray.inference import Predictor
from recray.inference.modulation import explore
from recray.inference.policy import OBSERVED, Frozen, Policy
from recray.serving.experiment import Experiment, is_in_share
from recray.stages import Say
from recray.state.log import Entry
from recray.state.rewards import Rewards
from recray.training.trainer import bundle_settings

SEEDS = 5
JUDGED = 20_000  # fresh users that every way is measured on
TWINS, TWIN_DECISIONS, LOGS = 10, 20_000, 20  # policies, what each is learned from, and logs that each is judged on
LOGGED, SIGMA = 10_000, 0.5  # decisions of a log, and how it explored
WORSE, SHARE, MOST_CANARY, WORSE_RUNS = 0.9, 0.2, 5_000, 50
VISITS = 3  # of a user on the average, where users come back
POLLUTED = (0.0, 0.1, 0.3)  # noise events, as shares of a history
ACTIONS = ("temperature", "recency")  # on real data
REAL_DECISIONS, REAL_SIGMA = 40_000, 0.3
SEARCHED, STEPS, STEPPED = 512, 150, 64  # users that a search tries an action on; steps of a gradient, and users of each
HINDSIGHT = 11  # settings of the best in hindsight
BUNDLE = "benchmark"

Act = Callable[[np.ndarray], np.ndarray]


def measure_policy(folder: Path, say: Say) -> dict[str, Any]:
    """`planted_oracle_gap_closed` by PPO (mean and least of five seeds) and by each baseline; `twin_false_promotion_rate`, with that of
    shuffled rewards and of A/A tests; what becomes of a policy that is 10 % worse; seconds for 100,000 decisions."""
    torch.set_num_threads(1)
    cluster.start()
    metrics = _planted(folder, say)
    metrics |= _twins(say)
    metrics |= _worse(say)
    return metrics


def _planted(folder: Path, say: Say) -> dict[str, Any]:
    world = Planted()
    observation, cases = world.draw(JUDGED, np.random.default_rng(10_000))
    paid: dict[str, list[np.ndarray]] = {}
    seconds, policies = [], []
    for seed in range(SEEDS):
        begun = time.monotonic()
        policies.append(learn(world, Ppo(), BUNDLE, seed=seed))
        seconds.append(time.monotonic() - begun)
        for name, act in {"ppo": policies[-1].act, **_baselines(world, policies[-1].frozen, seed)}.items():
            paid.setdefault(name, []).append(world.pay(cases, act(observation)))
        say(f"seed {seed}: {policies[-1].about['decisions']:,} decisions in {seconds[-1]:.0f} s, {paid['ppo'][-1].mean():.4f} a request")
    none = world.pay(cases, np.zeros((JUDGED, 1)))
    oracle = world.pay(cases, world.best(observation))
    lead = oracle.mean() - none.mean()
    closed = {name: [float((values.mean() - none.mean()) / lead) for values in found] for name, found in paid.items()}
    mine = np.mean(paid["ppo"], 0)
    metrics: dict[str, Any] = {
        "planted_oracle_gap_closed": round(float(np.mean(closed["ppo"])), 4),
        "planted_oracle_gap_closed_least": round(min(closed["ppo"]), 4),
        "gap_closed": {name: [round(value, 4) for value in values] for name, values in closed.items()},
        "reward_of_nothing": round(float(none.mean()), 4),
        "reward_of_oracle": round(float(oracle.mean()), 4),
        "ppo_over": _over(mine, {name: np.mean(found, 0) for name, found in paid.items() if name != "ppo"}),
        "learning_s_for_100000": [round(took, 1) for took in seconds],
    }
    keep = folder / "keep"
    keep.mkdir(exist_ok=True)
    shown = np.argsort(observation[:1500, 0])
    chosen = observation[shown]
    (keep / "svg").write_text(gap_closed(metrics["gap_closed"], chosen[:, 0], world.best(chosen)[:, 0], policies[0].act(chosen)[:, 0]))
    say(f"of the oracle's lead {metrics['planted_oracle_gap_closed']:.1%}; " + ", ".join(f"{n} {np.mean(v):.1%}" for n, v in closed.items()))
    return metrics


def _baselines(world: Planted, frozen: Frozen, seed: int) -> dict[str, Act]:
    decisions = Ppo().decisions
    return {
        "best global action": baselines.best_global(world, 4096, seed=seed),
        "global, by gradient": baselines.by_gradient(world, frozen, seed=seed),
        "closed form in length": baselines.by_length(world, 4096, seed=seed),
        "LinUCB": baselines.bandit(world, frozen, decisions, thompson=False, seed=seed),
        "Thompson sampling": baselines.bandit(world, frozen, decisions, thompson=True, seed=seed),
        "hyper-network, by the true gradient": baselines.by_gradient(world, frozen, hidden=64, seed=seed),
    }


def _over(mine: np.ndarray, others: dict[str, np.ndarray], ways: int | None = None) -> dict[str, dict[str, float]]:
    """Differences to each other way, paired by user, with intervals that hold together with 95 %, those of all `ways` (Bonferroni)."""
    means = bootstrap_means(np.stack([mine - found for found in others.values()], 1), 1000, 0)
    found = {}
    for place, name in enumerate(others):
        low, high = interval(means[:, place], 1 - 0.05 / (ways or len(others)))
        found[name] = {"difference": round(float((mine - others[name]).mean()), 4), "low": round(low, 4), "high": round(high, 4)}
    return found


def _twins(say: Say) -> dict[str, Any]:
    """How often the gate promotes where nothing is to be gained: each policy on logs of users of their own."""
    twin, promoted = replace(Planted(), twin=True), {"twin": 0, "twin_asked_both": 0, "shuffled": 0, "a_a": 0}
    runs = TWINS * LOGS
    for number in range(TWINS):
        policy = learn(twin, replace(Ppo(), decisions=TWIN_DECISIONS), BUNDLE, seed=100 + number)
        other = learn(Planted(), replace(Ppo(), decisions=TWIN_DECISIONS), BUNDLE, seed=200 + number)
        for repeat in range(LOGS):
            random = np.random.default_rng([300, number, repeat])
            promoted["twin"] += gate.judge(_logged(twin, LOGGED, SIGMA, random), policy).passed
            promoted["twin_asked_both"] += _asked_both(twin, policy, random).passed
            real = _logged(Planted(), LOGGED, SIGMA, random)
            promoted["shuffled"] += gate.judge(replace(real, reward=random.permutation(real.reward)), other).passed
            promoted["a_a"] += gate.judge(_beside(_logged(Planted(), LOGGED, SIGMA, random, other.act), random), _Beside(other)).passed
        say(f"{number + 1} policies, {(number + 1) * LOGS} logs of each kind: {promoted} promoted")
    return {f"{name}_false_promotion_rate": round(count / runs, 4) for name, count in promoted.items()} | {"false_promotion_runs": runs}


def _logged(rewards: Planted, n: int, sigma: float, random: np.random.Generator, act: Act | None = None) -> Logged:
    """A log of users who each came once, explored around action 0, or around what a policy does."""
    observation, cases = rewards.draw(n, random)
    mean = np.zeros((n, len(rewards.actions)), np.float32) if act is None else act(observation)
    action, density = explore(mean, sigma, random)
    reward = clicks(rewards.pay(cases, action), random)
    return Logged(observation, mean, action, density, np.full(n, sigma), reward, np.arange(n), np.full(n, BUNDLE), np.full(n, ""))


def _asked_both(rewards: Planted, policy: Policy, random: np.random.Generator) -> gate.Verdict:
    """The verdict of `recray tune`, which asks both of the same users."""
    observation, cases = rewards.draw(LOGGED, random)
    mine, none = (clicks(rewards.pay(cases, action), random) for action in (policy.act(observation), np.zeros((LOGGED, len(rewards.actions)))))
    return gate.compare(observation, mine, none)


def _beside(log: Logged, random: np.random.Generator) -> Logged:
    """The log of a policy that turned a second control around 0, which nobody felt."""
    mean = np.zeros((len(log), 1), np.float32)
    action, density = explore(mean, SIGMA, random)
    both = (np.concatenate(pair, 1) for pair in ((log.mean, mean), (log.action, action)))
    return replace(log, **dict(zip(("mean", "action"), both, strict=True)), log_density=log.log_density + density)


class _Beside:
    """A policy that turns a second control, which nobody feels: an A/A test whose weights are not 1."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.frozen = policy, policy.frozen

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([self.policy.act(observation), 0.6 * np.tanh(observation[:, 1:2] - 3)], 1).astype(np.float32)


class _Constant:
    """A policy that plays one action; for the gate."""

    def __init__(self, action: float, frozen: Frozen) -> None:
        self.action, self.frozen = action, frozen

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.full((len(observation), 1), self.action, np.float32)


def _worse(say: Say) -> dict[str, Any]:
    """A policy that earns a tenth less: refused by the gate, and sent home by its trial when it is forced upon users."""
    world = Planted()
    random = np.random.default_rng(400)
    observation, cases = world.draw(JUDGED, random)
    losses = {a: float(world.pay(cases, np.full((JUDGED, 1), a)).mean()) for a in np.linspace(0, 1, 101)}
    action = min(losses, key=lambda a: abs(losses[a] - WORSE * losses[0.0]))
    bad = _Constant(action, Frozen.of(observation))
    verdicts = [gate.judge(_logged(world, LOGGED, SIGMA, random), bad) for _ in range(WORSE_RUNS)]
    asked, again = ([_canary(world, bad.act, np.random.default_rng([500, seed]), visits) for seed in range(WORSE_RUNS)] for visits in (1, VISITS))
    ended = [requests for requests in asked if requests is not None]
    metrics = {
        "worse_runs": WORSE_RUNS,
        "worse_reward": round(losses[action] / losses[0.0], 4),
        "worse_refused": sum(not verdict.passed for verdict in verdicts) / len(verdicts),
        "worse_returned_within": max(ended) if len(ended) == len(asked) else None,
        "worse_returned": len(ended) / len(asked),
        "worse_returned_where_users_come_back": sum(requests is not None for requests in again) / len(again),
    }
    told = f"refused {metrics['worse_refused']:.0%}, returned within {metrics['worse_returned_within']} requests"
    told += f", {metrics['worse_returned_where_users_come_back']:.0%} where users come {VISITS} times on the average"
    say(f"a policy of {metrics['worse_reward']:.1%}: {told}")
    return metrics


def _canary(world: Planted, act: Act, random: np.random.Generator, visits: float) -> int | None:
    """Requests that a challenger answered until its trial ended, of users who come so many times on the average; None if it went on."""
    experiment, mine, number = Experiment("worse", SHARE, shadow=False, rewards=Rewards({"click": 1.0}, 1.0)), 0, 0
    while mine < MOST_CANARY:
        observation, cases = world.draw(500, random)
        better, worse = world.pay(cases, np.zeros((500, 1))), world.pay(cases, act(observation))
        for row in range(500):
            user = f"{random.integers(1 << 40)}"
            theirs = is_in_share(user, "worse", SHARE)
            body = {"trial": "worse", "share": SHARE, "arm": "challenger" if theirs else "champion", "items": (), "degraded": ()}
            for _ in range(random.geometric(1 / visits)):
                number += 1
                mine += theirs
                experiment.read(Entry("decision", str(number), user, 0.0, body))
                if random.random() < (worse if theirs else better)[row]:
                    clicked = {"request_id": str(number), "outcome": "click", "value": 1.0}
                    experiment.read(Entry("outcome", f"o{number}", None, 0.0, clicked))
        if experiment.reason_to_end():
            return mine
    return None


def measure_real(folder: Path, data: str, overrides: list[str], say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """On the histories of a data set, clean and with noise events: NDCG of half of the test users under each way, learned on the others.

    What is learned with chance is learned five times, and counts by each user's mean. `promoted`: how many of the five policies the gate
    lets pass that asks both of those users, as for `recray tune`; `promoted_by_log`: by a log of theirs that explored, as for `recray adapt`.
    `hindsight`: the best of eleven temperatures for each user.
    """
    settings, dataset, predictor, epochs = trained(data, folder, overrides, say)
    cluster.start()
    questions, new_only = questions_of(settings, dataset, predictor)
    np.random.default_rng(0).shuffle(questions)
    metrics: dict[str, Any] = {"epochs": epochs, "actions": ACTIONS, **_deciding(predictor, questions)}
    say(f"deciding takes {metrics['deciding_share']:.1%} of an answer's time, with exploring {metrics['exploring_share']:.1%}")
    for share in POLLUTED:
        random = np.random.default_rng(1)
        asked = [_polluted(question, share, predictor.n_items, random) for question in questions]
        half = len(asked) // 2
        learned, judged = (HeldOut(predictor, some, ACTIONS, new_only=new_only, listed_new_only=new_only) for some in (asked[:half], asked[half:]))
        found = _on_histories(learned, judged, min(settings.policy.decisions, REAL_DECISIONS))
        metrics[f"noise {share:.0%}"] = found
        passed = f"{found['promoted']} of {SEEDS} promoted {found['reasons']}, {found['promoted_by_log']} by a log"
        say(f"{share:.0%} noise: NDCG {found['ndcg']}, over nothing {found['over_nothing']}, {passed}")
    return bundle_settings(settings), metrics


def _on_histories(learned: HeldOut, judged: HeldOut, decisions: int) -> dict[str, Any]:
    policies = [learn(learned, replace(Ppo(), decisions=decisions), BUNDLE, seed=seed) for seed in range(SEEDS)]
    ways: dict[str, list[Act]] = {"ppo": [policy.act for policy in policies], **_real_baselines(learned, policies[0].frozen, decisions)}
    places = np.arange(len(judged))
    none = judged.pay(places, np.zeros((len(judged), len(ACTIONS))))
    by_seed = {name: [judged.pay(places, act(judged.observation)) for act in acts] for name, acts in ways.items()}
    paid = {name: np.mean(found, 0) for name, found in by_seed.items()}
    tried = [judged.pay(places, np.repeat([[x, 0.0]], len(judged), 0)) for x in np.linspace(-1, 1, HINDSIGHT)]
    random = np.random.default_rng(2)
    action, density = explore(np.zeros((len(judged), len(ACTIONS)), np.float32), REAL_SIGMA, random)
    log = Logged(
        judged.observation,
        np.zeros_like(action),
        action,
        density,
        np.full(len(judged), REAL_SIGMA),
        judged.pay(places, action),
        places,
        np.full(len(judged), BUNDLE),
        np.full(len(judged), ""),
    )
    usable, before = checked(log, BUNDLE, {""})[0], judged.lists(places, np.zeros((len(judged), len(ACTIONS))))
    varied = [judged.variety(judged.lists(places, policy.act(judged.observation)), before) for policy in policies]
    asked_both = [gate.compare(judged.observation, paid, none, diversity=share) for paid, share in zip(by_seed["ppo"], varied, strict=True)]
    by_log = [gate.judge(usable, policy, diversity=share) for policy, share in zip(policies, varied, strict=True)]
    zero = np.zeros(len(judged))
    return {
        "users": len(judged),
        "decisions": decisions,
        "ndcg": {"nothing": round(float(none.mean()), 4), **{name: round(float(found.mean()), 4) for name, found in paid.items()}},
        "ndcg_by_seed": {name: [round(float(one.mean()), 4) for one in found] for name, found in by_seed.items()},
        # all intervals of a table hold together with 95 %, over users, of what these seeds learned
        "over_nothing": {name: _over(found - none, {"": zero}, ways=len(paid))[""] for name, found in paid.items()},
        "ppo_over": _over(paid["ppo"], {name: found for name, found in paid.items() if name != "ppo"}),
        "hindsight": round(float(np.max(tried, 0).mean()), 4),
        "mean_action": [round(float(value), 3) for value in policies[0].act(judged.observation).mean(0)],
        "promoted": sum(verdict.passed for verdict in asked_both),
        "reasons": sorted({verdict.reason for verdict in asked_both if not verdict.passed}),
        "promoted_by_log": sum(verdict.passed for verdict in by_log),
        "reasons_by_log": sorted({verdict.reason for verdict in by_log if not verdict.passed}),
    }


def _real_baselines(learned: HeldOut, frozen: Frozen, decisions: int) -> dict[str, list[Act]]:
    some, table, seeds = min(len(learned), SEARCHED), baselines.Tabled(learned), range(SEEDS)
    steep: dict[str, Any] = {"steps": STEPS, "at_once": STEPPED}
    return {
        "best global action": [baselines.best_global(learned, some)],
        "global, by gradient": [baselines.by_gradient(learned, frozen, seed=seed, **steep) for seed in seeds],
        "closed form in length": [baselines.by_length(learned, some)],
        "LinUCB": [baselines.bandit(table, frozen, decisions, thompson=False, seed=seed) for seed in seeds],
        "Thompson sampling": [baselines.bandit(table, frozen, decisions, thompson=True, seed=seed) for seed in seeds],
        "hyper-network, by gradient": [baselines.by_gradient(learned, frozen, hidden=64, seed=seed, **steep) for seed in seeds],
    }


def _polluted(question: Question, share: float, n_items: int, random: np.random.Generator) -> Question:
    """The question with events of random items between those of its history, so that they are this share of it."""
    history = question.history
    n = len(history.item_index)
    extra = round(n * share / (1 - share))
    if not extra or not n:
        return question
    place = np.sort(random.integers(0, n, extra))
    event, time_s = np.asarray(history.event_index)[place], np.asarray(history.timestamp_s)[place]
    noise = History(random.integers(1, n_items + 1, extra), event, time_s, np.ones(extra, np.float32))
    return replace(question, history=History(*(np.insert(np.asarray(mine), place, more) for mine, more in zip(history, noise, strict=True))))


def _deciding(predictor: Predictor, questions: Sequence[Question]) -> dict[str, float]:
    """Shares of the time of an answer that a network as it is learned takes, on one thread."""
    torch.set_num_threads(1)
    sizes = [len(OBSERVED), Ppo().hidden, Ppo().hidden, len(ACTIONS)]
    weights = {f"weight_{n}": torch.zeros(b, a) for n, (a, b) in enumerate(itertools.pairwise(sizes))}
    weights |= {f"bias_{n}": torch.zeros(b) for n, b in enumerate(sizes[1:])}
    seen = np.stack([predictor.observe(question.history, question.now) for question in questions[:300]])
    policy = Policy(ACTIONS, Frozen.of(seen), weights, BUNDLE, {})
    found = {
        name: round(deciding_share(predictor, list(questions[:300]), policy, sigma), 4)
        for name, sigma in (("deciding_share", None), ("exploring_share", REAL_SIGMA))
    }
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return found
