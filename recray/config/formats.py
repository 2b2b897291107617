"""Old names of settings and of fields of artifacts, and their translation.

A settings file or command line with an old name is refused; the error names the new one. Artifacts with old
names are read: `to_current_settings` and `to_current_manifest` translate them. Run keys are hashes of the
first names (`to_first_names`) and `RESULTS_SINCE`. An upgrade that only renames therefore reuses existing
results: nothing is trained twice, and no privacy budget is spent again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RESULTS_SINCE = "0.1.0"
"""The first version whose results are still valid. Raise it when the same settings and data give other
results, never for a rename.
"""

SETTINGS = {
    "data.released": "data.available_from",
    "data.max_bad_fraction": "data.max_invalid_fraction",
    "split.held_out": "split.holdout_users",
    "split.asked_at": "split.query_time",
    "model.repeat": "model.repeat_consumption",
    "model.prior_days": "model.popularity_prior_days",
    "train.average_decay": "train.ema_decay",
    "train.batch_positions": "train.batch_tokens",
    "train.windows": "train.sequences",
    "train.horizon": "train.target_baskets",
    "evaluate.primary_setting": "evaluate.protocol",
    "gates.margin": "promotion.margin",
    "gates.must_beat": "promotion.must_beat",
    "gates.parity_users": "promotion.consistency_users",
    "gates.first_run": "promotion.first_run",
    "policy.wait_s": "policy.attribution_window_s",
    "policy.share": "policy.experiment_share",
    "policy.trial_days": "policy.experiment_days",
    "policy.sigma": "policy.exploration_scale",
    "policy.explore": "policy.exploration_share",
    "score.new_only": "score.filter_seen",
    "score.unseen": "score.cold_item_boost",
}
"""Old name of a setting -> its name."""

VALUES = {
    "split.query_time": {"cut": "cutoff"},
    "train.select_by": {"primary": "protocol"},
    "evaluate.protocol": {"repeats": "with_repeats", "new_only": "filter_seen"},
}
"""Setting -> {old value: its name}."""

ADDED: dict[str, Any] = {
    "data.display": {},
    "data.targets": {},
    "model.cooccurrence": False,
    "model.cooccurrence_events": 50,
    "model.cooccurrence_neighbours": 32,
    "policy.shown_only": False,
    "score.cold_item_share": 0.0,
    "score.seen_days": None,
    "score.seen_events": [],
    "train.calibrate": False,
    "train.cooccurrence_memory": 2.0,
}
"""Later setting -> the value with which results are as before it: then it is not part of run keys."""

FIELDS = {"bundle": {"prior_days": "popularity_prior_days"}, "snapshot": {"new_only": "filter_seen"}}
"""Kind of artifact -> {old field of its manifest: its name}."""

PROTOCOLS = VALUES["evaluate.protocol"]
"""Old name of a protocol, in the files of an evaluation -> its name."""

_FIRST = {new: old for old, new in SETTINGS.items()}
_FIRST_PROTOCOLS = {new: old for old, new in PROTOCOLS.items()}


def find_old_names(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Old names in settings by section, each with its new name."""
    for old, new in SETTINGS.items():
        section, _, field = old.partition(".")
        values = content.get(section)
        if isinstance(values, dict) and field in values:
            yield old, new


def to_current_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section from an artifact, under the current names and values."""
    return _rename(content, SETTINGS, VALUES)


def to_first_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse, for run keys: settings by section under their first names and values."""
    values = {
        _FIRST.get(name, name): {new: old for old, new in renamed.items()} for name, renamed in VALUES.items()
    }
    first = _rename(content, _FIRST, values)
    for name, neutral in ADDED.items():
        section, _, field = name.partition(".")
        if isinstance(fields := first.get(section), dict) and fields.get(field, ...) == neutral:
            del fields[field]
    return first


def first_protocol(protocol: str) -> str:
    """The first name of a protocol."""
    return _FIRST_PROTOCOLS.get(protocol, protocol)


def to_current_manifest(kind: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of an artifact under the current names."""
    fields = FIELDS.get(kind, {})
    current = {fields.get(name, name): value for name, value in manifest.items()}
    if "settings" in current:
        current["settings"] = to_current_settings(current["settings"])
    if isinstance(current.get("rules"), dict):
        current["rules"] = to_current_settings({"score": current["rules"]})["score"]
    return current


def _rename(
    content: Mapping[str, Any], names: Mapping[str, str], values: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for section, fields in content.items():
        if not isinstance(fields, dict):
            result[section] = fields
            continue
        if not fields:
            result.setdefault(section, {})
        for field, value in fields.items():
            name = names.get(f"{section}.{field}", f"{section}.{field}")
            new_values = values.get(name, {})
            to_section, _, to_field = name.partition(".")
            result.setdefault(to_section, {})[to_field] = (
                new_values.get(value, value) if isinstance(value, str) else value
            )
    return result
