"""Counts the bytes that a peer sends and receives: a transport around another one.

Streams are counted as they are read and written. Records travel in messages of the DHT that no stream shows: they are estimated.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Handler, RecordCheck, StartTransport, StoredValue, Stream, Transport
from lutetia.protocol.transport.dial_policy import DialPolicy

SEARCH_BYTES = 25_000
"""Bytes of a search in the DHT, questions and answers together: 23 to 29 KB in a swarm of 16 peers on one machine."""
HOLDERS, HANDOVER_BYTES = 5, 3_000
"""Peers that store a record, and the bytes with which each is given it, besides the record."""


class ByteMeter(Protocol):
    """Takes what was sent and received, in bytes."""

    def sent(self, count: int) -> None: ...

    def received(self, count: int) -> None: ...


class MeteredStream(Stream):
    """A stream whose bytes are counted."""

    def __init__(self, inner: Stream, meter: ByteMeter) -> None:
        self.peer_id, self.origin, self.moved = inner.peer_id, inner.origin, inner.moved
        self._inner, self._meter = inner, meter

    async def read_exactly(self, count: int) -> bytes:
        data = await self._inner.read_exactly(count)
        self._meter.received(count)
        return data

    async def read_into(self, target: memoryview) -> None:
        await self._inner.read_into(target)
        self._meter.received(len(target))

    async def write(self, data: bytes | memoryview) -> None:
        self._meter.sent(len(data))
        await self._inner.write(data)

    async def close(self) -> None:
        await self._inner.close()


class MeteredTransport(Transport):
    """`inner`, with what it sends and receives told to `meter`."""

    def __init__(self, inner: Transport, meter: ByteMeter) -> None:
        self.inner, self.peer_id, self._meter = inner, inner.peer_id, meter

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        self._searched()
        self._meter.sent(HOLDERS * (HANDOVER_BYTES + len(value)))
        return await self.inner.store(key, subkey, value, expires)

    async def get(self, key: str) -> dict[str, StoredValue]:
        self._searched()
        found = await self.inner.get(key)
        self._meter.received(HOLDERS * sum(len(each.value) for each in found.values()))
        return found

    def _searched(self) -> None:
        """A search of this peer, and one of another peer that asked this one: all peers search about equally often."""
        for count in (self._meter.sent, self._meter.received):
            count(SEARCH_BYTES)

    async def open_stream(self, peer_id: str, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        return MeteredStream(await self.inner.open_stream(peer_id, protocol, addresses), self._meter)

    async def serve(self, protocol: str, handler: Handler) -> None:
        await self.inner.serve(protocol, lambda stream: handler(MeteredStream(stream, self._meter)))

    def limit_dials(self, policy: DialPolicy) -> None:
        self.inner.limit_dials(policy)

    def now(self) -> float:
        return self.inner.now()

    def addresses(self) -> list[str]:
        return self.inner.addresses()

    async def connections(self) -> dict[str, str]:
        return await self.inner.connections()

    async def dial_each(self, addresses: Sequence[str]) -> dict[str, str]:
        return await self.inner.dial_each(addresses)

    async def find_double(self, addresses: Sequence[str]) -> str | None:
        return await self.inner.find_double(addresses)

    async def enter_dht(self, check: RecordCheck, bootstrap: Sequence[str] = ()) -> None:
        await self.inner.enter_dht(check, bootstrap)

    def favour(self, known: Callable[[str], bool]) -> None:
        self.inner.favour(known)

    def every(self, period: float, action: Callable[[], Awaitable[None]]) -> None:
        self.inner.every(period, action)

    def alive(self) -> bool:
        return self.inner.alive()

    async def close(self) -> None:
        await self.inner.close()


def metered(start: StartTransport, meter: ByteMeter) -> StartTransport:
    """`start`, whose transports are counted by `meter`."""

    async def start_metered(identity: Identity, *, listen: str, state_folder: Path, announce: Sequence[str] = ()) -> Transport:
        inner = await start(identity, listen=listen, state_folder=state_folder, announce=announce)
        return MeteredTransport(inner, meter)

    return start_metered
