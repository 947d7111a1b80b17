"""Ask a swarm for a document without being part of it: py-libp2p (TCP, noise, yamux) inside this process, for a second or two.

It runs where p2pd does not, and imports neither hivemind nor torch. The ticket's addresses carry peer ids, so whoever answers has
proved the key that the ticket names.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from ..system.errors import BootstrapError
from .documents import ACK
from .framing import read_framed
from .status import MAX_STATUS_BYTES
from .ticket import Ticket

_REASONS = {
    "fail to open connection": "nobody answers there",
    "upgrade security": "another peer than the ticket names answers there",
    "protocols not supported": "that peer does not offer this",
}
"""What py-libp2p's messages mean to a person."""


@dataclass
class _Answer:
    data: bytes | None = None
    failures: dict[str, str] = field(default_factory=dict)


def thin_document(ticket: Ticket, protocol: str, timeout: float = 8.0, limit_bytes: int = MAX_STATUS_BYTES) -> bytes:
    """What the first of the ticket's peers to answer sends on `protocol`; all are asked at once, each for `timeout` seconds.

    Raises BootstrapError, naming every address with its reason, when none answers.
    """
    import trio

    answer = _Answer()
    trio.run(_ask_all, ticket.addresses, protocol, timeout, limit_bytes, answer)
    if answer.data is None:
        reasons = "; ".join(f"{address}: {reason}" for address, reason in answer.failures.items())
        raise BootstrapError(f"no peer of the ticket answered ({reasons}); check your network or ask for a fresh ticket")
    return answer.data


async def _ask_all(addresses: tuple[str, ...], protocol: str, seconds: float, limit: int, answer: _Answer) -> None:
    import trio
    from libp2p import new_host

    # Its complaints are about our failed dials, which we report ourselves. Importing it sets the level, so this comes after.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    host = new_host(listen_addrs=[])

    async def ask(address: str) -> None:
        try:
            with trio.fail_after(seconds):
                answer.data = await _ask(host, address, protocol, limit)
        except Exception as error:  # noqa: BLE001 (py-libp2p raises many unrelated classes, and groups of them)
            answer.failures[address] = _reason(error, seconds)
        else:
            nursery.cancel_scope.cancel()

    async with host.run(listen_addrs=[]), trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(ask, address)


async def _ask(host: Any, address: str, protocol: str, limit: int) -> bytes:
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    peer = info_from_p2p_addr(Multiaddr(address))
    await host.connect(peer)
    stream = await host.new_stream(peer.peer_id, [TProtocol(protocol)])

    async def read_exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = await stream.read(min(count - len(data), 1 << 16))
            if not part:
                raise ConnectionError("the answer was cut short")
            data += part
        return bytes(data)

    try:
        document = await read_framed(read_exactly, limit)
        await stream.write(ACK)
        return document
    finally:
        await stream.close()


def _reason(error: BaseException, seconds: float) -> str:
    """The innermost cause in a few words."""
    import trio

    while inner := (error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__):
        error = inner
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {seconds:.0f} s"
    text = str(error)
    for sign, reason in _REASONS.items():
        if sign in text:
            return reason
    return text.splitlines()[0] if text else type(error).__name__
