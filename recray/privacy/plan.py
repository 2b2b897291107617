"""What can be afforded: noise for a cap, cadence of trainings, and shards of users by night. Accounting alone, no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recray.errors import SettingsError
from recray.privacy.accounting import Steps, epsilon_of, share_out

CADENCES = (1, 7, 30)
SHARDS = (1, 7)


@dataclass(frozen=True)
class Option:
    """Train every `every_days`, each time on one of `shards` parts of the users.

    trainings : of which one user is part, in the days planned for
    sigma : noise multiplier of each that keeps the cap; None: nothing does
    epsilon : of one user after all of them with the noise that the settings have
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
    """What each cadence needs and spends in so many days, after what was spent before.

    cap : ε of a user
    noise : noise multipliers of one training's steps and item counts (0: none) as the settings have them
    counts_share : of the counts, where the noise is to keep the cap
    """
    cells = [(every, shards, -(-days // (every * shards))) for every in CADENCES for shards in SHARDS]
    known = {}
    for count in {trainings for _, _, trainings in cells}:
        try:
            needed = share_out(cap, delta, rate, count * steps, counts_share, count, before)[0]
        except SettingsError:
            needed = None
        sigma, counts_sigma = noise
        released = [Steps(counts_sigma, 1.0, count)] if counts_sigma else []
        known[count] = needed, epsilon_of([*before, Steps(sigma, rate, count * steps), *released], delta)
    return [Option(every, shards, trainings, *known[trainings]) for every, shards, trainings in cells]
