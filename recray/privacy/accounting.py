"""Privacy accounting: composed privacy loss distributions of the Poisson-subsampled Gaussian mechanism (PRV,
arXiv 2106.02848).

Neighbouring data sets differ by all events of one user (add or remove).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from recray.config import PrivacySettings
from recray.errors import SettingsError

if TYPE_CHECKING:
    from recray.bundle import PrivacyStatement

TOLERANCE = 0.01  # of ε, in the accountant and in the search for σ
SIGMA_TOLERANCE = 0.005  # of σ
MAX_SIGMA = 1e4
MAX_EPSILON = 200.0
TAILS = 2e-10
"""Part of δ for the missing tails of the noise: they end at 9.4 standard deviations (2.3e-21 of a draw), for
up to 2^36 draws.
"""


@dataclass(frozen=True)
class Mechanism:
    """The mechanism of a training: `steps` Poisson-subsampled Gaussian steps on gradients of users.

    counts_sigma : standard deviation of Gaussian noise, added once to counts to which each user adds a vector
        of length 1; 0: no counts
    users : number of users, estimated from the holdout users; only used as a divisor of the sums
    part, parts : the users are this one of so many parts of the population
    """

    sigma: float
    rate: float
    steps: int
    clipping_norm: float
    delta: float
    users: int
    counts_sigma: float = 0.0
    part: int = 0
    parts: int = 1

    @property
    def epsilon(self) -> float:
        """ε of the whole training at `delta`."""
        return epsilon_of([Steps(self.sigma, self.rate, self.steps), *self.releases(1)], self.delta)

    def releases(self, number: int) -> list[Steps]:
        """Steps that account for `number` releases of the counts."""
        return [Steps(self.counts_sigma, 1.0, number)] if self.counts_sigma and number else []

    def summary_lines(self) -> list[str]:
        """The privacy statement as lines of text."""
        statement = self.statement()
        counts = f", item counts once at σ {self.counts_sigma:.3g}" if self.counts_sigma else ""
        details = (
            f"σ {self.sigma:.3g}, q {self.rate:g}, {self.steps} steps, C {self.clipping_norm:g}{counts}, "
            f"{statement['accountant']}"
        )
        users = (
            f"about {self.users} users"
            if self.parts == 1
            else f"about {self.users} users, part {self.part + 1} of {self.parts}"
        )
        return [
            f"private training: ε {self.epsilon:.2f} at δ {self.delta:g} for each of {users}, who are "
            f"{statement['unit']}; "
            f"neighbours differ by one user; {details}",
            f"protected: {statement['protected']}",
            *(f"not protected: {claim}" for claim in statement["not_protected"]),
        ]

    def statement(self) -> PrivacyStatement:
        """The privacy statement of the weights: what is protected and what is not."""
        return {
            "differential_privacy": True,
            "epsilon": round(self.epsilon, 4),
            "sigma": self.sigma,
            "rate": self.rate,
            "steps": self.steps,
            "clipping_norm": self.clipping_norm,
            "delta": self.delta,
            "users": self.users,
            "counts_sigma": self.counts_sigma,
            "part": self.part,
            "parts": self.parts,
            "unit": "protected with all their events",
            "adjacency": "add or remove one user: two logs are neighbours if one has a user with all "
            "events, and the other does not",
            "accountant": "PRV (Opacus)",
            "sampling": "Poisson",
            "protected": "the weights and everything computed from them, against anyone who sees them, for "
            "training users",
            "not_protected": [
                "a user's own recommendation list, which is computed from the user's own history, and the "
                "fact that it exists",
                "holdout users: the end of the data, event types, the estimated number of users, validation, "
                "promotion criteria, metrics, and impressions and outcomes in MLflow come from them alone",
                "the catalogue (data.items), which is treated as public",
                "digests of the data: with all other users' events, they reveal whether a user is present",
                "the output of jobs, and all files under storage.root except bundles and reports: datasets, "
                "collected events, quarantine",
                "figures of an audit, whose weights are discarded",
                "against anyone who reads the events, the checkpoints of a running training, or the memory "
                "of the machine",
            ],
            "randomness": "noise of ChaCha20 under keys of the operating system, in multiples of a grid, as "
            f"are the sums; δ includes {TAILS:g} for its tails",
        }


def mechanism_of(options: PrivacySettings, users: int) -> Mechanism:
    """The mechanism for the settings.

    Raises SettingsError for a δ above 0.1 / users, or for an ε that no noise reaches.
    """
    if options.delta * users > 0.1 or not users:
        raise SettingsError(
            f"privacy.delta: {options.delta:g} is more than a tenth of 1/{users}: a δ of 1/users allows one "
            "user's data to be published",
            f"set it to {0.1 / max(users, 1):.2g} or less",
        )
    sigma, counts = noise_of(options)
    mechanism = Mechanism(
        sigma, options.sampling_rate, options.steps, options.clipping_norm, options.delta, users, counts
    )
    if math.isinf(mechanism.epsilon):
        raise _too_little_noise(sigma)
    return mechanism


def _too_little_noise(sigma: float) -> SettingsError:
    return SettingsError(
        f"privacy.sigma: {sigma:g} gives an ε above {MAX_EPSILON:g}, which protects nobody",
        "raise it, or set privacy.epsilon",
    )


def noise_of(options: PrivacySettings) -> tuple[float, float]:
    """Noise multipliers of the steps and of the counts (0: none).

    Raises SettingsError for an ε that no noise reaches.
    """
    rate, steps, delta, share = options.sampling_rate, options.steps, options.delta, options.counts_share
    if options.sigma is not None:
        alone = epsilon_of([Steps(options.sigma, rate, steps)], delta)
        if math.isinf(alone):
            raise _too_little_noise(options.sigma)
        counts = math.sqrt((1 - share) / share) * sigma_for(alone, delta, 1.0, 1) if share else 0.0
        return options.sigma, counts
    if options.epsilon is not None:
        return split_noise(options.epsilon, delta, rate, steps, share)
    assert options.cap is not None
    return split_noise(options.cap, delta, rate, steps * options.trainings, share, options.trainings)


def split_noise(
    epsilon: float,
    delta: float,
    rate: float,
    steps: int,
    share: float,
    releases: int = 1,
    before: Sequence[Steps] = (),
) -> tuple[float, float]:
    """Noise multipliers of the steps and of the releases of the counts (0: none) that together stay within ε.

    share : share of the counts, as if all were one Gaussian mechanism whose 1/σ² is the sum of its parts'

    Raises SettingsError as `sigma_for`.
    """
    if not share:
        return sigma_for(epsilon, delta, rate, steps, before), 0.0
    counts = sigma_for(epsilon, delta, 1.0, releases, before) / math.sqrt(share)
    return sigma_for(epsilon, delta, rate, steps, [*before, Steps(counts, 1.0, releases)]), counts


class Steps(NamedTuple):
    """Steps of one mechanism: noise multiplier σ, sampling rate q, and number of steps."""

    sigma: float
    rate: float
    number: int


def epsilon_of(spent: Sequence[Steps], delta: float) -> float:
    """Upper bound of the composed ε of these steps at δ; 0 without steps, infinite above MAX_EPSILON."""
    history = tuple(sorted(group_steps(spent)))  # their order is irrelevant
    return _composed(history, delta) if history else 0.0


def group_steps(spent: Sequence[Steps]) -> list[Steps]:
    """The same steps, merged by mechanism."""
    counts: dict[tuple[float, float], int] = {}
    for sigma, rate, number in spent:
        counts[sigma, rate] = counts.get((sigma, rate), 0) + number
    return [Steps(sigma, rate, number) for (sigma, rate), number in counts.items() if number]


@lru_cache(maxsize=4096)
def _composed(history: tuple[Steps, ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    delta -= TAILS
    if delta <= 0:
        return math.inf
    rough, accountant = RDPAccountant(), PRVAccountant()
    rough.history = accountant.history = [tuple(steps) for steps in history]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that its bound is loose
        if rough.get_epsilon(delta) > MAX_EPSILON:
            return math.inf  # too large for the accountant, and no protection
        return float(accountant.get_epsilon(delta, eps_error=TOLERANCE))


def sigma_for(epsilon: float, delta: float, rate: float, count: int, before: Sequence[Steps] = ()) -> float:
    """The smallest noise multiplier (to 0.5 %) with which `count` steps, after the steps `before`, stay
    within ε.

    Raises SettingsError if there is none.
    """
    if epsilon_of(before, delta) >= epsilon:
        raise SettingsError(
            f"privacy: ε {epsilon:g} is already spent", "raise the cap, or use a new population"
        )

    def spent_epsilon(sigma: float) -> float:
        return epsilon_of([*before, Steps(sigma, rate, count)], delta)

    low, high, at_low, at_high = 0.0, 1.0, math.inf, spent_epsilon(1.0)
    while at_high > epsilon:
        low, high, at_low = high, 2 * high, at_high
        if high > MAX_SIGMA:
            raise SettingsError(
                f"privacy: no noise keeps {count} steps at a rate of {rate:g} within ε {epsilon:g}",
                "lower privacy.steps or privacy.sampling_rate",
            )
        at_high = spent_epsilon(high)
    while high - low > SIGMA_TOLERANCE * high:
        middle = _next_sigma(low, high, at_low, at_high, epsilon)
        if (spent := spent_epsilon(middle)) > epsilon:
            low, at_low = middle, spent
        else:
            high, at_high = middle, spent
    return high


def _next_sigma(low: float, high: float, at_low: float, at_high: float, epsilon: float) -> float:
    """The next σ to try in the search for the one that spends ε.

    log ε is nearly linear in log σ. The next σ lies slightly past the crossing of that line, on the wider
    side of the bracket; without a line, it is the middle.
    """
    if math.isinf(at_low) or at_high <= 0 or at_low <= at_high:
        return (low + high) / 2
    share = math.log(at_low / epsilon) / math.log(at_low / at_high)
    crossing = low * (high / low) ** share
    margin = SIGMA_TOLERANCE * crossing / 3
    sigma = crossing + margin if high - crossing > crossing - low else crossing - margin
    return sigma if low < sigma < high else (low + high) / 2
