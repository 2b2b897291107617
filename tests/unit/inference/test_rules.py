"""What is declared about lists: boosts, exclusions, caps and diversity."""

from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recray.config import ScoreSettings, load_settings
from recray.errors import RefusedError, SettingsError
from recray.inference import Rules, find_unmatched
from recray.inference.rules import is_everything_excluded, match_range, match_values

ITEMS = pa.table(
    {
        "item_id": [f"i{n}" for n in range(6)],
        "brand": ["acme", "acme", "acme", "bolt", None, "bolt"],
        "tags": [["new"], [], None, ["old", "new"], ["old"], []],
        "genres": ["Action|Comedy", "Action", "Drama", "", None, "Comedy"],
        "price": [3.0, 3.0, 4.5, None, float("nan"), 1.0],
        "codes": [[1.0, 2.0], [2.5], None, [], [1.0], [3.0]],
        "marks": [["007"], ["7"], ["1e1"], None, [], [""]],
        "used": [True, False, None, True, False, False],
    }
)
KINDS = {
    "brand": "categorical",
    "tags": "multi",
    "genres": "multi",
    "codes": "multi",
    "marks": "multi",
    "price": "numeric",
    "used": "categorical",
}
DATA = SimpleNamespace(key="d", items=ITEMS, manifest={"settings": {"data": {"features": KINDS}}})
NONE = ScoreSettings().rules()
NO = np.zeros(7, bool)
INDEX, SCORES = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
VECTORS = torch.tensor([[0.0, 0.0], [1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1], [-1, 0]])


def declared(to_bundle=None, cold=NO, boost=0.0, **rules) -> Rules:
    declared_rules = Rules.from_settings(
        {**NONE, **rules, "cold_item_boost": boost},
        DATA,
        np.arange(7) if to_bundle is None else to_bundle,
        cold,
    )
    assert declared_rules is not None
    return declared_rules


NUMBERS = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(-1e9, 1e9),
    pa.float32(): st.floats(-1e9, 1e9, width=32),
    pa.float16(): st.floats(-1e3, 1e3, width=16),
    pa.decimal128(10, 2): st.integers(-(10**9), 10**9).map(lambda cents: Decimal(cents) / 100),
}


@given(st.data())
def test_a_number_is_found_as_it_is_written_in_the_precision_of_its_column(data):
    kind = data.draw(st.sampled_from(list(NUMBERS)))
    held = pa.array(data.draw(st.lists(st.none() | NUMBERS[kind], min_size=1, max_size=5)), kind)
    values = held.to_pylist()
    one = data.draw(st.sampled_from([value for value in values if value is not None] or [1]))
    items = SimpleNamespace(
        items=pa.table({"n": held}), manifest={"settings": {"data": {"features": {"n": "numeric"}}}}
    )
    equal = [value is not None and value == one for value in values]
    said = [one, str(one)] if isinstance(one, int) else [float(one), str(one)]
    for text_value in said:
        assert match_values(items, "n", [text_value]).tolist() == equal
    bound = said[0]
    assert match_range(items.items["n"], bound, None).tolist() == [
        value is not None and value >= one for value in values
    ]
    assert match_range(items.items["n"], None, bound).tolist() == [
        value is not None and value <= one for value in values
    ]


@pytest.mark.parametrize("text", ["1_0", " 1", "1/2", "nan", "\u0661", "1e9999"])
def test_what_is_no_number_equals_none(text):
    items = SimpleNamespace(
        items=pa.table({"n": [1.0, 10.0, 0.5]}),
        manifest={"settings": {"data": {"features": {"n": "numeric"}}}},
    )
    assert not match_values(items, "n", [text]).any()


def test_exclusions_that_leave_nothing_are_seen():
    assert is_everything_excluded({**NONE, "exclude": ["used=true", "used=false", "price=4.5"]}, DATA)
    assert not is_everything_excluded(
        {**NONE, "exclude": ["used=true", "used=false"]}, DATA
    ) and not is_everything_excluded(NONE, DATA)


def test_nothing_declared_is_no_rule():
    assert Rules.from_settings(NONE, DATA, np.arange(7), NO) is None
    assert (
        Rules.from_settings({**NONE, "cold_item_boost": 2.0}, DATA, np.arange(7), NO) is None
    )  # training saw them all


def test_cold_items_are_raised_by_the_boost():
    rules = declared(
        cold=np.array([0, 0, 1, 0, 0, 0, 1], bool),
        boost=2.0,
        boosts={"brand=acme": 0.5},
        exclude=["tags=old"],
    )
    assert rules.boost_V.tolist() == [0, 0.5, 0.5, 0.5, -np.inf, -np.inf, 0]
    assert rules.adjust_scores(torch.zeros(1, 7), 0).tolist() == [[0, 0.5, 2.5, 0.5, -np.inf, -np.inf, 2.0]]
    assert rules.adjust_scores(torch.zeros(1, 2), 2).tolist() == [[2.5, 0.5]]
    counts = rules.adjust_counts(torch.tensor([[-torch.inf, 9.0, 0.0, 4.0, 9.0, 9.0, 1.25]]), 0)[0]
    assert counts[[0, 4, 5, 6]].tolist() == [-np.inf, -np.inf, -np.inf, 1.25], (
        "nobody met it, so it is not popular"
    )
    np.testing.assert_allclose(np.log1p(counts[1:4]), np.log1p([9.0, 0.0, 4.0]) + 0.5, rtol=1e-6)
    assert (rules.add_boosts(torch.zeros(1, 7), 0)[0] == rules.boost_V).all()


