"""Feature columns of the item table as the model takes them: bags of tokens, or vectors.

Categories, lists, numbers and text are bags of hashed tokens, one mechanism for all; vectors (embeddings of images, audio or
text made elsewhere, or by a sentence encoder when the data was prepared) stay vectors.

An item without a value, with an empty text or with a vector that is not finite does not
have the feature; a column that no item has, or that all have alike, tells nothing and does no harm (`notes` says so).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from recray.errors import DataError

NUMERIC_BINS = 20
ROWS = 1 << 14  # vectors that are brought to length one at once
VECTORS = ("vector", "sentence")  # kinds that a dataset keeps as one vector an item
MANY_MISSING = 0.5  # of the items, to be worth a note
LONG_TEXT = 100_000  # characters, to be worth a note
_WORD = re.compile(r"\w+")


Encoded = tuple[np.ndarray, np.ndarray]
"""A feature of the vocabulary with padding first: tokens int64 [K] and where each item's begin, offsets int64 [V]; or
vectors float32 [V, C] of length 1 (zero where there is none) and whether there is one, bool [V]."""


def encode(items: pa.Table, features: dict[str, str], buckets: int, known: pa.Table | None = None, *, distinct: bool = True) -> dict[str, Encoded]:
    """Every feature column, encoded. Raises DataError for vectors of several lengths.

    Numbers become the bin of their quantile among the distinct values and its neighbours, zero a token of its own; text its words and
    the trigrams of its words, all hashed into `buckets`; vectors are centred, then scaled to length 1.

    known : the table whose numbers decide the bins and whose vectors the centre, for items that come later; None: `items`
    distinct : false: quantiles of all values, as bundles of 0.1.0 have them
    """

    def encoded(name: str, kind: str) -> Encoded:
        before = None if known is None else known[name]
        return _vectors(items[name], name, before) if kind in VECTORS else _bags(_tokens(items[name], kind, before, distinct), name, buckets)

    return {name: encoded(name, kind) for name, kind in features.items()}


def joined(first: Encoded, then: Encoded) -> Encoded:
    """The feature of some items followed by that of others, whose own padding is left out."""
    values, places = first
    more, where = then
    if values.ndim == 2:
        return np.concatenate([values, more[1:]]), np.concatenate([places, where[1:]])
    return np.concatenate([values, more]), np.concatenate([places, where[1:] + len(values)])


def described(encoded: dict[str, Encoded], count: int) -> np.ndarray:
    """Which of `count` items have any feature, bool [count], padding not counted."""
    found = np.zeros(count, bool)
    for values, places in encoded.values():
        found |= places[1:] if values.ndim == 2 else np.diff(places, append=len(values))[1:] > 0
    return found


def notes(items: pa.Table, features: dict[str, str], buckets: int) -> list[str]:
    """What a person should know of the feature columns: which tell nothing, what many items lack, and what `buckets` cannot tell apart."""
    found = []
    for name, kind in features.items():
        kind = "text" if kind == "sentence" else kind  # as the owner has it
        first, second = encode(items, {name: kind}, 1 << 62)[name]
        present = second[1:] if kind == "vector" else np.diff(second, append=len(first))[1:] > 0
        distinct = {str(value) for value, there in zip(items[name].to_pylist(), present, strict=True) if there or kind == "vector"} - {"None"}
        missing = 1.0 - float(present.mean()) if len(present) else 1.0
        if len(distinct) <= 1:
            found.append(f"feature {name}: {'all items have the same value' if distinct else 'no item has a value'}; it tells nothing")
        elif missing > MANY_MISSING:
            found.append(f"feature {name}: {missing:.0%} of the items have no value")
        if kind != "vector":
            found += _crowded(name, kind, len(np.unique(first)), buckets)
        if kind == "text" and (longest := pc.max(pc.utf8_length(items[name])).as_py() or 0) > LONG_TEXT:
            found.append(f"feature {name}: a text has {longest} characters; the model takes the mean of all its words: shorten such texts")
    return found


def _crowded(name: str, kind: str, tokens: int, buckets: int) -> list[str]:
    """Whether many tokens have a bucket with another one: categories are then mixed up; text bears more, since an item has many words."""
    shared = 1 - (1 - 1 / buckets) ** max(tokens - 1, 0)
    if shared < (0.25 if kind != "text" else 0.9997):  # text: eight words a bucket
        return []
    return [f"feature {name}: {tokens} values in {buckets} buckets, {shared:.0%} of them share one with another; raise model.feature_buckets"]


def _tokens(column: pa.ChunkedArray, kind: str, known: pa.ChunkedArray | None, distinct: bool) -> Iterable[list[str]]:
    values = column.to_pylist()
    if kind == "numeric":
        return _numeric(values, values if known is None else known.to_pylist(), distinct)
    if kind == "text":
        return ([] if value is None else _text(value) for value in values)
    if kind == "multi":
        return (elements(value) for value in values)
    return (_said([value]) for value in values)


def elements(value: Any) -> list[str]:
    """The values of a `multi` column in one item: a list (datasets of 0.1.0: or text with `|` between them); what is empty is none."""
    parts = [] if value is None else value.split("|") if isinstance(value, str) else value
    return _said(parts)


def _said(values: Iterable[Any]) -> list[str]:
    """Values as text, without those that are empty; 5.0 is 5, since a column of whole numbers is one of floats as soon as one is missing."""
    real = [value for value in values if value is not None and value != "" and value == value]
    return [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in real]


def _numeric(values: list[Any], others: list[Any], distinct: bool) -> Iterable[list[str]]:
    number, known = (np.array([np.nan if v is None else float(v) for v in column]) for column in (values, others))
    known = known[np.isfinite(known)]
    zero = np.zeros(len(number), bool)
    if distinct:  # what many items have must not take the room of all others
        known, zero = np.unique(known[known != 0]), number == 0
    edges = np.unique(np.quantile(known, np.linspace(0, 1, NUMERIC_BINS + 1)[1:-1])) if len(known) else np.zeros(0)
    bins = np.searchsorted(edges, number, side="right")
    return (
        [] if not np.isfinite(x) else ["zero"] if nought else [str(b - 1), str(b), str(b + 1)]
        for b, x, nought in zip(bins, number, zero, strict=True)
    )


def _text(value: str) -> list[str]:
    words = _WORD.findall(value.lower())
    return [token for word in words for token in (word, *(word[i : i + 3] for i in range(len(word) - 2) if len(word) > 3))]


def _bags(items: Iterable[list[str]], name: str, buckets: int) -> Encoded:
    tokens: list[int] = []
    offsets = [0]
    for item in items:
        offsets.append(len(tokens))
        tokens += [xxhash.xxh64_intdigest(f"{name}\0{token}".encode()) % buckets for token in item]
    return np.array(tokens, np.int64), np.array(offsets, np.int64)


def _vectors(column: pa.ChunkedArray, name: str, known: pa.ChunkedArray | None) -> Encoded:
    found, present = _read_vectors(column, name)
    others, there = (found, present) if known is None else _read_vectors(known, name)
    centre = others.sum(0, dtype=np.float64) / there.sum() if there.sum() > 1 else np.zeros(others.shape[1])
    if found.shape[1] != len(centre):  # from another encoder: of no use to this model
        found, present = np.zeros((len(found), len(centre)), np.float32), np.zeros(len(found), bool)
    for some in (slice(first, first + ROWS) for first in range(0, len(found), ROWS)):
        centred = found[some] - centre
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        present[some] &= (length > 0).squeeze(1)
        found[some] = np.where(present[some, None], centred / np.maximum(length, 1e-300), 0.0)
    return found, present


def _read_vectors(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors as they are, float32 [V, C], and which items have one that can be used [V]; padding first, zeros where there is none."""
    values = column.combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    there = values.is_valid().to_numpy(zero_copy_only=False)
    size = np.where(there, pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False), 0)
    sizes = np.unique(size[size > 0])
    if len(sizes) > 1:
        raise DataError(f"feature {name}: vectors of {sizes[0]} and of {sizes[-1]} numbers", "write vectors of one length")
    found = np.zeros((len(values) + 1, int(sizes[0]) if len(sizes) else 1), np.float32)
    present = np.concatenate([[False], size > 0])
    found[present] = flat.reshape(-1, found.shape[1]) if len(sizes) else 0.0
    present &= np.isfinite(found).all(1)
    found[~present] = 0.0
    return found, present
