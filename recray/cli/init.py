"""`recray init`: writes a settings file, of the settings to decide first or of guesses from a log."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from recray.config import FIRST_SETTINGS, Settings, load_settings, parse_overrides, render_yaml
from recray.errors import SettingsError
from recray.prepare.choose import Guess
from recray.prepare.guess import guess_settings
from recray.prepare.prepare import inspect_input

MOST_LETTERS = 200  # of a reason
HEADING = """recray nightly --config {path}
Settings to decide first. `recray settings` prints all others with their defaults.
Override any on the command line: train.epochs=3"""
GUESSED = """recray nightly --config {path}

Guessed from {source}. Read each line with its reason, and correct what is wrong;
`recray validate --config {path}` checks all rows. All other settings keep their defaults: recray settings"""


def write_settings(
    path: Path, overrides: Sequence[str], data: Sequence[str] = (), template: str | None = None
) -> int:
    """Run `recray init`. Guesses from data are checked on the files before the settings file appears.

    overrides : settings as on any command line; what they decide is not guessed
    data : log and, if there is one, item table

    Raises SettingsError for a file that exists, DataError for what cannot be read or guessed.
    """
    if path.exists():
        raise SettingsError(f"{path} exists", "name another file: recray init other.yaml")
    if not data:
        if template is not None:
            raise SettingsError(
                "--template needs --from-data", "recray init --from-data EVENTS --template shop"
            )
        _write_new(
            path, render_yaml(load_settings(None, overrides), HEADING.format(path=path), FIRST_SETTINGS)
        )
        return 0
    events, *items = data
    if len(items) > 1:
        raise SettingsError(
            f"--from-data takes a log and an item table, not {len(data)} paths",
            "recray init --from-data EVENTS [ITEMS]; name the folder that holds several files",
        )
    decided = parse_overrides(overrides)
    shipped = _load_template(template)
    guesses = [
        guess
        for guess in guess_settings(events, items[0] if items else None, decided)
        if not _is_of_model(guess.setting, shipped)
    ]
    guesses += [Guess(setting, value, "as you said") for setting, value in decided.items()]
    if "storage.root" not in decided:
        root = Settings().storage.root
        guesses.append(Guess("storage.root", root, "workspace: everything recray writes is below it"))
    source = events + (f" and {items[0]}" if items else "")
    text = _render(guesses, GUESSED.format(path=path, source=source), shipped)

    with tempfile.TemporaryDirectory(prefix="recray-init-") as folder:
        draft = Path(folder) / "draft.yaml"
        draft.write_text(text)
        inspect_input(load_settings(draft), None)
    _write_new(path, text)
    return 0


def _write_new(path: Path, text: str) -> None:
    """Write a file that does not exist, all of it or nothing."""
    if path.exists():
        raise SettingsError(f"{path} exists", "name another file: recray init other.yaml")
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error}", "name another file") from None
    finally:
        scratch.unlink(missing_ok=True)
    print(f"wrote {path}; next: recray validate --config {path}", file=sys.stderr)


def _is_of_model(setting: str, template: dict[str, dict[str, Any]]) -> bool:
    """Whether a template decides about a setting of the model."""
    section, name, *_ = setting.split(".")
    return section in ("model", "train", "split") and name in template.get(section, {})


def _load_template(name: str | None) -> dict[str, dict[str, Any]]:
    """The settings of a shipped config that are not about its data."""
    if name is None:
        return {}
    text = resources.files("jobs").joinpath("configs", f"{name}.yaml").read_text()
    return {section: values for section, values in yaml.safe_load(text).items() if section != "data"}


def _render(guesses: Sequence[Guess], heading: str, template: dict[str, dict[str, Any]]) -> str:
    """YAML of the guesses, each with its reason, and of the template's settings that are not guessed."""
    sections: dict[str, dict[str, Any]] = {}
    for guess in guesses:
        section, name, *key = guess.setting.split(".", 2)
        fields = sections.setdefault(section, {})
        if key:
            fields.setdefault(name, {})[key[0]] = guess.value, guess.reason
        else:
            fields[name] = guess.value, guess.reason
    features = sections["data"].get("features", {})
    for section, values in template.items():
        for name, value in values.items():
            if name == "caps":
                value = {column: cap for column, cap in value.items() if column in features}
            if value != {}:
                sections.setdefault(section, {}).setdefault(name, (value, "of the template"))

    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for section, field in Settings.model_fields.items():
        fields = sections.get(section, {})
        lines += ["", f"{section}:"] if fields else []
        model: Any = field.annotation
        for name in (name for name in model.model_fields if name in fields):
            if isinstance(fields[name], dict):
                lines.append(f"  {name}:")
                lines += [f"    {_line(key, *pair)}" for key, pair in fields[name].items()]
            else:
                lines.append(f"  {_line(name, *fields[name])}")
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any, reason: str) -> str:
    dumped = yaml.safe_dump({name: value}, default_flow_style=None, width=10_000, allow_unicode=True).strip()
    text = dumped[1:-1] if dumped.startswith("{") else dumped
    reason = "".join(letter if letter.isprintable() else " " for letter in reason)
    return f"{text}  # {' '.join(reason.split())[:MOST_LETTERS]}" if reason else text
