"""Context of a request: what is known at its moment beside the history (device, page, hour), as small codes.

`data.context` names columns of the events, or `hour` and `weekday`, which are read off the moment (UTC). A value is hashed to a
code, so values that come later need no vocabulary; 0 stands for what is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from recray.errors import RequestError

CLOCK = ("hour", "weekday")
CODES = 1024


def code(name: str, value: Any) -> int:
    """Code of one value, 1 to CODES - 1; 0 for None."""
    if isinstance(value, bool):
        value = str(value).lower()  # as Arrow writes it
    return 0 if value is None else 1 + xxhash.xxh64_intdigest(f"{name}\0{value}".encode()) % (CODES - 1)


def codes(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Code of each value of an Arrow column, int16 [n]."""
    encoded = pa.chunked_array(column).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    known = np.array([*(code(name, value) for value in encoded.dictionary.to_pylist()), 0], np.int16)
    found: np.ndarray = known[pc.fill_null(encoded.indices, len(known) - 1).to_numpy()]
    return found


def clock_code(name: str, time_s: np.ndarray) -> np.ndarray:
    """Code of the hour (1 to 24) or the weekday (Monday 1 to Sunday 7) of moments in seconds, UTC."""
    return 1 + (time_s // 3600 % 24 if name == "hour" else (time_s // 86_400 + 3) % 7)


def asked(names: Sequence[str], given: Mapping[str, Any], now_s: int | None) -> np.ndarray:
    """Codes [C] of a request at the moment `now_s` (None: not known). Raises RequestError for a name that was not declared."""
    known = [name for name in names if name not in CLOCK]
    if unknown := sorted(set(given) - set(known)):
        raise RequestError(f"context: unknown field {unknown[0]!r}", f"known: {', '.join(known) or 'none'}; hour and weekday are read off `now`")
    read_off = {} if now_s is None else {name: int(clock_code(name, np.array(now_s))) for name in CLOCK}
    return np.array([read_off.get(name, 0) if name in CLOCK else code(name, given.get(name)) for name in names], np.int64)
