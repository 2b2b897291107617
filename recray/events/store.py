"""Opens the event store that `serve.state` names."""

from __future__ import annotations

from pathlib import Path

from recray.errors import SettingsError
from recray.events.log import Log
from recray.events.sqlite import SqliteLog


def sqlite_file(root: Path) -> Path:
    """Where a sqlite event store is."""
    return root / "state" / "log.sqlite"


def open_log(url: str, root: Path, keep_days: float = 0.0) -> Log:
    """The event store of `serve.state`: `sqlite` (in the workspace) or redis://host:port/database.

    keep_days : how long an `event_id` must be remembered at least

    Raises SettingsError for another address, StateError if it cannot be opened or may lose acknowledged
    entries.
    """
    if url == "sqlite":
        return SqliteLog(sqlite_file(root))
    if url.startswith(("redis://", "rediss://", "unix://")):
        try:
            from recray.events.redis import RedisLog
        except ModuleNotFoundError:
            raise SettingsError(
                "serve.state names a Redis, which needs the package redis", "pip install recray[redis]"
            ) from None
        return RedisLog(url, keep_days)
    raise SettingsError(
        f"serve.state: {url!r} is neither sqlite nor redis://host:port/database", "use one of them"
    )
