"""One message and one answer on a stream of its own, bounded in size and time on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from pydantic import ValidationError

from lutetia.protocol.rpc.framing import read_message, write_message
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.transport.base import Stream, Transport

Reply = TypeVar("Reply", bound=Frozen)


async def exchange(
    transport: Transport,
    peer_id: str,
    protocol: str,
    message: Frozen,
    reply: type[Reply],
    *,
    addresses: Sequence[str] = (),
    limit: int,
    seconds: float,
) -> Reply:
    """What `peer_id` answers, in at most `limit` bytes. Raises ConnectionError: away, slower than `seconds`, no such answer."""
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
        raise ConnectionError(f"peer {peer_id} answered {protocol} with a document that is no reply") from error


async def serve_exchange(
    transport: Transport, protocol: str, answer: Callable[[Stream, bytes], Awaitable[Frozen]], *, limit: int, seconds: float
) -> None:
    """Answer messages of at most `limit` bytes; one that is too large or too slow ends its own stream only."""

    async def handle(stream: Stream) -> None:
        try:
            async with asyncio.timeout(seconds):
                reply = await answer(stream, await read_message(stream, limit))
                await write_message(stream, canonical(reply))
                await stream.read_exactly(1)  # the other side's close: ours would cut off what is still under way
        except (TimeoutError, ConnectionError):
            return  # the asking side went away or dawdled; it will ask again

    await transport.serve(protocol, handle)
