import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from conftest import synthetic_overrides

from recray.bundle import Bundle
from recray.config import load_settings
from recray.dataset.popularity import DAY_S, FRESHNESS_BUCKETS, UNKNOWN_DAY, freshness_bucket
from recray.dataset.reader import History
from recray.errors import DataError
from recray.evaluation.protocol import EvaluationQueries
from recray.inference import Filters, Predictor
from recray.model import network
from recray.testing.published import prepare_here, untrained_bundle
from recray.testing.synthetic import SyntheticNews
from recray.training.plan import training_settings
from recray.training.worker import build_loop


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("news")
    SyntheticNews(users=400, articles=600, events_per_user=12, days=20).write(folder)
    return folder


def settings_of(site, root, *overrides):
    options = [
        f"data.events={site / 'events.parquet'}",
        f"data.items={site / 'items.parquet'}",
        f"storage.root={root}",
        "data.available_from=published",
    ]
    options += [
        "data.features={title: text, section: categorical}",
        "data.context=[device]",
        "split.query_time=target",
        "split.validation_users=0.5",
    ]
    small = [
        "model.dim=16",
        "model.history=16",
        "model.repeat_consumption=false",
        "model.id_dropout=0.3",
        "train.batch_tokens=1024",
        "train.learning_rate=0.01",
    ]
    return load_settings(None, [*options, *small, *overrides])


@pytest.fixture(scope="module")
def dataset(site, tmp_path_factory):
    return prepare_here(settings_of(site, tmp_path_factory.mktemp("root")))


def test_buckets_grow_with_age_and_tell_the_unknown_and_the_unborn():
    buckets = freshness_bucket(100, np.array([UNKNOWN_DAY, 101, 100, 99, 98, 90, 0, -7000]))
    assert buckets.tolist()[:4] == [0, 1, 2, 4]
    assert (
        (np.diff(buckets[1:7]) > 0).all()
        and buckets[7] == FRESHNESS_BUCKETS - 1
        and buckets.max() < FRESHNESS_BUCKETS
    )
    assert network.FRESHNESS_BUCKETS == FRESHNESS_BUCKETS


