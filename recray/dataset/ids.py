"""Ids as text and as integers: one text for each number, so that no two texts mean one user."""

from __future__ import annotations

import re
from typing import Any

CANONICAL = r"^(?:0|-?[1-9][0-9]{0,18})$"
_CANONICAL = re.compile(CANONICAL, re.ASCII)


def to_canonical_integer(value: Any) -> int | None:
    """The 64-bit integer of an id that is one, or spells one in its canonical form ("7"; not "007", "+7",
    "7.0" or " 7"); None for anything else.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if not _CANONICAL.fullmatch(value):
            return None
        value = int(value)
    return value if isinstance(value, int) and -(1 << 63) <= value < 1 << 63 else None


def to_typed_id(value: Any, *, is_integral: bool) -> Any:
    """An id from a request in the type of a vocabulary; None if it does not fit the type or is blank."""
    if is_integral:
        return to_canonical_integer(value)
    text = str(value)
    return text if text.strip() else None
