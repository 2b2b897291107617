import datetime as dt
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, make_url, text

from recray.config import (
    RESULT_SECTIONS,
    Settings,
    formats,
    load_settings,
    parse_as_of,
    render_yaml,
    sqlite_file,
    sqlite_url,
)
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
        ("promotion.must_beat=['popular, last day']", "query_time=target"),
    ],
)
def test_unusable_settings_are_named_with_a_fix(override, named):
    with pytest.raises(SettingsError) as error:
        load_settings(None, [override])
    assert named in str(error.value)
    assert error.value.fix
    assert error.value.exit_code == 2


def test_repeat_by_item_without_a_repeat_consumption_head_is_refused():
    with pytest.raises(SettingsError, match="repeat_by_item needs the repeat-consumption head"):
        load_settings(None, ["model.repeat_consumption=false", "model.repeat_by_item=true"])


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  epochs: 7\n  seed: 4\n")
    settings = load_settings(file, ["train.epochs=3"])
    assert (settings.train.epochs, settings.train.seed) == (3, 4)


def test_two_cuts_in_the_wrong_order_are_refused():
    with pytest.raises(SettingsError, match="validation_from: it must lie before test_from"):
        load_settings(None, ["split.test_from=2024-01-01", "split.validation_from=2024-02-01"])


def test_moments_are_utc_wherever_the_job_runs(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        settings = load_settings(
            None, ["split.test_from=2020-09-20", "split.validation_from=2020-09-01T00:00:00Z"]
        )
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
    moved = load_settings(
        None, ["data.events=[/elsewhere]", "train.threads=4", "score.actors=9"]
    ).result_settings("data", "train", "score")
    changed = load_settings(None, ["train.seed=1"]).result_settings("data", "train", "score")
    assert base == moved
    assert base != changed


def test_as_of_date_means_its_end():
    assert parse_as_of("2011-12-09") == dt.datetime(2011, 12, 9, 23, 59, 59, 999_999, dt.UTC)
    assert parse_as_of("20111209") == parse_as_of("2011-12-09")
    assert parse_as_of("2011-12-09T06:00+02:00") == dt.datetime(2011, 12, 9, 4, tzinfo=dt.UTC)
    with pytest.raises(SettingsError, match="--as-of"):
        parse_as_of("yesterday")
    assert parse_as_of("2024-03-05", "Asia/Tokyo") == dt.datetime(2024, 3, 5, 14, 59, 59, 999_999, dt.UTC)
    assert parse_as_of("2024-03-05T06:00Z", "Asia/Tokyo") == dt.datetime(2024, 3, 5, 6, tzinfo=dt.UTC)
    for far in ("9999-12-31", "0001-01-01T00:00+05:00", "1969-12-31"):
        with pytest.raises(SettingsError, match="from 1970 to 2099"):
            parse_as_of(far)


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "recray.yaml"
    path.write_text("train:\n  epochs: 3\n  seed: 1\n  epochs: 5\n")
    with pytest.raises(SettingsError, match="'epochs' is defined twice, in line 2 and in line 4"):
        load_settings(path)
    path.write_text("train: {epochs: 3}\nmodel: {dim: 8}\ntrain: {seed: 1}\n")
    with pytest.raises(SettingsError, match="'train' is defined twice, in line 1 and in line 3"):
        load_settings(path)


@pytest.mark.parametrize(
    "value", ["yes", "on", "true", "0123", "1_000", "12:30", "'3'", "2024-01-01", "0b11"]
)
def test_what_is_no_number_is_none(tmp_path, value):
    path = tmp_path / "recray.yaml"
    path.write_text(f"train:\n  seed: {value}\n")
    with pytest.raises(SettingsError, match=r"recray.yaml: train.seed: .* not a number"):
        load_settings(path)
    with pytest.raises(SettingsError, match=r"command line: train.seed: .* not a number"):
        load_settings(None, [f"train.seed={value}"])


def test_numbers_are_numbers_however_they_are_written(tmp_path):
    path = tmp_path / "recray.yaml"
    path.write_text(
        "train: {learning_rate: 1e-3, seed: 0x10, epochs: +7}\ndata: {columns: {event: no, item_id: "
        "0123}}\nsplit: {test_from: 2024-01-02}\n"
    )
    loaded = load_settings(path)
    assert (loaded.train.learning_rate, loaded.train.seed, loaded.train.epochs) == (0.001, 16, 7)
    assert (
        loaded.data.columns == {"event": "no", "item_id": "0123"}
        and loaded.split.test_from.isoformat() == "2024-01-02T00:00:00+00:00"
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("evaluate.k=['010']", "evaluate.k: '010' is text"),
        ("evaluate.k=[10, true]", "evaluate.k: True is yes or no"),
        ("score.caps={brand: true}", "score.caps: True is yes or no"),
        ("score.boosts={brand=a: '0123'}", "score.boosts: '0123' is text"),
        ("split.test_from=1709251200", "split.test_from: a number is not a date"),
        ("split.test_from='1709251200'", "split.test_from: a number is not a date"),
        ("data.events=", "data.events: it is blank"),
        ("data.events=[a, '']", "data.events: it is blank"),
        ("data.events=[]", "data.events: .*at least 1"),
        ("data.items= ", "data.items: it is blank"),
        ("storage.root=", "storage.root: it is blank"),
        ("storage.root=/x\0y", "storage.root: a path is UTF-8 text"),
        ("storage.root=/x\udcff", "storage.root: a path is UTF-8 text"),
        ("data.features={{ kinds }}", "a mapping as a name"),
    ],
)
def test_what_could_be_read_as_something_else_is_refused(text, named):
    with pytest.raises(SettingsError, match=named):
        load_settings(None, [text])


