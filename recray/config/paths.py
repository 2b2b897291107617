"""Paths and database URLs of the settings."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from recray.errors import SettingsError


def expand_path(path: str, setting: str) -> Path:
    """A path with `~` expanded. Raises SettingsError where there is no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        reason = "HOME is not set" if path.startswith("~/") or path == "~" else "there is no such user"
        raise SettingsError(
            f"{setting}: {path!r} needs a home folder, and {reason}", "name an absolute path, or set HOME"
        ) from None


def sqlite_url(path: Path) -> str:
    """SQLite URL of a file, for any characters in its path."""
    from sqlalchemy import URL

    plain = str(path)
    if quote(plain) == plain:
        return URL.create("sqlite", database=plain).render_as_string(hide_password=False)
    # a file URI, because MLflow would change such a path; with the driver's name, because MLflow would
    # otherwise create a folder named like the URL
    return URL.create(
        "sqlite+pysqlite", database=f"file:{quote(plain)}", query={"uri": "true"}
    ).render_as_string(hide_password=False)


def sqlite_file(url: str) -> str | None:
    """The file of a database URL, also of one by `sqlite_url`; None for another database or one in memory."""
    from sqlalchemy import make_url

    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    is_uri = parsed.database.startswith("file:")
    return unquote(parsed.database.removeprefix("file:").partition("?")[0]) if is_uri else parsed.database
