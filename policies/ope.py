"""Off-policy evaluation: what a policy would have earned, from a log that another one made. Numpy alone.

Notation: n logged decisions with reward r [n]; w [n], the density of the logged action under the policy that is evaluated over that under
the policy that logged it; q [n], a model's reward of the logged action; v [n], the model's mean reward of the evaluated policy's actions.
Each estimator returns a term for every decision, float64 [n], whose mean is the estimate, so that intervals and differences come from terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

RIDGE = 1.0
FOLDS = 3
RESAMPLES = 1000
LEAST_BEYOND = 5  # resamples beyond a bound, which they can still tell
SHUFFLES = 20
COMES = np.searchsorted(np.cumsum([math.exp(-1) / math.factorial(n) for n in range(9)]), (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float64)
"""How often a user comes in a resample (Chamandy et al. 2012), by 16 random bits: Poisson of mean 1, to 2⁻¹⁶."""


def ips(r: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Inverse propensity scores: w r (Horvitz and Thompson 1952)."""
    found: np.ndarray = w * r
    return found


def snips(r: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Self-normalised: sum(w r) / sum(w) (Swaminathan and Joachims 2015), as that value plus its influence function."""
    value = (w * r).sum() / w.sum()
    found: np.ndarray = value + w * (r - value) / w.mean()
    return found


def dm(v: np.ndarray) -> np.ndarray:
    """The direct method: the model's word, without any weight."""
    return v.astype(np.float64)


def dr(r: np.ndarray, w: np.ndarray, q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Doubly robust: v + w (r - q) (Dudík, Langford and Li 2011)."""
    found: np.ndarray = v + w * (r - q)
    return found


def switch_dr(r: np.ndarray, w: np.ndarray, q: np.ndarray, v: np.ndarray, most: float) -> np.ndarray:
    """Doubly robust where w <= most, the model alone elsewhere (Wang, Agarwal and Dudík 2017)."""
    found: np.ndarray = v + np.where(w <= most, w * (r - q), 0.0)
    return found


@dataclass(frozen=True)
class Interval:
    """An estimate and where the truth is with the confidence that was asked for."""

    value: float
    low: float
    high: float


def bernstein(terms: np.ndarray, width: float, confidence: float = 0.95) -> Interval:
    """Empirical Bernstein bounds of the mean of independent terms within a range of `width` (Maurer and Pontil 2009, theorem 4, both sides)."""
    n, log = len(terms), np.log(4.0 / (1.0 - confidence))
    away = float(np.sqrt(2.0 * terms.var(ddof=1) * log / n) + 7.0 * width * log / (3.0 * (n - 1)))
    mean = float(terms.mean())
    return Interval(mean, mean - away, mean + away)


def bootstrap(terms: np.ndarray, user: np.ndarray | None = None, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """As `bootstraps`, for one mean."""
    return bootstraps([terms], user, confidence=confidence, resamples=resamples, seed=seed)[0]


def bootstraps(
    terms: Sequence[np.ndarray],
    user: np.ndarray | None = None,
    among: Sequence[np.ndarray | None] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Bootstrap-t intervals of means over users (Efron and Tibshirani 1993, section 12.5), from the same resamples; skewed as the terms are.

    terms : M arrays [n]
    user : codes from 0 [n], whose decisions come and go together; None: each decision its own
    among : masks [n] of the decisions that each mean is over; None: all
    """
    masks = [np.ones(len(terms[0])) if mask is None else mask.astype(np.float64) for mask in among or [None] * len(terms)]
    who = np.arange(len(terms[0])) if user is None else user
    users = int(who.max()) + 1
    sums = np.stack([np.bincount(who, found * mask, users) for found, mask in zip(terms, masks, strict=True)], 1)
    counts = np.stack([np.bincount(who, mask, users) for mask in masks], 1)
    mean, error = _mean_and_error(np.ones((1, users)), sums, counts)
    random = np.random.default_rng(seed)
    step = max((1 << 22) // users, 1)
    t = np.empty((resamples, len(terms)))
    for start in range(0, resamples, step):
        drawn = COMES[random.integers(0, len(COMES), (min(step, resamples - start), users), dtype=np.uint16)]
        again, spread = _mean_and_error(drawn, sums, counts)
        t[start : start + len(drawn)] = (again - mean) / np.maximum(spread, 1e-300)
    above, below = np.quantile(t, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    low, high = mean[0] - below * error[0], mean[0] - above * error[0]
    return [Interval(*map(float, found)) for found in zip(mean[0], low, high, strict=True)]


def _mean_and_error(drawn_RU: np.ndarray, sums_UM: np.ndarray, counts_UM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means [R, M] of resamples in which users come so often, and their standard errors."""
    n = np.maximum(drawn_RU @ counts_UM, 1.0)
    mean = drawn_RU @ sums_UM / n
    squares = drawn_RU @ (sums_UM**2) - 2 * mean * (drawn_RU @ (sums_UM * counts_UM)) + mean**2 * (drawn_RU @ (counts_UM**2))
    return mean, np.sqrt(np.maximum(squares, 0.0)) / n


def lower_bound(terms: np.ndarray, user: np.ndarray, level: float, seed: int = 0) -> float:
    """What the mean of terms exceeds, but for so small a probability, where users come in clusters and differ in how often they come.

    The lower of two bounds, since either is too high somewhere: the bootstrap-t's, which follows skewed terms, as far as its resamples reach; and
    Student's, with a standard error that leaves each user out in turn (CR3; Bell and McCaffrey 2002), which follows few users with many terms. Its
    degrees of freedom are Satterthwaite's, from what users of their sizes contribute to the variance if a user's terms are correlated as they
    seem to be.

    user : codes from 0 [n]
    """
    users = int(user.max()) + 1
    sums, counts = np.bincount(user, terms, users), np.bincount(user, minlength=users).astype(np.float64)
    n, mean = counts.sum(), float(terms.mean())
    share = counts / n
    residual = (sums - mean * counts) / n / np.maximum(1.0 - share, 1e-9)
    error = math.sqrt(float((residual**2).sum()))
    alone, together = float(((terms - mean) ** 2).sum()), float(((sums - mean * counts) ** 2).sum())
    room = float((counts**2).sum() / n) - 1.0
    correlation = min(max((together / max(alone, 1e-300) - 1.0) / room, 0.0), 1.0) if room > 0 else 0.0
    weight = counts * (1.0 + (counts - 1.0) * correlation)
    freedom = max(float(weight.sum() ** 2 / (weight**2).sum()) - 1.0, 1.0)
    bound = mean - float(stdtrit(freedom, 1.0 - level)) * error
    if level * RESAMPLES >= LEAST_BEYOND:
        bound = min(bound, bootstrap(terms, user, confidence=1.0 - 2.0 * level, seed=seed).low)
    return bound


def effective(w: np.ndarray) -> float:
    """Effective sample size (Kish 1965): sum(w)² / sum(w²)."""
    return float(w.sum() ** 2 / max((w**2).sum(), 1e-300))


def modelled(
    state_ND: np.ndarray, action_NK: np.ndarray, r: np.ndarray, user: np.ndarray, *played_MNK: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """What a model of the reward says of the logged actions, q [n], and of others, a mean over the M that a policy draws, v [n]: a ridge
    regression on states, actions and their products, learned on other users.

    Cross-fitted (Chernozhukov et al. 2018): no user's term knows its own reward.
    """
    fold = np.random.default_rng(seed).integers(0, FOLDS, int(user.max()) + 1)[user]
    actions = action_NK[None], *played_MNK
    found = tuple(np.zeros(len(r)) for _ in actions)
    for place in range(FOLDS):
        mine = fold == place
        x = _columns(state_ND[~mine], action_NK[~mine])
        weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ r[~mine])
        for worth, drawn in zip(found, actions, strict=True):
            worth[mine] = np.mean([_columns(state_ND[mine], one[mine]) @ weights for one in drawn], 0)
    return found


def _columns(state_ND: np.ndarray, action_NK: np.ndarray) -> np.ndarray:
    """1, states, their squares, actions, their squares, and states times actions: [n, C]."""
    n = len(state_ND)
    x, a = state_ND.astype(np.float64), action_NK.astype(np.float64)
    products = (x[:, :, None] * a[:, None, :]).reshape(n, -1)
    return np.concatenate([np.ones((n, 1)), x, x**2, a, a**2, products], 1)


@dataclass(frozen=True)
class Evaluation:
    """What a policy is worth more than the one that logged, a decision, by estimator, and what the log can bear.

    intervals : of the differences; surely: what the doubly robust difference exceeds, but for `level`; production: of what was earned
    segments : of the doubly robust difference by segment
    effective, largest, weight : effective sample size and largest weight of either, and the mean one of the policy that is evaluated, which is
        1 where the log's densities are right
    shuffled : share of the intervals of the doubly robust difference that miss 0 when the rewards are dealt out anew, SHUFFLES times
    """

    intervals: dict[str, Interval]
    surely: float
    production: Interval
    segments: dict[str, Interval]
    effective: float
    largest: float
    weight: Interval
    shuffled: float


def against_production(
    r: np.ndarray,
    w: tuple[np.ndarray, np.ndarray],
    q: np.ndarray,
    v: tuple[np.ndarray, np.ndarray],
    user: np.ndarray,
    segments: Mapping[str, np.ndarray],
    *,
    confidence: float = 0.95,
    level: float = 0.025,
    most: float = 20.0,
    seed: int = 0,
) -> Evaluation:
    """The difference to production, paired by decision, with every estimator.

    w, v : of the policy that is evaluated and of production, which explores as that does, and maybe less than the log did
    segments : masks [n]
    """
    estimators: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "ips": lambda w, v: ips(r, w),
        "snips": lambda w, v: snips(r, w),
        "dm": lambda w, v: dm(v),
        "dr": lambda w, v: dr(r, w, q, v),
        "switch_dr": lambda w, v: switch_dr(r, w, q, v, most),
    }
    terms = {name: terms_of(w[0], v[0]) - terms_of(w[1], v[1]) for name, terms_of in estimators.items()}
    random = np.random.default_rng(seed)
    shuffled = [(w[0] - w[1]) * (random.permutation(r) - r.mean()) for _ in range(SHUFFLES)]
    everything = [*terms.values(), r, w[0], *[terms["dr"]] * len(segments), *shuffled]
    among = [None] * (len(terms) + 2) + list(segments.values()) + [None] * SHUFFLES
    found = bootstraps(everything, user, among, confidence=confidence, seed=seed)
    names = len(terms)
    return Evaluation(
        dict(zip(terms, found[:names], strict=True)),
        lower_bound(terms["dr"], user, level, seed),
        found[names],
        dict(zip(segments, found[names + 2 : -SHUFFLES], strict=True)),
        min(map(effective, w)),
        float(max(w[0].max(), w[1].max())),
        found[names + 1],
        float(np.mean([not one.low <= 0 <= one.high for one in found[-SHUFFLES:]])),
    )
