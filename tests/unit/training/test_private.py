"""Private training on a small shop: who is learned from, what is drawn, and that ranks stay together."""

import datetime as dt
import json
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from conftest import private_overrides

from recray.config import load_settings
from recray.dataset.reader import History
from recray.errors import DataError, RefusedError, SettingsError
from recray.evaluation.protocol import EvaluationQueries
from recray.inference import Predictor
from recray.model.network import Network
from recray.model.shape import PRESETS, Shape
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, mechanism_of, sigma_for
from recray.privacy.counts import log_counts, weighted_counts
from recray.privacy.engine import PrivateStep
from recray.privacy.ledger import Ledger
from recray.privacy.sampling import PoissonUsers
from recray.testing.published import prepare_here, untrained_bundle
from recray.training.batches import TrainingBatches, users_estimated
from recray.training.plan import training_settings
from recray.training.trainer import _reserve, mechanism_for
from recray.training.worker import build_loop, load_checkpoint, save_checkpoint

NOBODY = History(*np.zeros((4, 0), np.int64))


def private_settings(folder, root, *overrides):
    return load_settings(None, [*private_overrides(folder, root), *overrides])


@pytest.fixture(scope="module")
def settings(synthetic_folder, tmp_path_factory):
    return private_settings(synthetic_folder, tmp_path_factory.mktemp("private"))


@pytest.fixture(scope="module")
def dataset(settings):
    return prepare_here(settings)


def loop_of(settings, dataset, **options):
    mechanism = mechanism_for(settings, dataset)
    return build_loop(
        str(dataset.path),
        training_settings(settings),
        torch.device("cpu"),
        None,
        {**vars(mechanism), **options},
    )


def test_nothing_is_learned_of_test_users(dataset):
    held = [shard.holdout for shard in dataset.shards()]
    assert 0.15 < np.mean(np.concatenate(held)) < 0.35
    batches = TrainingBatches(
        dataset, history=50, batch_tokens=500, sequences="last", popularity_prior_days=0, seed=0
    )
    rows = batches.last_sequences()
    for number, shard in enumerate(dataset.shards()):
        users = np.searchsorted(shard.offsets, rows.start[rows.shard == number], side="right") - 1
        assert not shard.holdout[users].any() and len(np.unique(users)) == len(users)
        assert not shard.train_lengths[shard.holdout].any()
    for part in ("validation", "test"):
        positions = EvaluationQueries(dataset, part).positions
        assert len(positions) > 20
        assert all(held[shard][row] for shard, row, _, _ in positions)


def test_the_cutoffs_are_those_of_the_evaluated_users(dataset):
    times = np.concatenate(
        [shard.timestamp_s[np.repeat(shard.holdout, np.diff(shard.offsets))] for shard in dataset.shards()]
    )
    assert dataset.cut_s("test") == math.ceil(np.quantile(times, 0.9))
    everybody = np.concatenate([shard.timestamp_s for shard in dataset.shards()])
    assert dataset.cut_s("test") != math.ceil(np.quantile(everybody, 0.9))


def test_users_without_a_query_are_learned_from(synthetic_folder, tmp_path):
    dataset = prepare_here(private_settings(synthetic_folder, tmp_path, "split.kind=leave_one_out"))
    for shard in dataset.shards():
        counts = np.diff(shard.offsets)
        assert (shard.train_lengths == np.where(shard.holdout, 0, counts)).all()


def test_dropout_is_not_foreseen(settings, dataset):
    masks = []
    for _ in range(2):
        run = loop_of(settings, dataset, sigma=1e-9)
        assert run.model.shape.dropout > 0
        run.sampler = PoissonUsers(len(run.rows), 0.2, entropy=1)
        run.private_step()
        masks.append(run.model.items.ids.weight.detach().clone())
    assert not torch.allclose(*masks, rtol=1e-4, atol=1e-6)


def test_steps_are_taken_as_accounted_and_end_there(settings, dataset):
    run = loop_of(settings, dataset)
    lines = list(run.run())
    assert [line["steps"] for line in lines] == [5, 10, 12] and run.progress.step == 12
    assert not any("loss" in line for line in lines)
    assert (
        run.private.optimizer.noise_multiplier == 0.5
        and run.private.optimizer.expected_batch_size == 0.2 * users_estimated(dataset)[1]
    )
    assert list(run.run()) == []


