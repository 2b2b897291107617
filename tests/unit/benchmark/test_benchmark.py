"""The arithmetic of the benchmarks, and what they feed their models; the benchmarks themselves take minutes
to hours.
"""

from importlib import resources

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from recray import benchmark
from recray.benchmark import ablations, features, quality, rounds, scale, slate
from recray.benchmark.score import scorer
from recray.config import load_settings
from recray.errors import DataError, SettingsError
from recray.evaluation import metrics
from recray.training.plan import training_settings
from recray.training.worker import build_loop


def test_ranks_tell_what_lists_tell():
    ranks = np.array([1, 2, 10, 11, 0, 400])
    lists = np.zeros((len(ranks), 10), np.int64)
    for row, rank in enumerate(ranks):
        if 0 < rank <= 10:
            lists[row, rank - 1] = 7
    expected = metrics.per_user(lists, [np.array([7])] * len(ranks), 10)
    np.testing.assert_allclose(quality.hr(ranks), expected["hr"])
    np.testing.assert_allclose(quality.ndcg(ranks), expected["ndcg"])


def test_time_to_the_baselines_quality_is_that_of_the_first_epoch_as_good_as_its_best():
    curves = [
        {"who": "peer", "epoch": e, "seconds": 100.0 * e, "cpu_seconds": 200.0 * e, "validation_ndcg": v}
        for e, v in ((1, 0.1), (2, 0.15), (3, 0.14))
    ]
    for seed in quality.SEEDS:
        curves += [
            {"who": f"recray_{seed}", "seconds": 10.0 * e, "cpu_seconds": 20.0 * e, "validation_ndcg": v}
            for e, v in ((1, 0.1), (2, 0.149), (3, 0.151), (4, 0.2))
        ]
    ours, theirs = np.array([1, 2, 3, 1, 0]), np.array([2, 4, 11, 1, 5])
    comparison = quality.compare_ndcg([ours] * 3, theirs, "peer")
    times = quality.time_to_library_ndcg(curves, "peer", {"seconds": 1.0, "cpu_seconds": 0.5})
    assert times["peer_epochs"] == 2 and times["peer_seconds"] == 200.0
    assert times["time_to_peer_ratio"] == pytest.approx(30 / 200) and times[
        "cpu_time_to_peer_ratio"
    ] == pytest.approx(60 / 200)
    untold = quality.time_to_library_ndcg(curves, "peer", None)
    assert untold["seconds_to_peer"] == times["seconds_to_peer"] and untold["time_to_peer_ratio"] is None
    assert comparison["ndcg_lead"] == pytest.approx(
        (quality.ndcg(ours) - quality.ndcg(theirs)).mean(), abs=1e-4
    )
    assert comparison["ndcg_lead_low"] < comparison["ndcg_lead"] < comparison["ndcg_lead_high"]


def test_the_time_to_the_baselines_quality_is_reported_where_both_select_alike():
    alike = load_settings(None, ["evaluate.protocol=filter_seen", "split.kind=leave_one_out"])
    assert quality.selects_as_libraries_do(alike)
    for section, values in (
        ("evaluate", {"protocol": "with_repeats"}),
        ("train", {"select_by": "both"}),
        ("split", {"kind": "time"}),
    ):
        assert not quality.selects_as_libraries_do(alike.replace(section, **values))


def test_held_out_items_are_nowhere_before_the_test(synthetic_dataset, tmp_path):
    features.write_without_cold_items(synthetic_dataset, tmp_path / "events.parquet")
    kept = pq.read_table(tmp_path / "events.parquet").to_pandas()
    cold = {item for item in synthetic_dataset.items["item_id"].to_pylist() if features.is_cold(item)}
    assert 3 < len(cold) < 40
    expected = []
    for shard in synthetic_dataset.shards():
        for row in range(len(shard)):
            for position, item in enumerate(shard.history(row).item_index):
                name = synthetic_dataset.items["item_id"][int(item) - 1].as_py()
                if position >= shard.split[row, 2] or name not in cold:
                    expected.append(
                        (shard.user_ids[row].as_py(), name, int(shard.history(row).timestamp_s[position]))
                    )
    times = kept.timestamp.astype("datetime64[s]").astype("int64")
    assert sorted(zip(kept.user_id, kept.item_id, times, strict=True)) == sorted(expected)
    before = kept[times < synthetic_dataset.cut_s("test")]
    assert not set(before.item_id) & cold and set(kept.item_id) & cold


