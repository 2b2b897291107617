"""Reads settings from YAML and command-line overrides. Errors name the setting and the fix."""

from __future__ import annotations

import datetime as dt
import difflib
import os
import re
import zoneinfo
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from recray.config import formats
from recray.config.fields import list_choices, list_plain_types
from recray.config.paths import expand_path
from recray.config.private import apply_private_settings
from recray.config.sections import SAMPLE, Settings
from recray.errors import SettingsError


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file (None: the defaults) with overrides such as `train.epochs=3`.

    `data` paths in the file may contain $VARIABLES. Relative paths start at the file's folder. Raises
    SettingsError, which names field, value and fix.
    """
    content: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    _refuse_old_names(formats.find_old_names(content), str(path))
    replaced = {override.partition("=")[0] for override in overrides}
    _refuse_old_names(
        [(name, formats.SETTINGS[name]) for name in sorted(replaced & formats.SETTINGS.keys())],
        "command line",
    )
    if path is not None:
        _anchor_paths(content, Path(path).resolve().parent, replaced)
    for override in overrides:
        _apply_override(content, override)
    sections: dict[str, Any] = {name: field.annotation for name, field in Settings.model_fields.items()}
    defaults = {
        f"{section_name}.{name}": field.get_default()
        for section_name, section in sections.items()
        for name, field in section.model_fields.items()
    }
    changed = apply_private_settings(content, replaced, defaults)

    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise _to_settings_error(error, str(path) if path else "command line", replaced) from None
    settings._changed = tuple(changed)
    return settings


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """These settings with other values, by `section.field`, all checked. Raises SettingsError."""
    content = settings.model_dump()
    for name, value in values.items():
        section, _, field = name.partition(".")
        content[section][field] = value
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise _to_settings_error(error, "search", set(values)) from None


def _refuse_old_names(renamed: Iterable[tuple[str, str]], source: str) -> None:
    """Raises SettingsError with the new name of each old one."""
    if pairs := [f"{old} is now {new}" for old, new in renamed]:
        raise SettingsError(
            f"{source}: {', '.join(pairs)}", "use the new names; a renamed value is reported when it is read"
        )


FIRST_SETTINGS = {
    "storage": ("root",),
    "data": ("events", "items", "columns", "features"),
    "evaluate": ("protocol",),
    "promotion": ("must_beat",),
    "score": ("k", "filter_seen"),
    "serve": ("port", "outcomes"),
    "tracking": ("uri",),
}
"""Settings to decide first; `recray init` writes them."""


def render_yaml(settings: Settings, heading: str, shown: Mapping[str, Sequence[str]] | None = None) -> str:
    """Settings as commented YAML with `heading` as its opening comment.

    shown : fields by section; None: all
    """
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for name in Settings.model_fields if shown is None else shown:
        section = getattr(settings, name)
        lines += ["", f"{name}:"]
        dumped = section.model_dump(mode="json")
        for field_name, field in type(section).model_fields.items():
            if shown is not None and field_name not in shown[name]:
                continue
            value = (
                yaml.safe_dump(dumped[field_name], default_flow_style=True, width=10_000)
                .removesuffix("...\n")
                .strip()
            )
            mark = "advanced; " if field_name in type(section).advanced else ""
            lines.append(f"  {field_name}: {value}  # {mark}{field.description}")
    return "\n".join(lines) + "\n"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = _parse_yaml(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist", "write one with: recray init") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        fix = (
            "keep one of them"
            if "defined twice" in str(error)
            else "check that it is a YAML file, and quote values that are not plain text"
        )
        raise SettingsError(f"{path} cannot be read: {error}", fix) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(v is None or isinstance(v, dict) for v in content.values()):
        raise SettingsError(
            f"{path} does not contain sections", f"expected the sections {', '.join(Settings.model_fields)}"
        )
    return {key: value for key, value in content.items() if value is not None}


def _anchor_paths(content: dict[str, Any], folder: Path, replaced: set[str]) -> None:
    """Expand $VARIABLES in the file's paths, and make relative ones absolute from its folder."""

    def anchor(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        text = os.path.expandvars(value)
        if unset := re.search(r"\$\{?(\w+)", text):
            raise SettingsError(
                f"data: {text!r} needs the environment variable {unset[1]}",
                f"set {unset[1]}, or override data.events and data.items",
            )
        if not text.strip():
            raise SettingsError(
                f"data: {value!r} is blank", "set the environment variable that it names, or name a path"
            )
        is_complete = "://" in text or text == SAMPLE or expand_path(text, "data").is_absolute()
        return text if is_complete else str(folder / text)

    privacy = content.get("privacy", {})
    if "public_start" in privacy and "privacy.public_start" not in replaced:
        privacy["public_start"] = anchor(privacy["public_start"])
    data = content.get("data", {})
    if isinstance(data.get("events"), str):
        data["events"] = [data["events"]]
    if isinstance(data.get("events"), list) and "data.events" not in replaced:
        data["events"] = [anchor(value) for value in data["events"]]
    encoder = data.get("text_encoder")
    if (
        isinstance(encoder, str)
        and ("/" in encoder or "$" in encoder)
        and "data.text_encoder" not in replaced
    ):
        data["text_encoder"] = anchor(encoder)
    for name in ("items", "exclude_users"):
        if name in data and f"data.{name}" not in replaced:
            data[name] = anchor(data[name])


def _apply_override(content: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    parts = name.split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise SettingsError(
            f"override {override!r} is not section.field=value", "for example: train.epochs=3"
        )
    value = _parse_override(parts, text, override)
    fields = content
    for part in parts[:-1]:
        fields = fields.setdefault(part, {})
        if not isinstance(fields, dict):
            raise SettingsError(
                f"override {override!r}: {part} is not a section", "for example: train.epochs=3"
            )
    fields[parts[-1]] = value


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides as setting -> value, `data.columns.user_id` -> the name of a column. Raises SettingsError."""
    values: dict[str, Any] = {}
    for override in overrides:
        content: dict[str, Any] = {}
        _apply_override(content, override)
        name, value = override.partition("=")[0], content
        for part in name.split("."):
            value = value[part]
        if name == "data.columns" and isinstance(value, dict):
            values |= {f"data.columns.{column}": source for column, source in value.items()}
        else:
            values[name] = value
    return values


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2: `yes`, `on` and 12:30 are text, 1e-3 is a number, 0123 and dates stay as written.

    A key that is defined twice raises yaml.YAMLError.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
            if not isinstance(name, Hashable):
                raise yaml.MarkedYAMLError(
                    problem=f"a mapping as a name, in line {line}: is it a template such as {{{{ name }}}} "
                    "that was not filled in?"
                )
            if name in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"{name!r} is defined twice, in line {lines[name]} and in line {line}"
                )
            lines[name] = line
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, also for a key that is defined twice."""
    return yaml.load(text, _Loader)


def _parse_override(parts: list[str], text: str, override: str) -> Any:
    """The value of an override. The text for a text setting is its value, so that every path survives; for
    other settings it is YAML.
    """
    annotation: Any = (
        Settings.model_fields[parts[0]].annotation if parts[0] in Settings.model_fields else None
    )
    for part in parts[1:]:
        fields = getattr(annotation, "model_fields", {})
        annotation = fields[part].annotation if part in fields else (get_args(annotation) or (None,))[-1]
    is_text = str in list_plain_types(annotation) and list_plain_types(annotation) <= {str, NoneType}
    is_paths = get_origin(annotation) is tuple and not text.lstrip().startswith("[")
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text and not is_quoted:
        return None if text == "null" and NoneType in list_plain_types(annotation) else text
    if is_paths and not is_quoted:
        return [text]
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"override {override!r}: {error}", "quote the value as in YAML") from None
    return [value] if isinstance(value, str) and is_paths else value


def _to_settings_error(error: ValidationError, source: str, replaced: set[str]) -> SettingsError:
    """Pydantic's errors as one line per setting, with its source: the file or the command line."""
    problems: dict[str, str] = {}
    fixes = []
    for details in error.errors():
        name, problem, fix = _describe_problem(details, source, replaced)
        problems.setdefault(name, problem)
        fixes.append(fix)
    return SettingsError("\n".join(problems.values()), "; ".join(dict.fromkeys(fixes)))


def _describe_problem(details: Any, source: str, replaced: set[str]) -> tuple[str, str, str]:
    """The setting of one of pydantic's errors, the problem in a line, and the fix."""
    path, value = [str(part) for part in details["loc"]], details["input"]
    is_in_section = bool(path) and path[0] in Settings.model_fields
    section = Settings.model_fields[path[0]].annotation if is_in_section else None
    fields = getattr(section, "model_fields", {})
    field = fields.get(path[1]) if len(path) > 1 else None
    is_dict = field is not None and get_origin(field.annotation) is dict
    depth = 2 if not is_dict else 4 if len(path) > 3 and path[3] in _entry_fields(path) else 3
    name = ".".join(path[:depth])  # the rest are members of a union
    origin = source
    if any(f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") for other in replaced):
        origin = "command line"

    if details["type"] == "extra_forbidden":
        return name, f"{origin}: unknown setting {'.'.join(path)}", _suggest_name(path)
    if details["type"] == "literal_error" and field is not None:
        choices = list_choices(field.annotation)
        listed = ", ".join(repr(choice) if "," in choice else choice for choice in choices)
        fix = _suggest_choice(name, str(value), choices)
        return name, f"{origin}: {name}: {value!r} is not one of {listed}", fix
    if details["type"] == "tuple_type":
        return name, f"{origin}: {name}: {value!r} is not a list", f"write [{value}]"

    message = details["msg"].removeprefix("Value error, ")
    field_name = re.split(r"\W", message, maxsplit=1)[0]
    if len(path) == 1 and field_name in fields:  # of a section, about one of its fields
        name, message = f"{path[0]}.{field_name}", message.removeprefix(f"{field_name}: ")
        origin = "command line" if name in replaced else source
    is_about_several = not path or (len(path) == 1 and "." not in name)
    if origin == source != "command line" and replaced and is_about_several:
        origin = f"{source} with the command line"
    shown = "" if isinstance(value, dict) else f" (got {value!r})"
    problem = ": ".join(part for part in (origin, name, message) if part) + shown
    return name, problem, "`recray settings` prints every setting with its meaning"


def _suggest_choice(setting: str, value: str, choices: list[str]) -> str:
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(value.casefold(), by_folded, n=1)
    if renamed := formats.VALUES.get(setting, {}).get(value):
        close = [renamed]
    return f"did you mean {by_folded[close[0]]!r}?" if close else "choose one of them"


def _entry_fields(path: list[str]) -> Mapping[str, Any]:
    """The fields of an entry of a setting that holds sections by name (serve.surfaces); none for others."""
    field = Settings.model_fields[path[0]].annotation.model_fields.get(path[1])  # type: ignore[union-attr]
    types = () if field is None else get_args(field.annotation)
    return getattr(types[1], "model_fields", {}) if len(types) > 1 else {}


def _suggest_name(path: list[str]) -> str:
    names: Any = Settings.model_fields
    if len(path) > 1 and path[0] in names:
        names = (_entry_fields(path) if len(path) > 3 else None) or names[path[0]].annotation.model_fields
    close = difflib.get_close_matches(path[-1], list(names), n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"


def parse_as_of(text: str | None, zone: str | None = None) -> dt.datetime | None:
    """The last moment that a job reads, UTC. A bare date means its end. A text without a zone is in `zone`
    (None: UTC). Raises SettingsError.
    """
    if text is None:
        return None
    try:
        try:
            moment = dt.datetime.combine(dt.date.fromisoformat(text), dt.time.max)
        except ValueError:
            moment = dt.datetime.fromisoformat(text)
        if not 1970 <= moment.year < 2100:
            raise ValueError
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zoneinfo.ZoneInfo(zone or "UTC"))
        return moment.astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise SettingsError(
            f"--as-of {text!r} is not a date from 1970 to 2099", "write 2011-12-09 or 2011-12-09T06:00"
        ) from None
