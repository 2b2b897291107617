"""The protocol on the data that ships: baselines must give the figures of the reference implementation to
1e-3.
"""

import datetime as dt
from importlib import resources

import numpy as np
import pytest

from recray.config import load_settings
from recray.evaluation.baselines import fit_baselines
from recray.evaluation.evaluate import Evaluator
from recray.evaluation.protocol import EvaluationQueries
from recray.testing.published import prepare_here

# HR@10, NDCG@10, recall@10 printed by the reference implementation of the protocol (developer notes)
REPEATS = {
    "most popular": (0.3546, 0.0586, 0.0305),
    "popular, last 7 days": (0.5472, 0.1188, 0.0629),
    "item-kNN": (0.5069, 0.1377, 0.0849),
    "EASE": (0.6513, 0.2125, 0.1315),
    "personal frequency": (0.8035, 0.3044, 0.1996),
}
NEW_ONLY = {
    "most popular": (0.1864, 0.0254, 0.0189),
    "popular, last 7 days": (0.3277, 0.0632, 0.0455),
    "item-kNN": (0.2531, 0.0490, 0.0412),
    "EASE": (0.3797, 0.0816, 0.0701),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    config = str(resources.files("jobs") / "configs" / "demo.yaml")
    return load_settings(
        config, [f"storage.root={tmp_path_factory.mktemp('root')}", "evaluate.bootstrap=100"]
    )


@pytest.fixture(scope="module")
def retail(settings):
    return prepare_here(settings)


def test_sizes_and_cut(retail):
    kept = sum(int((np.diff(shard.offsets) >= 5).sum()) for shard in retail.shards())
    assert (kept, retail.n_items) == (4104, 3181)
    assert retail.cut_s("test") == dt.datetime(2011, 11, 20, 14, 43, tzinfo=dt.UTC).timestamp()


def test_baselines_reproduce_the_reference(settings, retail):
    questions = EvaluationQueries(retail, "test")
    assert len(questions) == 1018
    judge = Evaluator(settings, retail, questions)
    measured = {"with_repeats": {}, "filter_seen": {}}
    for name, ranker in fit_baselines(retail, questions, ease_max_items=10_000, ease_l2=500.0):
        for setting, (row, _) in judge.run(ranker, {}).items():
            measured[setting][name] = tuple(row[metric] for metric in ("hr@10", "ndcg@10", "recall@10"))
            assert row["users"] == (1018 if setting == "with_repeats" else 885)
    for setting, expected in (("with_repeats", REPEATS), ("filter_seen", NEW_ONLY)):
        for name, figures in expected.items():
            np.testing.assert_allclose(
                measured[setting][name], figures, atol=1e-3, err_msg=f"{name} {setting}"
            )


def test_large_catalogues_skip_ease_and_keep_near_neighbours(retail):
    questions = EvaluationQueries(retail, "test", max_users=200)
    rankers = dict(fit_baselines(retail, questions, ease_max_items=100, ease_l2=500.0))
    assert rankers["EASE"] == "more than 100 items"
    dense = dict(fit_baselines(retail, questions, ease_max_items=10_000, ease_l2=500.0))["item-kNN"]
    batch = next(questions.batches(200))
    a, b = (ranker(batch, 10, filter_seen=False) for ranker in (rankers["item-kNN"], dense))
    overlap = np.mean([len(set(x) & set(y)) / 10 for x, y in zip(a, b, strict=True)])
    assert overlap > 0.3
