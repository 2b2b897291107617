"""Noise that hides: its distribution, and that its last bits, unlike those of noise in 32 bits, tell no
neighbour from another.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from test_engine import D, T, make, make_batch, private

from recray.model.losses import Targets
from recray.privacy import noise
from recray.privacy.accounting import TAILS, Steps, epsilon_of
from recray.privacy.noise import GRID, GridNoise, gaussian, random_bits, uniform

TRIALS, BY_CHANCE = 40, 29  # of 40 fair coins 30 or more are heads in .1 % of all cases


class NoiseOf32Bits:
    """As it was: normal numbers of 32 bits, added to a sum of 32 bits."""

    def __init__(self, multiplier: float, contribution: float, numbers: int) -> None:
        self.deviation = multiplier * contribution
        self.random = np.random.default_rng()

    def to_grid(self, total):
        return total

    def draw_like(self, whole):
        return self.deviation * torch.from_numpy(self.random.standard_normal(tuple(whole.shape), np.float32))

    def from_grid(self, whole):
        return whole


def made_by(released: torch.Tensor, total: torch.Tensor, deviation: float) -> float:
    """Share of the numbers that noise of 32 bits could have made of this sum: what the last bits say."""
    normal = ((released.double() - total.double()) / deviation).float()
    is_on_grid = torch.zeros(len(normal), dtype=torch.bool)
    for near in (
        normal,
        torch.nextafter(normal, torch.tensor(-math.inf)),
        torch.nextafter(normal, torch.tensor(math.inf)),
    ):
        is_on_grid |= deviation * near + total == released
    return float(is_on_grid.double().mean())


def test_its_distribution_is_the_normal_one():
    drawn = gaussian(1_000_000)
    assert abs(drawn.mean()) < 4e-3 and abs(drawn.std() - 1) < 4e-3
    assert abs(stats.skew(drawn)) < 0.02 and abs(stats.kurtosis(drawn)) < 0.04
    assert stats.kstest(drawn[:200_000], "norm").pvalue > 1e-4
    pairs = drawn.reshape(2, -1)  # a sine and its cosine lie half of it apart
    assert abs(np.corrcoef(pairs)[0, 1]) < 5 / math.sqrt(pairs.shape[1]) and abs(
        np.corrcoef(pairs**2)[0, 1]
    ) < 5 / math.sqrt(pairs.shape[1])


def test_uniform_numbers_are_uniform_and_all_bits_are_drawn():
    assert stats.kstest(uniform(200_000), "uniform").pvalue > 1e-4 and uniform(1000).max() < 1
    bits = np.unpackbits(random_bits(100_000).view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(bits))


@pytest.mark.parametrize("count", [0, 1, 2, 7, noise.CHUNK + 3])
def test_so_many_are_drawn_and_never_the_same(count):
    first, second = gaussian(count), gaussian(count)
    assert len(first) == len(second) == count and np.isfinite(first).all()
    assert count == 0 or not np.array_equal(first, second)


@pytest.mark.parametrize(("multiplier", "contribution"), [(0.5, 1.0), (10.0, 0.3), (1e-9, 1.0), (40.0, 1e-4)])
def test_what_is_released_is_whole_multiples_of_a_grid_with_noise_of_the_size_that_is_accounted_for(
    multiplier, contribution
):
    numbers = 200_000
    drawn = GridNoise(multiplier, contribution, numbers)
    assert drawn.grid <= GRID * multiplier * contribution and math.log2(drawn.grid) % 1 == 0
    total = torch.randn(numbers) * contribution
    whole = drawn.to_grid(total)
    assert (
        whole.dtype == torch.int64
        and (whole.double() * drawn.grid - total.double()).abs().max() <= drawn.grid / 2
    )
    added = drawn.draw_like(whole)
    deviation = float(added.double().std()) * drawn.grid
    least = multiplier * (
        contribution + drawn.grid * math.sqrt(numbers)
    )  # two neighbours' sums may be so far apart once they are rounded
    assert least <= drawn.deviation <= 1.01 * least and deviation == pytest.approx(drawn.deviation, rel=0.01)
    assert torch.equal(drawn.from_grid(whole), (whole.double() * drawn.grid).float())


def test_the_control_of_an_audit_has_none():
    total = torch.randn(1000)
    drawn = GridNoise(0.0, 1.0, 1000)
    whole = drawn.to_grid(total)
    assert not drawn.draw_like(whole).any() and torch.allclose(drawn.from_grid(whole), total, atol=1e-5)


def recognised(kind) -> int:
    """Of two neighbouring sums, how often the last bits say right which one it was: σ 10, where ε .41 is
    promised.
    """
    right = 0
    for attempt in range(TRIALS):
        random = torch.Generator().manual_seed(attempt)
        others = torch.randn(2000, generator=random)
        user = torch.randn(2000, generator=random)
        sums = [others, others + user / user.norm()]
        there = attempt % 2
        drawn = kind(10.0, 1.0, 2000)
        whole = drawn.to_grid(sums[there])
        released = drawn.from_grid(whole + drawn.draw_like(whole))
        without, with_it = (made_by(released, total, 10.0) for total in sums)
        right += (with_it > without) == bool(there) if with_it != without else attempt % 4 < 2
    return right


def test_last_bits_do_not_tell_which_of_two_sums_was_released():
    assert recognised(NoiseOf32Bits) == TRIALS, "the attack works where noise has 32 bits"
    assert recognised(GridNoise) <= BY_CHANCE


def only(batch, targets, rows_BT: torch.Tensor):
    """A batch without the events outside of a mask, and without what was asked at them."""
    keep = rows_BT[batch.user_N, batch.position_N]
    count = targets.offsets.diff()
    targets_kept = targets.item[torch.repeat_interleave(keep, count)]
    offsets = torch.cat([count.new_zeros(1), count[keep].cumsum(0)])
    fields = {name: getattr(batch, name)[keep] for name in ("user_N", "position_N", "day_N", "context_NC")}
    return batch._replace(
        item_BT=batch.item_BT * rows_BT, event_BT=batch.event_BT * rows_BT, **fields
    ), Targets(offsets, targets_kept)


def longest(number: int):
    """A batch of six in which somebody is asked at the last position."""
    return next(
        one
        for seed in range(100)
        if int((one := make_batch(users=6, seed=100 * number + seed))[0].position_N.max()) == T - 1
    )


class Onlooker:
    """Sees the gradient of a table as a step releases it."""

    def __init__(self, step, table: torch.Tensor) -> None:
        self.place = next(number for number, one in enumerate(step.optimizer.params) if one is table)
        step.canaries = self

    def plant(self, gradients) -> None:
        pass

    def observe(self, gradients, users) -> None:
        self.seen = users * gradients[self.place].clone()


def on_the_lattice_without(kind, numbers: int, deviation: float) -> float:
    """What `made_by` finds where the sum is 0."""
    drawn = kind(deviation, 1.0, numbers)
    zeros = torch.zeros(numbers)
    whole = drawn.to_grid(zeros)
    return made_by(drawn.from_grid(whole + drawn.draw_like(whole)), zeros, drawn.deviation)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [(NoiseOf32Bits, 36, TRIALS), (GridNoise, TRIALS - BY_CHANCE, BY_CHANCE)]
)
def test_positions_that_nobody_else_reaches_do_not_tell_a_user(kind, least, most, monkeypatch):
    """A user with a history twice as long as all others is there or not, in a real step; where nobody else
    is, the sum is 0 without it.
    """
    monkeypatch.setattr("recray.privacy.engine.GridNoise", kind)
    right, deviation = 0, 1.3
    usual = np.median([on_the_lattice_without(kind, T // 2 * D, deviation) for _ in range(TRIALS + 1)])
    for attempt in range(TRIALS):
        batch, targets = longest(attempt)
        user = int(batch.user_N[batch.position_N.argmax()])
        is_own_row = (torch.arange(6) == user)[:, None].expand(6, T)
        others = ~is_own_row & (torch.arange(T) < T // 2)
        there = attempt % 2
        model = make("sasrec")
        step = private(model, 1.0, noise=deviation, rate=1e-6)
        onlooker = Onlooker(step, model.positions.weight)
        step.step([only(batch, targets, others | is_own_row if there else others)])
        alone = onlooker.seen[T // 2 : T].flatten()
        on_the_lattice = made_by(alone, torch.zeros_like(alone), step.optimizer.noise.deviation)
        right += (
            (on_the_lattice < usual) == bool(there)
            if on_the_lattice != usual or kind is NoiseOf32Bits
            else attempt % 4 < 2
        )
    assert least <= right <= most


def test_delta_pays_for_the_tails():
    steps = [Steps(1.0, 0.01, 100)]
    assert epsilon_of(steps, 1e-5) <= epsilon_of(steps, 1e-5 - TAILS * 1e3)
    assert math.isinf(epsilon_of(steps, TAILS))
