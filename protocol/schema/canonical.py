"""Canonical bytes of a document, which signatures and hashes cover: JSON, sorted keys, no spaces, UTF-8, finite numbers."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, model_validator

MOST_UNKNOWN_FIELDS = 32
_DEEPEST, _DEEPEST_UNKNOWN, _MOST_UNKNOWN_VALUES = 16, 4, 256
_LARGEST_INTEGER = 2**63
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class Frozen(BaseModel):
    """Base of documents that stay on one machine, and of the few that may never grow: immutable, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WireDocument(Frozen):
    """Base of every document that peers exchange. Fields of later versions are kept: they are written, signed and hashed again.

    They are bounded: at most 32 in one document, each at most 4 levels deep with 256 values. How the wire may change is written
    in docs/explanation/compatibility.md.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _bound_unknown_fields(self) -> Self:
        if unknown := self.__pydantic_extra__:
            if len(unknown) > MOST_UNKNOWN_FIELDS or not all(map(_FIELD_NAME.fullmatch, unknown)):
                raise ValueError(f"more than {MOST_UNKNOWN_FIELDS} unknown fields, or one whose name is none")
            for value in unknown.values():
                bounded_json(value, deepest=_DEEPEST_UNKNOWN, most=_MOST_UNKNOWN_VALUES)
        return self


def bounded_json(value: Any, deepest: int = _DEEPEST, most: int | None = None) -> Any:
    """`value` itself. Raises ValueError when it is not finite JSON, is nested too deeply or has more than `most` values."""
    level, count = [value], 0
    for _ in range(deepest):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list | tuple):
                inner += each
            elif not _plain(each):
                raise ValueError("a number is not finite or too large, or a value is not JSON")
        count += len(level)
        if most is not None and count > most:
            raise ValueError(f"more than {most} values")
        if not inner:
            return value
        level = inner
    raise ValueError(f"nested more than {deepest} levels deep")


def _plain(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) <= _LARGEST_INTEGER
    return value is None or isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


_DOCUMENT: TypeAdapter[dict[str, Any]] = TypeAdapter(Annotated[dict[str, Any], AfterValidator(bounded_json)])


def read_json(data: bytes) -> dict[str, Any]:
    """A JSON object as its sender wrote it, unknown fields and all. Raises pydantic's ValidationError."""
    return _DOCUMENT.validate_json(data)


def canonical(document: BaseModel | dict[str, Any]) -> bytes:
    """The canonical bytes of `document` (RFC 8785 in spirit: sorted keys, no whitespace, UTF-8)."""
    value = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(document: BaseModel | dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical bytes."""
    return hashlib.sha256(canonical(document)).hexdigest()