def test_release_days_are_read_and_invalid_ones_named(dataset, site, synthetic_folder, tmp_path):
    published = (
        pq.read_table(site / "items.parquet").sort_by("item_id")["published"].cast("int64").to_numpy()
        // 1_000_000
    )
    assert (dataset.released_day[1:] == published // DAY_S).all() and dataset.released_day[0] == UNKNOWN_DAY
    table = pq.read_table(site / "items.parquet")
    gaps = table.set_column(
        3, "published", pc.if_else(pc.equal(table["section"], "section 0"), None, table["published"])
    )
    pq.write_table(gaps, tmp_path / "gaps.parquet")
    some = prepare_here(settings_of(site, tmp_path, f"data.items={tmp_path / 'gaps.parquet'}"))
    nothing = pc.equal(some.items["section"], "section 0").to_numpy()
    assert ((some.released_day[1:] == UNKNOWN_DAY) == nothing).all() and nothing.any()
    with pytest.raises(DataError, match="data.available_from title is not a date"):
        prepare_here(settings_of(site, tmp_path, "data.available_from=title"))
    for wrong in (1_999, 19_783):  # a year, days
        numbers = table.set_column(3, "published", pa.array([wrong + n for n in range(len(table))]))
        pq.write_table(numbers, tmp_path / "numbers.parquet")
        with pytest.raises(
            DataError, match=rf"data.available_from published holds numbers from {wrong} to .* not seconds"
        ):
            prepare_here(settings_of(site, tmp_path, f"data.items={tmp_path / 'numbers.parquet'}"))
    milliseconds = table.set_column(
        3, "published", table["published"].cast(pa.timestamp("ms")).cast(pa.int64())
    )
    pq.write_table(milliseconds, tmp_path / "numbers.parquet")
    assert (
        prepare_here(settings_of(site, tmp_path, f"data.items={tmp_path / 'numbers.parquet'}")).released_day
        == dataset.released_day
    ).all()
    with pytest.raises(DataError, match="no column 'born'"):
        prepare_here(settings_of(site, tmp_path, "data.available_from=born"))
    with pytest.raises(DataError, match="data.available_from names born, but data.items is null"):
        prepare_here(
            load_settings(
                None,
                [
                    *synthetic_overrides(synthetic_folder, tmp_path),
                    "data.items=null",
                    "data.features={}",
                    "data.available_from=born",
                ],
            )
        )


def test_freshness_is_learned_and_articles_that_nobody_read_are_found(dataset, site, tmp_path):
    settings = settings_of(site, tmp_path)
    loop = build_loop(str(dataset.path), training_settings(settings), torch.device("cpu"))
    for epoch in range(12):
        loop.train_epoch(epoch)
    weight = loop.model.freshness.weight.detach().squeeze(-1)
    assert weight[2] > weight[1] + 1, "today's articles above those that are not there yet"
    assert weight[2] > weight[6] + 1, "and above those of three days ago"
    predictor = Predictor.of(loop.model, dataset, 7)
    trained = dataset.mask_trained_items()
    hits, n_queries = 0, 0
    for batch in EvaluationQueries(dataset, "test").batches(200):
        cold = [q for q in batch if not trained[q.target].any()]
        if cold:
            asks = {
                "now": [q.now for q in cold],
                "context": [q.context for q in cold],
                "filters": Filters(filter_seen=True),
            }
            lists = predictor.recommend([q.history for q in cold], 10, **asks).item_index
            hits += sum(bool(np.isin(q.target, lists[row]).any()) for row, q in enumerate(cold))
            n_queries += len(cold)
    assert n_queries > 50
    assert hits / n_queries > 5 * 10 / dataset.n_items


def test_a_bundle_knows_the_release_of_its_items(dataset, site, tmp_path):
    bundle = untrained_bundle(settings_of(site, tmp_path), dataset, tmp_path / "b", "b")
    assert (Bundle.open(bundle.path).released_day == dataset.released_day).all()
    released = dataset.released_day
    days = np.unique(released[released != UNKNOWN_DAY])
    assert 2 < len(days) < 100
    predictor = Predictor.load(bundle.path)
    event = History(np.array([1]), np.array([0]), np.array([0]), np.ones(1, np.float32))
    contexts = np.zeros((len(days), predictor.model.shape.context), np.int64)
    batch = predictor.encoder.batch([event] * len(days), days * DAY_S, contexts)
    assert (batch.fresh_PV[batch.day_N].numpy() == freshness_bucket(days[:, None], released)).all()


def test_release_days_are_those_of_tonight(dataset, site, tmp_path):
    """Not those of the night in which the bundle was trained."""
    bundle = untrained_bundle(settings_of(site, tmp_path), dataset, tmp_path / "b", "b")
    table = pq.read_table(site / "items.parquet")
    cold_items = np.setdiff1d(np.arange(1, dataset.n_items + 1), dataset.popularity.item_index)
    assert len(cold_items) > 2
    sooner, latest = dataset.items["item_id"].take(pa.array(cold_items[:2] - 1)).to_pylist()
    at = np.array(table["published"].cast("int64").to_numpy())
    row_of = {item: n for n, item in enumerate(table["item_id"].to_pylist())}
    far = (dataset.now_s // DAY_S + 400) * DAY_S * 1_000_000
    for first, second, answered in ((far, at[row_of[sooner]], sooner), (at[row_of[sooner]], far, None)):
        for folder, moment in (("then", first), ("tonight", second)):
            days = at.copy()
            days[row_of[sooner]], days[row_of[latest]] = moment, far
            changed = table.set_column(3, "published", pa.array(days).cast(table["published"].type))
            pq.write_table(changed, tmp_path / f"{folder}.parquet")
        then, tonight = (
            prepare_here(settings_of(site, tmp_path, f"data.items={tmp_path / name}.parquet"))
            for name in ("then", "tonight")
        )
        bundle = untrained_bundle(settings_of(site, tmp_path), then, tmp_path / f"b{first}", "b")
        predictor = Predictor.load(bundle.path, dataset=tonight)
        h = next(EvaluationQueries(tonight, "test").batches(1))[0].history
        shown = predictor.recommend([h], tonight.n_items, now=tonight.now_s).item_index[0]
        shown = set(predictor.vocabulary.ids_of(shown[shown > 0]))
        assert (sooner in shown) == (answered == sooner) and latest not in shown


def test_the_news_site_is_drawn_from_its_seed_and_fades(site):
    redrawn = SyntheticNews(users=400, articles=600, events_per_user=12, days=20)
    events, items = pq.read_table(site / "events.parquet"), pq.read_table(site / "items.parquet")
    assert redrawn.event_table() == events and redrawn.item_table() == items
    assert SyntheticNews(users=400, articles=600, events_per_user=12, days=20, seed=1).event_table() != events
    rows = pc.index_in(events["item_id"], items["item_id"].combine_chunks())
    age = (
        events["timestamp"].cast(pa.int64()).to_numpy()
        - items["published"].cast(pa.int64()).take(rows).to_numpy()
    ) / 86_400e6
    assert age.min() >= 0 and age.max() <= redrawn.live_days
    assert np.histogram(age, bins=4, range=(0, 4))[0].tolist() == sorted(
        np.histogram(age, bins=4, range=(0, 4))[0].tolist(), reverse=True
    )