def test_auc():
    clicked = np.array([True, False, False, True])
    assert slate.auc(np.array([4.0, 1, 2, 3]), clicked) == 1.0
    assert slate.auc(np.array([1.0, 4, 3, 2]), clicked) == 0.0
    assert slate.auc(np.zeros(4), clicked) == 0.5
    assert slate.auc(np.array([3.0, 2, 1, 1]), clicked) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_a_slate_is_learned_from_histories_and_clicks_alone(tmp_path, monkeypatch):
    moments = pd.to_datetime(["2019-11-09 10:00", "2019-11-10 10:00", "2019-11-14 10:00"])
    sessions = pd.DataFrame(
        {
            "impression_id": [1, 2, 3],
            "user_id": ["u", "u", "v"],
            "timestamp": moments,
            "history": [["a"], ["a", "b"], ["c"]],
        }
    )
    rows = [
        (i, s, item, event)
        for i, s in ((1, 0), (2, 1), (3, 2))
        for item, event in ((f"click{i}", "click"), (f"not{i}", "impression"))
    ]
    shown = pd.DataFrame(
        [
            {
                "impression_id": i,
                "user_id": sessions.user_id[s],
                "timestamp": moments[s],
                "item_id": item,
                "event": event,
            }
            for i, s, item, event in rows
        ]
    )
    for name, table in (("sessions", sessions), ("interactions", shown)):
        table.to_parquet(tmp_path / f"{name}.parquet")
    pd.DataFrame({"item_id": ["a", "not1"], "title": ["x", "y"], "category": ["k", "k"]}).to_parquet(
        tmp_path / "items.parquet"
    )
    (tmp_path / "out").mkdir()

    def enough(*args):
        raise InterruptedError("the data set is written")

    monkeypatch.setattr(slate, "prepare_data", enough)
    with pytest.raises(InterruptedError, match="is written"):
        slate.measure_slate(tmp_path / "out", str(tmp_path), [], print)
    events = pd.read_parquet(tmp_path / "out" / "events.parquet").sort_values("timestamp")
    assert events[events.user_id == "u"].item_id.tolist() == ["a", "click1", "click2"]
    assert events[events.user_id == "v"].item_id.tolist() == ["c", "click3"]
    assert set(pd.read_parquet(tmp_path / "out" / "items.parquet").item_id) == {
        "a",
        "c",
        *(f"{w}{i}" for w in ("click", "not") for i in (1, 2, 3)),
    }
    with pytest.raises(DataError, match="does not have the layout of MIND"):
        slate.measure_slate(tmp_path, str(tmp_path / "out"), [], print)


def test_a_slate_is_evaluated_from_end_to_end(tmp_path, monkeypatch):
    """Who read of one section clicks on it, and half a week of that is enough to be better than chance."""
    monkeypatch.setenv("RECRAY_DATA", "")  # set back afterwards
    random = np.random.default_rng(0)
    data = tmp_path / "mind"
    data.mkdir()
    sessions, shown = [], []
    for number in range(300):
        is_click = number % 2
        moment = pd.Timestamp("2019-11-09") + pd.Timedelta(minutes=20 * number)
        read = [f"{is_click}-{i}" for i in random.choice(10, 4, replace=False)]
        sessions.append(
            {"impression_id": number, "user_id": f"u{number}", "timestamp": moment, "history": read}
        )
        for section in (0, 1):
            click = "click" if section == is_click else "impression"
            shown.append(
                {
                    "impression_id": number,
                    "user_id": f"u{number}",
                    "timestamp": moment,
                    "item_id": f"{section}-{random.integers(10)}",
                    "event": click,
                }
            )
    pd.DataFrame(sessions).to_parquet(data / "sessions.parquet")
    pd.DataFrame(shown).to_parquet(data / "interactions.parquet")
    items = [
        {"item_id": f"{section}-{i}", "title": "", "category": str(section)}
        for section in (0, 1)
        for i in range(10)
    ]
    pd.DataFrame(items).to_parquet(data / "items.parquet")
    small = [
        "train.epochs=10",
        "train.learning_rate=0.01",
        "model.dim=16",
        "model.blocks=1",
        "train.batch_tokens=200",
    ]
    _, metrics = slate.measure_slate(tmp_path, str(data), small, lambda text: None)
    assert metrics["impressions"] == 60 and metrics["auc_low"] <= metrics["auc"] <= metrics["auc_high"]
    assert metrics["auc"] > 0.7 > metrics["popular_auc"]