def test_two_trainings_draw_other_noise(settings, dataset):
    first, second = (loop_of(settings, dataset) for _ in range(2))
    before = first.model.state_dict()["items.ids.weight"].clone()
    assert torch.equal(before, second.model.state_dict()["items.ids.weight"])
    next(first.run())
    next(second.run())
    assert not torch.equal(first.model.items.ids.weight, second.model.items.ids.weight)


def test_it_learns_with_little_noise(synthetic_folder, tmp_path):
    settings = private_settings(
        synthetic_folder,
        tmp_path,
        "privacy.steps=150",
        "privacy.report_every=150",
        "train.learning_rate=0.01",
    )
    run = loop_of(settings, prepare_here(settings), sigma=0.01)
    untrained = run.validation_ndcg()
    assert next(run.run())["validation_ndcg"] > 2 * untrained


def test_it_learns_from_fixed_features(synthetic_folder, tmp_path):
    fixed = [
        "model.items=features",
        "data.features={category: categorical, brand: categorical, price: numeric, tags: multi, title: text}",
    ]
    steps = ["privacy.steps=150", "privacy.report_every=150", "train.learning_rate=0.01"]
    settings = private_settings(synthetic_folder, tmp_path, *fixed, *steps)
    run = loop_of(settings, prepare_here(settings), sigma=0.01)
    untrained, codes = run.validation_ndcg(), run.model.items.codes()
    assert next(run.run())["validation_ndcg"] > 2 * untrained
    assert torch.equal(run.model.items.codes(), codes)
    assert (codes.norm(dim=1)[1:] - 1).abs().max() < 1e-5 and not codes[0].any()


def test_a_resumed_training_takes_the_steps_that_are_left(settings, dataset, tmp_path):
    first = loop_of(settings, dataset)
    next(first.run())
    save_checkpoint(first, tmp_path)
    second = loop_of(settings, dataset)
    load_checkpoint(second, tmp_path)
    assert torch.equal(first.model.items.ids.weight, second.model.items.ids.weight)
    assert [line["steps"] for line in second.run()] == [10, 12]
    assert "generator" not in json.dumps(second.progress.to_dict())


def test_the_counts_are_of_those_who_are_learned_from_and_each_adds_a_vector_of_length_one(dataset):
    counts = weighted_counts(dataset)
    assert counts[0] == 0
    expected = np.zeros_like(counts)
    for shard in dataset.shards():
        for row in np.flatnonzero(~shard.holdout & (shard.train_lengths > 0)):
            items = set(
                shard.item_index[shard.offsets[row] : shard.offsets[row] + shard.train_lengths[row]].tolist()
            )
            expected[list(items)] += len(items) ** -0.5
    np.testing.assert_allclose(counts, expected)
    each = [_counts_without(dataset, number) for number in range(3)]
    np.testing.assert_allclose([np.linalg.norm(counts - without) for without in each], 1.0)


def _counts_without(dataset, number):
    """The counts if the nth user who is learned from were not there."""

    class Fewer:
        n_items = dataset.n_items

        def shards(self):
            left = number
            for shard in dataset.shards():
                learned = shard.train_lengths.copy()
                rows = np.flatnonzero(learned > 0)
                if 0 <= left < len(rows):
                    learned[rows[left]] = 0
                left -= len(rows)
                yield SimpleNamespace(
                    offsets=shard.offsets, item_index=shard.item_index, train_lengths=learned
                )

    return weighted_counts(Fewer())


def test_the_noise_of_the_counts_has_the_stated_deviation(dataset):
    counts, sigma = weighted_counts(dataset), 0.02
    top, *others = np.argsort(-counts)[:20]
    draws = np.stack([log_counts(dataset, sigma) for _ in range(400)]).astype(float)
    # of the largest count, which has noise of its own
    ratios = np.exp(draws[:, others] - draws[:, [top]]) * counts[top]
    expected = sigma * np.sqrt(1 + (counts[others] / counts[top]) ** 2)
    np.testing.assert_allclose((ratios.std(0) / expected).mean(), 1.0, rtol=0.1)
    assert (draws.max(1) == 0).all() and (draws >= np.log(sigma / (counts.max() + 6 * sigma))).all()


