"""Settings that `privacy.enabled` changes: restrictions of private training, and values that suit it.

A conflicting setting is replaced and reported; one from the command line is refused. A suitable value
replaces the default. It also replaces the value of a settings file that does not enable privacy itself,
because such a file was written for training without privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from recray.errors import SettingsError


class Restriction(NamedTuple):
    """Values that private training allows for a setting, the replacement of others, and the reason."""

    allows: Callable[[Any], bool]
    replacement: Any
    reason: str


def _is_off(value: Any) -> bool:
    return not value


_UNKNOWN_NORM = "the exact contribution of one user to it is unknown"
_REVEALS = "it would reveal one user's events"

RESTRICTIONS: dict[str, Restriction] = {
    "split.holdout_users": Restriction(
        bool, 0.1, "selection, promotion criteria and metrics need users who are not in the training"
    ),
    "data.catalogue": Restriction(
        lambda value: value == "items",
        "items",
        "the catalogue would reveal that a user interacted with an item",
    ),
    "data.min_item_events": Restriction(_is_off, 0, _REVEALS),
    "data.targets": Restriction(_is_off, {}, "its item counts and its loss take all events alike"),
    "data.shards": Restriction(bool, 16, "it would reveal the number of events"),
    "data.context": Restriction(_is_off, [], _UNKNOWN_NORM),
    "data.available_from": Restriction(_is_off, None, _UNKNOWN_NORM),
    "model.preset": Restriction(lambda value: value in ("dp", "sasrec"), "dp", _UNKNOWN_NORM),
    "model.attention": Restriction(lambda value: value != "pointwise", None, _UNKNOWN_NORM),
    "model.relative": Restriction(_is_off, None, _UNKNOWN_NORM),
    "model.time_bias": Restriction(_is_off, False, _UNKNOWN_NORM),
    "model.values": Restriction(_is_off, False, _UNKNOWN_NORM),
    "model.repeat_consumption": Restriction(_is_off, False, _UNKNOWN_NORM),
    "model.repeat_by_item": Restriction(_is_off, False, _UNKNOWN_NORM),
    "model.popularity_prior_days": Restriction(_is_off, 0, "its counts have no noise"),
    "model.cooccurrence": Restriction(_is_off, False, "its counts have no noise"),
    "train.loss": Restriction(lambda value: value in ("auto", "softmax"), "softmax", _UNKNOWN_NORM),
    "train.temperature_jitter": Restriction(_is_off, 0.0, _UNKNOWN_NORM),
    "train.calibrate": Restriction(_is_off, False, "the scores of a private model have a single term"),
    "train.target_baskets": Restriction(lambda value: value == 1, 1, _UNKNOWN_NORM),
    "promotion.must_beat": Restriction(
        lambda value: set(value) <= {"most popular"},
        ["most popular"],
        "the other baselines learn without noise",
    ),
}
SUITABLE_VALUES: dict[str, Any] = {
    "model.scores": None,
    "model.dim": 32,
    "model.blocks": 1,
    "model.history": 50,
    "model.dropout": 0.1,
    "model.id_dropout": 0.0,
    "train.learning_rate": 0.01,
    "train.warmup_steps": 10,
    "train.ema_decay": 0.95,
    "train.warm_start": True,
}
"""Few weights, because noise grows with their number, and large steps; see `recray benchmark privacy`."""


def apply_private_settings(
    content: dict[str, Any], command_line: Collection[str], defaults: Mapping[str, Any]
) -> list[str]:
    """Change settings (file and overrides, by section) for private training; return the changes as text.

    command_line : names of the settings on the command line
    defaults : by name

    Does nothing without `privacy.enabled`. Raises SettingsError for a conflict on the command line.
    """
    privacy = content.get("privacy")
    if not isinstance(privacy, dict) or privacy.get("enabled") is not True:
        return []
    changed: list[str] = []
    for name, restriction in RESTRICTIONS.items():
        value = _read_value(content, name, defaults[name])
        if _is_allowed(restriction, value):
            continue
        if name in command_line:
            raise SettingsError(
                f"command line: {name}: {_to_yaml(value)} cannot be trained privately: {restriction.reason}",
                f"omit it: privacy.enabled sets {name}={_to_yaml(restriction.replacement)}",
            )
        changed.append(_replace_value(content, name, value, restriction.replacement))

    # a file that enables privacy was written for private training
    keeps_file_values = "privacy.enabled" not in command_line
    for name, replacement in SUITABLE_VALUES.items():
        value = _read_value(content, name, defaults[name])
        is_deliberate = name in command_line or (keeps_file_values and value != defaults[name])
        if value != replacement and not is_deliberate:
            changed.append(_replace_value(content, name, value, replacement))
    return changed


def find_conflicts(values: Mapping[str, Any]) -> list[str]:
    """Settings that private training forbids, each with its reason."""
    return [
        f"{name}: {restriction.reason}"
        for name, restriction in RESTRICTIONS.items()
        if not _is_allowed(restriction, values[name])
    ]


def _is_allowed(restriction: Restriction, value: Any) -> bool:
    try:
        return restriction.allows(value)
    except TypeError:  # a wrong type, which validation reports
        return True


def _read_value(content: Mapping[str, Any], name: str, default: Any) -> Any:
    section, _, field = name.partition(".")
    fields = content.get(section)
    return fields.get(field, default) if isinstance(fields, dict) else default


def _replace_value(content: dict[str, Any], name: str, value: Any, replacement: Any) -> str:
    section, _, field = name.partition(".")
    content.setdefault(section, {})[field] = replacement
    return f"{name} {_to_yaml(value)} → {_to_yaml(replacement)}"


def _to_yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )
