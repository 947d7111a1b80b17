"""The offer stream: a node hands its sealed checkpoint record to the coordinator, which answers what it will do about it.

The reply is immediate; judging takes longer. Offering the same checkpoint again asks how it stands.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from pydantic import AliasChoices, ConfigDict, Field, ValidationError

from lutetia.protocol.rpc.request_response import exchange, serve_exchange
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.records import MAX_RECORD_BYTES, RecordRefused
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.protocol.transport.base import Stream, Transport

OFFER = "/lutetia/offer/1"
OFFER_TIMEOUT = 10.0
_MAX_OFFER_BYTES = 2 * MAX_RECORD_BYTES + 256  # the sealed record is JSON inside a JSON string: quotes are escaped
_MAX_REPLY_BYTES = 4096


class Offer(Frozen):
    """`sealed` is what `records.seal` made, `expires` the expiry it was sealed with."""

    sealed: str = Field(max_length=MAX_RECORD_BYTES)
    expires: float


class OfferReply(Frozen):
    """How an offered checkpoint stands.

    `queued`: it waits or is being judged. `busy`: offer it again after `retry_after` seconds. `accepted`. `superseded`: another
    result was accepted for this epoch; sync and go on from it. `invalid`: refused for good by `check`. `inconclusive`: it could
    not be judged (for instance its blobs could not be fetched).
    """

    model_config = ConfigDict(serialize_by_alias=True)

    verdict: Literal["queued", "busy", "accepted", "superseded", "invalid", "inconclusive"]
    check: CheckName | None = Field(
        default=None,
        validation_alias=AliasChoices("check", "rung"),
        serialization_alias="rung",  # its name on the wire, which nodes of earlier versions read and write
        description="The check that failed, of an invalid or inconclusive result",
    )
    text: str = Field(default="", max_length=1000)
    retry_after: float | None = None


Answer = Callable[[str, Offer], Awaitable[OfferReply]]
"""(peer id of the offering stream, offer) -> reply. May raise RecordRefused."""
Admit = Callable[[Stream], OfferReply | None]
"""The reply to whoever must come later, before his offer is even looked at."""


async def offer_checkpoint(
    transport: Transport, peer_id: str, sealed: bytes, expires: float, addresses: Sequence[str] = ()
) -> OfferReply:
    """Offer a sealed CheckpointRecord to coordinator `peer_id`. Raises ConnectionError when it is away or answers nonsense."""
    offer = Offer(sealed=sealed.decode(), expires=expires)
    return await exchange(
        transport, peer_id, OFFER, offer, OfferReply, addresses=addresses, limit=_MAX_REPLY_BYTES, seconds=OFFER_TIMEOUT
    )


async def serve_offers(transport: Transport, answer: Answer, admit: Admit = lambda stream: None) -> None:
    """Answer offers; one that is too large, too slow or malformed ends its own stream only. `admit` is asked first."""

    async def reply(stream: Stream, data: bytes) -> OfferReply:
        return admit(stream) or await _answered(answer, stream.peer_id, data)

    await serve_exchange(transport, OFFER, reply, limit=_MAX_OFFER_BYTES, seconds=OFFER_TIMEOUT)


async def _answered(answer: Answer, peer_id: str, data: bytes) -> OfferReply:
    try:
        return await answer(peer_id, Offer.model_validate_json(data))
    except ValidationError:
        return OfferReply(verdict="invalid", check="signature", text="the offer is malformed")
    except RecordRefused as error:
        return OfferReply(verdict="invalid", check="signature", text=str(error)[:1000])