def test_what_is_pushed_back_in_popular_lists_keeps_its_order():
    rules = declared(boosts={"brand=acme": -20.0})
    counts = rules.adjust_counts(torch.tensor([[-torch.inf, 5.0, 500.0, 1.0, 0.0, 3.0, 2.5]]), 0)[0]
    assert counts.argsort(descending=True).tolist() == [5, 6, 4, 2, 1, 3, 0] and counts[
        [4, 5, 6]
    ].tolist() == [0, 3, 2.5]


def test_boosts_and_exclusions_find_their_items():
    rules = declared(boosts={"brand=acme": 0.5, "tags=new": 1.0}, exclude=["tags=old"])
    assert rules.boost_V.tolist() == [0, 1.5, 0.5, 0.5, -np.inf, -np.inf, 0]
    assert rules.pool_size(10) == 10


@pytest.mark.parametrize(
    ("rule", "items"),
    [
        ("genres=Comedy", [1, 6]), ("genres=Action", [1, 2]), ("genres=Action|Comedy", []),
        ("price=3", [1, 2]), ("price=4.50", [3]),
        ("price=nan", []), ("price=cheap", []), ("used=true", [1, 4]), ("brand=None", []),
        ("tags=old", [4, 5]), ("brand=bol", []),
        ("codes=1", [1, 5]), ("codes=1.0", [1, 5]), ("codes=2.5", [2]), ("marks=7", [2]), ("marks=007", [1]),
    ],
)  # fmt: skip
def test_a_rule_finds_the_items_that_have_its_value(rule, items):
    assert np.flatnonzero(declared(boosts={rule: 1.0}, diversity=0.1).boost_V).tolist() == items
    assert find_unmatched({**NONE, "exclude": [rule]}, DATA) == ([] if items else [rule])


def test_rules_are_those_of_tonights_items_in_the_bundles_indices():
    """The bundle knows three of the six items, in another order."""
    rules = declared(np.array([0, 3, 0, 1, 2, 0, 0]), NO[:4], exclude=["brand=acme"], caps={"brand": 1})
    assert rules.boost_V.tolist() == [0, -np.inf, 0, -np.inf]
    ((group_V, _),) = rules.caps
    assert group_V[0] == -1 and group_V[1] == group_V[3] != group_V[2]


def test_a_rule_on_a_column_that_the_data_do_not_have_is_refused():
    with pytest.raises(RefusedError, match="'colour', which dataset d does not have"):
        declared(caps={"colour": 1})
    with pytest.raises(RefusedError, match="'colour'"):
        find_unmatched({**NONE, "boosts": {"colour=red": 1.0}}, DATA)


def test_caps_leave_room_for_others_and_items_without_a_value_are_free():
    index, scores = declared(caps={"brand": 1}).rerank(INDEX, SCORES, VECTORS, 4)
    assert index.tolist() == [[1, 4, 5, 0]] and scores.tolist() == [[6.0, 3.0, 2.0, -np.inf]]
    index, _ = declared(caps={"brand": 2}).rerank(INDEX, SCORES, VECTORS, 4)
    assert index.tolist() == [[1, 2, 4, 5]]


def test_a_cap_takes_empty_values_for_none():
    items = ITEMS.set_column(1, "brand", pa.array(["", "", "x", "x", None, ""])).set_column(
        4, "price", pa.array([float("nan")] * 3 + [1.0, 1.0, None])
    )
    data = SimpleNamespace(key="d", items=items, manifest=DATA.manifest)
    rules = Rules.from_settings({**NONE, "caps": {"brand": 1, "price": 1}}, data, np.arange(7), NO)
    assert [group_V.tolist()[1:] for group_V, _ in rules.caps] == [
        [-1, -1, 1, 1, -1, -1],
        [-1, -1, -1, 1, 1, -1],
    ]


def test_more_diversity_means_less_likeness_and_none_changes_nothing():
    def likeness(diversity):
        index, scores = Rules(diversity, torch.zeros(7), ()).rerank(INDEX, SCORES, VECTORS, 3)
        unit = torch.nn.functional.normalize(VECTORS[index[0]], dim=-1)
        assert torch.equal(scores[0], SCORES[0, index[0] - 1])
        return (unit @ unit.T).triu(1).sum().item(), index[0].tolist()

    assert likeness(0.0)[1] == [1, 2, 3]
    some, much = likeness(0.3), likeness(0.9)
    assert likeness(0.0)[0] > some[0] >= much[0] and some[1][0] == much[1][0] == 1


def test_fewer_candidates_than_places():
    index, scores = declared(diversity=0.5).rerank(
        torch.tensor([[3, 0, 0]]), torch.tensor([[1.0, -np.inf, -np.inf]]), VECTORS, 3
    )
    assert index.tolist() == [[3, 0, 0]] and torch.isinf(scores[0, 1:]).all()


@pytest.mark.parametrize(
    "override", ["score.boosts={colour=red: 1}", "score.exclude=[brand]", "score.caps={tags: 2}"]
)
def test_rules_on_what_is_no_feature_are_refused(override):
    with pytest.raises(SettingsError, match="of data.features"):
        load_settings(None, ["data.items=x", "data.features={brand: categorical, tags: multi}", override])


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_boost_is_a_number(value):
    with pytest.raises(SettingsError, match="finite"):
        load_settings(
            None,
            ["data.items=x", "data.features={brand: categorical}", f"score.boosts={{brand=acme: {value}}}"],
        )
