"""What is told of an address of the ticket that does not answer."""

from __future__ import annotations

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen


class BootstrapFault(Frozen):
    """An address of the ticket that does not answer."""

    address: str = Field(description="The multiaddr, as the ticket names it")
    since: float = Field(description="Since when, in Unix seconds")
    why: str = Field(description="Why, in words")
