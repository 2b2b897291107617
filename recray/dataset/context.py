"""Context of a request as small codes: what is known besides the history, such as device, page or hour.

`data.context` names columns of the events, or `hour` and `weekday`, which are derived from the time (UTC). A
value is hashed to a code, so new values need no vocabulary; 0 stands for unknown.
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


def encode_value(name: str, value: Any) -> int:
    """Code of one value, 1 to CODES - 1; 0 for None."""
    if isinstance(value, bool):
        value = str(value).lower()  # as Arrow writes it
    return 0 if value is None else 1 + xxhash.xxh64_intdigest(f"{name}\0{value}".encode()) % (CODES - 1)


def encode_column(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Code of each value of an Arrow column, int16 [n]."""
    encoded = pa.chunked_array(column).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = np.array([*(encode_value(name, value) for value in encoded.dictionary.to_pylist()), 0], np.int16)
    result: np.ndarray = codes[pc.fill_null(encoded.indices, len(codes) - 1).to_numpy()]
    return result


def encode_clock(name: str, time_s: np.ndarray) -> np.ndarray:
    """Code of the hour (1 to 24) or the weekday (Monday 1 to Sunday 7) of times in seconds, UTC."""
    return 1 + (time_s // 3600 % 24 if name == "hour" else (time_s // 86_400 + 3) % 7)


def encode_request(names: Sequence[str], values: Mapping[str, Any], now_s: int | None) -> np.ndarray:
    """Codes [C] of a request at the time `now_s` (None: unknown). Raises RequestError for a name that is not
    declared.
    """
    declared = [name for name in names if name not in CLOCK]
    if undeclared := sorted(set(values) - set(declared)):
        raise RequestError(
            f"context: unknown field {undeclared[0]!r}",
            f"declared: {', '.join(declared) or 'none'}; hour and weekday are derived from `now`",
        )
    clock_codes = {} if now_s is None else {name: int(encode_clock(name, np.array(now_s))) for name in CLOCK}
    return np.array(
        [
            clock_codes.get(name, 0) if name in CLOCK else encode_value(name, values.get(name))
            for name in names
        ],
        np.int64,
    )