def test_a_round_scores_every_user(synthetic_settings, synthetic_dataset, tmp_path):
    state = build_loop(
        str(synthetic_dataset.path), training_settings(synthetic_settings), torch.device("cpu")
    ).best
    alone = synthetic_settings.replace("score", actors=1)
    with scorer(tmp_path, alone, synthetic_dataset, state) as score:
        score()
    assert (
        sum(pq.read_metadata(part).num_rows for part in (tmp_path / "parts").glob("*.parquet"))
        == synthetic_dataset.n_users
    )


def test_the_exponent_of_linear_growth_is_one():
    assert scale.fit_exponent([(10, 2.0), (20, 4.0), (40, 8.0)]) == pytest.approx(1.0)
    assert scale.fit_exponent([(10, 2.0), (20, 8.0), (40, 32.0)]) == pytest.approx(2.0)


def test_variants_are_held_against_the_default(synthetic_folder, tmp_path, monkeypatch):
    variants = {
        "default": [],
        "the same": ["train.loss=softmax"],
        "again": ["train.temperature_jitter=1e-9"],
        "sampled": ["train.loss=sampled"],
    }
    monkeypatch.setattr(ablations, "VARIANTS", variants)
    said: list[str] = []
    small = [
        f"data.events=[{synthetic_folder / 'events'}]",
        f"data.items={synthetic_folder / 'items.parquet'}",
    ]
    small += [
        "train.epochs=1",
        "train.batch_tokens=2000",
        "model.dim=8",
        "model.blocks=1",
        "model.dropout=0",
        "evaluate.max_users=50",
    ]
    small += ["evaluate.bootstrap=100", "score.caps={}"]
    run_settings, metrics = ablations.measure_ablations(tmp_path, None, small, said.append)
    assert run_settings["train"]["loss"] == "auto" and metrics["users"] == 50
    assert said[1] == "the same: skipped, it equals the default here" and list(metrics["variants"]) == [
        "default",
        "again",
        "sampled",
    ]
    default, repeated_default, sampled = metrics["variants"].values()
    for setting in ("with_repeats", "filter_seen"):
        for variant in (repeated_default, sampled):
            assert variant[setting]["lead"] == pytest.approx(
                metrics[f"{setting}_ndcg"] - variant[setting]["ndcg"], abs=2e-4
            )
    assert abs(repeated_default["with_repeats"]["lead"]) < 0.01 and sampled["changed"] == [
        "train.loss=sampled"
    ]
    assert default["with_repeats"]["sharper"] != default["with_repeats"]["ndcg"]


@pytest.mark.parametrize("config", ["demo", "ml-1m", "news", "shop", "video"])
def test_every_variant_fits_every_config(config, monkeypatch):
    monkeypatch.setenv("RECRAY_DATA", "data")
    path = str(resources.files("jobs") / "configs" / f"{config}.yaml")
    settings = {name: load_settings(path, changed) for name, changed in ablations.VARIANTS.items()}
    assert (
        not settings["no copy term"].model.repeat_consumption
        and settings["copy term by item"].model.repeat_by_item
    )
    assert settings["no item features"].data.features == {} and settings["no item features"].score.caps == {}
    assert settings["default"] == load_settings(path)


@pytest.mark.parametrize("name", ["quality", "features", "slate", "train", "score"])
def test_a_benchmark_on_data_asks_for_them(name, tmp_path):
    with pytest.raises(SettingsError, match="needs --data"):
        benchmark.run(name, tmp_path, lambda text: None)
    with pytest.raises(DataError, match="does not exist"):
        benchmark.run(name, tmp_path, lambda text: None, data="no-such-data")
    assert not list(tmp_path.iterdir())


def test_rounds_count_the_logs_that_pass(monkeypatch):
    cells = {name: rounds.Cell(0.3, 0.0, 2000, 300, gain) for name, gain in (("none", 0.0), ("gain", 1.0))}
    monkeypatch.setattr(rounds, "make_cells", lambda: cells)
    metrics = rounds.measure_rounds(None, lambda line: None, logs=6, control_logs=3)
    none, gain = (
        [rounds.judge_log(seed, cell) for seed in range(n)]
        for cell, n in zip(cells.values(), (6, 3), strict=True)
    )
    assert metrics["level_most"] == round(sum(above for above, *_ in none) / 6, 4) < 0.5
    assert metrics["control_least"] == sum(above for above, *_ in gain) / 3 == 1.0
    never = np.prod([np.mean([not by_round[k] for *_, by_round in none]) for k in range(rounds.ROUNDS)])
    assert (
        metrics["any_most"] == round(1 - never, 4) == metrics["table"][0][3] < metrics["table"][1][3] == 1.0
    )
