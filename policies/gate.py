"""The promotion criteria of policies: checks a policy against a log that another policy made. Each check
states its result in words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.special import zeta

from policies import ope
from policies.logs import LoggedDecisions
from recray.evaluation.criteria import Check
from recray.inference.modulation import explore, log_density
from recray.inference.policy import OBSERVED, ObservationNormalizer

# maximum share of the 95 % intervals on shuffled rewards that exclude 0: where the intervals hold, more than
# 4 of 20 is one chance in 400
MAX_SHUFFLED = 0.2
DRAWS = 8
# exploration of both policies in the comparison, as a share of the log's; the narrower it is, the clearer is
# the difference
EXPLORATION_SHARES = (0.5, 1.0)
MIN_SEGMENT = 30  # decisions


@dataclass(frozen=True)
class Criteria:
    """What a policy has to reach.

    threshold : significant gain, as a share of what production earns
    effective : minimum effective sample size
    segment : maximum significant loss of a segment, and maximum predicted loss without exploration, as a
        share of what each earns
    max_weight : weight above which SWITCH-DR uses the reward model
    diversity : of its lists, as a share of the trained model's
    latency : maximum share of the Predictor's time for a decision
    level : probability that a policy without a gain passes
    """

    threshold: float = 0.0
    effective: float = 500.0
    segment: float = -0.01
    max_weight: float = 20.0
    diversity: float = 0.9
    latency: float = 0.05
    confidence: float = 0.95
    level: float = 0.025


TOTAL_LEVEL = 0.1  # probability that any of the successive rounds promotes a policy without a gain
DECAY = 1.2


def spend_level(number: int) -> float:
    """Level of the criteria in a round, numbered from 1 since the live policy changed; the levels of all
    rounds sum to `TOTAL_LEVEL`.

    The level is a power of the round's number, so that a change of habits after many rounds can still be
    shown (alpha spending; Foster and Stine 2008 for a budget that restarts with each discovery).
    """
    return float(TOTAL_LEVEL * number**-DECAY / zeta(DECAY))


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
        """The texts of the failed checks; empty if all passed."""
        return "; ".join(check.text for check in self.checks if not check.passed)


class ActingPolicy(Protocol):
    """The policy under evaluation: a `Policy`, or an object with the same interface."""

    @property
    def normalizer(self) -> ObservationNormalizer: ...

    def act(self, observation_ND: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Estimates:
    """What the estimators of `policies.ope` read, for three policies: the evaluated one, production, and the
    trained model (action 0). All have the same exploration.

    share : of the log's exploration
    w, v : by policy
    unexplored : predicted gain of a decision without exploration
    """

    share: float
    w: tuple[np.ndarray, np.ndarray, np.ndarray]
    q: np.ndarray
    v: tuple[np.ndarray, np.ndarray, np.ndarray]
    unexplored: float

    def differences(self, reward: np.ndarray) -> np.ndarray:
        """Doubly robust difference of each decision to production, [n]."""
        evaluated, production = (ope.dr(reward, self.w[n], self.q, self.v[n]) for n in (0, 1))
        result: np.ndarray = evaluated - production
        return result


def estimate(log: LoggedDecisions, policy: ActingPolicy, criteria: Criteria, seed: int = 0) -> Estimates:
    """Weights and predicted rewards, at the smallest exploration that leaves enough effective samples."""
    mean, zero = policy.act(log.observation), np.zeros_like(log.mean)
    for share in EXPLORATION_SHARES:
        w = importance_weights(log, mean, share), importance_weights(log, log.mean, share)
        if min(map(ope.effective_sample_size, w)) >= criteria.effective:
            break

    drawn = [
        np.stack(
            [explore(centre, share * log.sigma[:, None], random)[0] for random in _make_generators(seed)]
        )
        for centre in (mean, log.mean, zero)
    ]
    state = policy.normalizer.normalise(log.observation)
    q, evaluated, production, trained, played, before = ope.predict_rewards(
        state, log.action, log.reward, log.user_codes, *drawn, mean[None], log.mean[None], seed=seed
    )
    # most users get responses without exploration; the reward model is too coarse for small differences
    unexplored = float((played - before).mean())
    weights = (*w, importance_weights(log, zero, share))
    return Estimates(share, weights, q, (evaluated, production, trained), unexplored)


def judge(
    log: LoggedDecisions,
    policy: ActingPolicy,
    criteria: Criteria = Criteria(),
    *,
    seed: int = 0,
    diversity: float | None = None,
    latency: float | None = None,
) -> Verdict:
    """The verdict on a policy from a log of usable decisions.

    diversity : of the policy's lists, as a share of the trained model's; None: not measured
    latency : a decision's share of the Predictor's time; None: not measured
    """
    estimates = estimate(log, policy, criteria, seed)
    codes, segments = log.user_codes, split_by_history_length(log.observation)
    evaluation = ope.compare_with_production(
        log.reward,
        estimates.w,
        estimates.q,
        estimates.v,
        codes,
        segments,
        confidence=criteria.confidence,
        level=criteria.level,
        max_weight=criteria.max_weight,
        seed=seed,
    )

    checks = _check_evaluation(evaluation, estimates.share, estimates.unexplored, len(log), criteria)
    earned = estimates.w[1]
    own = {name: float(np.average(log.reward[mask], weights=earned[mask])) for name, mask in segments.items()}
    checks += [
        *_check_segments(evaluation.segments, own, criteria),
        *_check_limits(diversity, latency, criteria),
    ]
    figures = {
        "explored": estimates.share,
        "level": criteria.level,
        "dr_surely": evaluation.gain_lower_bound,
        "over_trained": evaluation.gain_over_trained.value,
        "over_trained_low": evaluation.gain_over_trained.low,
        "over_trained_high": evaluation.gain_over_trained.high,
        "unexplored": estimates.unexplored,
        "effective_samples": evaluation.effective_sample_size,
        "shuffled": evaluation.shuffled_exclusion_rate,
        "largest_weight": evaluation.max_weight,
        "production": evaluation.production.value,
        "decisions": float(len(log)),
    }
    for name, interval in evaluation.intervals.items():
        figures |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return Verdict(checks, figures | _to_figures(diversity, latency))


def compare(
    observation: np.ndarray,
    paid: np.ndarray,
    none: np.ndarray,
    criteria: Criteria = Criteria(),
    *,
    diversity: float | None = None,
    latency: float | None = None,
    seed: int = 0,
) -> Verdict:
    """The verdict where both can be tried on the same users: the rewards [n] under a policy, and under the
    trained model.

    diversity : of the policy's lists, as a share of the trained model's
    """
    difference = paid - none
    segments = split_by_history_length(observation)
    gain, *by_segment = ope.bootstrap_intervals(
        [difference] * (1 + len(segments)),
        None,
        [None, *segments.values()],
        confidence=criteria.confidence,
        seed=seed,
    )
    earned = max(abs(float(none.mean())), 1e-12)
    text = (
        f"gain {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] a user, compared with {earned:.4f}, "
        f"over {len(paid)} users"
    )
    own = {name: float(none[mask].mean()) for name, mask in segments.items()}
    checks = [
        Check("gain", gain.low > criteria.threshold * earned, text),
        *_check_segments(dict(zip(segments, by_segment, strict=True)), own, criteria),
    ]
    checks += _check_limits(diversity, latency, criteria)
    figures = {
        "users": float(len(paid)),
        "none": earned,
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
    }
    return Verdict(checks, figures | _to_figures(diversity, latency))


def _check_evaluation(
    evaluation: ope.Evaluation, share: float, unexplored: float, decisions: int, criteria: Criteria
) -> list[Check]:
    """The checks of the off-policy estimates.

    share : exploration of both policies, as a share of the log's
    unexplored : predicted gain of a decision without exploration
    """
    earned = max(abs(evaluation.production.value), 1e-12)
    values = {name: interval.value for name, interval in evaluation.intervals.items()}
    gain, weight = evaluation.intervals["dr"], evaluation.mean_weight
    estimates = ", ".join(f"{name} {value:+.4f}" for name, value in values.items())
    gain_text = (
        f"gain {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] a decision, compared with {earned:.4f}, "
        f"both at {share:g} times the logged exploration"
    )
    gain_text += f"; lower bound {evaluation.gain_lower_bound:+.4f} at level {criteria.level:.2g}"
    weight_text = (
        f"the mean weight is {weight.value:.3f}, not 1: actions were not played with the logged densities"
    )
    unexplored_text = (
        f"predicted gain without exploration {unexplored:+.4f}, required {criteria.segment * earned:+.4f}"
    )
    support_text = (
        f"{evaluation.effective_sample_size:.0f} effective samples of {decisions}, "
        f"required {criteria.effective:.0f}"
    )
    return [
        Check(
            "estimators agree",
            all(value > 0 for value in values.values()),
            f"estimators disagree: {estimates}",
        ),
        Check("gain", evaluation.gain_lower_bound > criteria.threshold * earned, gain_text),
        Check("unexplored", unexplored >= criteria.segment * earned, unexplored_text),
        Check("support", evaluation.effective_sample_size >= criteria.effective, support_text),
        Check("weights", 2 * weight.low - weight.value <= 1 <= 2 * weight.high - weight.value, weight_text),
        Check(
            "shuffled rewards",
            evaluation.shuffled_exclusion_rate <= MAX_SHUFFLED,
            f"{evaluation.shuffled_exclusion_rate:.0%} of the intervals on shuffled rewards exclude 0",
        ),
    ]


def _check_segments(
    changes: dict[str, ope.Interval], own: dict[str, float], criteria: Criteria
) -> list[Check]:
    """No segment may lose significantly, as a share of what it earns itself (`own`)."""
    checks = []
    for name, change in changes.items():
        text = f"{name}: {change.value:+.4f} of {own[name]:.4f}, upper bound {change.high:+.4f}"
        checks.append(Check(f"segment {name}", change.high >= criteria.segment * abs(own[name]), text))
    return checks


def _check_limits(diversity: float | None, latency: float | None, criteria: Criteria) -> list[Check]:
    """The limits on diversity and latency, as far as they were measured."""
    checks = []
    if diversity is not None:
        checks.append(
            Check(
                "diversity",
                diversity >= criteria.diversity,
                f"the diversity of its lists is {diversity:.0%} of the trained model's, "
                f"required {criteria.diversity:.0%}",
            )
        )
    if latency is not None:
        text = f"a decision takes {latency:.1%} of the Predictor's time, {criteria.latency:.0%} allowed"
        checks.append(Check("latency", latency <= criteria.latency, text))
    return checks


def _to_figures(diversity: float | None, latency: float | None) -> dict[str, float]:
    return {
        name: value for name, value in (("diversity", diversity), ("latency", latency)) if value is not None
    }


def importance_weights(log: LoggedDecisions, mean: np.ndarray, share: float = 1.0) -> np.ndarray:
    """Density of the logged actions under exploration around `mean`, divided by the logged density, float64
    [n].

    share : of the exploration, relative to the log's
    """
    result: np.ndarray = np.exp(log_density(log.action, mean, share * log.sigma[:, None]) - log.log_density)
    return result


def _make_generators(seed: int) -> list[np.random.Generator]:
    """The same random numbers for every policy."""
    return [np.random.default_rng([seed, draw]) for draw in range(DRAWS)]


def split_by_history_length(observation: np.ndarray) -> dict[str, np.ndarray]:
    """Thirds of the requests by the length of the history, masks [n]; without those that are too small."""
    length = observation[:, OBSERVED.index("log_length")]
    low, high = np.quantile(length, [1 / 3, 2 / 3])
    segments = {
        "short histories": length <= low,
        "middle histories": (length > low) & (length <= high),
        "long histories": length > high,
    }
    return {name: mask for name, mask in segments.items() if mask.sum() >= MIN_SEGMENT}
