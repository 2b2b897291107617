"""What a search may vary, what it starts from, and what it refuses before any training."""

import pytest
from conftest import private_overrides, synthetic_overrides

from recray import pipeline
from recray.config import load_settings, with_values
from recray.config.sections import Range
from recray.errors import DataError, RefusedError, SettingsError
from recray.pipeline.search import require_enough
from recray.search.space import choose_space, nearest, own_values, read_space
from recray.testing.published import prepare_here


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.scores=cosine", "model.dropout=0.25", "train.learning_rate=0.02", "train.batch_tokens=777"),
        ("model.time_bias=false", "model.popularity_prior_days=5", "model.preset=sasrec"),
        ("model.repeat_consumption=false", "model.blocks=3"),
    ],
)
def test_a_chosen_space_has_the_settings_own_values_and_no_impossible_ones(
    synthetic_settings, synthetic_dataset, overrides
):
    settings = with_values(synthetic_settings, {})
    for override in overrides:
        name, _, value = override.partition("=")
        settings = with_values(settings, {name: {"true": True, "false": False}.get(value, _number(value))})
    space = choose_space(settings, synthetic_dataset)
    own = own_values(settings, space)
    assert all(nearest(domain, own[name]) == own[name] for name, domain in space.items())
    for name, domain in space.items():
        for value in (domain.min, domain.max) if isinstance(domain, Range) else domain:
            assert own_values(with_values(settings, {name: value}), {name: ()}) == {name: value}


def _number(text):
    return (
        float(text)
        if text.replace(".", "").isdigit() and "." in text
        else (int(text) if text.isdigit() else text)
    )


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("{model.dropuot: [0.1]}", "search.space: 'model.dropuot' is no setting of model or train"),
        ("{data.min_user_events: [1, 2]}", "'data.min_user_events' is no setting of model or train"),
        ("{model.dropout: [0.1, 2]}", "model.dropout"),
        ("{train.learning_rate: {min: -1, max: 1}}", "train.learning_rate"),
    ],
)
def test_a_space_with_a_wrong_setting_is_refused(synthetic_settings, synthetic_dataset, space, words):
    settings = load_settings(None, [f"search.space={space}"])
    with pytest.raises(SettingsError) as error:
        read_space(settings, synthetic_dataset)
    assert words in error.value.message


def test_all_problems_of_a_space_are_said_at_once(synthetic_dataset):
    settings = load_settings(None, ["search.space={model.dim: [3.5], train.epoch: [1], model.x: [2]}"])
    with pytest.raises(SettingsError) as error:
        read_space(settings, synthetic_dataset)
    assert all(name in error.value.message for name in ("model.dim", "train.epoch", "model.x"))


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("{min: 2, max: 1}", "min must be below max"),
        ("{min: 0, max: 1, log: true}", "both above 0"),
        ("{min: 1}", "a range needs max"),
        ("[]", "at least 1 item"),
    ],
)
def test_a_domain_that_is_none_is_refused_with_the_settings(domain, words):
    with pytest.raises(SettingsError, match=words):
        load_settings(None, [f"search.space={{train.learning_rate: {domain}}}"])


def test_too_few_users_choose_nothing(tmp_path, synthetic_folder):
    overrides = [*synthetic_overrides(synthetic_folder, tmp_path), "split.validation_users=0.05"]
    with pytest.raises(DataError, match="validation users are too few to choose settings: 30 are the fewest"):
        require_enough(prepare_here(load_settings(None, overrides)))


def test_a_private_search_is_refused_and_an_existing_file_kept(tmp_path, synthetic_folder):
    private = load_settings(None, private_overrides(synthetic_folder, tmp_path / "root"))
    with pytest.raises(RefusedError, match="every trial would spend privacy budget"):
        pipeline.run("search", private)
    file = tmp_path / "mine.yaml"
    file.write_text("model: {dim: 32}\n")
    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path / "root"))
    with pytest.raises(SettingsError, match="exists"):
        pipeline.run("search", settings, out=str(file))
    with pytest.raises(SettingsError, match="its folder does not exist"):
        pipeline.run("search", settings, out=str(tmp_path / "nowhere" / "best.yaml"))
    assert file.read_text() == "model: {dim: 32}\n" and not (tmp_path / "root").exists()
