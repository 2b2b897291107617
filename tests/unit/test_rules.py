"""What is declared about lists: boosts, exclusions, caps and diversity."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray.config import load_settings
from recray.errors import SettingsError
from recray.inference import Rules

ITEMS = pa.table(
    {
        "item_id": [f"i{n}" for n in range(6)],
        "brand": ["acme", "acme", "acme", "bolt", None, "bolt"],
        "tags": [["new"], [], None, ["old", "new"], ["old"], []],
    }
)
NONE = {"diversity": 0.0, "boosts": {}, "exclude": [], "caps": {}}
INDEX, SCORES = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
VECTORS = torch.tensor([[0.0, 0.0], [1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1], [-1, 0]])


def declared(**rules) -> Rules:
    found = Rules.declared({**NONE, **rules}, ITEMS)
    assert found is not None
    return found


def test_nothing_declared_is_no_rule():
    assert Rules.declared(NONE, ITEMS) is None


def test_boosts_and_exclusions_find_their_items():
    rules = declared(boosts={"brand=acme": 0.5, "tags=new": 1.0}, exclude=["tags=old"])
    assert rules.boost_V.tolist() == [0, 1.5, 0.5, 0.5, 1.0, 0, 0]
    assert rules.barred.tolist() == [4, 5] and rules.pool(10) == 10


def test_caps_leave_room_for_others_and_items_without_a_value_are_free():
    index, scores = declared(caps={"brand": 1}).choose(INDEX, SCORES, VECTORS, 4)
    assert index.tolist() == [[1, 4, 5, 0]] and scores.tolist() == [[6.0, 3.0, 2.0, -np.inf]]
    index, _ = declared(caps={"brand": 2}).choose(INDEX, SCORES, VECTORS, 4)
    assert index.tolist() == [[1, 2, 4, 5]]


def test_more_diversity_means_less_likeness_and_none_changes_nothing():
    def likeness(diversity):
        index, scores = Rules(diversity, torch.zeros(7), np.zeros(0, np.int64), ()).choose(INDEX, SCORES, VECTORS, 3)
        unit = torch.nn.functional.normalize(VECTORS[index[0]], dim=-1)
        assert torch.equal(scores[0], SCORES[0, index[0] - 1])
        return (unit @ unit.T).triu(1).sum().item(), index[0].tolist()

    assert likeness(0.0)[1] == [1, 2, 3]
    some, much = likeness(0.3), likeness(0.9)
    assert likeness(0.0)[0] > some[0] >= much[0] and some[1][0] == much[1][0] == 1


def test_fewer_candidates_than_places():
    index, scores = declared(diversity=0.5).choose(torch.tensor([[3, 0, 0]]), torch.tensor([[1.0, -np.inf, -np.inf]]), VECTORS, 3)
    assert index.tolist() == [[3, 0, 0]] and torch.isinf(scores[0, 1:]).all()


@pytest.mark.parametrize("override", ["score.boosts={colour=red: 1}", "score.exclude=[brand]", "score.caps={tags: 2}"])
def test_rules_on_what_is_no_feature_are_refused(override):
    with pytest.raises(SettingsError, match="of data.features"):
        load_settings(None, ["data.items=x", "data.features={brand: categorical, tags: multi}", override])
