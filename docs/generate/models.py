"""Pydantic models as tables of their fields. Each model has a section on one page; other pages link to it."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.generate.markdown import code, docstring, join, sentence, table

Model = type[BaseModel]
_NAMES: dict[Any, str] = {Path: "path", str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}
_LONGEST_PATTERN = 60
_SINGULAR = {"entries": "entry", "characters": "character"}


@cache
def homes() -> dict[Model, str]:
    """The page on which each model has its section."""
    from docs.generate import protocol, settings, status

    pages: dict[Model, str] = {}
    for page, roots in (("protocol.md", protocol.roots()), ("status.md", status.roots()), ("settings.md", settings.roots())):
        for model in closure(roots):
            pages.setdefault(model, page)
    return pages


def closure(roots: Iterable[Model]) -> list[Model]:
    """`roots` and every model that their fields use, each once, a model before those it uses."""
    found: dict[Model, None] = {}

    def visit(model: Model) -> None:
        if model not in found:
            found[model] = None
            for field in model.model_fields.values():
                for used in _models_in(field.annotation):
                    visit(used)

    for root in roots:
        visit(root)
    return list(found)


def _models_in(annotation: Any) -> Iterator[Model]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def sections(
    roots: Iterable[Model], page: str, variable: Callable[[Model, str], str] | None = None, level: str = "##"
) -> list[str]:
    """A section for each model of `roots` and for the models they use, as far as these have their section on `page`.

    Args:
        roots: the models to begin with.
        page: file name of the page that is made.
        variable: (model, field) → environment variable, for a column of them.
        level: Markdown of the headings.
    """
    return [section(model, page, variable, level) for model in closure(roots) if homes()[model] == page]


def section(model: Model, page: str, variable: Callable[[Model, str], str] | None = None, level: str = "##") -> str:
    """Heading, docstring and fields of one model."""
    with_variables = variable is not None and any(variable(model, name) for name in model.model_fields)
    header = ["field", "type", "default", *(["environment variable"] if with_variables else []), "description"]
    rows = []
    for name, field in model.model_fields.items():
        extra = [code(variable(model, name)) if variable(model, name) else ""] if variable and with_variables else []
        rows.append([code(name), type_text(field, page), default_text(field), *extra, sentence(field.description or "")])
    return join(f"{level} {model.__name__}", docstring(model), table(header, rows))


def type_text(field: FieldInfo, page: str) -> str:
    """The type of a field with its bounds, and links to models."""
    arguments = get_args(field.annotation)
    if get_origin(field.annotation) in (Union, types.UnionType) and type(None) in arguments:
        others = [each for each in arguments if each is not type(None)]
        return f"{_bounded(' or '.join(_type(each, page) for each in others), field.metadata)} or null"
    return _bounded(_type(field.annotation, page), field.metadata)


def _type(annotation: Any, page: str) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [part for each in arguments[1:] for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return _bounded(_type(arguments[0], page), metadata)
    if origin is Literal:
        return " or ".join(code(json.dumps(value)) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each, page) for each in arguments)
    if origin in (tuple, list, set, frozenset):
        return "list of " + " or ".join(dict.fromkeys(_type(each, page) for each in arguments if each is not Ellipsis))
    if origin is dict:
        return f"table of {_type(arguments[0], page)} → {_type(arguments[1], page)}"
    if annotation is None or annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        home = homes()[annotation]
        return f"[{annotation.__name__}]({'' if home == page else home}#{annotation.__name__.lower()})"
    return _NAMES.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _bounded(text: str, metadata: Sequence[Any]) -> str:
    unit = "entries" if text.startswith(("list", "table")) else "characters"
    bounds = [bound for part in metadata for bound in _bounds(part, unit)]
    return f"{text} ({', '.join(bounds)})" if bounds else text


def _bounds(part: Any, unit: str) -> Iterator[str]:
    for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if (value := getattr(part, attribute, None)) is not None:
            yield f"{sign} {value:,}".replace(",", " ") if isinstance(value, int) else f"{sign} {value:g}"
    for attribute, word in (("min_length", "at least"), ("max_length", "at most")):
        if (value := getattr(part, attribute, None)) is not None:
            yield f"{word} {value} {unit if value != 1 else _SINGULAR[unit]}"
    if pattern := getattr(part, "pattern", None):
        if digits := re.fullmatch(r"\^\[0-9a-f\]\{(\d+)\}\$", pattern):
            yield f"{digits[1]} hex digits"
        elif len(pattern) <= _LONGEST_PATTERN:
            yield f"matches {code(pattern)}"


def default_text(field: FieldInfo) -> str:
    """The default of a field; empty where it is required."""
    if field.default_factory is not None:
        return "computed"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        changed = field.default.model_dump(mode="json", exclude_defaults=True)
        return code(json.dumps(changed)) if changed else "its defaults"
    return code(json.dumps(field.default, default=str, ensure_ascii=False))
