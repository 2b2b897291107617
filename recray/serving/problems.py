"""Problem documents (RFC 9457), the format of every refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

TYPE_NAME = re.compile(r"int|float|str|bool|Range|constrained-\w+|\w+\[.*\]|function-\w+\(.*\)")
MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """An invalid field. `field`: path in the request, such as body.history.0.item_id."""

    field: str
    problem: str


class Problem(BaseModel):
    """Why a request was refused. `fix`: the next step."""

    title: str
    status: int
    detail: str
    fix: str = ""
    errors: list[FieldError] = []


def make_problem(
    status: int,
    detail: str,
    fix: str = "",
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response of a refusal."""
    content = Problem(
        title=HTTPStatus(status).phrase, status=status, detail=detail, fix=fix, errors=list(errors)
    )
    return JSONResponse(content.model_dump(), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def to_field_errors(errors: Sequence[Any]) -> list[FieldError]:
    """Pydantic's errors of a body, one per field and problem. Values are left out, they may be personal."""
    problems = {
        (
            ".".join(("body", *(str(part) for part in error["loc"] if not _is_type_name(part)))),
            str(error["msg"]),
        ): None
        for error in errors
    }
    return [FieldError(field=field, problem=text) for field, text in problems]


def _is_type_name(part: str | int) -> bool:
    """Whether a part of a path is pydantic's name of a type in a union, not a field."""
    return isinstance(part, str) and TYPE_NAME.fullmatch(part) is not None
