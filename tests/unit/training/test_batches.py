import numpy as np
import pytest
from conftest import synthetic_overrides

from recray.config import load_settings
from recray.inference.inputs import find_next_times
from recray.testing.published import prepare_here
from recray.training.batches import TrainingBatches


def batches(dataset, **kwargs):
    options = {
        "history": 8,
        "batch_tokens": 200,
        "sequences": "all",
        "popularity_prior_days": 7,
        "seed": 0,
        **kwargs,
    }
    return TrainingBatches(dataset, **options)


def asked(packed):
    """(user's items up to the question, target items, moment) of every query, as plain values."""
    out = []
    for batch, targets, _ in packed:
        offsets = targets.offsets.tolist()
        for n, (user, position) in enumerate(
            zip(batch.user_N.tolist(), batch.position_N.tolist(), strict=True)
        ):
            context = tuple(batch.item_BT[user, : position + 1].tolist())
            basket = tuple(targets.item[offsets[n] : offsets[n + 1]].tolist())
            out.append((context, basket, int(batch.now_BT[user, position])))
    return out


def expected(data):
    """The same from the histories: at the end of each training basket, what the next one holds, and when."""
    out = set()
    for shard in data.shards():
        for row in range(len(shard)):
            start, end = int(shard.offsets[row]), int(shard.offsets[row] + shard.split[row, 0])
            item, basket, time = (
                a[start:end].tolist() for a in (shard.item_index, shard.basket, shard.timestamp_s)
            )
            for e in range(len(item) - 1):
                if basket[e] != basket[e + 1]:
                    following = [item[j] for j in range(e + 1, len(item)) if basket[j] == basket[e + 1]]
                    out.add((tuple(item[: e + 1]), tuple(following), time[e + 1]))
    return out


def test_each_basket_end_asks_for_the_next_basket_and_nothing_else(synthetic_dataset):
    queries = asked(batches(synthetic_dataset, history=1000).epoch(0))
    assert set(queries) == expected(synthetic_dataset)


def test_baskets_of_several_items_are_predicted_as_a_whole(tmp_path, synthetic_folder):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(synthetic_folder / "events")
    daily = pc.floor_temporal(table["timestamp"], multiple=10, unit="day")
    pq.write_table(
        table.set_column(2, "timestamp", daily.cast(pa.timestamp("us", tz="UTC"))), tmp_path / "e.parquet"
    )
    overrides = [*synthetic_overrides(synthetic_folder, tmp_path), f"data.events={tmp_path / 'e.parquet'}"]
    data = prepare_here(load_settings(None, overrides))
    queries = asked(batches(data, history=1000).epoch(0))
    assert max(len(targets) for _, targets, _ in queries) > 2
    assert set(queries) == expected(data)


def test_sequences_cover_long_histories_once_each_epoch(synthetic_dataset):
    whole = len(asked(batches(synthetic_dataset, history=1000).epoch(0)))
    assert len(asked(batches(synthetic_dataset, history=8).epoch(3))) == whole
    last = batches(synthetic_dataset, history=8, sequences="last")
    assert len(asked(last.epoch(0))) < whole


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_parts_of_all_ranks_are_the_global_batch(synthetic_dataset, world_size):
    source = batches(synthetic_dataset)
    one = list(source.epoch(1))
    parts = [list(source.epoch(1, rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(one)}
    for step, (batch, targets, count) in enumerate(one):
        assert count == len(batch.user_N) == sum(len(part[step][0].user_N) for part in parts)
        assert {part[step][2] for part in parts} == {count}
        together = asked([part[step] for part in parts])
        assert sorted(together) == sorted(asked([(batch, targets, count)]))


def test_an_epoch_is_a_function_of_its_number(synthetic_dataset):
    first, repeated, other = (asked(batches(synthetic_dataset).epoch(e)) for e in (0, 0, 1))
    assert first == repeated
    assert first != other


def test_padding_stays_small_and_batches_within_their_size(synthetic_dataset):
    source = batches(synthetic_dataset, history=32, batch_tokens=128)
    assert source.padding() <= 0.10
    assert all(batch.item_BT.numel() <= 128 for batch, _, _ in source.epoch(0))


def test_the_popularity_prior_sees_no_event_of_the_day_of_the_query(synthetic_dataset):
    source = batches(synthetic_dataset)
    batch, _, _ = next(source.epoch(0))
    popularity = synthetic_dataset.popularity
    among = np.array([0, 3, 4, synthetic_dataset.n_items])
    prior, few = (source.dated(batch.prior_PV.numpy(), items)[0] for items in (None, among))
    for n in range(0, len(batch.user_N), 7):
        day = int(batch.now_BT[batch.user_N[n], batch.position_N[n]]) // 86_400
        inside = (popularity.day < day) & (popularity.day >= day - 7)
        counts = np.bincount(
            popularity.item_index[inside],
            weights=popularity.count[inside],
            minlength=synthetic_dataset.n_items + 1,
        )
        np.testing.assert_allclose(prior[batch.day_N[n]], np.log1p(counts), rtol=1e-6)
        np.testing.assert_allclose(few[batch.day_N[n]], np.log1p(counts)[among], rtol=1e-6)


def test_training_queries_as_the_predictor_queries(synthetic_dataset):
    """The moments of all positions of a window are those that the predictor would give them."""
    for batch, _, _ in batches(synthetic_dataset, history=1000).epoch(0):
        for user, position in zip(batch.user_N.tolist(), batch.position_N.tolist(), strict=True):
            times = batch.time_BT[user : user + 1, : position + 1].numpy()
            now = batch.now_BT[user, position].numpy()[None]
            expected = find_next_times(times, np.array([position + 1]), now)
            assert batch.now_BT[user, : position + 1].tolist() == expected[0].tolist()
