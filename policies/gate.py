"""May a policy go live? Asked of a log that another policy made; every check says in words what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.special import zeta

from policies import ope
from policies.logs import Logged
from recray.evaluation.gates import Check
from recray.inference.modulation import explore, log_density
from recray.inference.policy import OBSERVED, Frozen

WRONG = 0.2  # of the 95 % intervals on shuffled rewards, at most: more than 4 of 20 is one chance in 400 where they hold
DRAWS = 8
EXPLORED = 0.5, 1.0  # of what the log explored, so far both explore where they are compared: what differs shows the more, the less they do


@dataclass(frozen=True)
class Rules:
    """threshold: what a policy has to gain for sure, as a share of what production earns; effective: samples after weighting, at least;
    segment: what no segment may lose for sure, as a share of what it earns, nor what is played unexplored, by the model's word; most: weight
    above which SWITCH-DR believes the model; diversity: of its lists, as a share of the trained model's; latency: share of the Predictor's time
    that a decision may take; level: of a gain that is none."""

    threshold: float = 0.0
    effective: float = 500.0
    segment: float = -0.01
    most: float = 20.0
    diversity: float = 0.9
    latency: float = 0.05
    confidence: float = 0.95
    level: float = 0.025


ANY_ROUND = 0.1  # probability that any round of those after one another passes that gains nothing
DECAY = 1.2


def level_of(number: int) -> float:
    """Level of the gate in the round of that number since the live policy changed, from 1; all of them together have `ANY_ROUND`.

    Spent as the power of the round's number, so that a change of habits after many rounds still has something to be shown with
    (alpha spending; Foster and Stine 2008 for what begins anew with each discovery).
    """
    return float(ANY_ROUND * number**-DECAY / zeta(DECAY))


@dataclass(frozen=True)
class Verdict:
    """The checks, all of which have to pass, and the figures behind them."""

    checks: list[Check]
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """What did not pass, in words; empty if all did."""
        return "; ".join(check.text for check in self.checks if not check.passed)


class Acts(Protocol):
    """What is judged: a `Policy`, or what acts as one does."""

    @property
    def frozen(self) -> Frozen: ...

    def act(self, observation_ND: np.ndarray, /) -> np.ndarray: ...


def judge(
    log: Logged, policy: Acts, rules: Rules = Rules(), *, seed: int = 0, diversity: float | None = None, latency: float | None = None
) -> Verdict:
    """The verdict on a policy by a checked log.

    diversity : of the policy's lists, as a share of the trained model's; latency: a decision's share of the Predictor's time. None: not measured
    """
    mean, codes = policy.act(log.observation), log.codes
    for share in EXPLORED:
        w = weights(log, mean, share), weights(log, log.mean, share)
        if min(map(ope.effective, w)) >= rules.effective:
            break
    zero = np.zeros_like(mean)
    drawn = [np.stack([explore(one, share * log.sigma[:, None], random)[0] for random in _again(seed)]) for one in (mean, log.mean, zero)]
    state, parts = policy.frozen.normalise(log.observation), thirds(log.observation)
    q, *v, played, before = ope.modelled(state, log.action, log.reward, codes, *drawn, mean[None], log.mean[None], seed=seed)
    trained = ope.dr(log.reward, w[0], q, v[0]) - ope.dr(log.reward, weights(log, zero, share), q, v[2])
    over_trained = ope.bootstrap(trained, codes, rules.confidence, seed=seed)
    found = ope.against_production(
        log.reward, w, q, (v[0], v[1]), codes, parts, confidence=rules.confidence, level=rules.level, most=rules.most, seed=seed
    )
    earned = max(abs(found.production.value), 1e-12)
    values = {name: interval.value for name, interval in found.intervals.items()}
    unexplored = float((played - before).mean())  # what everybody gets whose answers do not explore; the model is too coarse to tell little
    sure, weight = found.intervals["dr"], found.weight
    told = ", ".join(f"{name} {value:+.4f}" for name, value in values.items())
    gain = f"gains {sure.value:+.4f} [{sure.low:+.4f}, {sure.high:+.4f}] a decision of {earned:.4f}, both explored {share:g} times as far as logged"
    gain += f"; at least {found.surely:+.4f} at level {rules.level:.2g}"
    densities = f"weights are {weight.value:.3f} on the average, not 1: actions were not played with the densities that were logged"
    alone = f"played unexplored it gains {unexplored:+.4f} by the model, {rules.segment * earned:+.4f} at least are wanted"
    support = f"{found.effective:.0f} effective samples of {len(log)}, {rules.effective:.0f} wanted"
    checks = [
        Check("estimators agree", all(value > 0 for value in values.values()), f"estimators disagree: {told}"),
        Check("gain", found.surely > rules.threshold * earned, gain),
        Check("unexplored", unexplored >= rules.segment * earned, alone),
        Check("support", found.effective >= rules.effective, support),
        Check("weights", 2 * weight.low - weight.value <= 1 <= 2 * weight.high - weight.value, densities),
        Check("shuffled rewards", found.shuffled <= WRONG, f"{found.shuffled:.0%} of the intervals say that shuffled rewards gain or lose"),
    ]
    own = {name: float(np.average(log.reward[mask], weights=w[1][mask])) for name, mask in parts.items()}
    checks += [*_kept(found.segments, own, rules), *_allowed(diversity, latency, rules)]
    figures = {
        "explored": share,
        "level": rules.level,
        "dr_surely": found.surely,
        "over_trained": over_trained.value,
        "over_trained_low": over_trained.low,
        "over_trained_high": over_trained.high,
        "unexplored": unexplored,
        "effective_samples": found.effective,
        "shuffled": found.shuffled,
        "largest_weight": found.largest,
        "production": found.production.value,
        "decisions": float(len(log)),
    }
    for name, interval in found.intervals.items():
        figures |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return Verdict(checks, figures | _measured(diversity, latency))


def compare(
    observation: np.ndarray,
    paid: np.ndarray,
    none: np.ndarray,
    rules: Rules = Rules(),
    *,
    diversity: float | None = None,
    latency: float | None = None,
    seed: int = 0,
) -> Verdict:
    """The verdict where both can be tried on the same users: what each [n] was paid under a policy, and under the trained model.

    diversity : of the policy's lists, as a share of the trained model's
    """
    difference = paid - none
    parts = thirds(observation)
    gain, *by_part = ope.bootstraps([difference] * (1 + len(parts)), None, [None, *parts.values()], confidence=rules.confidence, seed=seed)
    earned = max(abs(float(none.mean())), 1e-12)
    text = f"gains {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] a user of {earned:.4f}, over {len(paid)} users"
    own = {name: float(none[mask].mean()) for name, mask in parts.items()}
    checks = [Check("gain", gain.low > rules.threshold * earned, text), *_kept(dict(zip(parts, by_part, strict=True)), own, rules)]
    checks += _allowed(diversity, latency, rules)
    figures = {"users": float(len(paid)), "none": earned, "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
    return Verdict(checks, figures | _measured(diversity, latency))


def _kept(parts: dict[str, ope.Interval], own: dict[str, float], rules: Rules) -> list[Check]:
    """That no segment loses for sure of what it earns itself."""
    found = []
    for name, change in parts.items():
        text = f"{name}: {change.value:+.4f} of {own[name]:.4f}, at best {change.high:+.4f}"
        found.append(Check(f"segment {name}", change.high >= rules.segment * abs(own[name]), text))
    return found


def _allowed(diversity: float | None, latency: float | None, rules: Rules) -> list[Check]:
    """What its lists and its decisions may be, of what was measured."""
    found = []
    if diversity is not None:
        found.append(Check("diversity", diversity >= rules.diversity, f"its lists are {diversity:.0%} as varied, {rules.diversity:.0%} wanted"))
    if latency is not None:
        text = f"a decision takes {latency:.1%} of the Predictor's time, {rules.latency:.0%} allowed"
        found.append(Check("latency", latency <= rules.latency, text))
    return found


def _measured(diversity: float | None, latency: float | None) -> dict[str, float]:
    return {name: value for name, value in (("diversity", diversity), ("latency", latency)) if value is not None}


def weights(log: Logged, mean: np.ndarray, share: float = 1.0) -> np.ndarray:
    """Density of the logged actions around other means, explored that share as far as the log did, over theirs, float64 [n]."""
    found: np.ndarray = np.exp(log_density(log.action, mean, share * log.sigma[:, None]) - log.log_density)
    return found


def _again(seed: int) -> list[np.random.Generator]:
    """The same chance for whoever asks."""
    return [np.random.default_rng([seed, draw]) for draw in range(DRAWS)]


def thirds(observation: np.ndarray) -> dict[str, np.ndarray]:
    """Requests by the length of the history, masks [n]."""
    length = observation[:, OBSERVED.index("log_length")]
    low, high = np.quantile(length, [1 / 3, 2 / 3])
    found = {"short histories": length <= low, "middle histories": (length > low) & (length <= high), "long histories": length > high}
    return {name: mask for name, mask in found.items() if mask.sum() >= 30}
