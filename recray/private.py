"""What `privacy.enabled` changes of the other settings: what cannot be trained privately gives way, what suits it comes in its place.

A setting that conflicts is replaced and listed, or, if the command line named it, refused. What only suits a private training replaces a
default, and what a file says that does not turn privacy on itself: that was meant for another training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from recray.errors import SettingsError


class Rule(NamedTuple):
    """A setting that a private training cannot have as it likes: the values that it may have, which one comes instead, and why."""

    fits: Callable[[Any], bool]
    instead: Any
    why: str


def _off(value: Any) -> bool:
    return not value


_UNKNOWN_NORM = "what one user adds there is not known exactly"
_TELLS = "one user's events would show in it"

MUST: dict[str, Rule] = {
    "split.held_out": Rule(bool, 0.1, "selection, gates and metrics need users of whom nothing is learned"),
    "data.catalogue": Rule(lambda value: value == "items", "items", "that somebody met an item would show in the catalogue"),
    "data.min_item_events": Rule(_off, 0, _TELLS),
    "data.shards": Rule(bool, 16, "how many events there are would show in it"),
    "data.context": Rule(_off, [], _UNKNOWN_NORM),
    "data.released": Rule(_off, None, _UNKNOWN_NORM),
    "model.preset": Rule(lambda value: value in ("dp", "sasrec"), "dp", _UNKNOWN_NORM),
    "model.attention": Rule(lambda value: value != "pointwise", None, _UNKNOWN_NORM),
    "model.relative": Rule(_off, None, _UNKNOWN_NORM),
    "model.time_bias": Rule(_off, False, _UNKNOWN_NORM),
    "model.values": Rule(_off, False, _UNKNOWN_NORM),
    "model.repeat": Rule(_off, False, _UNKNOWN_NORM),
    "model.repeat_by_item": Rule(_off, False, _UNKNOWN_NORM),
    "model.prior_days": Rule(_off, 0, "it counts without noise"),
    "train.loss": Rule(lambda value: value in ("auto", "softmax"), "softmax", _UNKNOWN_NORM),
    "train.temperature_jitter": Rule(_off, 0.0, _UNKNOWN_NORM),
    "train.horizon": Rule(lambda value: value == 1, 1, _UNKNOWN_NORM),
    "gates.must_beat": Rule(lambda value: set(value) <= {"most popular"}, ["most popular"], "the others learn without noise"),
}
SUITS: dict[str, Any] = {
    "model.scores": None,
    "model.dim": 32,
    "model.blocks": 1,
    "model.history": 50,
    "model.dropout": 0.1,
    "model.id_dropout": 0.0,
    "train.learning_rate": 0.01,
    "train.warmup_steps": 10,
    "train.average_decay": 0.95,
    "train.warm_start": True,
}
"""Few weights for little noise, large steps; measured by `recray benchmark privacy`."""


def switched(content: dict[str, Any], named: Collection[str], defaults: Mapping[str, Any]) -> list[str]:
    """Change settings as they were read (file and overrides, by section) so that they can be trained privately; what was changed, in words.

    named : settings of the command line
    defaults : by name

    Nothing happens where privacy is off. Raises SettingsError for a conflicting setting of the command line.
    """
    privacy = content.get("privacy")
    if not isinstance(privacy, dict) or privacy.get("enabled") is not True:
        return []
    changed: list[str] = []
    for name, rule in MUST.items():
        value = _get(content, name, defaults[name])
        if _fits(rule, value):
            continue
        if name in named:
            raise SettingsError(
                f"command line: {name}: {_shown(value)} cannot be trained privately: {rule.why}",
                f"leave it out: privacy.enabled takes {name}={_shown(rule.instead)}",
            )
        changed.append(_put(content, name, value, rule.instead))
    meant = "privacy.enabled" not in named  # a file that turns privacy on means what it says
    for name, instead in SUITS.items():
        value = _get(content, name, defaults[name])
        if name not in named and value != instead and not (meant and value != defaults[name]):
            changed.append(_put(content, name, value, instead))
    return changed


def conflicts(values: Mapping[str, Any]) -> list[str]:
    """Settings, by name, that a private training cannot have, each with its reason."""
    return [f"{name}: {rule.why}" for name, rule in MUST.items() if not _fits(rule, values[name])]


def _fits(rule: Rule, value: Any) -> bool:
    try:
        return rule.fits(value)
    except TypeError:  # of no type that it may have, which is said elsewhere
        return True


def _get(content: dict[str, Any], name: str, default: Any) -> Any:
    section, _, field = name.partition(".")
    found = content.get(section)
    return found.get(field, default) if isinstance(found, dict) else default


def _put(content: dict[str, Any], name: str, value: Any, instead: Any) -> str:
    section, _, field = name.partition(".")
    content.setdefault(section, {})[field] = instead
    return f"{name} {_shown(value)} → {_shown(instead)}"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
