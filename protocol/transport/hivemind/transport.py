"""The real network: libp2p streams through hivemind's p2pd, records in hivemind's DHT. It runs in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Handler, RecordCheck, StoredValue, Stream, Transport
from lutetia.protocol.transport.dial_policy import DialPolicy
from lutetia.protocol.transport.hivemind.dht.node import HivemindDht
from lutetia.protocol.transport.hivemind.dialer import Dialer
from lutetia.protocol.transport.hivemind.listener import ListenerCheck
from lutetia.protocol.transport.hivemind.p2pd_process import P2pdProcess, Reachability
from lutetia.protocol.transport.idle_connections import IDLE_PER_PREFIX, idle_to_close
from lutetia.protocol.transport.reachability import answers, bootstrap_failure
from lutetia.system.errors import BootstrapError

log = logging.getLogger(__name__)

MAINTENANCE_PERIOD = 20.0
HEALTH_PERIOD, HEALTH_TIMEOUT = 5.0, 30.0
"""How often p2pd is asked whether it works, and for how long it may take to answer. Seconds."""
_GOODBYE_TIMEOUT = 5.0
_PINGS_PER_ROUND = 3


class HivemindTransport(Transport):
    """One peer over libp2p. Made by `connect_hivemind`, or by `start` where the record check is known only later."""

    def __init__(
        self, daemon: P2pdProcess, addresses: list[str], state_folder: Path, policy: DialPolicy, listener: ListenerCheck
    ) -> None:
        self.peer_id = daemon.control.peer_id
        self._daemon, self._addresses, self._state_folder = daemon, addresses, state_folder
        self._dialer = Dialer(daemon.control, policy)
        self._listener = listener
        self._dht: HivemindDht | None = None
        self._bootstrap: tuple[str, ...] = ()
        self._periodic: list[asyncio.Task[None]] = []
        self._closed = False
        self._fault: str | None = None
        self._health = asyncio.get_running_loop().create_task(self._watch_health())

    @classmethod
    async def start(
        cls,
        identity: Identity,
        *,
        listen: str,
        state_folder: Path,
        announce: Sequence[str] = (),
        reach: Reachability | None = None,
    ) -> HivemindTransport:
        """Start p2pd: streams work, the DHT does not yet. See `StartTransport` for arguments and errors.

        `reach` None chooses by `listen`: on loopback nothing outside is asked. Until `limit_dials` is called, the dial policy
        follows from `listen`, too.
        """
        until_limited = DialPolicy.of([listen])
        daemon = await P2pdProcess.start(identity, listen, state_folder, reach, announce, until_limited.allows)
        try:
            addresses = await daemon.control.addresses()
            listener = ListenerCheck("" if reach and reach.no_listen else listen, () if announce else addresses)
            return cls(daemon, addresses, state_folder, until_limited, listener)
        except BaseException:
            await daemon.close()
            raise

    async def enter_dht(self, check: RecordCheck, bootstrap: Sequence[str] = ()) -> None:
        self._dht = await HivemindDht.start(self._daemon.control.address, check, self._daemon.control.origins)
        self._bootstrap = tuple(address for address in bootstrap if _peer_of(address) != self.peer_id)
        if self._bootstrap:
            refused = await self.dial_each(self._bootstrap)
            if len(refused) == len(self._bootstrap):
                raise BootstrapError(bootstrap_failure(refused))
            self._bootstrap = tuple(a for a in self._bootstrap if a not in refused or self._dialer.trusts([a]))
            await self._meet_all({_peer_of(address) for address in self._bootstrap if address not in refused})
            await self._dht.look_around()
        self.every(MAINTENANCE_PERIOD, self._maintain)

    def limit_dials(self, policy: DialPolicy) -> None:
        self._dialer.policy = policy
        if self._daemon.own_dials:
            self._daemon.own_dials.allows = policy.allows

    async def connections(self) -> dict[str, str]:
        self._require_alive()
        return await self._daemon.control.connections()

    async def dial_each(self, addresses: Sequence[str]) -> dict[str, str]:
        return await self._dialer.dial_each(addresses)

    async def find_double(self, addresses: Sequence[str]) -> str | None:
        allowed = [address for address in addresses if self._dialer.policy.allows(address)]
        there = await asyncio.gather(*map(answers, allowed))
        suspects = [address for address, answered in zip(allowed, there, strict=True) if answered]
        return suspects[0] if suspects and await self._proves_our_key(suspects) else None

    def now(self) -> float:
        return time.time()

    def addresses(self) -> list[str]:
        return list(self._addresses)

    def alive(self) -> bool:
        working = self._fault is None and self._daemon.running and (self._dht is None or self._dht.responsive)
        return working and not self._closed

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        dht = self._require_dht()
        try:
            return await dht.store(key, subkey, value, expires)
        except TimeoutError:
            log.warning("record %s counts as not stored: storing it took too long", key)
            return False

    async def get(self, key: str) -> dict[str, StoredValue]:
        dht = self._require_dht()
        try:
            return await dht.get(key)
        except TimeoutError as error:
            raise ConnectionError(f"looking up {key} took too long") from error

    async def open_stream(self, peer_id: str, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        self._require_alive()
        try:
            await self._dialer.reach(peer_id, addresses)
            return await self._daemon.control.open_stream(peer_id, protocol)
        except ConnectionError as error:
            if self._dialer.trusts(addresses):
                raise
            log.debug("no stream %s to peer %s: %s", protocol, peer_id, error)
            raise ConnectionError(f"peer …{peer_id[-8:]} does not answer {protocol}") from None

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._require_alive()
        await self._daemon.control.serve(protocol, handler)

    def favour(self, known: Callable[[str], bool]) -> None:
        self._daemon.control.favour(known)

    async def close(self) -> None:
        self._closed = True
        tasks = [self._health, *self._periodic]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._dht:
            with contextlib.suppress(TimeoutError):  # a p2pd that hangs answers no goodbye
                async with asyncio.timeout(_GOODBYE_TIMEOUT):
                    await self._dht.close()
        await self._daemon.close(hung=self._fault is not None)

    def every(self, period: float, action: Callable[[], Awaitable[None]]) -> None:
        self._periodic.append(asyncio.get_running_loop().create_task(self._repeat(period, action)))

    async def neighbours(self) -> list[str]:
        """Peer ids in the DHT's routing table, for benchmarks and tests."""
        return self._require_dht().neighbours()

    async def _proves_our_key(self, addresses: Sequence[str]) -> bool:
        """Dial under a new identity: libp2p's handshake succeeds only if the other side holds the key of our peer id."""
        stranger = await P2pdProcess.start(Identity.generate(), "/ip4/127.0.0.1/tcp/0", self._state_folder / "stranger")
        try:
            await stranger.control.connect(self.peer_id, addresses)
        except ConnectionError:
            return False
        else:
            return True
        finally:
            await stranger.close()

    async def _meet_all(self, peer_ids: set[str]) -> None:
        dht = self._require_dht()
        met = await asyncio.gather(*(dht.meet(peer_id) for peer_id in sorted(peer_ids)))
        log.info("entered the DHT through %d of %d peers", sum(met), len(met))

    async def _repeat(self, period: float, action: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(period)
            if not self._daemon.running:
                log.error("p2pd ended with status %s; this peer is off the network", self._daemon.process.returncode)
                return
            with contextlib.suppress(ConnectionError):
                await action()

    async def _watch_health(self) -> None:
        """Ask p2pd regularly whether it works, and whether it can be reached.

        One that is stopped or has lost its sockets or its listener neither ends nor says anything.
        """
        while self._daemon.running:
            await asyncio.sleep(HEALTH_PERIOD)
            try:
                await self._daemon.control.check(HEALTH_TIMEOUT)
                if await self._listener.is_lost():
                    raise ConnectionError("it no longer listens at its port")
            except ConnectionError as error:
                self._fault = str(error)
                log.error("p2pd does not work any more (%s): this peer is off the network", error)
                return
            except OSError as error:  # of this process, for instance too many open files: p2pd may be well
                log.info("cannot ask p2pd whether it works: %s", error)

    async def _maintain(self) -> None:
        """Drop dead neighbours, return to lost bootstrap peers, close idle connections, update our own addresses."""
        dht = self._require_dht()
        neighbours = dht.neighbours()
        for peer_id in random.sample(neighbours, min(_PINGS_PER_ROUND, len(neighbours))):
            if not await dht.meet(peer_id):
                log.debug("neighbour %s is gone", peer_id)
        lost = [address for address in self._bootstrap if _peer_of(address) not in dht.neighbours()]
        if back := {_peer_of(address) for address in await self._dialer.redial(lost)}:
            await self._meet_all(back)
            await dht.look_around()
        await self._close_idle()
        self._addresses = await self._daemon.control.addresses()

    async def _close_idle(self) -> None:
        control, wanted = self._daemon.control, {*self._require_dht().neighbours(), *map(_peer_of, self._bootstrap)}
        connections = await control.connections()
        for peer_id in idle_to_close(connections, wanted | control.in_use(connections), IDLE_PER_PREFIX):
            with contextlib.suppress(ConnectionError):  # it has gone meanwhile
                await control.disconnect(peer_id)

    def _require_alive(self) -> None:
        if not self.alive():
            why = self._fault or "its p2pd has ended or no longer answers"
            raise ConnectionError(f"this peer is off the network: {why}")

    def _require_dht(self) -> HivemindDht:
        self._require_alive()
        if self._dht is None:
            raise ConnectionError("this peer has not entered the DHT yet")
        return self._dht


async def connect_hivemind(
    identity: Identity,
    *,
    listen: str = "/ip4/0.0.0.0/tcp/0",
    bootstrap: Sequence[str] = (),
    check: RecordCheck,
    announce: Sequence[str] = (),
    state_folder: Path,
    reach: Reachability | None = None,
    policy: DialPolicy | None = None,
) -> HivemindTransport:
    """Start a peer and enter the DHT; with no `bootstrap` it is alone until others come.

    `policy` limits what it dials; None follows from `listen`. Other arguments and errors are those of `HivemindTransport.start`
    and `Transport.enter_dht`.
    """
    transport = await HivemindTransport.start(
        identity, listen=listen, state_folder=state_folder, announce=announce, reach=reach
    )  # fmt: skip
    if policy is not None:
        transport.limit_dials(policy)
    try:
        await transport.enter_dht(check, bootstrap)
    except BaseException:
        await transport.close()
        raise
    return transport


def _peer_of(address: str) -> str:
    return address.rpartition("/p2p/")[2]
