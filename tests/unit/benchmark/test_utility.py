"""The benchmark of quality by ε, on a world small enough to run here."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from recray.benchmark import cuts, utility
from recray.benchmark.quality import ranks_of
from recray.benchmark.vanilla_peer import Vanilla
from recray.testing.synthetic import SyntheticShop
from recray.training.batches import TrainingBatches
from recray.training.worker import build_loop


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            utility,
            "SPECIFICATION",
            SyntheticShop(users=300, items=60, events_per_user=12.0, repeat=0.0, seed=3),
        )
        rest = ("privacy.delta=1e-4", "privacy.sampling_rate=1.0", "privacy.steps=4", "train.epochs=1")
        patch.setitem(utility.OF_DATA, "synthetic", ("model.history=10", "split.holdout_users=0.3", *rest))
        patch.setattr(utility, "LEARNING_RATES", (1e-3, 1e-2))
        patch.setattr(utility, "EPSILONS", (3.0, 8.0))
        patch.setattr(utility, "RUN_COUNTS", (1, 2))
        yield utility


@pytest.fixture(scope="module")
def bench(small, tmp_path_factory):
    return small.UtilityData(tmp_path_factory.mktemp("bench"), "synthetic", [], fixed=False)


def test_the_table_has_every_cell_and_a_second_run_measures_none_again(small, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said = []
    _, first = small.measure_utility(tmp_path / "a", "synthetic", [], said.append, tmp_path / "out")
    assert set(first["table"]) == {
        f"{method}, {variant}"
        for method in ("full", "public features", "vanilla", "popularity")
        for variant in ("ε 3", "ε 8", "not private")
        if (method, variant) != ("vanilla", "not private")
    }
    assert first["synthetic_eps8_over_vanilla"] == pytest.approx(
        first["table"]["full, ε 8"]["ndcg"] / first["table"]["vanilla, ε 8"]["ndcg"], rel=0.05
    )
    assert first["nights"]["ε 3 a night"] == sorted(first["nights"]["ε 3 a night"])
    assert "<svg" in (tmp_path / "a" / "keep" / "svg").read_text()
    (file,) = (tmp_path / "out").glob("*.cells.jsonl")
    cells = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(cells) == 3 * (2 + 2) + 3 + 2 * 1, (
        "two trials a method and two repeats, the other ε, and without privacy all rates but the last"
    )
    full = [cell for cell in cells if (cell["method"], cell["epsilon"]) == ("full", 8.0)]
    rate = next(cell["learning_rate"] for cell in full if cell["number"] == 2)
    assert first["repeats"]["full, ε 8"] == [
        round(cell["ndcg"], 4) for cell in full if cell["learning_rate"] == rate
    ]
    trials = {cell["learning_rate"]: cell["validation_ndcg"] for cell in full if cell["number"] == 0}
    assert trials[rate] == max(trials.values())
    _, second = small.measure_utility(tmp_path / "b", "synthetic", [], said.append, tmp_path / "out")
    assert len(file.read_text().splitlines()) == len(cells)
    measured_cells = {
        key: value for key, value in second["table"].items() if not key.startswith("popularity, ε")
    }
    assert measured_cells.items() <= first["table"].items()


def test_both_ways_to_rank_agree(bench):
    loop = build_loop(str(bench.dataset.path), bench.training_settings, torch.device("cpu"))
    model, queries = loop.model.eval(), bench.queries["test"]
    expected = ranks_of(model, bench.dataset, bench.training_settings, queries)
    from recray.inference import Predictor

    predictor = Predictor.of(model, bench.dataset, 0)

    def scores(batch):
        answer = predictor.recommend(
            [q.history for q in batch], bench.dataset.n_items, now=[q.now for q in batch]
        )
        dense = np.full((len(batch), bench.dataset.n_items + 1), -np.inf)
        np.put_along_axis(dense, answer.item_index, answer.scores, 1)
        return dense

    assert utility.ranks_by(scores, queries).tolist() == expected.tolist()


def test_the_baseline_library_learns_the_rows_that_we_learn(bench, monkeypatch):
    learned = []
    monkeypatch.setattr(utility.vanilla_peer, "train", lambda model, *rows, **options: learned.append(rows))
    bench.run("vanilla", 8.0, 1e-3, 0)
    ((item, following, *_),) = learned
    batches = TrainingBatches(
        bench.dataset, history=10, batch_tokens=100, sequences="last", popularity_prior_days=0, seed=0
    )
    sequences = batches.last_sequences()
    assert len(item) == len(sequences)
    batch, targets = batches.collate(sequences)
    assert (batch.item_BT.numpy() == item[:, : batch.item_BT.shape[1]]).all()
    assert (item > 0).sum() == (following > 0).sum()
    single = targets.offsets.diff() == 1
    our_targets = following[batch.user_N[single], batch.position_N[single]]
    assert (our_targets == targets.item[targets.offsets[:-1][single]].numpy()).all()


def test_the_baseline_library_does_not_see_what_follows():
    torch.manual_seed(0)
    model = Vanilla(20, 8, 2, 2, 6, 0.0).eval()
    item = torch.randint(1, 20, (3, 6))
    changed = item.clone()
    changed[:, 4:] = torch.randint(1, 20, (3, 2))
    torch.testing.assert_close(model(item)[:, :4], model(changed)[:, :4])
    assert not torch.allclose(model(item)[:, 5], model(changed)[:, 5])


def test_noise_of_popularity_is_that_of_its_epsilon():
    for epsilon, delta in ((1.0, 1e-5), (8.0, 1e-6)):
        sigma = utility.calibrate_gaussian(epsilon, delta)
        exact_delta = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(
            -0.5 / sigma - epsilon * sigma
        )
        assert exact_delta == pytest.approx(delta, rel=1e-6)
    assert utility.calibrate_gaussian(8.0, 1e-6) < utility.calibrate_gaussian(1.0, 1e-6)


def test_each_cutoff_begins_with_the_training_before_and_a_second_run_measures_none_again(
    small, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {
        "SPECIFICATION": small.SPECIFICATION,
        "OF_DATA": small.OF_DATA,
        "CUTS": 2,
        "SEEDS": 1,
        "LAST": 1,
        "FIRST_DAY": 100,
    }.items():
        monkeypatch.setattr(cuts, name, value)
    said = []
    (tmp_path / "a").mkdir()
    run_settings, metrics = cuts.measure_cuts(tmp_path / "a", [], said.append, tmp_path / "out")
    assert (run_settings["privacy"]["cap"], run_settings["privacy"]["trainings"]) == (8.0, 2) and [
        len(row) for row in metrics["table"]
    ] == [5, 5]
    assert metrics["lead_over_reused_low"] <= metrics["lead_over_reused"] <= metrics["lead_over_reused_high"]
    statements = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("privacy.json")
    }
    assert (
        statements.keys() == {"0-0", "0-1", "0-alone"}
        and statements["0-alone"]["epsilon"] > 1.2 * statements["0-0"]["epsilon"]
    )
    (file,) = (tmp_path / "out").glob("*.cells.jsonl")
    lines = file.read_text()
    file.write_text(lines[:-10])  # torn
    (tmp_path / "b").mkdir()
    assert cuts.measure_cuts(tmp_path / "b", [], said.append, tmp_path / "out")[1] == metrics
    assert file.read_text().splitlines()[0] == lines.splitlines()[0]
