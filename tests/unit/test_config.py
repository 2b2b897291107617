import datetime as dt
import time

import pytest

from recray.config import Settings, load_settings, parse_as_of, render_yaml
from recray.errors import SettingsError


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.epoch=3", "did you mean epochs?"),
        ("train.epochs=many", "train.epochs"),
        ("trian.epochs=3", "did you mean train?"),
        ("model.heads=3", "heads (3) must divide dim (64)"),
        ("train.epochs", "section.field=value"),
        ("split.test_fraction=0.9", "split.test_fraction"),
        ("data.features={price: colour}", "data.features.price"),
        ("evaluate.k=[10, 0]", "evaluate.k"),
        ("gates.must_beat=['popular, last day']", "asked_at=target"),
    ],
)
def test_unusable_settings_are_named_with_a_fix(override, named):
    with pytest.raises(SettingsError) as error:
        load_settings(None, [override])
    assert named in str(error.value)
    assert error.value.fix
    assert error.value.exit_code == 2


def test_a_copy_term_by_item_without_a_copy_term_is_refused():
    with pytest.raises(SettingsError, match="repeat_by_item is of the copy term"):
        load_settings(None, ["model.repeat=false", "model.repeat_by_item=true"])


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  epochs: 7\n  seed: 4\n")
    settings = load_settings(file, ["train.epochs=3"])
    assert (settings.train.epochs, settings.train.seed) == (3, 4)


def test_two_cuts_in_the_wrong_order_are_refused():
    with pytest.raises(SettingsError, match="validation_from must lie before test_from"):
        load_settings(None, ["split.test_from=2024-01-01", "split.validation_from=2024-02-01"])


def test_moments_are_utc_wherever_the_job_runs(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        settings = load_settings(None, ["split.test_from=2020-09-20", "split.validation_from=2020-09-01T00:00:00Z"])
    finally:
        monkeypatch.undo()
        time.tzset()
    assert settings.split.test_from == dt.datetime(2020, 9, 20, tzinfo=dt.UTC)


def test_data_paths_are_taken_from_the_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("data:\n  events: [events, $PLACE/x.parquet]\n")
    with pytest.raises(SettingsError, match="PLACE"):
        load_settings(file)
    monkeypatch.setenv("PLACE", "/else")
    assert load_settings(file).data.events == (str(tmp_path / "events"), "/else/x.parquet")


def test_the_rendered_file_reads_back_as_the_same_settings(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(render_yaml(Settings(), "heading"))
    assert load_settings(file) == Settings()


@pytest.mark.parametrize(("root", "word"), [("somewhere", "relative"), ("s3://bucket/x", "not a path")])
def test_a_root_that_cannot_be_written_to_is_refused(root, word):
    with pytest.raises(SettingsError, match=word):
        load_settings(None, [f"storage.root={root}"]).root()


def test_places_stay_out_of_result_settings():
    base = load_settings(None).result_settings("data", "train", "score")
    moved = load_settings(None, ["data.events=[/elsewhere]", "train.threads=4", "score.actors=9"]).result_settings("data", "train", "score")
    changed = load_settings(None, ["train.seed=1"]).result_settings("data", "train", "score")
    assert base == moved
    assert base != changed


def test_as_of_date_means_its_end():
    assert parse_as_of("2011-12-09") == dt.datetime(2011, 12, 9, 23, 59, 59, 999_999, dt.UTC)
    assert parse_as_of("20111209") == parse_as_of("2011-12-09")
    assert parse_as_of("2011-12-09T06:00+02:00") == dt.datetime(2011, 12, 9, 4, tzinfo=dt.UTC)
    with pytest.raises(SettingsError, match="--as-of"):
        parse_as_of("yesterday")
