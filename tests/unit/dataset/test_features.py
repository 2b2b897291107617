"""What the model gets of the item table, and that nothing in it makes a score that is not a number."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recray import pipeline
from recray.config import load_settings
from recray.dataset.features import describe_features, encode_features
from recray.errors import DataError
from recray.inference import Predictor
from recray.testing.published import prepare_here, untrained_bundle


def test_features_become_bags_of_tokens():
    items = pa.table(
        {
            "brand": ["a", None, "a"],
            "tags": [["x", "y"], [], None],
            "price": [1.0, None, 9.0],
            "title": ["Red bag", "", None],
        }
    )
    kinds = {"brand": "categorical", "tags": "multi", "price": "numeric", "title": "text"}
    bags = encode_features(items, kinds, 1000)
    sizes = {name: np.diff([*offsets, len(tokens)]).tolist() for name, (tokens, offsets) in bags.items()}
    assert sizes == {
        "brand": [0, 1, 0, 1],
        "tags": [0, 2, 0, 0],
        "price": [0, 3, 0, 3],
        "title": [0, 2, 0, 0],
    }
    tokens, offsets = bags["brand"]
    assert tokens[offsets[1]] == tokens[offsets[3]]


def vectors(*rows):
    return encode_features(
        pa.table({"image": pa.array(rows, pa.list_(pa.float32()))}), {"image": "vector"}, 10
    )["image"]


def test_vectors_are_centred_and_of_length_one_and_broken_ones_are_missing():
    values, present = vectors([1.0, 0.0], None, [float("nan"), 1.0], [3.0, 2.0], [], [float("inf"), 0.0])
    assert present.tolist() == [False, True, False, False, True, False, False]
    np.testing.assert_allclose(np.linalg.norm(values[present], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(values[1], -values[4])
    assert (values[~present] == 0).all() and values.dtype == np.float32


def test_numbers_too_large_for_float32_do_no_harm():
    values, present = vectors_of_doubles([3e38, 0.0], [3e38, 1.0], [1.0, 2.0], [1e20, 1.0], [1e300, 0.0])
    assert np.isfinite(values).all() and present.tolist() == [False, True, True, True, True, False]
    np.testing.assert_allclose(np.linalg.norm(values[present], axis=1), 1.0, rtol=1e-5)


def vectors_of_doubles(*rows):
    return encode_features(
        pa.table({"image": pa.array(rows, pa.list_(pa.float64()))}), {"image": "vector"}, 10
    )["image"]


def test_empty_values_are_no_values():
    items = pa.table(
        {"brand": ["", "a", None], "tags": [[""], [None, "x"], []], "genres": ["", "a||b", None]}
    )
    for name, kind, sizes in (
        ("brand", "categorical", [0, 1, 0]),
        ("tags", "multi", [0, 1, 0]),
        ("genres", "multi", [0, 2, 0]),
    ):
        tokens, offsets = encode_features(items, {name: kind}, 100)[name]
        assert np.diff([*offsets, len(tokens)]).tolist() == [0, *sizes], name


def test_a_whole_number_is_the_same_value_in_a_column_of_floats():
    whole = pa.table({"maker": [5, 7, 9], "tags": [[1, 2], [3], []]})
    floats = pa.table({"maker": [5.0, None, float("nan")], "tags": [[1.0, 2.0], [None], [float("nan"), 2.5]]})
    for name, kind, sizes in (("maker", "categorical", [0, 1, 0, 0]), ("tags", "multi", [0, 2, 0, 1])):
        as_whole, (tokens, offsets) = (
            encode_features(items, {name: kind}, 1000)[name] for items in (whole, floats)
        )
        assert np.diff([*offsets, len(tokens)]).tolist() == sizes
        assert tokens[: offsets[2]].tolist() == as_whole[0][: as_whole[1][2]].tolist()


def test_vectors_of_two_lengths_are_named():
    with pytest.raises(DataError, match="feature image: vectors of 1 and of 2 numbers"):
        vectors([1.0], [1.0, 2.0])


def test_columns_that_tell_nothing_are_noted():
    items = pa.table({"brand": ["a", "a", "a"], "colour": pa.nulls(3, pa.string()),
    "size": ["s", None, None], "title": ["x", "y", "z"],
                      "image": [[1.0, 2.0]] * 3})  # fmt: skip
    kinds = {
        "brand": "categorical",
        "colour": "categorical",
        "size": "categorical",
        "title": "text",
        "image": "vector",
    }
    assert describe_features(items, kinds, 4096) == [
        "feature brand: all items have the same value; it has no effect",
        "feature colour: no item has a value; it has no effect",
        "feature size: all items have the same value; it has no effect",
        "feature image: all items have the same value; it has no effect",
    ]
    assert (
        describe_features(
            items.set_column(2, "size", pa.array(["s", "m", None])), {"size": "categorical"}, 4096
        )
        == []
    )
    assert (
        describe_features(pa.table({"price": [0.0] * 97 + [5.0, 6.0, 7.0]}), {"price": "numeric"}, 4096) == []
    )
    many = pa.table({"size": ["s", "m", None, None, None]})
    assert describe_features(many, {"size": "categorical"}, 4096) == [
        "feature size: 60% of the items have no value"
    ]


@pytest.fixture(scope="module")
def poor(tmp_path_factory):
    """A shop whose item table has everything that can be missing or broken."""
    folder = tmp_path_factory.mktemp("poor")
    random = np.random.default_rng(0)
    events = {
        "user_id": random.integers(0, 30, 600),
        "item_id": random.integers(0, 20, 600),
        "timestamp": np.arange(600) * 3600 + 1_700_000_000,
    }
    pq.write_table(pa.table(events), folder / "events.parquet")
    image = [
        None if n % 5 == 0 else [float("nan"), 1.0, 2.0] if n % 5 == 1 else random.normal(size=3).tolist()
        for n in range(24)
    ]
    items = {
        "item_id": np.arange(24),
        "title": ["", None, "red shoe", "  "] * 6,
        "colour": pa.nulls(24, pa.string()),
        "price": [None, float("nan"), 3.0, 1e30] * 6,
        "image": pa.array(image, pa.list_(pa.float64())),
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    kinds = "{title: text, colour: categorical, price: numeric, image: vector}"
    overrides = [
        f"data.events={folder / 'events.parquet'}",
        f"data.items={folder / 'items.parquet'}",
        f"data.features={kinds}",
    ]
    return load_settings(
        None,
        [
            *overrides,
            f"storage.root={folder / 'root'}",
            "model.dim=8",
            "model.history=16",
            "split.validation_users=0.5",
        ],
    )


def test_a_poor_item_table_never_makes_a_score_that_is_not_a_number(poor, tmp_path):
    result = pipeline.run("validate", poor, None)
    assert any(note.startswith("feature colour: no item has a value") for note in result.warnings)
    dataset = prepare_here(poor)
    bundle = untrained_bundle(poor, dataset, tmp_path / "b", "b")
    predictor = Predictor.load(bundle.path, dataset=dataset)
    histories = [dataset.shard(0).history(row) for row in range(len(dataset.shard(0)))]
    scores = predictor.recommend(histories, 24, now=dataset.now_s).scores
    assert np.isfinite(scores).all()
    weights = bundle.model().state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("{weight: numeric}", "has no column 'weight'"),
        ("{title: numeric}", "feature title has type string, which is not numeric"),
        ("{title: vector}", "feature title holds text that is not a JSON list of numbers"),
        ("{image: categorical}", "which is not categorical"),
    ],
)
def test_columns_that_are_missing_or_of_another_type_are_named_by_validate(poor, kinds, message):
    settings = load_settings(
        None,
        [f"data.events={poor.data.events[0]}", f"data.items={poor.data.items}", f"data.features={kinds}"],
    )
    with pytest.raises(DataError, match=message):
        pipeline.run("validate", settings, None)


def test_zero_is_apart_and_what_few_items_have_is_told_apart():
    table = pa.table({"price": [0.0] * 960 + [float(n) for n in range(1, 41)]})
    tokens, offsets = encode_features(table, {"price": "numeric"}, 1 << 30)["price"]
    of = [
        frozenset(tokens[a:b].tolist()) for a, b in zip(offsets[1:], [*offsets[2:], len(tokens)], strict=True)
    ]
    assert len(of[0]) == 1 and not of[0] & of[960] and of[960] != of[980] != of[999] and not of[960] & of[999]
    before, _ = encode_features(table, {"price": "numeric"}, 1 << 30, distinct=False)["price"]
    assert len(set(before.tolist())) < len(set(tokens.tolist()))


def test_categories_that_share_buckets_and_long_texts_are_noted():
    table = pa.table(
        {"seller": [f"s{n}" for n in range(30_000)], "about": ["word"] * 29_999 + ["long " * 30_000]}
    )
    crowded, long = describe_features(table, {"seller": "categorical", "about": "text"}, 4096)
    assert (
        crowded == "feature seller: 30000 values in 4096 buckets, 100% of them share one with another: raise "
        "model.feature_buckets"
    )
    assert "150000 characters" in long and describe_features(table, {"seller": "categorical"}, 1 << 20) == []