def test_a_private_training_begins_with_the_noised_counts_of_its_ledger(settings, dataset, tmp_path):
    run = loop_of(settings, dataset)
    taken = []
    run.take_steps = lambda steps, counts: taken.append((steps, counts))
    lines = run.run()
    next(lines)
    assert taken == [(0, 1), (5, 0)]
    offset = run.model.offset_V.clone()
    order = np.argsort(-weighted_counts(dataset))[:3]
    assert offset.max() == 0 and offset[order].mean() > offset.mean()
    save_checkpoint(run, tmp_path)
    resumed = loop_of(settings, dataset)
    load_checkpoint(resumed, tmp_path)
    resumed.take_steps = lambda steps, counts: taken.append((steps, counts))
    list(resumed.run())
    assert taken[2:] == [(5, 0), (2, 0)] and torch.equal(resumed.model.offset_V, offset)
    popular = Predictor.of(resumed.model, dataset, 0).recommend([NOBODY], 5, now=0)
    assert (
        popular.source == ["popular"]
        and popular.item_index[0].tolist()
        == (1 + np.argsort(-offset[1:].numpy(), kind="stable")[:5]).tolist()
    )


def test_without_a_share_for_them_there_are_no_counts(synthetic_folder, tmp_path):
    settings = private_settings(synthetic_folder, tmp_path, "privacy.counts_share=0")
    mechanism = mechanism_of(settings.privacy, 100)
    assert mechanism.counts_sigma == 0 and mechanism.releases(1) == []
    run = loop_of(settings, prepare_here(settings))
    run.release_counts()
    assert run.model.offset_V is None


def test_counts_and_steps_together_keep_epsilon(settings):
    options = settings.privacy.model_copy(update={"sigma": None, "epsilon": 2.0, "counts_share": 0.1})
    mechanism = mechanism_of(options, 1000)
    alone = mechanism_of(options.model_copy(update={"counts_share": 0.0}), 1000)
    assert 1.8 < mechanism.epsilon <= 2.0 and alone.sigma < mechanism.sigma < 1.2 * alone.sigma
    steps = epsilon_of([Steps(mechanism.sigma, mechanism.rate, mechanism.steps)], mechanism.delta)
    counts = epsilon_of(mechanism.releases(1), mechanism.delta)
    assert 0 < counts < steps < mechanism.epsilon
    by_sigma = mechanism_of(options.model_copy(update={"sigma": mechanism.sigma, "epsilon": None}), 1000)
    np.testing.assert_allclose(by_sigma.counts_sigma, mechanism.counts_sigma, rtol=0.1)


def test_each_training_learns_from_the_next_part_of_the_users(synthetic_folder, tmp_path):
    settings = private_settings(synthetic_folder, tmp_path, "privacy.shards=3")
    row_counts = []
    for number, day in enumerate((1, 8, 15, 20)):
        dataset = prepare_here(settings, dt.datetime(2024, 4, day, 23, 59, 59, tzinfo=dt.UTC))
        key = f"night {number}"
        mechanism = mechanism_for(settings, dataset, key)
        run = build_loop(
            str(dataset.path), training_settings(settings), torch.device("cpu"), None, vars(mechanism)
        )
        tonight = run.rows.batches.dataset
        assert (mechanism.part, mechanism.parts) == (number % 3, 3) and abs(
            len(run.rows) - mechanism.users
        ) < 0.3 * mechanism.users
        assert np.isclose(weighted_counts(tonight).sum(), _total(tonight))
        next(run.run())
        _reserve(settings, key, dataset, mechanism, None)
        assert mechanism_for(settings, dataset, key) == mechanism, "repeated, it is still its turn"
        row_counts.append(_learned(tonight))
    ledger = Ledger.read(settings.ledger_url(), settings.privacy.population)
    assert row_counts[0] <= row_counts[3] and not (
        row_counts[1] & row_counts[3] or row_counts[2] & row_counts[3] or row_counts[1] & row_counts[2]
    )
    everybody = _learned(dataset)
    assert (
        row_counts[3] | row_counts[2] | row_counts[1] <= everybody
        and len(everybody) / 5 < len(row_counts[3]) < len(everybody) / 2
    )
    assert ledger.members() == len(row_counts[1] | row_counts[2] | row_counts[3])
    with pytest.raises(SettingsError, match="more than a tenth of 1/"):
        mechanism_for(
            private_settings(synthetic_folder, tmp_path, "privacy.shards=3", "privacy.delta=8e-3"), dataset
        )
    with pytest.raises(DataError, match="no training users in part 1 of 3000"):
        mechanism_for(private_settings(synthetic_folder, tmp_path, "privacy.shards=3000"), dataset)


