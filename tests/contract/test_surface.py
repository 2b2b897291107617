"""What others build on: public names, the endpoint's OpenAPI, the hook that is the same as CI.

`RECRAY_RECORD=1 pytest tests/contract` writes down a surface that was changed on purpose.
"""

import ast
import json
import os
from pathlib import Path

import pytest
import yaml

import recray

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).parent / "records"
RECORD = bool(os.environ.get("RECRAY_RECORD"))


CHANGED = "it changed; if on purpose: RECRAY_RECORD=1 pytest tests/contract"


def recorded(name: str, found: object) -> object:
    """What is recorded under a name; `found` is recorded first if that was asked for."""
    path = RECORDS / name
    if RECORD:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return json.loads(path.read_text())


def signature(node: ast.FunctionDef) -> str:
    return f"({ast.unparse(node.args)})"


def public_names() -> dict[str, dict[str, str]]:
    """Public functions with their parameters, classes with their public methods and fields, constants; by module."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(Path(recray.__file__).parent.rglob("*.py")):
        module = ".".join(["recray", *path.relative_to(Path(recray.__file__).parent).with_suffix("").parts])
        names: dict[str, str] = {}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                names[node.name] = signature(node)
            elif isinstance(node, ast.ClassDef):
                names[node.name] = "class"
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        names[f"{node.name}.{inner.name}"] = signature(inner)
                    elif isinstance(inner, ast.AnnAssign):
                        names[f"{node.name}.{ast.unparse(inner.target)}"] = ast.unparse(inner.annotation)
        names = {name: what for name, what in names.items() if not any(part.startswith("_") for part in name.split(".") if part != "__init__")}
        if names:
            found[module.removesuffix(".__init__")] = names
    return found


def test_public_names_are_the_recorded_ones():
    found = public_names()
    assert found == recorded("names.json", found), CHANGED


def test_the_endpoints_openapi_is_the_recorded_one():
    from recray.serving.http import openapi

    found = json.loads(openapi())
    assert found == recorded("openapi.json", found), CHANGED


def test_the_commands_and_their_options_are_the_recorded_ones():
    import argparse

    from recray import cli

    (commands,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    found = {
        name: sorted(option for action in command._actions for option in (action.option_strings or [action.dest]))
        for name, command in commands.choices.items()
    }
    assert found == recorded("commands.json", found), CHANGED


def test_the_settings_and_their_defaults_are_the_recorded_ones():
    from recray.config import Settings

    found = json.loads(Settings().model_dump_json())
    assert found == recorded("settings.json", found), CHANGED


def test_the_hook_runs_what_ci_runs():
    (repo,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repo["hooks"]
    assert hook["entry"] == "bash infra/lint.sh" and hook["language"] == "system" and hook["pass_filenames"] is False
    assert "bash infra/lint.sh\n" in (REPOSITORY / "infra" / "test.sh").read_text()
    assert "infra/test.sh" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["recray", "policies"])
def test_types_are_checked_strictly(name):
    import tomllib

    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] is True and name in settings["packages"]
    loosened = {key for key, value in settings.items() if value is False or key in ("disable_error_code", "implicit_reexport")}
    assert not loosened
