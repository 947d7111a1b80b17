"""One request and one response on a stream of their own, bounded in size and time on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from pydantic import ValidationError

from lutetia.protocol.rpc.framing import read_message, write_message
from lutetia.protocol.schema.canonical import WireDocument, canonical
from lutetia.protocol.transport.base import Stream, Transport

Reply = TypeVar("Reply", bound=WireDocument)


async def exchange(
    transport: Transport,
    peer_id: str,
    protocol: str,
    message: WireDocument,
    reply: type[Reply],
    *,
    addresses: Sequence[str] = (),
    limit: int,
    seconds: float,
) -> Reply:
    """Send `message` to `peer_id` and return its reply.

    Args:
        transport: How to reach it.
        peer_id: The peer to ask.
        protocol: Name of the stream.
        message: The request.
        reply: The type of the response.
        addresses: Where to dial the peer if it is not connected.
        limit: Longest response in bytes.
        seconds: Time for the whole exchange.

    Raises ConnectionError: away, too slow, too large, or not a `reply`.
    """
    try:
        async with asyncio.timeout(seconds):
            stream = await transport.open_stream(peer_id, protocol, addresses)
            try:
                await write_message(stream, canonical(message))
                return reply.model_validate_json(await read_message(stream, limit))
            finally:
                await stream.close()
    except TimeoutError as error:
        raise ConnectionError(f"peer {peer_id} did not answer {protocol} within {seconds:.0f} s") from error
    except ValidationError as error:
        raise ConnectionError(f"peer {peer_id} answered {protocol} with an invalid document") from error


async def serve_exchange(
    transport: Transport, protocol: str, answer: Callable[[Stream, bytes], Awaitable[WireDocument]], *, limit: int, seconds: float
) -> None:
    """Answer requests of at most `limit` bytes within `seconds`. One that is too large or too slow ends only its own stream."""

    async def handle(stream: Stream) -> None:
        try:
            async with asyncio.timeout(seconds):
                reply = await answer(stream, await read_message(stream, limit))
                await write_message(stream, canonical(reply))
                await stream.read_exactly(1)  # wait for the other side to close: closing first would cut off bytes in flight
        except (TimeoutError, ConnectionError):
            return  # the asking side went away or was too slow; it will ask again

    await transport.serve(protocol, handle)
