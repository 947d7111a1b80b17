"""Ask a swarm for a document without joining it: py-libp2p (TCP, noise, yamux) in this process, for a second or two.

It works where p2pd does not run, and imports neither hivemind nor torch. The ticket's addresses contain peer ids, so a peer that
answers has proved that it holds the key which the ticket names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from lutetia.protocol.light_client.dial import dial
from lutetia.protocol.rpc.framing import framed, read_framed
from lutetia.protocol.rpc.introduction import ACK
from lutetia.protocol.schema.status import MAX_STATUS_BYTES
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import BootstrapError


@dataclass
class _Answer:
    data: bytes | None = None
    failures: dict[str, str] = field(default_factory=dict)


def fetch_document(
    ticket: Ticket, protocol: str, timeout: float = 8.0, limit_bytes: int = MAX_STATUS_BYTES, name: str | None = None
) -> bytes:
    """Ask all peers of the ticket at once and return the first answer.

    Args:
        ticket: The peers to ask.
        protocol: Name of the document's stream.
        timeout: Seconds for each peer.
        limit_bytes: Longest document that is accepted.
        name: What is asked for, on a stream of named documents.

    Raises BootstrapError when none answers; the text names every address with its reason.
    """
    answer = _Answer()
    trio.run(_ask_all, ticket.addresses, protocol, timeout, limit_bytes, name, answer)
    if answer.data is None:
        reasons = "; ".join(f"{address}: {reason}" for address, reason in answer.failures.items())
        raise BootstrapError(f"no peer of the ticket answered ({reasons}); check your network or get a new ticket")
    return answer.data


async def _ask_all(
    addresses: tuple[str, ...], protocol: str, seconds: float, limit: int, name: str | None, answer: _Answer
) -> None:
    async def ask(address: str) -> None:
        try:
            with trio.fail_after(seconds):
                answer.data = await _ask(address, protocol, limit, name)
        except trio.TooSlowError:
            answer.failures[address] = f"no answer within {seconds:.0f} s"
        except ConnectionError as error:
            answer.failures[address] = str(error)
        else:
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(ask, address)


async def _ask(address: str, protocol: str, limit: int, name: str | None) -> bytes:
    async with dial(address) as connection:
        stream = await connection.open_stream(protocol)
        if name is not None:
            await stream.write(framed(name.encode()))
        document = await read_framed(stream.read_exactly, limit)
        await stream.write(ACK)
        await stream.close()
    return document
