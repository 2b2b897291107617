"""Texts that hold several values: lists as JSON, Python, numpy or Hive write them, and values with a
separator.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import re
import tokenize
from typing import Any

_NAN = re.compile(r"\bnan\b(?=\s*[,\])}])")
_QUOTED_TEXT = re.compile(r"\'([^\']*)\'|\"([^\"]*)\"")
_QUOTED_TEXTS = re.compile(  # as numpy writes texts
    rf"(?:{_QUOTED_TEXT.pattern})(?:\s+(?:{_QUOTED_TEXT.pattern}))*"
)
_ADJACENT_QUOTES = re.compile(r"[\'\"]\s+[\'\"]")
_NUMBERS = re.compile(r"-?[0-9.]+(?:\s+-?[0-9.]+)*")
OTHER_SEPARATORS = "/\t>:&+"  # suggested to the user where most texts contain one


def split_values(text: str, separator: str | None) -> list[str]:
    """The values of a text: of the list that it is, else the parts between separators (None: the whole text
    is one value).
    """
    values = parse_list(text)
    if values is None:
        return [part.strip() for part in (text.split(separator) if separator else [text]) if part.strip()]
    return [value if isinstance(value, str) else json.dumps(value) for value in values if value is not None]


def parse_list(text: str) -> list[Any] | None:
    """The values of a text that is a list as JSON, Python, numpy or Hive write it; None for any other
    text.
    """
    if text[:1] not in "[({" and not text.startswith("frozenset("):
        return None
    parsed: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        parsed = json.loads(text)
    if parsed is None and not (_ADJACENT_QUOTES.search(text) and _has_adjacent_texts(text)):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            parsed = ast.literal_eval(
                _NAN.sub("None", text)
                .removeprefix("frozenset(")
                .removesuffix(")" if text.startswith("frozenset(") else "")
            )
    if isinstance(parsed, list | tuple | set):
        return sorted(parsed, key=repr) if isinstance(parsed, set) else list(parsed)

    if not (text.startswith("[") and text.endswith("]")):
        return None
    content = text[1:-1].strip()
    if quoted := _QUOTED_TEXTS.fullmatch(content) and _QUOTED_TEXT.findall(content):
        return [single_quoted or double_quoted for single_quoted, double_quoted in quoted]
    parts = content.split() if _NUMBERS.fullmatch(content) else content.split(",")
    return [part.strip() for part in parts if part.strip()]


def _has_adjacent_texts(text: str) -> bool:
    """Whether quoted texts stand side by side without a comma: numpy writes two texts so, Python reads them
    as one.
    """
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        return any(
            current == following == tokenize.STRING for current, following in itertools.pairwise(kinds)
        )
    return True


def infer_separator(texts: list[str | None]) -> tuple[str | None, str]:
    """The separator of texts with several values: the one of | ; and , that most of them contain outside of
    lists, None for none.

    Also returns a note for the user, empty if the separator is beyond doubt.
    """
    plain = [text for text in texts if text is not None and text.strip() and parse_list(text.strip()) is None]
    counts = {separator: sum(separator in text for text in plain) for separator in "|;,"}
    separator = max(counts, key=lambda candidate: counts[candidate])
    if not plain or not counts[separator]:
        common = [sign for sign in OTHER_SEPARATORS if sum(sign in text for text in plain) > len(plain) / 2]
        if not common:
            return None, ""
        return (
            None,
            f"no text contains | ; or , so each is one value; most contain {common[0]!r}: set "
            f"data.separator={common[0]!r} if it separates values",
        )
    also_present = ";".join(
        f"{count} texts also contain {other!r}"
        for other, count in counts.items()
        if other != separator and count
    )
    if separator == "|" and not also_present:
        return separator, ""
    details = f" ({also_present})" if also_present else ""
    return (
        separator,
        f"{separator!r} is taken as the separator of its values{details}; set data.separator to confirm it",
    )
