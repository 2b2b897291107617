import numpy as np
import pyarrow as pa

from recray.testing.synthetic import SyntheticShop


def events(**kwargs) -> pa.Table:
    return pa.concat_tables(SyntheticShop(**{"users": 400, "items": 200, "seed": 3, **kwargs}).event_tables())


def test_the_same_seed_gives_the_same_synthetic_data():
    assert events().equals(events())
    assert not events().equals(events(seed=4))


def test_sizes_and_types():
    table = events(users=2000, events_per_user=20)
    assert len(table) / 2000 == np.clip(len(table) / 2000, 18, 22)
    assert set(table["event"].unique().to_pylist()) == {"view", "cart", "purchase"}
    assert SyntheticShop(users=10, items=5).social_table().num_rows == 30


def test_taste_can_be_learned_and_noise_hides_it():
    def concentration(**kwargs):
        world = SyntheticShop(users=400, items=200, seed=3, repeat=0.0, **kwargs)
        table = pa.concat_tables(world.event_tables())
        categories = world.item_table()["category"].to_pylist()
        kind_of_item = np.array([int(category.removeprefix("kind ")) for category in categories])
        kind = kind_of_item[[int(item[1:]) for item in table["item_id"].to_pylist()]]
        user = table["user_id"].to_numpy()
        top = [np.bincount(kind[user == u]).max() / (user == u).sum() for u in range(100)]
        return np.mean(top)

    assert concentration(noise=0.0) > concentration(noise=0.9) + 0.1
