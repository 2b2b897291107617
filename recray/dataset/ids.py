"""Ids as text and as whole numbers: one text for each number, so that no two texts are one user."""

from __future__ import annotations

import re
from typing import Any

CANONICAL = r"^(?:0|-?[1-9][0-9]{0,18})$"
_CANONICAL = re.compile(CANONICAL, re.ASCII)


def canonical_integer(given: Any) -> int | None:
    """The 64-bit integer that an id is, or that it writes in its one canonical way ("7"; not "007", "+7", "7.0" or " 7"); None for all else."""
    if isinstance(given, bool):
        return None
    if isinstance(given, str):
        if not _CANONICAL.fullmatch(given):
            return None
        given = int(given)
    return given if isinstance(given, int) and -(1 << 63) <= given < 1 << 63 else None


def as_id(given: Any, *, integral: bool) -> Any:
    """An id from a request in the type of a vocabulary; None for what it cannot hold, and for nothing but blanks."""
    if integral:
        return canonical_integer(given)
    text = str(given)
    return text if text.strip() else None
