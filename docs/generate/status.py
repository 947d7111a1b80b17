"""The page of the status document."""

from __future__ import annotations

from docs.generate.markdown import docstring, join
from docs.generate.models import Model, sections
from lutetia.protocol.schema import status
from lutetia.protocol.schema.status import MAX_STATUS_BYTES, SwarmStatus


def roots() -> list[Model]:
    return [SwarmStatus]


def page() -> str:
    """docs/reference/status.md."""
    return join(
        "# Status document",
        docstring(status),
        f"It has at most {MAX_STATUS_BYTES >> 20} MiB. Times are Unix seconds. Readers ignore fields that they do not know.",
        *sections(roots(), "status.md"),
    )
