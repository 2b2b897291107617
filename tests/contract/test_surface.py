"""What others build on: public names, the endpoint's OpenAPI, commands, settings; and the hook that is the
same as CI.

`RECRAY_RECORD=1 pytest tests/contract` writes down a surface that was changed on purpose.
"""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

import recray
from recray import errors

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).parent / "records"
RECORD = bool(os.environ.get("RECRAY_RECORD"))


CHANGED = "it changed; if on purpose: RECRAY_RECORD=1 pytest tests/contract"


def recorded(name: str, current: object) -> object:
    """What is recorded under a name; `found` is recorded first if that was asked for."""
    path = RECORDS / name
    if RECORD:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n")
    return json.loads(path.read_text())


def test_public_names_are_those_of_all():
    assert recray.__all__ == sorted(recray.__all__)
    for name in recray.__all__:
        assert getattr(recray, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_sort"):
        recray.nothing_of_the_sort  # noqa: B018
    assert recray.__all__ == recorded("names.json", recray.__all__), CHANGED


def test_the_drawing_of_the_errors_is_complete():
    """Each class stands in the drawing once, below its base."""
    classes = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.RecrayError)
    }
    drawn, path = {}, []
    for line in errors.__doc__.splitlines():
        if name := re.search(r"\b[A-Z]\w+Error\b", line):
            depth = name.start() // 4
            path[depth:] = [name[0]]
            drawn[name[0]] = next(
                (parent for parent in reversed(path[:-1]) if parent in classes), "Exception"
            )
        elif "exit code 1" in line:
            path[1:] = ["(exit code 1)"]
    assert drawn == {name: value.__base__.__name__ for name, value in classes.items()}
    hidden = {"PartUnavailableError"}  # another part stands in, so nobody outside sees it
    assert set(classes) - hidden <= set(recray.__all__)


def test_the_endpoints_openapi_is_the_recorded_one():
    from recray.serving.http import openapi

    document = json.loads(openapi())
    assert document == recorded("openapi.json", document), CHANGED


def test_the_commands_and_their_options_are_the_recorded_ones():
    import argparse

    from recray import cli

    (commands,) = [
        action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ]
    options = {
        name: sorted(
            option for action in command._actions for option in (action.option_strings or [action.dest])
        )
        for name, command in commands.choices.items()
    }
    assert options == recorded("commands.json", options), CHANGED


def test_the_settings_and_their_defaults_are_the_recorded_ones():
    from recray.config import Settings

    defaults = json.loads(Settings().model_dump_json())
    assert defaults == recorded("settings.json", defaults), CHANGED


def test_the_hook_runs_what_ci_runs():
    (repo,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repo["hooks"]
    assert (
        hook["entry"] == "bash infra/lint.sh"
        and hook["language"] == "system"
        and hook["pass_filenames"] is False
    )
    assert "bash infra/lint.sh\n" in (REPOSITORY / "infra" / "test.sh").read_text()
    assert "infra/test.sh" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["recray", "policies"])
def test_types_are_checked_strictly(name):
    import tomllib

    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] is True and name in settings["packages"]
    loosened = {
        key
        for key, value in settings.items()
        if value is False or key in ("disable_error_code", "implicit_reexport")
    }
    assert not loosened
