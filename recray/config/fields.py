"""Parts of the settings' sections: a closed base class, kinds of fields, and their checks."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def operational(default: Any, description: str, **kwargs: Any) -> Any:
    """A field that says where or with what a job runs. It changes no result and no run key."""
    return Field(default=default, description=description, json_schema_extra={"operational": True}, **kwargs)


def _to_utc(value: dt.datetime) -> dt.datetime:
    return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


def _parse_date(value: Any) -> Any:
    """Read digits such as 20240301 as a date; as a number they would be seconds since 1970."""
    if (
        isinstance(value, int | float | str)
        and not isinstance(value, bool)
        and re.fullmatch(r"\d+(\.\d+)?", text := str(value).strip())
    ):
        try:
            return dt.datetime.strptime(text, "%Y%m%d")
        except ValueError:
            raise ValueError("a number is not a date; write 2024-03-01, or 2024-03-01T06:00") from None
    return value


Moment = Annotated[dt.datetime, BeforeValidator(_parse_date), AfterValidator(_to_utc)]


def _check_path(value: str) -> str:
    if not value.strip():
        raise ValueError("it is blank: name a path, or omit the setting")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("a path is UTF-8 text without NUL")
    return value


PathText = Annotated[str, AfterValidator(_check_path)]


TIME_DIRECTIVES = {
    **dict.fromkeys("mHIMSd", r"\d{1,2}"),
    "Y": r"\d{4}",
    "y": r"\d{2}",
    **dict.fromkeys("bB", "[A-Za-z]+"),
    "p": "[AaPp][Mm]",
}
"""Directives of a pattern of times, as in strptime, and the text that each stands for."""


def check_time_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern of times with an unknown directive, or without year, month or day."""
    directives = re.findall("%(.?)", pattern)
    known = ", ".join(f"%{directive}" for directive in TIME_DIRECTIVES)
    if unknown := [directive for directive in directives if directive not in TIME_DIRECTIVES]:
        raise ValueError(f"%{unknown[0]} is not a part of a pattern; known: {known}")
    if len(set(directives)) < len(directives):
        raise ValueError("a part of the pattern occurs twice")
    if not ({"d"} <= {*directives} and {*directives} & set("Yy") and {*directives} & set("mbB")):
        raise ValueError("a pattern needs a year, a month and a day, for example %d/%m/%Y %H:%M")


TimePattern = Annotated[str, Field(pattern="%")]


def list_plain_types(annotation: Any) -> set[Any]:
    """The plain types that an annotation accepts, without containers; choices count as text."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return list_plain_types(get_args(annotation)[0])
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if origin in (Union, UnionType):
        return set().union(*map(list_plain_types, get_args(annotation)))
    return {annotation} if origin is None else set()


def find_misread_values(value: Any, annotation: Any) -> Iterator[Any]:
    """Texts and booleans where numbers are expected, also within lists and mappings.

    Pydantic would convert them: `yes` to 1, "0123" to 123.
    """
    if get_origin(annotation) is Annotated:
        yield from find_misread_values(value, get_args(annotation)[0])
    elif isinstance(value, list | tuple | dict):
        is_dict = isinstance(value, dict)
        for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
            if get_origin(part) is (dict if is_dict else tuple):
                for element in value.values() if isinstance(value, dict) else value:
                    yield from find_misread_values(element, get_args(part)[1 if is_dict else 0])
    elif isinstance(value, bool | str):
        kinds = list_plain_types(annotation)
        if kinds & {int, float} and not kinds & {bool, str}:
            yield value


def list_choices(annotation: Any) -> list[str]:
    """The choices of an annotation, its elements and its keys."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return list(dict.fromkeys(choice for part in get_args(annotation) for choice in list_choices(part)))


class Section(BaseModel):
    """A section of the settings: closed and frozen."""

    advanced: ClassVar[frozenset[str]] = frozenset()
    """Fields whose default rarely needs a change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_misread_numbers(cls, content: Any) -> Any:
        for name, value in content.items() if isinstance(content, dict) else ():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
            for misread in find_misread_values(value, annotation):
                kind = "yes or no" if isinstance(misread, bool) else "text"
                raise ValueError(f"{name}: {misread!r} is {kind}, not a number")
        return content


def is_operational(field: Any) -> bool:
    """Whether a field was declared by `operational`."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("operational"))
