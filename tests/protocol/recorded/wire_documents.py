"""All documents that cross the wire or stand in a ledger, found by their base class, and the fields that each has of its own."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from lutetia.coordinator.ledger import events
from lutetia.models.mixing import description
from lutetia.protocol import joining
from lutetia.protocol.rpc import accepted_checkpoints, audit_request, check_request, checkpoint_offer
from lutetia.protocol.schema import status, ticket
from lutetia.protocol.schema.canonical import Frozen

MODULES = (events, description, joining, accepted_checkpoints, audit_request, check_request, checkpoint_offer, status, ticket)
"""Importing these imports every module that has such documents."""
_ELSEWHERE = ("lutetia.coordinator.ledger.events", "lutetia.models.mixing.description")


def wire_documents() -> list[type[BaseModel]]:
    """Every one of them, bases without fields of their own left out."""
    found = {
        kind for kind in _subclasses(Frozen) if kind.__module__.startswith("lutetia.protocol.") or kind.__module__ in _ELSEWHERE
    }
    return sorted((kind for kind in found if kind.model_fields), key=lambda kind: kind.__name__)


def _subclasses(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def fields_by_document() -> dict[str, list[str]]:
    return {kind.__name__: sorted(kind.model_fields) for kind in wire_documents()}