def test_digits_of_a_date_are_that_date():
    for said in ("20240301", "'20240301'", "2024-03-01"):
        assert load_settings(None, [f"split.test_from={said}"]).split.test_from == dt.datetime(
            2024, 3, 1, tzinfo=dt.UTC
        )


def test_paths_in_a_file_are_of_its_folder_but_for_those_that_are_whole(tmp_path, monkeypatch):
    path = tmp_path / "recray.yaml"
    path.write_text("data: {events: ['night 10:00/e.parquet', 's3://b/e', '/x/e'], items: '${ITEMS}'}\n")
    monkeypatch.setenv("ITEMS", "")
    with pytest.raises(SettingsError, match=r"'\$\{ITEMS\}' is blank"):
        load_settings(path)
    monkeypatch.setenv("ITEMS", "~nosuchuser/items")
    with pytest.raises(SettingsError, match="there is no such user"):
        load_settings(path)
    monkeypatch.setenv("ITEMS", "items")
    data = load_settings(path).data
    assert data.events == (str(tmp_path / "night 10:00/e.parquet"), "s3://b/e", "/x/e") and data.items == str(
        tmp_path / "items"
    )


@pytest.mark.parametrize(
    ("root", "path"),
    [("file:///tmp/a%20b", "/tmp/a b"), ("file://localhost/tmp/a", "/tmp/a"), ("/tmp/a%20b", "/tmp/a%20b")],
)
def test_a_root_may_be_a_file_uri(root, path):
    assert load_settings(None, [f"storage.root={root}"]).root() == Path(path)


def test_a_mapping_on_the_command_line_is_blamed_there(tmp_path):
    path = tmp_path / "recray.yaml"
    path.write_text("data: {features: {a: text}}\n")
    with pytest.raises(
        SettingsError, match=r"command line: data.features.price: 'number'.*(?s:.)*did you mean 'numeric'"
    ):
        load_settings(path, ["data.features={price: number}"])


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_every_path_survives_the_command_line_and_the_databases(name):
    path = "/x/" + name
    loaded = load_settings(
        None,
        [
            f"storage.root={path}",
            f"data.events={path}",
            f"data.items={path}",
            f"privacy.public_start={path}",
            "privacy.counts_share=0",
        ],
    )
    assert (
        loaded.storage.root == path
        and loaded.data.events == (path,)
        and loaded.data.items == path
        and loaded.privacy.public_start == path
    )
    url = make_url(sqlite_url(Path(path)))
    assert unquote(url.database.removeprefix("file:")) == str(Path(path)) and (
        url.query.get("uri") == "true"
    ) == url.database.startswith("file:")


