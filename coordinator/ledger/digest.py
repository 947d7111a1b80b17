"""The digest of a run's state: equal ledgers give equal digests, in every process and on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel


def state_bytes(state: Any) -> bytes:
    """Canonical bytes of a state of frozen dataclasses, mappings, tuples, sets, pydantic models and plain values."""
    document = _plain(state)
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def state_digest(state: Any) -> str:
    """SHA-256 (hex) of the canonical bytes."""
    return hashlib.sha256(state_bytes(state)).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(entry) for entry in value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a state holds a {type(value).__name__}, which has no canonical form")


def _key(key: Any) -> str:
    return "|".join(map(str, key)) if isinstance(key, tuple) else str(key)
