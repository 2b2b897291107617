"""Items that came, and items that went, since a bundle was trained."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import private_overrides, synthetic_overrides

from recray.config import ScoreSettings, load_settings
from recray.dataset.features import append_items, encode_features
from recray.dataset.popularity import Popularity
from recray.evaluation.protocol import EvaluationQueries
from recray.inference import Predictor, Rules
from recray.testing.published import prepare_here, untrained_bundle
from recray.training.plan import training_settings
from recray.training.worker import build_loop

KINDS = {"category": "categorical", "price": "numeric", "tags": "multi", "title": "text", "image": "vector"}


def with_images(table: pa.Table) -> pa.Table:
    vectors = np.random.default_rng(0).normal(size=(len(table), 6)).astype(np.float32)
    return table.append_column("image", pa.array(list(vectors), pa.list_(pa.float32())))


@pytest.fixture(scope="module")
def items(synthetic_folder) -> pa.Table:
    return with_images(pq.read_table(synthetic_folder / "items.parquet"))


def prepared(synthetic_folder, root, items, *overrides):
    pq.write_table(items, root / "items.parquet")
    features = "{" + ", ".join(f"{name}: {kind}" for name, kind in KINDS.items()) + "}"
    options = [
        *synthetic_overrides(synthetic_folder, root),
        f"data.items={root / 'items.parquet'}",
        f"data.features={features}",
        *overrides,
    ]
    settings = load_settings(None, options)
    return settings, prepare_here(settings)


def test_what_comes_later_is_encoded_as_if_it_had_been_there(items):
    first, then = items.slice(0, 70), items.slice(70)
    whole, start = encode_features(items, KINDS, 64, first), encode_features(first, KINDS, 64)
    appended = encode_features(then, KINDS, 64, first)
    for name in KINDS:
        for ours, theirs in zip(append_items(start[name], appended[name]), whole[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_newcomers_are_scored_by_their_features_and_the_rest_as_before(synthetic_folder, items, tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    cold = items.slice(0, 1).set_column(
        0, "item_id", pa.array(["j-cold"])
    )  # nobody met it, so it has no id vector
    settings, before = prepared(synthetic_folder, tmp_path / "before", pa.concat_tables([items, cold]))
    bundle = untrained_bundle(settings, before, tmp_path / "bundle", "bundle")
    twin = cold.set_column(0, "item_id", pa.array(["z-twin"]))
    bare = pa.table({name: pa.nulls(1, twin[name].type) for name in twin.column_names}).set_column(
        0, "item_id", pa.array(["z-bare"])
    )
    _, after = prepared(synthetic_folder, tmp_path / "after", pa.concat_tables([items, cold, twin, bare]))
    old, new = Predictor.load(bundle.path), Predictor.load(bundle.path, dataset=after)
    assert new.n_items == old.n_items + 1, "one that nothing is known of cannot be scored"
    histories = [new.vocabulary.translation(after).history(after.shard(0).history(row)) for row in range(8)]
    indices = new.vocabulary.index_of(["j-cold", "z-twin"])
    assert indices.all()
    scores = np.stack(new.score(histories, [indices] * len(histories), now=after.now_s))
    np.testing.assert_allclose(scores[:, 0], scores[:, 1], rtol=1e-6, atol=1e-7)
    learned_items = np.arange(1, old.n_items + 1)
    for a, b in zip(
        *(p.score(histories, [learned_items] * len(histories), now=after.now_s) for p in (old, new)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    answer = new.recommend(histories, new.n_items, now=after.now_s)
    assert (answer.item_index == indices[1]).any(1).all()


def test_a_private_bundle_has_noised_counts_alone_and_newcomers_count_least(
    synthetic_folder, items, tmp_path
):
    kinds = [
        "model.items=features",
        "data.features={category: categorical, title: text}",
        f"data.items={tmp_path / 'items.parquet'}",
    ]
    pq.write_table(items, tmp_path / "items.parquet")
    settings = load_settings(None, [*private_overrides(synthetic_folder, tmp_path), *kinds])
    before = prepare_here(settings)
    bundle = untrained_bundle(settings, before, tmp_path / "bundle", "bundle", {"differential_privacy": True})
    assert "events" in before.items.column_names and "events" not in bundle.items.column_names
    assert len(Popularity.load(bundle.path / "popularity.parquet", before.n_items).count) == 0
    twin = items.slice(0, 1).set_column(0, "item_id", pa.array(["z-twin"]))
    pq.write_table(pa.concat_tables([items, twin]), tmp_path / "items.parquet")
    after = prepare_here(settings)
    predictor = Predictor.load(bundle.path, dataset=after)
    offset = predictor.model.offset_V
    assert (
        len(offset) == predictor.n_items + 1 == before.n_items + 2
        and offset[-1] == offset.min() < offset.max() == 0
    )
    first, last = predictor.vocabulary.index_of([items["item_id"][0].as_py(), "z-twin"])
    history = predictor.vocabulary.translation(after).history(after.shard(0).history(0))
    (scores,) = predictor.score([history], [np.array([first, last])], now=after.now_s)
    np.testing.assert_allclose(scores[1] - scores[0], offset[last] - offset[first], atol=1e-5)
    assert predictor.cold_V.tolist() == [False] * (last) + [True]
    nobody = history.last(0)
    with pytest.MonkeyPatch.context() as patch:
        responses = [predictor.recommend([history, nobody], 20, now=after.now_s)]
        patch.setattr("recray.inference.candidates.ITEM_BLOCK", 16)
        responses.append(predictor.recommend([history, nobody], 20, now=after.now_s))
    np.testing.assert_array_equal(*(answer.item_index for answer in responses))
    assert responses[0].source == ["model", "popular"]
    np.testing.assert_allclose(responses[0].scores[1], np.sort(offset[1:].numpy())[::-1][:20])


def test_the_cold_item_boost_raises_what_is_known_by_features_alone(synthetic_folder, items, tmp_path):
    cold = pa.concat_tables(
        [items.slice(0, 1).set_column(0, "item_id", pa.array([name])) for name in ("j-known", "j-bare")]
    )
    bare = pa.table({name: pa.nulls(1, cold[name].type) for name in cold.column_names}).set_column(
        0, "item_id", pa.array(["j-bare"])
    )
    settings, dataset = prepared(
        synthetic_folder, tmp_path, pa.concat_tables([items, cold.slice(0, 1), bare])
    )
    predictor = Predictor.load(untrained_bundle(settings, dataset, tmp_path / "bundle", "bundle").path)
    with_features, nothing = predictor.vocabulary.index_of(["j-known", "j-bare"])
    assert predictor.cold_V[with_features] and not predictor.cold_V[nothing] and not predictor.cold_V[0]
    assert not (predictor.cold_V & dataset.mask_trained_items()).any()
    rules = Rules.from_settings(
        ScoreSettings(cold_item_boost=20.0).rules(), dataset, np.arange(dataset.n_items + 1), predictor.cold_V
    )
    answer = predictor.recommend([dataset.shard(0).history(0)], 5, now=dataset.now_s, rules=rules)
    assert (
        with_features in answer.item_index[0][: predictor.cold_V.sum()]
        and nothing not in answer.item_index[0]
    )


@pytest.fixture(scope="module")
def with_cold(synthetic_folder, items, tmp_path_factory):
    """A trained predictor that knows five items by their features alone, and queries."""
    root = tmp_path_factory.mktemp("cold")
    cold = pa.concat_tables(
        [items.slice(n, 1).set_column(0, "item_id", pa.array([f"j-cold-{n}"])) for n in range(5)]
    )
    settings, dataset = prepared(synthetic_folder, root, pa.concat_tables([items, cold]))
    loop = build_loop(dataset, training_settings(settings), torch.device("cpu"))
    for _ in loop.run():
        pass
    predictor = Predictor.of(loop.finish().eval(), dataset, settings.model.popularity_prior_days)
    predictor.cold_gaps = tuple(loop.progress.cold_gaps)
    (queries,) = EvaluationQueries(dataset, "validation").batches(1000)
    return dataset, predictor, queries


def lists_of(with_cold, k=10, *, histories=None, **declared):
    dataset, predictor, queries = with_cold
    rules = Rules.from_settings(
        ScoreSettings(**declared).rules(),
        dataset,
        np.arange(dataset.n_items + 1),
        predictor.cold_V,
        predictor.cold_gaps,
    )
    return predictor.recommend(
        histories or [query.history for query in queries],
        k,
        now=[query.now for query in queries],
        rules=rules,
        context=[query.context for query in queries],
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_so_many_lists_end_with_a_cold_item_as_are_asked_for(with_cold, share):
    _, predictor, queries = with_cold
    before, after = lists_of(with_cold), lists_of(with_cold, cold_item_share=share)
    has_cold = predictor.cold_V[after.item_index].any(1)
    at_first = predictor.cold_V[before.item_index].any(1).mean()
    assert len(predictor.cold_gaps) == 21 and len(queries) > 50 and at_first < share
    assert has_cold.mean() == pytest.approx(share, abs=0.05)
    np.testing.assert_array_equal(before.item_index[:, :-1], after.item_index[:, :-1])
    changed = before.item_index[:, -1] != after.item_index[:, -1]
    assert predictor.cold_V[after.item_index[changed, -1]].all()
    assert (np.diff(after.scores, axis=1) <= 0).all(), "in order of their scores"
    assert all(len(set(row)) == 10 for row in after.item_index.tolist())


def test_a_place_for_cold_items_is_the_same_whatever_the_blocks_and_none_in_short_lists(with_cold):
    _, predictor, queries = with_cold
    whole = lists_of(with_cold, cold_item_share=0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recray.inference.candidates.ITEM_BLOCK", 16)
        np.testing.assert_array_equal(lists_of(with_cold, cold_item_share=0.7).item_index, whole.item_index)
    short = lists_of(with_cold, 4, cold_item_share=1.0)
    np.testing.assert_array_equal(short.item_index, lists_of(with_cold, 4).item_index)
    nobody = [query.history.last(0) for query in queries]
    popular = lists_of(with_cold, histories=nobody, cold_item_share=0.5)
    assert not predictor.cold_V[popular.item_index].any(), "nobody bought a cold item"
    capped = lists_of(with_cold, cold_item_share=1.0, caps={"category": 2})
    categories = np.array([None, *with_cold[0].items["category"].to_pylist()], object)
    for row in capped.item_index:
        assert max(Counter(categories[row[row > 0]]).values()) <= 2


def test_without_cold_items_or_their_gaps_a_share_changes_nothing(synthetic_dataset, with_cold):
    declared = ScoreSettings(cold_item_share=0.5).rules()
    to_bundle = np.arange(synthetic_dataset.n_items + 1)
    none_V = np.zeros(synthetic_dataset.n_items + 1, bool)
    gaps = with_cold[1].cold_gaps
    assert Rules.from_settings(declared, synthetic_dataset, to_bundle, none_V, gaps) is None
    assert Rules.from_settings(declared, synthetic_dataset, to_bundle, ~none_V) is None
    with pytest.raises(ValueError, match="set one of them"):
        ScoreSettings(cold_item_share=0.5, cold_item_boost=1.0)


def test_removed_items_are_not_recommended(synthetic_folder, items, tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    settings, before = prepared(synthetic_folder, tmp_path / "before", items)
    bundle = untrained_bundle(settings, before, tmp_path / "bundle", "bundle")
    _, after = prepared(synthetic_folder, tmp_path / "after", items, "data.min_item_events=20")
    removed = set(before.items["item_id"].to_pylist()) - set(after.items["item_id"].to_pylist())
    assert 3 < len(removed) < len(before.items) - 3
    predictor = Predictor.load(bundle.path, dataset=after)
    history = predictor.vocabulary.translation(after).history(after.shard(0).history(0))
    for histories in ([history], [history.last(0)]):
        answer = predictor.recommend(histories, predictor.n_items, now=after.now_s)
        item_ids = predictor.vocabulary.ids_of(answer.item_index[0][answer.item_index[0] > 0])
        assert set(item_ids) == set(after.items["item_id"].to_pylist()), (
            "all that are left, and none that is gone"
        )


def test_a_bundle_without_features_knows_nothing_of_newcomers(synthetic_folder, items, tmp_path):
    (tmp_path / "before").mkdir()
    settings, before = prepared(synthetic_folder, tmp_path / "before", items, "data.features={}")
    bundle = untrained_bundle(settings, before, tmp_path / "bundle", "bundle")
    (tmp_path / "after").mkdir()
    extra = pa.concat_tables([items, items.slice(0, 1).set_column(0, "item_id", pa.array(["z"]))])
    _, after = prepared(synthetic_folder, tmp_path / "after", extra)
    assert len(bundle.cold_items(after)) == 0
    assert Predictor.load(bundle.path, dataset=after).n_items == len(before.items)
    assert torch.equal(
        bundle.model().items.ids.weight, bundle.model(bundle.cold_items(after)).items.ids.weight
    )


def test_what_is_declared_otherwise_now_is_not_taken_for_what_it_was(synthetic_folder, items, tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    settings, before = prepared(synthetic_folder, tmp_path / "before", items)
    bundle = untrained_bundle(settings, before, tmp_path / "bundle", "bundle")
    extra = pa.concat_tables([items, items.slice(0, 1).set_column(0, "item_id", pa.array(["z"]))])
    _, same = prepared(synthetic_folder, tmp_path / "after", extra)
    assert bundle.cold_items(same)["item_id"].to_pylist() == ["z"]
    _, other = prepared(
        synthetic_folder,
        tmp_path / "after",
        extra,
        "data.features={category: categorical, title: categorical}",
        "data.context=[weekday, hour]",
    )
    assert len(bundle.cold_items(other)) == 0
    translation = Predictor.load(bundle.path, dataset=other).vocabulary.translation(other)
    assert translation.context(np.array([3, 14])).tolist() == [14], "the hour by its name, not by its place"
    _, nothing = prepared(synthetic_folder, tmp_path / "after", extra, "data.context=[]")
    assert Predictor.load(bundle.path, dataset=nothing).vocabulary.translation(nothing).context(
        np.zeros(0, np.int64)
    ).tolist() == [0]