def test_a_ledger_that_does_not_know_a_private_bundle_is_refused(synthetic_folder, tmp_path, dataset):
    settings = private_settings(synthetic_folder, tmp_path)
    said = {"differential_privacy": True, "population": "others"}
    untrained_bundle(settings, dataset, tmp_path / "bundles" / "other", "other", said)
    mechanism = mechanism_for(settings, dataset)
    assert _reserve(settings, "first", dataset, mechanism, None)["run_key"] == "first", (
        "of other users, as one without privacy"
    )
    untrained_bundle(
        settings,
        dataset,
        tmp_path / "bundles" / "mine",
        "mine",
        {**said, "population": settings.privacy.population},
    )
    with pytest.raises(RefusedError, match="does not contain bundle mine"):
        _reserve(settings, "second", dataset, mechanism, None)
    assert [
        run.run_key for run in Ledger.read(settings.ledger_url(), settings.privacy.population).runs()
    ] == ["first"]


def _learned(dataset):
    return {
        user
        for shard in dataset.shards()
        for user in shard.user_ids.filter(pa.array(shard.train_lengths > 0)).to_pylist()
    }


def _total(dataset):
    """Of all users, the square root of how many items each is learned from by."""
    return sum(
        np.sqrt(len(np.unique(shard.item_index[start : start + count])))
        for shard in dataset.shards()
        for start, count in zip(shard.offsets[:-1], shard.train_lengths, strict=True)
    )


