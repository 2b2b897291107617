"""Lower bounds of ε: against exact chances, against mechanisms whose ε is known, and on trainings with and
without noise.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from conftest import private_overrides
from scipy.stats import norm

from recray.config import load_settings
from recray.errors import SettingsError
from recray.model.network import Network
from recray.model.shape import PRESETS, Shape
from recray.privacy import engine, noise, norms
from recray.privacy.accounting import Mechanism, mechanism_of
from recray.privacy.audit import Bound, Canaries, bound, chance_of, lower_bound, true_positives
from recray.privacy.watch import Finding, StepMonitor, check_repeated_noise
from recray.testing.published import prepare_here
from recray.training.audit import run_monitored, sequence_losses, train_monitored
from recray.training.batches import TrainingBatches, users_learned
from recray.training.canaries import synthetic_users
from recray.training.plan import training_settings
from recray.training.worker import build_loop


def test_the_chance_of_right_guesses_is_that_of_a_biased_coin_and_delta_adds_to_it():
    chance = [math.comb(10, k) * 0.75**k * 0.25 ** (10 - k) for k in range(11)]
    assert chance_of(10, 10, 9, math.log(3), 0.0) == pytest.approx(sum(chance[9:]))
    fewer = max(sum(chance[9 - i : 9]) / i for i in range(1, 10))
    assert chance_of(20, 10, 9, math.log(3), 1e-4) == pytest.approx(sum(chance[9:]) + 2 * 20 * 1e-4 * fewer)
    assert chance_of(20, 10, 0, 1.0, 0.5) == 1.0


def test_the_bound_is_where_the_chance_reaches_what_is_allowed():
    epsilon = lower_bound(1000, 300, 240, 1e-6)
    assert chance_of(1000, 300, 240, epsilon, 1e-6) <= 0.05 < chance_of(1000, 300, 240, epsilon + 0.01, 1e-6)
    assert lower_bound(1000, 300, 150, 1e-6) == 0.0


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_randomised_response_is_bounded_near_its_epsilon_and_seldom_above(epsilon):
    random = np.random.default_rng(0)
    bounds = []
    for _ in range(40):
        planted = random.random(4000) < 0.5
        truth = random.random(4000) < 1 / (1 + math.exp(-epsilon))
        bounds.append(
            bound(planted, np.where(truth, planted, ~planted) + 1e-3 * random.random(4000), 0.0).epsilon
        )
    assert np.mean(np.array(bounds) > epsilon) <= 0.1
    assert np.median(bounds) > 0.8 * epsilon


def test_a_gaussian_mechanism_is_not_refuted_at_its_epsilon_and_is_far_below():
    random = np.random.default_rng(1)
    sigma, delta = 1.0, 1e-5

    def delta_at(epsilon):  # the exact δ at ε (Balle and Wang, arXiv 1805.06530)
        return norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(
            -0.5 / sigma - epsilon * sigma
        )

    claim = next(e for e in np.arange(0, 10, 0.01) if delta_at(e) <= delta)
    planted = random.random(5000) < 0.5
    lower = bound(planted, planted + sigma * random.normal(size=5000), delta)
    assert 0.3 < lower.epsilon < claim
    assert lower.verdict(claim) == "not refuted" and lower.verdict(0.2) == "refuted"


def test_few_canaries_cannot_tell():
    planted = np.arange(8) < 4
    epsilon = bound(planted, planted.astype(float), 1e-6)
    assert epsilon.correct == epsilon.guesses and epsilon.verdict(3.0) == "cannot tell"
    assert Bound(0.0, 5.0, 8, 8, 4).verdict(3.0) == "not refuted"


def test_true_positives_allow_so_many_false_alarms():
    others, members = np.arange(100.0), np.array([-1.0, 0.5, 1.5, 50.0])
    assert true_positives(members, others, 0.0) == 0.25
    assert true_positives(members, others, 0.01) == 0.5
    assert true_positives(members, others, 0.02) == 0.75


def test_canaries_lie_apart_and_are_planted_at_their_rate():
    weights = [torch.zeros(7, 3), torch.zeros(5), torch.zeros(2, 2, 2)]
    canaries = Canaries(weights, 34, 0.25, 0.5, entropy=0)
    everywhere = [torch.full_like(weight, 3.0) for weight in weights]
    canaries.is_present_M[:], canaries.rate = True, 1.0
    canaries.plant(everywhere)
    assert all((gradient == 3.5).all() for gradient in everywhere)
    canaries.observe([gradient / 4 for gradient in everywhere], users=4)
    assert (canaries.membership_score_M == 0.5).all(), "what others add is known"
    canaries = Canaries(weights, 30, 0.25, 1.0, entropy=0)
    for _ in range(2000):
        total = [torch.zeros_like(weight) for weight in weights]
        canaries.plant(total)
        canaries.observe(total, users=1)
    assert (
        canaries.membership_score_M[~canaries.is_present_M] == 0
    ).all() and 5 < canaries.is_present_M.sum() < 25
    np.testing.assert_allclose(canaries.membership_score_M[canaries.is_present_M] / 2000, 0.25, atol=0.05)
    with pytest.raises(SettingsError, match="audit_canaries"):
        Canaries(weights, 35, 0.25, 1.0)


@pytest.fixture(scope="module")
def settings(synthetic_folder, tmp_path_factory):
    return load_settings(
        None,
        [
            *private_overrides(synthetic_folder, tmp_path_factory.mktemp("audit")),
            "privacy.steps=40",
            "privacy.sigma=2",
        ],
    )


@pytest.fixture(scope="module")
def dataset(settings):
    return prepare_here(settings)


def test_a_training_keeps_its_claim_and_one_without_noise_is_caught(settings, dataset):
    mechanism = mechanism_of(settings.privacy, users_learned(dataset))
    refutations = {}
    for sigma in (mechanism.sigma, 0.0):
        run = train_monitored(
            str(dataset.path), training_settings(settings), {**vars(mechanism), "sigma": sigma}, 1000
        )
        refutations[sigma] = bound(run["planted"], run["seen"], settings.privacy.delta)
    assert refutations[mechanism.sigma].epsilon < mechanism.epsilon
    assert refutations[mechanism.sigma].epsilon > 0.2, "canaries are seen through the noise"
    assert refutations[0.0].verdict(3.0) == refutations[0.0].verdict(1.0) == "refuted"


def looked_at(settings, dataset, mutate=lambda loop: None, rows=8, **parts) -> dict[str, Finding]:
    """What is found of a training of 10 steps with made-up users, after something was done to it."""
    mechanism = Mechanism(sigma=1.0, rate=0.2, steps=10, clipping_norm=0.5, delta=1e-4, users=200, **parts)
    random = np.random.default_rng()
    loop = build_loop(
        dataset.with_shard(synthetic_users(dataset, rows, random)),
        training_settings(settings),
        torch.device("cpu"),
        None,
        vars(mechanism),
    )
    mutate(loop)
    monitor = run_monitored(loop, mechanism, 0, rows, random)
    assert len(monitor["planted"]) == rows and np.isfinite(monitor["seen"]).all()
    return {finding["name"]: Finding(**finding) for finding in monitor["findings"]}


def test_a_sound_training_has_no_findings_and_its_made_up_users_are_clipped(settings, dataset):
    findings = looked_at(settings, dataset)
    assert [finding for finding in findings.values() if not finding.passed] == []
    assert (
        "no gradient needed clipping" not in findings["contribution"].text
        and "added 0.5" in findings["contribution"].text
    )


def test_a_training_on_a_part_of_the_users_is_audited_alike(settings, dataset):
    """With `privacy.shards`: the made-up users are in whichever part learns."""
    for part in (0, 1):
        findings = looked_at(settings, dataset, part=part, parts=2)
        assert [finding for finding in findings.values() if not finding.passed] == []


@pytest.mark.slow
@pytest.mark.second
def test_twenty_sound_trainings_have_no_findings(settings, dataset):
    assert [
        finding for _ in range(20) for finding in looked_at(settings, dataset).values() if not finding.passed
    ] == []


def without_cross_term(self, gradient_BTD, along_BT=None):
    return (self.squared + norms.lookup_norms(self.item_BT, gradient_BTD)).clamp(min=0)


def seeded(count):
    return np.random.default_rng(0).standard_normal(count)


MUTANTS = {
    "clipping off": ("contribution", lambda loop, patch: setattr(loop.private, "clipping_norm", 1e9)),
    "clipping at 2 C": ("contribution", lambda loop, patch: setattr(loop.private, "clipping_norm", 1.0)),
    "the cross term left out": (
        "contribution",
        lambda loop, patch: patch.setattr(norms.ScoredTable, "table_norms", without_cross_term),
    ),
    "every user in every step": (
        "rate",
        lambda loop, patch: setattr(loop.sampler, "draw", lambda: loop.sampler.own_users),
    ),
    "no noise": ("noise", lambda loop, patch: setattr(loop.private.optimizer.noise, "deviation", 0.0)),
    "a quarter of the noise": (
        "noise",
        lambda loop, patch: setattr(loop.private.optimizer.noise, "deviation", 0.125),
    ),
    "noise of a fixed seed": ("fresh noise", lambda loop, patch: patch.setattr(noise, "gaussian", seeded)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_training_that_keeps_less_than_it_promises_is_caught(settings, dataset, monkeypatch, mutant):
    name, mutate = MUTANTS[mutant]
    findings = looked_at(settings, dataset, lambda loop: mutate(loop, monkeypatch))
    assert not findings[name].passed, findings


def test_trainings_that_begin_with_the_same_noise_are_caught():
    """Whatever its size, as that of a generator that is seeded once."""
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 256))
    assert check_repeated_noise({"a": one.tolist(), "b": other.tolist(), "control": [0.0] * 256}).passed
    finding = check_repeated_noise({"a": one.tolist(), "b": other.tolist(), "c": (3 * one).tolist()})
    assert not finding.passed and finding.text == "a and c began with the same noise"


def _watched_rank(rank: int, folder: str, noisy: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    off = {"time_bias": False, "repeat": False, "prior": False}
    model = Network(Shape(**PRESETS["dp"], **off, event_types=1, dim=16, history=8), np.arange(201) > 0, {})
    sgd = torch.optim.SGD(
        [parameter for name, parameter in model.named_parameters() if name != "temperature"], lr=1e-6
    )
    step = engine.PrivateStep(model, sgd, clipping_norm=0.3, noise_multiplier=1.7, expected_users=20.0)
    step.optimizer.rank = 0 if rank in noisy else 1
    step.monitor = StepMonitor(0, 0.1, 1.7 * 0.3, 0.3)
    for _ in range(4):
        step.monitor.record_draw(np.zeros(0, np.int64))
        step.step([])
    passed = {finding.name: finding.passed for finding in step.monitor.findings()}
    torch.save(passed, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("noisy", "sound"), [((0,), True), ((0, 1), False), ((), False)])
def test_noise_on_every_rank_and_on_none_is_caught(tmp_path, noisy, sound):
    processes.start_processes(_watched_rank, (str(tmp_path), noisy), nprocs=2, start_method="fork")
    for rank in range(2):
        outcome = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert outcome["noise"] == sound and (outcome["fresh noise"] or not noisy), outcome


def test_losses_are_those_of_each_user_alone(settings, dataset):
    loop = build_loop(str(dataset.path), training_settings(settings), torch.device("cpu"))
    batches = TrainingBatches(
        dataset, history=20, batch_tokens=500, sequences="last", popularity_prior_days=0, seed=0
    )
    model, sequences = loop.model.eval().requires_grad_(False), batches.last_sequences()
    losses = sequence_losses(model, batches, sequences)
    for user in (0, 5, 17):
        batch, targets = batches.collate(sequences[np.array([user])])
        table = model.items()
        log_share = model.scores(model.hidden(batch, table, None), model.output(table), batch).log_softmax(1)
        each = [
            -log_share[n, targets.item[targets.offsets[n] : targets.offsets[n + 1]]].mean()
            for n in range(len(log_share))
        ]
        assert losses[user] == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_those_who_are_held_out_are_measured_as_if_they_were_learned_from(dataset):
    batches = TrainingBatches(
        dataset, history=20, batch_tokens=500, sequences="last", popularity_prior_days=0, seed=0
    )
    learned, held = batches.last_sequences(), batches.last_sequences(holdout=True)
    for sequences, expected in ((learned, False), (held, True)):
        assert len(sequences) > 30
        for number, shard in enumerate(dataset.shards()):
            users = (
                np.searchsorted(shard.offsets, sequences.start[sequences.shard == number], side="right") - 1
            )
            assert (shard.holdout[users] == expected).all()
            assert (
                sequences.limit[sequences.shard == number] == shard.offsets[users] + shard.split[users, 2]
            ).all(), "all up to the test"
