"""Privacy plan: the noise that keeps a cap, for cadences of training and shards of users. Needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recray.errors import SettingsError
from recray.privacy.accounting import Steps, epsilon_of, split_noise

CADENCES = (1, 7, 30)
SHARDS = (1, 7)


@dataclass(frozen=True)
class Option:
    """Train every `every_days` days, each time on one of `shards` parts of the users.

    trainings : of one user, within the planned days
    sigma : noise multiplier of each training that keeps the cap; None: none does
    epsilon : of one user after all trainings, with the noise of the settings
    """

    every_days: int
    shards: int
    trainings: int
    sigma: float | None
    epsilon: float


def options(
    cap: float,
    delta: float,
    rate: float,
    steps: int,
    noise: tuple[float, float],
    days: int,
    before: Sequence[Steps] = (),
    *,
    counts_share: float = 0.0,
) -> list[Option]:
    """Required noise and spent ε of each cadence over `days`, after the steps spent `before`.

    cap : ε of a user
    noise : noise multipliers of one training's steps and item counts (0: none) in the settings
    counts_share : share of the counts, for the noise that keeps the cap
    """
    cadences = [
        (every_days, shards, -(-days // (every_days * shards)))
        for every_days in CADENCES
        for shards in SHARDS
    ]
    noise_and_epsilon = {}
    for count in {trainings for _, _, trainings in cadences}:
        try:
            needed = split_noise(cap, delta, rate, count * steps, counts_share, count, before)[0]
        except SettingsError:
            needed = None
        sigma, counts_sigma = noise
        released = [Steps(counts_sigma, 1.0, count)] if counts_sigma else []
        noise_and_epsilon[count] = (
            needed,
            epsilon_of([*before, Steps(sigma, rate, count * steps), *released], delta),
        )
    return [
        Option(every_days, shards, trainings, *noise_and_epsilon[trainings])
        for every_days, shards, trainings in cadences
    ]
