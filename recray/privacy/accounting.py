"""What steps cost: privacy loss distributions of the Poisson-subsampled Gaussian mechanism, composed (PRV, arXiv 2106.02848).

Neighbouring data sets differ by all events of one user being there or not (add or remove).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from recray.config import PrivacySettings
from recray.errors import SettingsError

TOLERANCE = 0.01  # of epsilon, to which σ is found and the accountant computes
SIGMA_TOLERANCE = 0.005  # of σ
MAX_SIGMA = 1e4
MAX_EPSILON = 200.0
TAILS = 2e-10
"""What δ pays for tails of the noise that end at 9.4 standard deviations (2.3e-21 of a draw), for up to 2^36 draws."""


@dataclass(frozen=True)
class Mechanism:
    """What a training does: a Poisson-subsampled Gaussian mechanism on gradients of users, `steps` times, and Gaussian noise of standard
    deviation `counts_sigma` once on counts to which each user adds a vector of length 1 (0: no counts).

    users : about how many there are, told by those who are held out; it divides the sums, and nothing else rests on it
    part, parts : they are one of so many parts of the population
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
        """So many releases of the counts."""
        return [Steps(self.counts_sigma, 1.0, number)] if self.counts_sigma and number else []

    def words(self) -> list[str]:
        """The statement for a person, a line each."""
        said = self.statement()
        counts = f", item counts once at σ {self.counts_sigma:.3g}" if self.counts_sigma else ""
        how = f"σ {self.sigma:.3g}, q {self.rate:g}, {self.steps} steps, C {self.clipping_norm:g}{counts}, {said['accountant']}"
        who = f"about {self.users} users" if self.parts == 1 else f"about {self.users} users, part {self.part + 1} of {self.parts}"
        return [
            f"private training: ε {self.epsilon:.2f} at δ {self.delta:g} for each of {who}, who are {said['unit']}; "
            f"neighbours differ by one user; {how}",
            f"protected: {said['protected']}",
            *(f"not protected: {text}" for text in said["not_protected"]),
        ]

    def statement(self) -> dict[str, Any]:
        """What is promised and what is not, as it travels with the weights."""
        return {
            "differential_privacy": True,
            "epsilon": round(self.epsilon, 4),
            **asdict(self),
            "unit": "protected with all their events",
            "adjacency": "add or remove one user: two logs are neighbours if one has a user with all events, and the other does not",
            "accountant": "PRV (Opacus)",
            "sampling": "Poisson",
            "protected": "the weights, and whatever is computed from them, against anyone who sees them, for users who are learned from",
            "not_protected": [
                "a user's own list, which is made from the user's own history, and that the list is there",
                "users who are held out: the end of the data, types of events, about how many users there are, validation, gates, metrics, and what "
                "MLflow is told of answers and outcomes, are of them alone",
                "the catalogue (data.items), which is taken for public",
                "digests of the data, by which whoever knows all events but one user's can tell whether the user is there",
                "what jobs print, and what lies under storage.root beside bundles and reports: datasets, collected events, quarantine",
                "figures of an audit, whose trainings are thrown away",
                "against who reads the events, the checkpoints of a training that runs, or the machine's memory",
            ],
            "randomness": f"noise of ChaCha20 under keys of the operating system, in whole multiples of a grid, added to sums in such; δ pays "
            f"{TAILS:g} for its tails",
        }


def mechanism_of(options: PrivacySettings, users: int) -> Mechanism:
    """What the settings ask for. Raises SettingsError for a δ above a tenth of 1/users, or an ε that no noise reaches."""
    if options.delta * users > 0.1 or not users:
        raise SettingsError(
            f"privacy.delta: {options.delta:g} is more than a tenth of 1/{users}: with 1/users one of them could be published as it is",
            f"lower it, to {0.1 / max(users, 1):.2g} or less",
        )
    sigma, counts = noise_of(options)
    found = Mechanism(sigma, options.sampling_rate, options.steps, options.clipping_norm, options.delta, users, counts)
    if math.isinf(found.epsilon):
        raise _promises_nothing(sigma)
    return found


def _promises_nothing(sigma: float) -> SettingsError:
    return SettingsError(f"privacy.sigma: {sigma:g} leaves ε above {MAX_EPSILON:g}, which promises nothing", "raise it, or name an epsilon")


