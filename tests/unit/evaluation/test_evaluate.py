import numpy as np
import pytest
import scipy.sparse as sp
from conftest import synthetic_overrides

from recray.config import load_settings
from recray.evaluation.baselines import NEIGHBOURS, cosine_similarity, fit_baselines, to_fractions
from recray.evaluation.evaluate import MODEL, compare, evaluate, evaluate_key
from recray.evaluation.protocol import EvaluationQueries
from recray.evaluation.table import render_table
from recray.inference import Predictor
from recray.testing.published import prepare_here, untrained_bundle


def test_the_table_holds_every_ranker_in_both_settings(synthetic_settings, synthetic_dataset, tmp_path):
    bundle = untrained_bundle(synthetic_settings, synthetic_dataset, tmp_path / "b", "b")
    table, ndcg = compare(
        synthetic_settings, synthetic_dataset, Predictor.load(bundle.path, dataset=synthetic_dataset)
    )
    assert {setting: values.mean() for setting, values in ndcg.items()} == {
        s: rows[MODEL]["ndcg@10"] for s, rows in table.items()
    }
    for rows in table.values():
        assert list(rows) == [
            MODEL,
            "most popular",
            "popular, last 7 days",
            "personal frequency",
            "item-kNN",
            "EASE",
        ]
        for name, row in rows.items():
            if "skipped" in row:
                continue
            for k in (10, 20):
                assert row[f"ndcg@{k}_low"] <= row[f"ndcg@{k}"] <= row[f"ndcg@{k}_high"]
                assert 0 < row[f"coverage@{k}"] <= 1 and 0 <= row[f"popularity_share@{k}"] <= 1
            lengths = [row["segments"][s]["users"] for s in row["segments"] if s.startswith("history")]
            assert sum(lengths) == row["users"]
            if name != MODEL:
                ndcg_gain = rows[MODEL]["ndcg@10"] - row["ndcg@10"]
                np.testing.assert_allclose(row["model_lead"], ndcg_gain, atol=1e-9)
                assert row["model_lead_low"] <= ndcg_gain <= row["model_lead_high"]


def test_real_time_queries_get_what_is_popular_then(synthetic_folder, tmp_path):
    settings = load_settings(
        None, [*synthetic_overrides(synthetic_folder, tmp_path), "split.query_time=target"]
    )
    data = prepare_here(settings)
    questions = EvaluationQueries(data, "test")
    rankers = dict(fit_baselines(data, questions, ease_max_items=10_000, ease_l2=500.0))
    assert list(rankers)[1:3] == ["popular, last 7 days", "popular, last day"]
    queries = [query for batch in questions.batches(50) for query in batch]
    days = {query.now // 86_400 for query in queries}
    assert len(days) > 1
    for name, length in (("popular, last 7 days", 7), ("popular, last day", 1)):
        lists = rankers[name](queries, 5, filter_seen=False)
        for row, query in enumerate(queries):
            counts = data.popularity.window(query.now, length)
            assert (counts[lists[row]] == np.sort(counts[1:])[::-1][:5]).all()


@pytest.mark.parametrize(
    "dense", [0.0, 2.0]
)  # whole rows are looked through, or only what is there is sorted
def test_neighbours_are_the_nearest(dense, monkeypatch):
    monkeypatch.setattr("recray.evaluation.baselines.DENSE", dense)
    interactions = sp.random(300, 700, 0.05, "csr", np.float32, rng=np.random.default_rng(0)).sign()
    whole, near = (cosine_similarity(interactions, dense=dense) for dense in (True, False))
    assert near.nnz == (near > 0).nnz and np.diff(near.tocsc().indptr).max() == NEIGHBOURS
    for item in (0, 511, 512, 699):
        column = np.sort(whole[:, item])[::-1]
        np.testing.assert_allclose(
            np.sort(near[:, [item]].toarray().ravel())[::-1][:NEIGHBOURS], column[:NEIGHBOURS], atol=1e-6
        )


def test_what_breaks_ties_is_below_one_purchase():
    fractions = to_fractions(np.array([[0.0, 32_500.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]))
    assert fractions.max() < 1 and (np.diff(fractions[0, [0, 3, 2, 1]]) > 0).all() and not fractions[1].any()


def test_a_setting_without_targets_is_skipped_not_fatal(tmp_path, synthetic_folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    t = 1_700_000_000
    rows = [(u, f"i{u % 3}", t + 86_400 * d + u) for u in range(40) for d in range(20)]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("user_id", "item_id", "timestamp"))}
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    overrides = [
        o
        for o in synthetic_overrides(synthetic_folder, tmp_path)
        if not o.startswith(("data.items", "data.features"))
    ]
    settings = load_settings(None, [*overrides, f"data.events={tmp_path / 'e.parquet'}"])
    data = prepare_here(settings)
    bundle = untrained_bundle(settings, data, tmp_path / "b", "b")
    table = evaluate(settings, evaluate_key(settings, data, bundle), data, bundle)
    assert "skipped" in table["filter_seen"][MODEL] and table["with_repeats"][MODEL]["users"] > 0
    render_table(table, 10)
