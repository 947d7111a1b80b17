"""One peer of a `MemoryNetwork`: its part of the DHT, its streams, its clock."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lutetia.protocol.async_helpers import gather_quickly
from lutetia.protocol.schema.records import RecordRefused
from lutetia.protocol.transport.base import Handler, RecordCheck, StoredValue, Stream, Transport
from lutetia.protocol.transport.inbound_limits import HandlerTasks
from lutetia.protocol.transport.network_origin import origin_of
from lutetia.protocol.transport.reachability import bootstrap_failure
from lutetia.system.errors import BootstrapError
from tests.memory_transport.stream import MemoryStream, Pipe

if TYPE_CHECKING:
    from tests.memory_transport.network import MemoryNetwork

log = logging.getLogger(__name__)


class MemoryTransport(Transport):
    """One peer of a MemoryNetwork. `check` is None until it enters the DHT."""

    def __init__(self, network: MemoryNetwork, peer_id: str, skew: float, number: int) -> None:
        self.peer_id, self.skew = peer_id, skew
        self.check: RecordCheck | None = None
        self._network = network
        self._address = f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4001/p2p/{peer_id}"
        self._records: dict[str, dict[str, StoredValue]] = {}
        self._handlers: dict[str, Handler] = {}
        self._tasks = HandlerTasks()
        self._periodic: list[asyncio.Task[None]] = []
        self._streams: list[tuple[str, MemoryStream]] = []
        self._alive = True

    def now(self) -> float:
        return self._network.now() + self.skew

    def addresses(self) -> list[str]:
        return [self._address]

    def alive(self) -> bool:
        return self._alive

    async def connections(self) -> dict[str, str]:
        """All peers that can be dialled: this network has no connections."""
        return self._network.places(self.peer_id)

    async def dial_each(self, addresses: Sequence[str]) -> dict[str, str]:
        """Each address is dialled by its peer id: hosts and ports are not looked at."""
        self._require_alive()
        peer_ids = [address.rpartition("/p2p/")[2] for address in addresses]
        reasons = await gather_quickly([self._why_not(peer_id) for peer_id in peer_ids], lambda reason: reason == "")
        return {
            address: "no answer yet" if reason is None else reason
            for address, reason in zip(addresses, reasons, strict=True)
            if reason != ""
        }

    async def find_double(self, addresses: Sequence[str]) -> str | None:
        """None: a MemoryNetwork refuses a second peer of the same identity."""
        return None

    async def enter_dht(self, check: RecordCheck, bootstrap: Sequence[str] = ()) -> None:
        self._require_alive()
        others = [address for address in bootstrap if not address.endswith(f"/p2p/{self.peer_id}")]
        refused = await self.dial_each(others)
        if others and len(refused) == len(others):
            raise BootstrapError(bootstrap_failure(refused))
        self.check = check
        self._network.place(self)

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        self._require_dht()
        stored = StoredValue(value, expires)
        if not self.keep(key, subkey, stored):
            return False
        others = [peer for peer in self._network.nearest(self.peer_id, key) if peer is not self]
        answered = await self._ask(others)
        return not others or sum(peer.keep(key, subkey, stored) for peer in answered) > 0

    async def get(self, key: str) -> dict[str, StoredValue]:
        self._require_dht()
        others = [peer for peer in self._network.nearest(self.peer_id, key) if peer is not self]
        newest: dict[str, StoredValue] = {}
        for peer in [self, *await self._ask(others)]:
            for subkey, stored in peer.held(key).items():
                newer = subkey not in newest or stored.expires > newest[subkey].expires
                if newer and self._accepts(key, subkey, stored):
                    newest[subkey] = stored
        return newest

    async def open_stream(self, peer_id: str, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        self._require_alive()
        await self._dial(peer_id)
        target = self._network.find(peer_id)
        if target is None or not self._network.reachable(self.peer_id, peer_id):
            raise ConnectionError(f"peer {peer_id} went away")
        forth = Pipe(lambda size: self._network.link(self.peer_id, peer_id, size))
        back = Pipe(lambda size: self._network.link(peer_id, self.peer_id, size))
        here, there = MemoryStream(peer_id, back, forth), MemoryStream(self.peer_id, forth, back)
        there.origin = origin_of(self._address)
        if not target.answer(protocol, there):
            raise ConnectionError(f"peer {peer_id} does not answer {protocol}")
        self._streams.append((peer_id, here))
        return here

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._require_alive()
        self._handlers[protocol] = handler

    def favour(self, known: Callable[[str], bool]) -> None:
        self._tasks.known = known

    def every(self, period: float, action: Callable[[], Awaitable[None]]) -> None:
        self._periodic.append(asyncio.get_running_loop().create_task(self._repeat(period, action)))

    async def close(self) -> None:
        if self._alive:
            self._network.kill(self)
        for task in self._periodic:
            task.cancel()
        await asyncio.gather(*self._periodic, return_exceptions=True)
        await self._tasks.close()

    def keep(self, key: str, subkey: str, stored: StoredValue) -> bool:
        """Keep a record here if this peer's check accepts it; the one that expires later wins. False if it is refused."""
        if not self._accepts(key, subkey, stored):
            return False
        records = self._records.setdefault(key, {})
        if subkey not in records or records[subkey].expires < stored.expires:
            records[subkey] = stored
        return True

    def held(self, key: str) -> dict[str, StoredValue]:
        """The records kept here that are live by this peer's clock."""
        now = self.now()
        live = {subkey: stored for subkey, stored in self._records.get(key, {}).items() if stored.expires > now}
        if key in self._records:
            self._records[key] = live
        return live

    def take_over(self, neighbours: Iterator[MemoryTransport]) -> None:
        """As a newcomer, get from `neighbours` the records that this peer is to hold from now on."""
        for neighbour in neighbours:
            for key in list(neighbour._records) if neighbour is not self else ():
                if self in self._network.nearest(self.peer_id, key):
                    for subkey, stored in neighbour.held(key).items():
                        self.keep(key, subkey, stored)

    def answer(self, protocol: str, stream: MemoryStream) -> bool:
        """Take an inbound stream. False when nothing here serves `protocol`."""
        handler = self._handlers.get(protocol)
        if handler is None or not self._tasks.start(protocol, handler, stream):
            return False
        self._streams = [(peer_id, old) for peer_id, old in self._streams if not old.closed]
        self._streams.append((stream.peer_id, stream))
        return True

    def break_streams(self, together: Callable[[str, str], bool]) -> None:
        for peer_id, stream in self._streams:
            if not together(self.peer_id, peer_id):
                stream.break_(f"the link to {peer_id} broke")

    def die(self) -> None:
        self._alive = False
        self.break_streams(lambda a, b: False)
        self._streams.clear()
        self._handlers.clear()
        self._records.clear()

    def _accepts(self, key: str, subkey: str, stored: StoredValue) -> bool:
        if self.check is None:
            return False
        try:
            return self.check(key, subkey, stored.value, stored.expires) == key
        except RecordRefused as error:
            log.debug("%s refused a record under %s: %s", self.peer_id, key, error)
            return False

    async def _ask(self, peers: Sequence[MemoryTransport]) -> list[MemoryTransport]:
        """One lookup and one request to each of `peers`, all at once. Returns those whose answer arrives."""
        answered, longest = [], 0.0
        for peer in peers:
            trip = 2 * (self._network.delay(self.peer_id, peer.peer_id) + self._network.delay(peer.peer_id, self.peer_id))
            lost = self._network.lost() or self._network.lost()
            longest = max(longest, self._network.timeout if lost else trip)
            if not lost and trip < self._network.timeout:
                answered.append(peer)
        await asyncio.sleep(min(longest, self._network.timeout))
        self._require_alive()
        return [peer for peer in answered if peer.alive() and self._network.together(peer.peer_id, self.peer_id)]

    async def _dial(self, peer_id: str) -> None:
        """Make a round trip, with up to four attempts. Raises ConnectionError."""
        for _ in range(4):
            if self._network.reachable(self.peer_id, peer_id) and not self._network.lost():
                await asyncio.sleep(self._network.delay(self.peer_id, peer_id) + self._network.delay(peer_id, self.peer_id))
                return
            await asyncio.sleep(self._network.timeout / 4)
        raise ConnectionError(f"peer {peer_id} could not be dialled: no answer within {self._network.timeout:.1f} s")

    async def _why_not(self, peer_id: str) -> str:
        """Dial a peer. Returns the reason why it failed, or ""."""
        try:
            await self._dial(peer_id)
        except ConnectionError as error:
            return str(error)
        return ""

    async def _repeat(self, period: float, action: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(period)
            if not self._alive:
                return
            with contextlib.suppress(ConnectionError):
                await action()

    def _require_alive(self) -> None:
        if not self._alive:
            raise ConnectionError("this peer has left the network")

    def _require_dht(self) -> None:
        self._require_alive()
        if self.check is None:
            raise ConnectionError("this peer has not entered the DHT yet")