@pytest.mark.parametrize("name", ["night #1", "a%20b", "w?at=1&b", "100 %", "é ü"])
def test_databases_lie_where_their_path_says(tmp_path, name):
    (tmp_path / name).mkdir()
    engine = create_engine(sqlite_url(tmp_path / name / "a.sqlite"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (a INTEGER)"))
    engine.dispose()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.sqlite")] == [
        f"{name}/a.sqlite"
    ]
    assert sqlite_file(sqlite_url(tmp_path / name / "a.sqlite")) == str(tmp_path / name / "a.sqlite")


def test_choices_are_named():
    with pytest.raises(SettingsError) as error:
        load_settings(None, ["promotion.must_beat=[popularity]"])
    assert error.value.message.startswith(
        "command line: promotion.must_beat: 'popularity' is not one of most popular, 'popular, last 7 days', "
        "'popular, last day'"
    ) and "literal" not in str(error.value)
    with pytest.raises(SettingsError, match=r"did you mean 'softmax'"):
        load_settings(None, ["train.loss=softmx"])


def test_where_it_was_said_is_named(tmp_path):
    path = tmp_path / "recray.yaml"
    path.write_text("train: {epochs: 0}\nmodel: {dim: 7}\n")
    with pytest.raises(SettingsError) as error:
        load_settings(path, ["train.patience=0", "score.k=0"])
    lines = error.value.message.splitlines()
    said = {line.split(": ")[1]: line.split(": ")[0] for line in lines}
    assert said == {
        "model.heads": str(path),
        "train.epochs": str(path),
        "train.patience": "command line",
        "score.k": "command line",
    }


def test_without_a_home_folder_the_setting_is_named(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(SettingsError, match="storage.root: '~/.recray' needs a home folder"):
        Settings().root()


CAPPED = ("privacy.enabled=true", "privacy.cap=8")


@pytest.mark.parametrize(
    "config",
    sorted((Path(__file__).parents[3] / "jobs" / "configs").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_two_settings_turn_privacy_on_whatever_else_is_written_out(config, monkeypatch):
    monkeypatch.setenv("RECRAY_DATA", "/data")
    loaded = load_settings(config, [*CAPPED, "data.items=/data/items.parquet"])
    assert (
        loaded.model.preset == "dp"
        and not loaded.model.repeat_consumption
        and loaded.split.holdout_users == 0.1
        and loaded.data.catalogue == "items"
    )
    assert loaded.train.learning_rate == 0.01 and loaded.model.blocks == 1
    assert (
        any(words.startswith("model.preset ligr → dp") for words in loaded.changed)
        and load_settings(config).changed == ()
    )


def test_a_conflict_of_the_command_line_is_refused_with_what_to_leave_out():
    with pytest.raises(
        SettingsError, match="command line: model.repeat_consumption: true cannot be trained privately.*"
    ) as error:
        load_settings(None, [*CAPPED, "data.items=/items.parquet", "model.repeat_consumption=true"])
    assert "omit it" in error.value.fix and "model.repeat_consumption=false" in error.value.fix
    with pytest.raises(SettingsError, match="privacy.cap: name the ε that may be spent"):
        load_settings(None, ["privacy.enabled=true", "data.items=/items.parquet"])
    with pytest.raises(SettingsError, match="data.items names no table"):
        load_settings(None, CAPPED)


def test_a_file_that_turns_privacy_on_means_what_it_says_of_the_training(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "privacy: {enabled: true, cap: 8}\ndata: {items: /items.parquet}\ntrain: {learning_rate: "
        "0.03}\nmodel: {repeat_consumption: true, dim: 64}\n"
    )
    loaded = load_settings(file)
    assert (loaded.train.learning_rate, loaded.model.repeat_consumption, loaded.model.dim) == (
        0.03,
        False,
        32,
    ), "64 is the default, which nobody chose"
    assert "model.repeat_consumption true → false" in loaded.changed and not any(
        "learning_rate" in words for words in loaded.changed
    )
    assert load_settings(file, ["model.dim=64"]).model.dim == 64


OLD_VALUES = [(name, old, new) for name, values in formats.VALUES.items() for old, new in values.items()]


@pytest.mark.parametrize(("old", "new"), formats.SETTINGS.items())
def test_an_old_name_of_a_setting_is_refused_with_the_new_one(old, new, tmp_path):
    section, field = new.split(".")
    assert field in Settings.model_fields[section].annotation.model_fields, "the new name is a setting"
    with pytest.raises(SettingsError, match=rf"command line: {old} is now {new}"):
        load_settings(None, [f"{old}=1"])
    file = tmp_path / "old.yaml"
    file.write_text(f"{old.partition('.')[0]}:\n  {old.partition('.')[2]}: 1\n")
    with pytest.raises(SettingsError, match=rf"old.yaml: {old} is now {new}"):
        load_settings(file)


def test_a_value_of_no_setting_is_not_taken():
    assert Settings().replace("train", epochs=3).train.epochs == 3
    with pytest.raises(KeyError, match="train: epoch"):
        Settings().replace("train", epoch=3)


@pytest.mark.parametrize(("name", "old", "new"), OLD_VALUES)
def test_an_old_value_of_a_setting_is_refused_with_the_new_one(name, old, new):
    with pytest.raises(SettingsError, match=f"did you mean '{new}'"):
        load_settings(None, [f"{name}={old}"])


@given(st.data())
def test_stored_settings_are_read_under_new_names_and_keys_keep_the_first(data):
    settings = Settings().result_settings(*RESULT_SECTIONS)
    for name, values in formats.VALUES.items():
        section, field = name.split(".")
        settings[section][field] = data.draw(st.sampled_from(list(values.values())))
    first = formats.to_first_names(settings)
    assert settings == formats.to_current_settings(settings)
    for name, neutral in formats.ADDED.items():  # later settings are in keys where they change something
        section, field = name.split(".")
        assert (field in first[section]) == (settings[section][field] != neutral)
        if settings[section][field] == neutral:
            del settings[section][field]
        assert formats.to_first_names({section: {field: "other"}}) == {section: {field: "other"}}
    assert formats.to_current_settings(first) == settings
    assert "gates" in first and "promotion" not in first and "asked_at" in first["split"]
    assert not list(formats.find_old_names(settings)) and len(list(formats.find_old_names(first))) > 15
