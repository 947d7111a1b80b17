"""What pydantic found wrong in a document or a setting, in words for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

_SUBJECT = re.compile(r"\b(Input|String|List|Tuple|Dictionary|Set|Data|Value|Bytes|Decimal input|URL) should ")
_WORDS = {
    "must match pattern": "must have the form", "greater than or equal to": "at least", "less than or equal to": "at most",
    "a valid boolean": "true or false", "a valid integer": "a whole number", "a valid tuple": "a list",
    "a valid list": "a list", "a valid dictionary": "a table", "a valid number": "a number", "a valid string": "a text",
}  # fmt: skip
_LONGEST_INPUT = 60


def describe_problem(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first problem, as `field: what is allowed, and what was given`.

    Args:
        error: what pydantic raised.
        model: the settings that were wrong. Its fields' descriptions then say what is allowed.
    """
    problem = error.errors(include_url=False)[0]
    where = [part for part in problem["loc"] if isinstance(part, int) or not _is_branch(part)]
    return f"{'.'.join(map(str, where)) or 'document'}: {_sentence(problem, where, model)}"


def _is_branch(part: str) -> bool:
    """Whether a part of the place names a validator of pydantic's and no field."""
    return any(letter in part for letter in "[(")


def _sentence(problem: Mapping[str, Any], where: Sequence[int | str], model: type[BaseModel] | None) -> str:
    given = _quoted(problem["input"])
    match problem["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return "is unknown"
        case "string_pattern_mismatch" | "int_parsing" if described := _description(model, where):
            return f"{given or 'the value'} is not allowed ({described})"
        case "value_error" | "assertion_error":
            return str(problem["ctx"]["error"])
        case "literal_error":
            return f"must be {problem['ctx']['expected']}{given and f', not {given}'}"
    sentence = plain_words(problem["msg"])
    return f"{sentence}{given and f', not {given}'}" if sentence.startswith("must ") else sentence


def plain_words(text: str) -> str:
    """A message of pydantic's, or one that quotes it as typer's do, in plain words."""
    sentence = _SUBJECT.sub("must ", text).split(", unable to")[0].replace("Value error, ", "")
    for technical, plain in _WORDS.items():
        sentence = sentence.replace(technical, plain)
    return sentence


def _quoted(value: Any) -> str:
    """The wrong value, where it is short enough to be shown."""
    text = repr(value)
    return text if isinstance(value, str | int | float | bool) and len(text) <= _LONGEST_INPUT else ""


def unknown_key(values: Mapping[str, Any], *models: type[BaseModel], above: tuple[str, ...] = ()) -> str | None:
    """The first key of `values`, or of a table in it, that none of `models` has, as `table.key: is unknown`.

    Documents of other versions may have more fields than ours; what people write may not.
    """
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    for key, value in values.items():
        if key not in fields:
            near = get_close_matches(key, fields, 1)
            return f"{'.'.join((*above, key))}: is unknown{f'; did you mean {near[0]}?' if near else ''}"
        inner = [kind for model in models if key in model.model_fields for kind in _models_in(model.model_fields[key].annotation)]
        if inner and isinstance(value, Mapping) and (found := unknown_key(value, *inner, above=(*above, key))):
            return found
    return None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may be. A mapping of models is none itself: its keys are free."""
    if get_origin(annotation) in (dict, Mapping):
        return []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _description(model: type[BaseModel] | None, where: Sequence[int | str]) -> str:
    field = model.model_fields.get(str(where[0])) if model and where else None
    return (field.description or "") if field else ""
