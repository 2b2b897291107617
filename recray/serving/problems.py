"""Problem documents (RFC 9457): what every refusal of the endpoint looks like."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

KIND = re.compile(r"int|float|str|bool|Range|constrained-\w+|\w+\[.*\]|function-\w+\(.*\)")
MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """`field`: path in the request, such as body.history.0.item_id."""

    field: str
    problem: str


class Problem(BaseModel):
    """Why a request was refused. `fix`: what to do about it."""

    title: str
    status: int
    detail: str
    fix: str = ""
    errors: list[FieldError] = []


def problem(status: int, detail: str, fix: str = "", errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response of a refusal."""
    content = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, fix=fix, errors=list(errors))
    return JSONResponse(content.model_dump(), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def field_errors(found: Sequence[Any]) -> list[FieldError]:
    """Of pydantic's errors of a body, one a field and problem; what was sent is not repeated, it may be anybody's."""
    told = {(".".join(("body", *(str(part) for part in error["loc"] if not _kind(part)))), str(error["msg"])): None for error in found}
    return [FieldError(field=field, problem=text) for field, text in told]


def _kind(part: str | int) -> bool:
    """Whether a part of a path is one of several types that a value may have, as pydantic calls them, and no field's name."""
    return isinstance(part, str) and KIND.fullmatch(part) is not None
