"""Validated, torch-free configuration: unknown fields are errors that name the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from tokenformer.errors import TokenFormerError

Model = TypeVar("Model", bound="StrictModel")


def _is_number(value: Any) -> Any:
    if isinstance(value, str | bool):
        raise ValueError(f"found {value!r}, expected a number")
    return value


Int = Annotated[int, BeforeValidator(_is_number)]
"""A whole number; 1e3 is one, a text such as "12" and true are none."""

Float = Annotated[float, BeforeValidator(_is_number)]


class StrictModel(BaseModel):
    """Base of every configuration: immutable, no unknown fields, no infinite or NaN numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def validate(model: type[Model], values: Mapping[str, Any], *, source: str, within: str = "") -> Model:
    """Build ``model`` from ``values``; ``source`` (a file or option) opens every error line, and ``within`` is the
    place of the values there, where they are a part of it.

    Raises:
        TokenFormerError: one line for each wrong field: its place, what was found, what was expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise TokenFormerError(explain(error, model, source, within)) from error


def explain(error: ValidationError, model: type[BaseModel], source: str, within: str = "") -> str:
    """One line for each problem of a pydantic error, in the words of the configuration."""
    lines = []
    outer = [within] if within else []
    for problem in error.errors():
        location, kind, found = problem["loc"], problem["type"], problem["input"]
        place = (
            ".".join([*outer, *_written_place(model, location, unknown_last=kind == "extra_forbidden")])
            or "configuration"
        )
        if kind == "extra_forbidden":
            known = known_fields(model, location[:-1])
            lines.append(f"{source}: {place}: unknown field{nearest(str(location[-1]), known)}")
        elif kind == "missing":
            lines.append(f"{source}: {place}: missing, but required")
        elif kind == "union_tag_not_found":
            lines.append(f"{source}: {place}.{_tag_name(problem)}: missing, but required")
        elif kind == "union_tag_invalid":
            context = problem["ctx"]
            expected = f"expected {context['expected_tags']}"
            lines.append(f"{source}: {place}.{_tag_name(problem)}: found '{context['tag']}'; {expected}")
        elif kind == "value_error":
            opening = f"{source}: {place}" if location or within else source
            lines.append(f"{opening}: {problem['ctx']['error']}")
        else:
            lines.append(f"{source}: {place}: found {found!r}; {_lower_first(problem['msg'])}")
    return "\n".join(dict.fromkeys(lines))


def _tag_name(problem: ErrorDetails) -> str:
    """The field that chooses the member of a union; pydantic quotes it."""
    return str(problem["ctx"]["discriminator"]).strip("'")


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or a list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def known_fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) model at ``location``; union tags and list indices are stepped over."""
    return sorted({name for current in _models_at(model, location) for name in current.model_fields})


def _written_place(
    model: type[BaseModel], location: tuple[int | str, ...], *, unknown_last: bool
) -> list[str]:
    """``location`` without the tags that pydantic puts in where it enters a union: nobody wrote those.

    With ``unknown_last`` the last part is an unknown field, whatever its name.
    """
    written = []
    for index, part in enumerate(location):
        models = _models_at(model, location[:index])
        is_field = any(part in current.model_fields for current in models)
        is_tag = any(part in _tags(current) for current in models) and not is_field
        if part == "[key]":  # pydantic's word for a wrong key of a mapping, which stands before it
            continue
        if not is_tag or (unknown_last and index == len(location) - 1):
            written.append(str(part))
    return written


def _models_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    models = [model]
    for part in location:
        inner = [
            candidate
            for current in models
            if isinstance(part, str) and part in current.model_fields
            for candidate in _models_in(current.model_fields[part].annotation)
        ]
        if inner:
            models = inner
        else:  # a list index stays where it is; the tag of a union picks the member
            tagged = [m for m in models if part in _tags(m)]
            models = tagged or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def _tags(model: type[BaseModel]) -> set[Any]:
    return {value for field in model.model_fields.values() for value in get_args(field.annotation)}


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
