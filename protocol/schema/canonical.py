"""Canonical bytes of a document, which signatures and hashes cover: JSON, sorted keys, no spaces, UTF-8, finite numbers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of every document that peers exchange: immutable, no unknown fields, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def canonical(document: BaseModel | dict[str, Any]) -> bytes:
    """The canonical bytes of `document` (RFC 8785 in spirit: sorted keys, no whitespace, UTF-8)."""
    value = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(document: BaseModel | dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical bytes."""
    return hashlib.sha256(canonical(document)).hexdigest()
