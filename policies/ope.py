"""Off-policy evaluation: what a policy would have earned, from a log that another policy made. Numpy only.

Notation: n logged decisions with reward r [n]; w [n], the density of the logged action under the evaluated
policy divided by that under the logging policy; q [n], a reward model's prediction for the logged action;
v [n], its mean prediction for the actions of the evaluated policy. Each estimator returns a term for every
decision, float64 [n]. The mean of the terms is the estimate; intervals and differences come from the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import stdtrit

RIDGE = 1.0
FOLDS = 3
RESAMPLES = 1000
MIN_TAIL_RESAMPLES = 5  # resamples beyond a bound; with fewer the bootstrap cannot locate it
SHUFFLES = 20
RESAMPLE_COUNTS = np.searchsorted(
    np.cumsum([math.exp(-1) / math.factorial(n) for n in range(9)]), (np.arange(1 << 16) + 0.5) / (1 << 16)
).astype(np.float64)
"""How often a user occurs in a resample (Chamandy et al. 2012), indexed by 16 random bits: Poisson of mean 1,
to 2⁻¹⁶.
"""


def ips(r: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Inverse propensity scores: w r (Horvitz and Thompson 1952)."""
    result: np.ndarray = w * r
    return result


def snips(r: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Self-normalised: sum(w r) / sum(w) (Swaminathan and Joachims 2015), as that value plus its influence
    function.
    """
    value = (w * r).sum() / w.sum()
    result: np.ndarray = value + w * (r - value) / w.mean()
    return result


def dm(v: np.ndarray) -> np.ndarray:
    """The direct method: the reward model's prediction, without any weight."""
    return v.astype(np.float64)


def dr(r: np.ndarray, w: np.ndarray, q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Doubly robust: v + w (r - q) (Dudík, Langford and Li 2011)."""
    result: np.ndarray = v + w * (r - q)
    return result


def switch_dr(r: np.ndarray, w: np.ndarray, q: np.ndarray, v: np.ndarray, max_weight: float) -> np.ndarray:
    """Doubly robust where w <= max_weight, the reward model elsewhere (Wang, Agarwal and Dudík 2017)."""
    return v + np.where(w <= max_weight, w * (r - q), 0.0)


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_intervals(
    terms: Sequence[np.ndarray],
    user: np.ndarray | None = None,
    masks: Sequence[np.ndarray | None] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """The intervals of `resample`, all of the same confidence."""
    resampled = resample(terms, user, masks, resamples=resamples, seed=seed)
    return [resampled.interval(column, confidence) for column in range(len(terms))]


@dataclass(frozen=True)
class BootstrapResult:
    """M means over users, and their resamples.

    mean, error : [M]
    t : differences of the resampled means to the mean, in their own standard errors, [resamples, M]
    """

    mean: np.ndarray
    error: np.ndarray
    t: np.ndarray

    def interval(self, column: int, confidence: float) -> Interval:
        """The bootstrap-t interval of a mean."""
        t_low, t_high = np.quantile(self.t[:, column], [(1 - confidence) / 2, (1 + confidence) / 2])
        mean, error = self.mean[column], self.error[column]
        return Interval(float(mean), float(mean - t_high * error), float(mean - t_low * error))


def resample(
    terms: Sequence[np.ndarray],
    user: np.ndarray | None = None,
    masks: Sequence[np.ndarray | None] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> BootstrapResult:
    """Means over users with the same resamples for all, for bootstrap-t intervals (Efron and Tibshirani 1993,
    section 12.5). The intervals are skewed as the terms are.

    terms : M arrays [n]
    user : codes from 0 [n]; the decisions of a user are resampled together; None: each decision on its own
    masks : [n], of the decisions that each mean is over; None: all
    """
    codes = np.arange(len(terms[0])) if user is None else user
    users = int(codes.max()) + 1
    term_masks = [None] * len(terms) if masks is None else list(masks)
    counts: dict[int, np.ndarray] = {}
    for mask in term_masks:
        if id(mask) not in counts:
            counts[id(mask)] = np.bincount(codes, mask, users).astype(np.float64)
    group = np.array([list(counts).index(id(mask)) for mask in term_masks])
    sums_UM = np.stack(
        [
            np.bincount(codes, values if mask is None else values * mask, users)
            for values, mask in zip(terms, term_masks, strict=True)
        ],
        1,
    )
    counts_UG = np.stack(list(counts.values()), 1)
    mean, error = _mean_and_error(np.ones((1, users)), sums_UM, counts_UG, group)

    random = np.random.default_rng(seed)
    step = max((1 << 22) // users, 1)
    t = np.empty((resamples, len(terms)))
    for start in range(0, resamples, step):
        drawn = RESAMPLE_COUNTS[
            random.integers(0, len(RESAMPLE_COUNTS), (min(step, resamples - start), users), dtype=np.uint16)
        ]
        resampled_mean, spread = _mean_and_error(drawn, sums_UM, counts_UG, group)
        t[start : start + len(drawn)] = (resampled_mean - mean) / np.maximum(spread, 1e-300)
    return BootstrapResult(mean[0], error[0], t)


def _mean_and_error(
    drawn_RU: np.ndarray, sums_UM: np.ndarray, counts_UG: np.ndarray, group_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means [R, M] of resamples with these counts of each user, and their standard errors.

    counts_UG : decisions by user, one column for each set of decisions
    group_M : the set of each mean
    """
    n = np.maximum(drawn_RU @ counts_UG, 1.0)[:, group_M]
    mean = drawn_RU @ sums_UM / n
    squares = (
        drawn_RU @ (sums_UM**2)
        - 2 * mean * (drawn_RU @ (sums_UM * counts_UG[:, group_M]))
        + mean**2 * (drawn_RU @ (counts_UG**2))[:, group_M]
    )
    return mean, np.sqrt(np.maximum(squares, 0.0)) / n


def lower_bound(
    terms: np.ndarray,
    user: np.ndarray,
    level: float,
    seed: int = 0,
    interval_at: Callable[[float], Interval] | None = None,
) -> float:
    """Lower confidence bound of the mean of terms, with error probability `level`, where the terms of a user
    are correlated and users differ in how many they have.

    It is the lower of two bounds, since either is too high somewhere. The bootstrap-t bound follows skewed
    terms, as far as its resamples reach. Student's bound follows few users with many terms: its standard
    error leaves out each user in turn (CR3; Bell and McCaffrey 2002). Its degrees of freedom are
    Satterthwaite's, from what users of these sizes contribute to the variance at the estimated correlation
    of a user's terms.

    user : codes from 0 [n]
    interval_at : interval of the mean by confidence, if it was resampled with others; None: resampled here
    """
    users = int(user.max()) + 1
    sums, counts = np.bincount(user, terms, users), np.bincount(user, minlength=users).astype(np.float64)
    n, mean = counts.sum(), float(terms.mean())
    share = counts / n
    residual = (sums - mean * counts) / n / np.maximum(1.0 - share, 1e-9)
    standard_error = math.sqrt(float((residual**2).sum()))

    within_squares = float(((terms - mean) ** 2).sum())
    cluster_squares = float(((sums - mean * counts) ** 2).sum())
    excess_cluster_size = float((counts**2).sum() / n) - 1.0
    correlation = (
        min(max((cluster_squares / max(within_squares, 1e-300) - 1.0) / excess_cluster_size, 0.0), 1.0)
        if excess_cluster_size > 0
        else 0.0
    )
    expected_variance = counts * (1.0 + (counts - 1.0) * correlation)
    degrees_of_freedom = max(float(expected_variance.sum() ** 2 / (expected_variance**2).sum()) - 1.0, 1.0)

    bound = mean - float(stdtrit(degrees_of_freedom, 1.0 - level)) * standard_error
    if level * RESAMPLES >= MIN_TAIL_RESAMPLES:
        interval_at = interval_at or partial(resample([terms], user, seed=seed).interval, 0)
        bound = min(bound, interval_at(1.0 - 2.0 * level).low)
    return bound


def effective_sample_size(w: np.ndarray) -> float:
    """Effective sample size (Kish 1965): sum(w)² / sum(w²)."""
    return float(w.sum() ** 2 / max((w**2).sum(), 1e-300))


def predict_rewards(
    state_ND: np.ndarray,
    action_NK: np.ndarray,
    r: np.ndarray,
    user: np.ndarray,
    *policy_actions_MNK: np.ndarray,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """A reward model's predictions: of the logged actions, q [n], and of each set of played actions, the mean
    over its M draws, v [n]. The model is a ridge regression on states, actions and their products.

    Cross-fitted (Chernozhukov et al. 2018): no user's prediction is fitted on that user's rewards.
    """
    fold = np.random.default_rng(seed).integers(0, FOLDS, int(user.max()) + 1)[user]
    actions = action_NK[None], *policy_actions_MNK
    predictions = tuple(np.zeros(len(r)) for _ in actions)
    for number in range(FOLDS):
        rows = fold == number
        x = _to_features(state_ND[~rows], action_NK[~rows])
        coefficients = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ r[~rows])
        for values, draws in zip(predictions, actions, strict=True):
            values[rows] = np.mean(
                [_to_features(state_ND[rows], drawn[rows]) @ coefficients for drawn in draws], 0
            )
    return predictions


def _to_features(state_ND: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
    """1, states, their squares, actions, their squares, and states times actions: [n, C]."""
    n = len(state_ND)
    x, a = state_ND.astype(np.float64), action_NK.astype(np.float64)
    products = (x[:, :, None] * a[:, None, :]).reshape(n, -1)
    return np.concatenate([np.ones((n, 1)), x, x**2, a, a**2, products], 1)


@dataclass(frozen=True)
class Evaluation:
    """The gain of a policy over the logging policy, per decision and by estimator, and the support of the
    log.

    intervals : of the paired differences
    gain_over_trained : of the doubly robust difference to the trained model
    gain_lower_bound : of the doubly robust difference, with error probability `level`
    production : of the rewards that were earned
    segments : of the doubly robust difference by segment
    effective_sample_size, max_weight, mean_weight : the smaller effective sample size and the largest weight
        of both policies, and the mean weight of the evaluated one, which is 1 where the log's densities are
        right
    shuffled_exclusion_rate : share of the intervals of the doubly robust difference that exclude 0 when the
        rewards are shuffled, SHUFFLES times
    """

    intervals: dict[str, Interval]
    gain_over_trained: Interval
    gain_lower_bound: float
    production: Interval
    segments: dict[str, Interval]
    effective_sample_size: float
    max_weight: float
    mean_weight: Interval
    shuffled_exclusion_rate: float


def compare_with_production(
    r: np.ndarray,
    w: tuple[np.ndarray, np.ndarray, np.ndarray],
    q: np.ndarray,
    v: tuple[np.ndarray, np.ndarray, np.ndarray],
    user: np.ndarray,
    segments: Mapping[str, np.ndarray],
    *,
    confidence: float = 0.95,
    level: float = 0.025,
    max_weight: float = 20.0,
    seed: int = 0,
) -> Evaluation:
    """The difference to production, paired by decision, with every estimator.

    w, v : of the evaluated policy, of production and of the trained model, all with the same exploration,
        which may be narrower than the log's
    segments : masks [n]
    """
    estimators: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "ips": lambda w, v: ips(r, w),
        "snips": lambda w, v: snips(r, w),
        "dm": lambda w, v: dm(v),
        "dr": lambda w, v: dr(r, w, q, v),
        "switch_dr": lambda w, v: switch_dr(r, w, q, v, max_weight),
    }
    terms = {name: to_terms(w[0], v[0]) - to_terms(w[1], v[1]) for name, to_terms in estimators.items()}
    terms_vs_trained = dr(r, w[0], q, v[0]) - dr(r, w[2], q, v[2])
    random = np.random.default_rng(seed)
    shuffled_terms = [(w[0] - w[1]) * (random.permutation(r) - r.mean()) for _ in range(SHUFFLES)]

    names, unsegmented_terms = list(terms), [terms_vs_trained, r, w[0], *shuffled_terms]
    by_segment = [terms["dr"]] * len(segments)
    masks = [None] * (len(names) + len(unsegmented_terms)) + list(segments.values())
    resampled = resample([*terms.values(), *unsegmented_terms, *by_segment], user, masks, seed=seed)
    intervals = [resampled.interval(column, confidence) for column in range(len(masks))]
    gain_over_trained, production, mean_weight, *shuffled_intervals = intervals[
        len(names) : len(names) + len(unsegmented_terms)
    ]
    return Evaluation(
        dict(zip(names, intervals, strict=False)),
        gain_over_trained,
        lower_bound(terms["dr"], user, level, seed, partial(resampled.interval, names.index("dr"))),
        production,
        dict(zip(segments, intervals[len(names) + len(unsegmented_terms) :], strict=True)),
        min(map(effective_sample_size, w[:2])),
        float(max(w[0].max(), w[1].max())),
        mean_weight,
        float(np.mean([not interval.low <= 0 <= interval.high for interval in shuffled_intervals])),
    )
