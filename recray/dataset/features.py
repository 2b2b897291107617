"""Encodes feature columns of the item table for the model: as bags of tokens, or as vectors.

Categories, lists, numbers and text become bags of hashed tokens. Vectors stay vectors: embeddings of images,
audio or text, or those that a sentence encoder made when the data was prepared.

An item without a value, with an empty text or with a non-finite vector lacks the feature. A column without
values, or with one value for all items, has no effect (`describe_features` reports it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from recray.errors import DataError

NUMERIC_BINS = 20
VECTOR_ROWS = 1 << 14  # vectors that are normalized at once
VECTORS = ("vector", "sentence")  # kinds that a dataset stores as one vector per item
MAX_MISSING = 0.5  # share of the items; above it there is a note
LONG_TEXT = 100_000  # characters; above it there is a note
_WORD = re.compile(r"\w+")


Encoded = tuple[np.ndarray, np.ndarray]
"""A feature of the vocabulary with padding first: tokens int64 [K] and the start of each item's tokens, int64
[V]; or unit vectors float32 [V, C] (zero where missing) and a mask of present ones, bool [V].
"""


def encode_features(
    items: pa.Table,
    features: Mapping[str, str],
    buckets: int,
    reference: pa.Table | None = None,
    *,
    distinct: bool = True,
) -> dict[str, Encoded]:
    """Encode every feature column. Raises DataError for vectors of several lengths.

    Numbers become the bin of their quantile among the distinct values and its neighbours, zero a token of its
    own; text becomes its words and the trigrams of its words, all hashed into `buckets`; vectors are centred,
    then scaled to length 1.

    reference : table that defines the bins of numbers and the centre of vectors, for items added later; None:
        `items`
    distinct : false: quantiles of all values, as bundles of 0.1.0 have them
    """

    def encode_column(name: str, kind: str) -> Encoded:
        reference_column = None if reference is None else reference[name]
        return (
            _normalize_vectors(items[name], name, reference_column)
            if kind in VECTORS
            else _hash_tokens(_tokenize(items[name], kind, reference_column, distinct), name, buckets)
        )

    return {name: encode_column(name, kind) for name, kind in features.items()}


def append_items(encoded: Encoded, added: Encoded) -> Encoded:
    """The encoded feature with more items at its end, without the padding of these."""
    values, offsets = encoded
    added_values, added_offsets = added
    if values.ndim == 2:
        return np.concatenate([values, added_values[1:]]), np.concatenate([offsets, added_offsets[1:]])
    return np.concatenate([values, added_values]), np.concatenate([offsets, added_offsets[1:] + len(values)])


def mask_described(encoded: dict[str, Encoded], count: int) -> np.ndarray:
    """Which of `count` items have any feature, bool [count], without padding."""
    is_described = np.zeros(count, bool)
    for values, offsets in encoded.values():
        is_described |= offsets[1:] if values.ndim == 2 else np.diff(offsets, append=len(values))[1:] > 0
    return is_described


def describe_features(items: pa.Table, features: dict[str, str], buckets: int) -> list[str]:
    """Notes about feature columns: without effect, missing for many items, or with more values than `buckets`
    can distinguish.
    """
    notes = []
    for name, kind in features.items():
        kind = "text" if kind == "sentence" else kind  # items are not encoded yet
        values, offsets_or_mask = encode_features(items, {name: kind}, 1 << 62)[name]
        present = (
            offsets_or_mask[1:] if kind == "vector" else np.diff(offsets_or_mask, append=len(values))[1:] > 0
        )
        distinct = {
            str(value)
            for value, is_present in zip(items[name].to_pylist(), present, strict=True)
            if is_present or kind == "vector"
        } - {"None"}
        missing = 1.0 - float(present.mean()) if len(present) else 1.0
        if len(distinct) <= 1:
            notes.append(
                f"feature {name}: "
                f"{'all items have the same value' if distinct else 'no item has a value'}; it has no effect"
            )
        elif missing > MAX_MISSING:
            notes.append(f"feature {name}: {missing:.0%} of the items have no value")
        if kind != "vector":
            notes += _describe_collisions(name, kind, len(np.unique(values)), buckets)
        if kind == "text" and (longest := pc.max(pc.utf8_length(items[name])).as_py() or 0) > LONG_TEXT:
            notes.append(
                f"feature {name}: a text has {longest} characters; the model averages all its words: shorten "
                "such texts"
            )
    return notes


def _describe_collisions(name: str, kind: str, tokens: int, buckets: int) -> list[str]:
    """A note if many tokens share a bucket. Categories are then mixed up; text tolerates more, since an item
    has many words.
    """
    collision_share = 1 - (1 - 1 / buckets) ** max(tokens - 1, 0)
    if collision_share < (0.25 if kind != "text" else 0.9997):  # text: eight words per bucket
        return []
    return [
        f"feature {name}: {tokens} values in {buckets} buckets, {collision_share:.0%} of them share one with "
        "another: raise model.feature_buckets"
    ]


def _tokenize(
    column: pa.ChunkedArray, kind: str, reference: pa.ChunkedArray | None, distinct: bool
) -> Iterable[list[str]]:
    values = column.to_pylist()
    if kind == "numeric":
        return _bin_numbers(values, values if reference is None else reference.to_pylist(), distinct)
    if kind == "text":
        return ([] if value is None else _split_text(value) for value in values)
    if kind == "multi":
        return (to_elements(value) for value in values)
    return (_to_texts([value]) for value in values)


def to_elements(value: Any) -> list[str]:
    """The values of a `multi` column in one item: a list (in datasets of 0.1.0 also text with `|` between
    values), without empty ones.
    """
    parts = [] if value is None else value.split("|") if isinstance(value, str) else value
    return _to_texts(parts)


def _to_texts(values: Iterable[Any]) -> list[str]:
    """Values as text, without empty ones. 5.0 becomes 5: a column of integers is one of floats once one is
    missing.
    """
    present = [value for value in values if value is not None and value != "" and value == value]
    return [
        str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in present
    ]


def _bin_numbers(values: list[Any], reference: list[Any], distinct: bool) -> Iterable[list[str]]:
    numbers, reference_numbers = (
        np.array([np.nan if v is None else float(v) for v in column]) for column in (values, reference)
    )
    reference_numbers = reference_numbers[np.isfinite(reference_numbers)]
    is_zero = np.zeros(len(numbers), bool)
    if distinct:  # a value that many items share must not take up most bins
        reference_numbers, is_zero = np.unique(reference_numbers[reference_numbers != 0]), numbers == 0
    edges = (
        np.unique(np.quantile(reference_numbers, np.linspace(0, 1, NUMERIC_BINS + 1)[1:-1]))
        if len(reference_numbers)
        else np.zeros(0)
    )
    bins = np.searchsorted(edges, numbers, side="right")
    return (
        [] if not np.isfinite(x) else ["zero"] if at_zero else [str(b - 1), str(b), str(b + 1)]
        for b, x, at_zero in zip(bins, numbers, is_zero, strict=True)
    )


def _split_text(value: str) -> list[str]:
    words = _WORD.findall(value.lower())
    return [
        token
        for word in words
        for token in (word, *(word[i : i + 3] for i in range(len(word) - 2) if len(word) > 3))
    ]


def _hash_tokens(items: Iterable[list[str]], name: str, buckets: int) -> Encoded:
    tokens: list[int] = []
    offsets = [0]
    for item in items:
        offsets.append(len(tokens))
        tokens += [xxhash.xxh64_intdigest(f"{name}\0{token}".encode()) % buckets for token in item]
    return np.array(tokens, np.int64), np.array(offsets, np.int64)


def _normalize_vectors(column: pa.ChunkedArray, name: str, reference: pa.ChunkedArray | None) -> Encoded:
    vectors, present = _read_vectors(column, name)
    reference_vectors, is_reference = (
        (vectors, present) if reference is None else _read_vectors(reference, name)
    )
    center = (
        reference_vectors.sum(0, dtype=np.float64) / is_reference.sum()
        if is_reference.sum() > 1
        else np.zeros(reference_vectors.shape[1])
    )
    if vectors.shape[1] != len(center):  # from another encoder: this model cannot use them
        vectors, present = np.zeros((len(vectors), len(center)), np.float32), np.zeros(len(vectors), bool)
    for rows in (slice(first, first + VECTOR_ROWS) for first in range(0, len(vectors), VECTOR_ROWS)):
        centred = vectors[rows] - center
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        present[rows] &= (length > 0).squeeze(1)
        vectors[rows] = np.where(present[rows, None], centred / np.maximum(length, 1e-300), 0.0)
    return vectors, present


def _read_vectors(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Unscaled vectors, float32 [V, C], and which items have a finite one [V]; padding first, zeros where
    there is none.
    """
    values = column.combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    is_valid = values.is_valid().to_numpy(zero_copy_only=False)
    size = np.where(is_valid, pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False), 0)
    sizes = np.unique(size[size > 0])
    if len(sizes) > 1:
        raise DataError(
            f"feature {name}: vectors of {sizes[0]} and of {sizes[-1]} numbers", "write vectors of one length"
        )
    vectors = np.zeros((len(values) + 1, int(sizes[0]) if len(sizes) else 1), np.float32)
    present = np.concatenate([[False], size > 0])
    vectors[present] = flat.reshape(-1, vectors.shape[1]) if len(sizes) else 0.0
    present &= np.isfinite(vectors).all(1)
    vectors[~present] = 0.0
    return vectors, present
