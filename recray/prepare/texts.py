"""Texts that hold several values: lists as JSON, Python, numpy or Hive write them, and values with a separator between them."""

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
_ONE = re.compile(r"\'([^\']*)\'|\"([^\"]*)\"")
_QUOTED = re.compile(rf"(?:{_ONE.pattern})(?:\s+(?:{_ONE.pattern}))*")  # as numpy writes texts
_APART = re.compile(r"[\'\"]\s+[\'\"]")
_NUMBERS = re.compile(r"-?[0-9.]+(?:\s+-?[0-9.]+)*")
OTHER_SIGNS = "/\t>:&+"  # that may separate values, where most texts have one


def values_of(text: str, between: str | None) -> list[str]:
    """The values of a text: those of a list that it writes, else what stands between the separators (None: it is one value)."""
    found = written_list(text)
    if found is None:
        return [part.strip() for part in (text.split(between) if between else [text]) if part.strip()]
    return [one if isinstance(one, str) else json.dumps(one) for one in found if one is not None]


def written_list(text: str) -> list[Any] | None:
    """The values of a text that is a list as JSON, Python, numpy or Hive write it; None for another text."""
    if text[:1] not in "[({" and not text.startswith("frozenset("):
        return None
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
    if found is None and not (_APART.search(text) and _side_by_side(text)):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = ast.literal_eval(_NAN.sub("None", text).removeprefix("frozenset(").removesuffix(")" if text.startswith("frozenset(") else ""))
    if isinstance(found, list | tuple | set):
        return sorted(found, key=repr) if isinstance(found, set) else list(found)
    if not (text.startswith("[") and text.endswith("]")):
        return None
    inner = text[1:-1].strip()
    if quoted := _QUOTED.fullmatch(inner) and _ONE.findall(inner):
        return [one or other for one, other in quoted]
    parts = inner.split() if _NUMBERS.fullmatch(inner) else inner.split(",")
    return [part.strip() for part in parts if part.strip()]


def _side_by_side(text: str) -> bool:
    """Whether quoted texts stand side by side, with nothing between them: numpy writes two so, Python reads one."""
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        return any(one == other == tokenize.STRING for one, other in itertools.pairwise(kinds))
    return True


def see_separator(texts: list[str | None]) -> tuple[str | None, str]:
    """What stands between the values of texts: the one of | ; and , that most of them have outside of JSON, None for none; and what a person
    should know of that, nothing where it is beyond doubt."""
    plain = [text for text in texts if text is not None and text.strip() and written_list(text.strip()) is None]
    counts = {sign: sum(sign in text for text in plain) for sign in "|;,"}
    sign = max(counts, key=lambda one: counts[one])
    if not plain or not counts[sign]:
        other = next((one for one in OTHER_SIGNS if sum(one in text for text in plain) > len(plain) / 2), None)
        return None, "" if other is None else f"no text has | ; or , in it, so each is one value; most have {other!r}: data.separator={other!r}?"
    others = [f"{count} texts have {other!r} too" for other, count in counts.items() if other != sign and count]
    if sign == "|" and not others:
        return sign, ""
    return sign, f"{sign!r} is taken for what separates its values{f' ({chr(59).join(others)})' if others else ''}; data.separator says so"
