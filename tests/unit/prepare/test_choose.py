"""What `recray init --from-data` says about the model, by the size of a log."""

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from recray.cli.init import write_settings
from recray.config import Settings, load_settings
from recray.prepare.choose import EPOCH_EVENTS, LogSize, choose_settings, measure_log


def chosen(size, **kind):
    options = {"repeats": 0.0, "has_baskets": False, "has_time": True, **kind}
    return {guess.setting: guess.value for guess in choose_settings(size, **options)}


def test_the_size_of_a_log_is_that_of_all_its_files(tmp_path):
    random, both = np.random.default_rng(0), tmp_path / "both"
    both.mkdir()
    parts = [(random.integers(0, 40, 500), random.integers(0, 90, 500)) for _ in range(3)]
    for number, (users, items) in enumerate(parts):
        table = pa.table({"u": users, "i": [f"i{item}" for item in items], "x": users})
        if number < 2:
            pq.write_table(table, both / f"{number}.parquet", row_group_size=100)
    folder = tmp_path / "csv"
    folder.mkdir()
    csv.write_csv(pa.table({"u": parts[2][0], "i": parts[2][1], "x": [None] * 500}), folder / "2.csv")
    users = np.concatenate([users for users, _ in parts[:2]])
    items = np.concatenate([items for _, items in parts[:2]])
    expected = np.quantile(np.bincount(users)[np.bincount(users) > 0], 0.9)
    assert measure_log(str(both), "u", "i") == LogSize(
        1000, len(np.unique(users)), len(np.unique(items)), int(expected)
    )
    assert measure_log(str(folder), "u", "i").events == 500
    assert measure_log(str(folder), "x", "i") == LogSize(0, 0, 0, 0)


@pytest.mark.parametrize("events", [1, 10_000, 1_000_000, 50_000_000])
@pytest.mark.parametrize("users", [1, 4_999, 5_000, 10**7])
@pytest.mark.parametrize("history", [0, 10, 51, 200, 399, 10_000])
def test_choices_are_settings_and_fit_together(users, events, history):
    settings = Settings()
    for repeats in (0.0, 0.5):
        kind = {"repeats": repeats, "has_baskets": True, "has_order": repeats > 0}
        values = chosen(LogSize(events, users, 100, history), **kind)
        overrides = [f"{name}={str(value).lower()}" for name, value in values.items()]
        loaded = load_settings(None, overrides)
        assert loaded.model.cooccurrence and loaded.model.repeat_by_item == (repeats > 0)
        assert loaded.train.epochs * events <= EPOCH_EVENTS or loaded.train.epochs == 5
        assert loaded.train.learning_rate == (0.003 if loaded.train.epochs < 20 and users >= 5_000 else 0.001)
        assert loaded.model.history >= min(history, 400)
        assert (loaded.model.dropout > settings.model.dropout) == (users < 5_000)


def test_a_template_and_what_the_user_decided_come_first(tmp_path):
    table = pa.table(
        {
            "user_id": [user for user in range(50) for _ in range(20)],
            "item_id": [item % 7 for item in range(1000)],
            "timestamp": [1_700_000_000 + 3600 * n for n in range(1000)],
        }
    )
    pq.write_table(table, tmp_path / "events.parquet")
    for name, template, override, dropout, history in (
        ("a", None, [], 0.4, 50),
        ("b", "shop", [], 0.4, 400),
        ("c", None, ["model.dropout=0.15"], 0.15, 50),
    ):
        write_settings(tmp_path / f"{name}.yaml", override, [str(tmp_path / "events.parquet")], template)
        settings = load_settings(tmp_path / f"{name}.yaml")
        assert (settings.model.dropout, settings.model.history) == (dropout, history)
        assert settings.model.cooccurrence