def noise_of(options: PrivacySettings) -> tuple[float, float]:
    """Noise multipliers of the steps and of the counts (0: none). Raises SettingsError for an ε that no noise reaches."""
    rate, steps, delta, share = options.sampling_rate, options.steps, options.delta, options.counts_share
    if options.sigma is not None:
        alone = epsilon_of([Steps(options.sigma, rate, steps)], delta)
        if math.isinf(alone):
            raise _promises_nothing(options.sigma)
        return options.sigma, math.sqrt((1 - share) / share) * sigma_for(alone, delta, 1.0, 1) if share else 0.0
    if options.epsilon is not None:
        return share_out(options.epsilon, delta, rate, steps, share)
    assert options.cap is not None
    return share_out(options.cap, delta, rate, steps * options.trainings, share, options.trainings)


def share_out(
    epsilon: float, delta: float, rate: float, steps: int, share: float, releases: int = 1, before: Sequence[Steps] = ()
) -> tuple[float, float]:
    """Noise multipliers of so many steps and of so many releases of the counts (0: none), which together stay within ε.

    `share` is that of the counts as if all were one Gaussian mechanism, whose 1/σ² is the sum of those of its parts. Raises
    SettingsError as `sigma_for`.
    """
    if not share:
        return sigma_for(epsilon, delta, rate, steps, before), 0.0
    counts = sigma_for(epsilon, delta, 1.0, releases, before) / math.sqrt(share)
    return sigma_for(epsilon, delta, rate, steps, [*before, Steps(counts, 1.0, releases)]), counts


class Steps(NamedTuple):
    """Steps of one mechanism: noise multiplier σ, sampling rate q, and how many."""

    sigma: float
    rate: float
    number: int


def epsilon_of(spent: Sequence[Steps], delta: float) -> float:
    """Upper bound of the ε that these steps have together at δ; 0 without steps, infinite beyond MAX_EPSILON."""
    history = tuple(sorted(grouped(spent)))  # however they came, they are the same
    return _composed(history, delta) if history else 0.0


def grouped(spent: Sequence[Steps]) -> list[Steps]:
    """The same steps, those of one mechanism together."""
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
        warnings.simplefilter("ignore")  # that its bound is a rough one
        if rough.get_epsilon(delta) > MAX_EPSILON:
            return math.inf  # too far for the accountant, and no promise at all
        return float(accountant.get_epsilon(delta, eps_error=TOLERANCE))


def sigma_for(epsilon: float, delta: float, rate: float, count: int, before: Sequence[Steps] = ()) -> float:
    """The smallest noise multiplier (to 0.5 %) with which `count` steps, after those that were taken before, stay within ε.

    Raises SettingsError if none does.
    """
    if epsilon_of(before, delta) >= epsilon:
        raise SettingsError(f"privacy: ε {epsilon:g} is spent already", "raise the cap, or wait for a population that was not used yet")

    def spends(sigma: float) -> float:
        return epsilon_of([*before, Steps(sigma, rate, count)], delta)

    low, high, at_low, at_high = 0.0, 1.0, math.inf, spends(1.0)
    while at_high > epsilon:
        low, high, at_low = high, 2 * high, at_high
        if high > MAX_SIGMA:
            raise SettingsError(
                f"privacy: no noise brings {count} steps at a rate of {rate:g} within ε {epsilon:g}", "take fewer steps, or a lower rate"
            )
        at_high = spends(high)
    while high - low > SIGMA_TOLERANCE * high:
        middle = _between(low, high, at_low, at_high, epsilon)
        if (found := spends(middle)) > epsilon:
            low, at_low = middle, found
        else:
            high, at_high = middle, found
    return high


def _between(low: float, high: float, at_low: float, at_high: float, epsilon: float) -> float:
    """Where to look next for the σ that spends ε: log ε falls nearly straight with log σ, so a little beyond where such a line meets it, on the
    side from which the bracket is still wide; the middle where there is no line."""
    if math.isinf(at_low) or at_high <= 0 or at_low <= at_high:
        return (low + high) / 2
    share = math.log(at_low / epsilon) / math.log(at_low / at_high)
    meets = low * (high / low) ** share
    beyond = SIGMA_TOLERANCE * meets / 3
    found = meets + beyond if high - meets > meets - low else meets - beyond
    return found if low < found < high else (low + high) / 2
