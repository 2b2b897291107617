"""Settings of recray: typed, frozen and closed, read from YAML plus `section.field=value` overrides.

An unknown key, a wrong type or two fields that contradict each other raise `SettingsError` before a job
starts. Operational fields say where or with what a job runs. They change no result and are not part of run
keys.

Names are imported when they are used, so that `recray.config.formats` does not load pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recray.config.file import (
        FIRST_SETTINGS,
        load_settings,
        parse_as_of,
        parse_overrides,
        render_yaml,
        with_values,
    )
    from recray.config.paths import expand_path, sqlite_file, sqlite_url
    from recray.config.sections import (
        RESULT_SECTIONS,
        SAMPLE,
        DataSettings,
        EvaluateSettings,
        ModelSettings,
        PolicySettings,
        PrivacySettings,
        PromotionSettings,
        ScoreSettings,
        SearchSettings,
        ServeSettings,
        Settings,
        SplitSettings,
        StorageSettings,
        TrackingSettings,
        TrainSettings,
    )

__all__ = [
    "FIRST_SETTINGS",
    "RESULT_SECTIONS",
    "SAMPLE",
    "DataSettings",
    "EvaluateSettings",
    "ModelSettings",
    "PolicySettings",
    "PrivacySettings",
    "PromotionSettings",
    "ScoreSettings",
    "SearchSettings",
    "ServeSettings",
    "Settings",
    "SplitSettings",
    "StorageSettings",
    "TrackingSettings",
    "TrainSettings",
    "expand_path",
    "load_settings",
    "parse_as_of",
    "parse_overrides",
    "render_yaml",
    "sqlite_file",
    "sqlite_url",
    "with_values",
]

_MODULES = {
    **dict.fromkeys(
        ("FIRST_SETTINGS", "load_settings", "parse_as_of", "parse_overrides", "render_yaml", "with_values"),
        "file",
    ),
    **dict.fromkeys(("expand_path", "sqlite_file", "sqlite_url"), "paths"),
}
"""Name -> module of `recray.config`; all others are in `sections`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'recray.config' has no attribute {name!r}")
    return getattr(import_module(f"recray.config.{_MODULES.get(name, 'sections')}"), name)