def _rank(rank: int, folder: str, settings, path: str, mechanism: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = build_loop(path, training_settings(settings), torch.device("cpu"), None, mechanism)
    drawn = []
    draw = run.sampler.draw

    def watched():
        # some steps find nobody on any rank
        users = draw() if run.progress.step % 4 else np.zeros(0, np.int64)
        drawn.append(users.tolist())
        return users

    run.sampler.draw = watched
    list(run.run())
    assert run.model.offset_V.std() > 0.1 and torch.equal(run.model.offset_V, run.ema_model.offset_V)
    torch.save(
        {"weights": run.model.state_dict(), "steps": run.progress.step, "drawn": drawn}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def test_ranks_draw_apart_and_stay_equal_to_the_bit(settings, dataset, tmp_path):
    arguments = (str(tmp_path), settings, str(dataset.path), vars(mechanism_for(settings, dataset)))
    processes.start_processes(_rank, arguments, nprocs=2, start_method="fork")  # which has imported all
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["steps"] == two["steps"] == 12
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    assert not {user for step in one["drawn"] for user in step} & {
        user for step in two["drawn"] for user in step
    }
    assert one["drawn"] != [[user - 1 for user in step] for step in two["drawn"]]


def _noisy_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)  # of the weights, which are alike
    off = {"time_bias": False, "repeat": False, "prior": False}
    model = Network(Shape(**PRESETS["dp"], **off, event_types=1, dim=64, history=8), np.arange(1001) > 0, {})
    before = model.items.ids.weight.detach().clone()
    sgd = torch.optim.SGD(
        [parameter for name, parameter in model.named_parameters() if name != "temperature"], lr=1.0
    )
    PrivateStep(model, sgd, clipping_norm=0.3, noise_multiplier=1.7, expected_users=20.0).step([])
    torch.save((model.items.ids.weight.detach() - before)[1:], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_add_the_noise_once(tmp_path):
    processes.start_processes(_noisy_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one, two)
    np.testing.assert_allclose(one.std().item(), 1.7 * 0.3 / 20.0, rtol=0.02)


def test_each_user_is_drawn_with_the_chance_that_is_accounted():
    users, rate, steps = 400, 0.1, 2000
    ranks = [PoissonUsers(users, rate, rank=rank, world_size=2, entropy=rank) for rank in range(2)]
    masks = np.zeros((2, steps, users // 2), bool)
    for step in range(steps):
        for rank, sampler in enumerate(ranks):
            drawn = sampler.draw()
            assert (drawn % 2 == rank).all()
            masks[rank, step, drawn // 2] = True
    share = masks.mean(1)
    assert np.abs(share - rate).max() < 5 * math.sqrt(rate * (1 - rate) / steps)
    together = (masks[0] & masks[1]).mean()  # what independent ranks have in common
    assert abs(together - rate**2) < 5 * math.sqrt(rate**2 / masks[0].size)
    sizes = masks.sum(2).sum(0)
    np.testing.assert_allclose(sizes.var(), users * rate * (1 - rate), rtol=0.2)


def test_epsilon_is_that_of_the_literature():
    # what 300 steps of 1,024 expected users out of 6,040 need at δ 1e-5
    for epsilon, sigma in ((1, 11.3), (3, 4.24), (8, 1.94)):
        np.testing.assert_allclose(epsilon_of([Steps(sigma, 1024 / 6040, 300)], 1e-5), epsilon, rtol=0.02)
    np.testing.assert_allclose(sigma_for(8.0, 1e-5, 1024 / 6040, 300), 1.94, rtol=0.02)
    spent = [Steps(4.0, 0.1, 100)]
    assert epsilon_of([], 1e-5) == 0.0 < epsilon_of(spent, 1e-5) < epsilon_of(spent * 2, 1e-5)
    assert sigma_for(3.0, 1e-5, 0.1, 100, before=spent) > sigma_for(3.0, 1e-5, 0.1, 100)


@pytest.mark.parametrize(
    ("nights", "epsilon"), [(7, 2.88), (30, 6.66), pytest.param(365, 32.8, marks=pytest.mark.slow)]
)
def test_the_same_users_every_training_cost_more_and_more(nights, epsilon):
    repeated_nightly = Steps(sigma_for(1.0, 1e-5, 1024 / 6040, 300), 1024 / 6040, 300)
    np.testing.assert_allclose(
        epsilon_of([repeated_nightly._replace(number=300 * nights)], 1e-5), epsilon, rtol=0.02
    )


def test_what_cannot_be_kept_is_refused_before_the_first_step(settings):
    with pytest.raises(SettingsError, match="more than a tenth of 1/1000"):
        mechanism_of(settings.privacy.model_copy(update={"delta": 1.01e-4}), 1000)
    with pytest.raises(SettingsError, match="protects nobody"):
        mechanism_of(settings.privacy.model_copy(update={"sigma": 0.01}), 1000)
    with pytest.raises(SettingsError, match="already spent"):
        sigma_for(0.5, 1e-5, 0.1, 100, before=[Steps(1.0, 0.1, 100)])
    mechanism = mechanism_of(settings.privacy.model_copy(update={"sigma": None, "epsilon": 2.0}), 1000)
    assert 1.8 < mechanism.epsilon <= 2.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("privacy.epsilon=0", "greater than 0"),
        ("privacy.epsilon=1", "either epsilon or sigma"),
        ("privacy.cap=null", "privacy.cap"),
        ("split.holdout_users=0", "split.holdout_users: 0 cannot"),
        ("data.catalogue=all", "data.catalogue"),
        ("data.min_item_events=5", "data.min_item_events"),
        ("model.preset=ligr", "model.preset"),
        ("model.repeat_consumption=true", "model.repeat_consumption"),
        ("model.popularity_prior_days=7", "model.popularity_prior_days"),
        ("train.loss=sampled", "train.loss"),
        ("split.kind=random", "random split"),
        ("promotion.must_beat=[EASE]", "promotion.must_beat"),
    ],
)
def test_settings_that_break_the_promise_are_refused(synthetic_folder, tmp_path, override, words):
    with pytest.raises(SettingsError, match=words):
        private_settings(synthetic_folder, tmp_path, override)


def test_the_statement_says_what_is_promised_and_what_is_not():
    statement = Mechanism(2.0, 0.1, 100, 1.0, 1e-5, 1000).statement()
    assert statement["differential_privacy"] and statement["sigma"] == 2.0 and 0 < statement["epsilon"] < 20
    assert "all their events" in statement["unit"] and any(
        "holdout users" in text for text in statement["not_protected"]
    )
    json.dumps(statement)
