"""Feature columns of the item table as bags of tokens: one mechanism for categories, lists, numbers and text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

NUMERIC_BINS = 20
_WORD = re.compile(r"\w+")


def tokenize(items: pa.Table, features: dict[str, str], buckets: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens of every feature column.

    Returns name -> (tokens int64 [K], offsets int64 [V]) over the vocabulary with padding first; a missing value has no
    token, so that its vector is zero. Numbers become their quantile bin and its neighbours, text its words and the
    trigrams of its words, all hashed into `buckets`.
    """
    return {name: _bags(_tokens(items[name], kind), name, buckets) for name, kind in features.items()}


def _tokens(column: pa.ChunkedArray, kind: str) -> Iterable[list[str]]:
    values = column.to_pylist()
    if kind == "numeric":
        return _numeric(values)
    if kind == "text":
        return ([] if value is None else _text(value) for value in values)
    if kind == "multi":
        return ([] if v is None else [str(x) for x in (v.split("|") if isinstance(v, str) else v)] for v in values)
    return ([] if value is None else [str(value)] for value in values)


def _numeric(values: list[Any]) -> Iterable[list[str]]:
    number = np.array([np.nan if v is None else float(v) for v in values])
    known = number[np.isfinite(number)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, NUMERIC_BINS + 1)[1:-1])) if len(known) else np.zeros(0)
    bins = np.searchsorted(edges, number, side="right")
    return ([str(b - 1), str(b), str(b + 1)] if np.isfinite(x) else [] for b, x in zip(bins, number, strict=True))


def _text(value: str) -> list[str]:
    words = _WORD.findall(value.lower())
    return [token for word in words for token in (word, *(word[i : i + 3] for i in range(len(word) - 2) if len(word) > 3))]


def _bags(items: Iterable[list[str]], name: str, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    tokens: list[int] = []
    offsets = [0]
    for item in items:
        offsets.append(len(tokens))
        tokens += [xxhash.xxh64_intdigest(f"{name}\0{token}".encode()) % buckets for token in item]
    return np.array(tokens, np.int64), np.array(offsets, np.int64)
