"""The offer stream: a node sends its sealed checkpoint record to the coordinator and gets the state of that result.

The reply is immediate, the checks take longer. Offering the same checkpoint again asks for its state.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from pydantic import AliasChoices, ConfigDict, Field, ValidationError

from lutetia.protocol.rpc.request_response import exchange, serve_exchange
from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import Moment, OpenWord, Seconds, Sentence
from lutetia.protocol.schema.records import MAX_RECORD_BYTES, RecordRefused
from lutetia.protocol.transport.base import Stream, Transport

OFFER = "/lutetia/offer/1"
OFFER_TIMEOUT = 10.0
_MAX_OFFER_BYTES = 2 * MAX_RECORD_BYTES + 256  # the sealed record is JSON inside a JSON string: quotes are escaped
_MAX_REPLY_BYTES = 4096


class Offer(WireDocument):
    """A result, offered for acceptance."""

    sealed: str = Field(max_length=MAX_RECORD_BYTES, description="The CheckpointRecord as `records.seal` sealed it (JSON)")
    expires: Moment = Field(description="Expiry with which it was sealed, in Unix seconds")


class OfferReply(WireDocument):
    """The state of an offered result.

    Verdicts:
        queued: It waits for its checks or is being checked.
        busy: Offer it again after `retry_after` seconds.
        accepted: It is the newest epoch of its shard, or was.
        gathered: It is the result of its lane, and is merged with those of other lanes; only in runs with lanes.
        superseded: Another result was accepted for this epoch; sync and continue from that one.
        invalid: Refused for good.
        inconclusive: It could not be checked, for instance because its blobs could not be fetched.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    verdict: Literal["queued", "busy", "accepted", "gathered", "superseded", "invalid", "inconclusive"] = Field(
        description="State of the offered result"
    )
    check: OpenWord | None = Field(
        default=None,
        validation_alias=AliasChoices("check", "rung"),
        serialization_alias="rung",  # its name on the wire, which nodes of earlier versions read and write
        description="The check that failed, of an invalid or inconclusive result",
    )
    text: Sentence = Field(default="", description="Reason of the verdict, for people")
    retry_after: Seconds | None = Field(default=None, description="Seconds to wait before offering it again; null: no need")


Answer = Callable[[str, Offer], Awaitable[OfferReply]]
"""(peer id of the offering stream, offer) -> reply. May raise RecordRefused."""
Admit = Callable[[Stream], OfferReply | None]
"""The reply to a peer that must offer later, given before its offer is parsed; None lets it in."""


async def offer_checkpoint(
    transport: Transport, peer_id: str, sealed: bytes, expires: Moment, addresses: Sequence[str] = ()
) -> OfferReply:
    """Offer a sealed CheckpointRecord to coordinator `peer_id`. Raises ConnectionError: away, slow, no valid reply."""
    offer = Offer(sealed=sealed.decode(), expires=expires)
    return await exchange(
        transport, peer_id, OFFER, offer, OfferReply, addresses=addresses, limit=_MAX_REPLY_BYTES, seconds=OFFER_TIMEOUT
    )


async def serve_offers(transport: Transport, answer: Answer, admit: Admit = lambda stream: None) -> None:
    """Answer offers; `admit` is asked first. One that is too large, too slow or malformed ends only its own stream."""

    async def reply(stream: Stream, data: bytes) -> OfferReply:
        return admit(stream) or await _answered(answer, stream.peer_id, data)

    await serve_exchange(transport, OFFER, reply, limit=_MAX_OFFER_BYTES, seconds=OFFER_TIMEOUT)


async def _answered(answer: Answer, peer_id: str, data: bytes) -> OfferReply:
    try:
        return await answer(peer_id, Offer.model_validate_json(data))
    except ValidationError:
        return OfferReply(verdict="invalid", check="signature", text="the offer is malformed")
    except RecordRefused as error:
        return OfferReply(verdict="invalid", check="signature", text=str(error))
