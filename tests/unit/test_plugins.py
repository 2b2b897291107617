"""A metric and a loss of another package are used by their names, and what is wrong with them is named."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from recray.config import load_settings
from recray.errors import SettingsError
from recray.evaluation.evaluate import compare, evaluate_key
from recray.evaluation.metrics import own_per_user, per_user
from recray.inference import Predictor
from recray.model.losses import Criterion, softmax
from recray.testing.published import untrained_bundle

pytestmark = pytest.mark.second

CODE = """
import numpy as np
from recray.model.losses import softmax

def first(lists_UK, targets, k):
    return np.array([float(lists[0] in items) for lists, items in zip(lists_UK, targets)])

def short(lists_UK, targets, k):
    return np.zeros(1)

def doubled(scores_nU, item, row, share):
    loss, gradient = softmax(scores_nU, item, row, share)
    return 2 * loss, 2 * gradient
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with these entry points: group -> {name: function}."""

    def add(**groups):
        folder = tmp_path / f"site{len(list(tmp_path.iterdir()))}"
        info = folder / "shop_plugins-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / "shop_plugins.py").write_text(CODE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-plugins\nVersion: 1.2\n")
        lines = []
        for group, functions in groups.items():
            lines.append(f"[recray.{group}]")
            lines += [f"{name} = shop_plugins:{function}" for name, function in functions.items()]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "shop_plugins", raising=False)

    return add


LISTS = np.array([[3, 1, 2], [5, 4, 0]])
TARGETS = [np.array([3]), np.array([4])]


def test_a_metric_is_in_every_evaluation(install, synthetic_settings, synthetic_dataset, tmp_path):
    bundle = untrained_bundle(synthetic_settings, synthetic_dataset, tmp_path / "b", "b")
    before = evaluate_key(synthetic_settings, synthetic_dataset, bundle)
    assert own_per_user(LISTS, TARGETS, 2) == {}
    install(metrics={"hit_first": "first"})
    assert own_per_user(LISTS, TARGETS, 2)["hit_first"].tolist() == [1.0, 0.0]
    predictor = Predictor.load(bundle, dataset=synthetic_dataset)
    table, _ = compare(synthetic_settings, synthetic_dataset, predictor)
    k = synthetic_settings.evaluate.k[0]
    row = table["with_repeats"]["recray"]
    assert 0 <= row[f"hit_first@{k}_low"] <= row[f"hit_first@{k}"] <= row[f"hr@{k}"]
    assert f"hit_first@{k}" in table["with_repeats"]["most popular"]
    assert evaluate_key(synthetic_settings, synthetic_dataset, bundle) != before


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("ndcg", "first", "ndcg is a built-in metric"),
        ("short", "short", r"shape \(1,\) for 2 users"),
        ("lost", "nowhere", "cannot be imported"),
        ("number", "np", "is no function"),
    ],
)
def test_what_is_wrong_with_a_metric_is_named(install, name, function, words):
    install(metrics={name: function})
    with pytest.raises(SettingsError, match=words):
        own_per_user(LISTS, TARGETS, 2)


def test_a_loss_is_used_by_its_name(install):
    with pytest.raises(SettingsError, match="'doubled' is not one of auto, softmax, sampled, gbce"):
        load_settings(None, ["train.loss=doubled"])
    install(losses={"doubled": "doubled"})
    assert load_settings(None, ["train.loss=doubled"]).train.loss == "doubled"
    criterion = Criterion("doubled", torch.full((7,), 1 / 6))
    scores, one = torch.randn(2, 7), torch.ones(2)
    item, row = torch.tensor([1, 3]), torch.tensor([0, 1])
    loss, gradient = criterion.judge(scores.clone(), item, row, one)
    expected, expected_gradient = softmax(scores.clone(), item, row, one)
    torch.testing.assert_close(loss, 2 * expected)
    torch.testing.assert_close(gradient, 2 * expected_gradient)
    assert not criterion.is_sampled


def test_a_private_training_refuses_a_loss_whose_norm_is_not_known(install):
    install(losses={"doubled": "doubled"})
    with pytest.raises(SettingsError, match=r"train\.loss"):
        load_settings(None, ["privacy.enabled=true", "privacy.cap=8", "train.loss=doubled"])


def test_a_loss_that_a_node_lacks_is_named():
    with pytest.raises(SettingsError, match=r"no package of this node declares focal under recray\.losses"):
        Criterion("focal", torch.full((7,), 1 / 6))


def test_the_metrics_of_recray_stay(install):
    install(metrics={"hit_first": "first"})
    assert list(per_user(LISTS, TARGETS, 2)) == ["hr", "ndcg", "mrr", "recall"]
