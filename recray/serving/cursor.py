"""The next page of a list: a cursor holds the user and the items that earlier pages showed.

The next page leaves these items out, so it repeats none, also after another run was published in between.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

from recray.errors import RequestError

MOST_SHOWN = 2_000  # items of all pages
MOST_LETTERS = 1 << 16  # of a cursor
_FIX = "begin with an empty cursor, and send each response's cursor with the next request of the same user"


def encode_cursor(user: str | None, shown: Sequence[Any]) -> str | None:
    """The cursor after these items; None where there are too many for another page."""
    content = zlib.compress(json.dumps([user, list(shown)]).encode())
    cursor = base64.urlsafe_b64encode(content).decode()
    return cursor if len(shown) <= MOST_SHOWN and len(cursor) <= MOST_LETTERS else None


def decode_cursor(cursor: str, user: str | None) -> list[Any]:
    """The items that earlier pages showed to the user. Raises RequestError for the cursor of another user, or
    text that is no cursor.
    """
    if not cursor:
        return []
    try:
        decompressor = zlib.decompressobj()
        content = decompressor.decompress(base64.b64decode(cursor, b"-_", validate=True), 1 << 22)
        owner, shown = json.loads(content)
        is_cursor = decompressor.eof and isinstance(shown, list) and len(shown) <= MOST_SHOWN
        is_cursor = is_cursor and all(type(item) in (int, str) for item in shown)
    except (ValueError, TypeError, RecursionError, zlib.error):
        is_cursor = False
    if not is_cursor:
        raise RequestError("cursor: it is not one of this endpoint", _FIX)
    if owner != user:
        raise RequestError("cursor: it belongs to another user", _FIX)
    return list(shown)
