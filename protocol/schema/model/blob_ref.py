"""The name of a blob."""

from __future__ import annotations

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Digest


class BlobRef(Frozen):
    """A blob by name."""

    digest: Digest = Field(description="SHA-256 over the size and the table of 1 MiB chunk hashes (hex)")
    size: int = Field(ge=0, le=1 << 40, description="Size in bytes")
