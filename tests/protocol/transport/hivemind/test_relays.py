"""Circuit relays through real p2pd: a relayed connection is reported as relayed, and no peer relays for strangers by default."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from multiaddr import Multiaddr

from lutetia.coordinator.ledger.status_builder import link_of
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.hivemind.bindings import messages
from lutetia.protocol.transport.hivemind.p2pd_client import _peer_bytes
from lutetia.protocol.transport.hivemind.p2pd_process import P2pdProcess, Reachability
from tests.protocol.networks import LOOPBACK, until


@dataclass(frozen=True)
class Forced(Reachability):
    """With further switches of p2pd: on loopback it would never find out by itself how it is reached."""

    more: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        return [*super().arguments(), *self.more]


async def start(name: str, folder: Path, reach: Reachability) -> P2pdProcess:
    return await P2pdProcess.start(Identity.derived(name), LOOPBACK, folder / name, reach)


async def relay_and_hidden(folder: Path) -> tuple[P2pdProcess, P2pdProcess, str]:
    """A relay, a peer that nobody can dial and that asks it for a place, and the relay's address."""
    public = Forced(nat_port_map=False, auto_nat=False, relay=True, more=("-forceReachabilityPublic",))
    relay = await start("relay", folder, public)
    place = (await relay.control.addresses())[0]
    hidden = Forced(
        nat_port_map=False, auto_nat=False, relay=True, auto_relay=True, trusted_relays=(place,), no_listen=True,
        more=("-forceReachabilityPrivate", "-relayDiscovery=0"),
    )  # fmt: skip
    return relay, await start("hidden", folder, hidden), place


async def dial_through(caller: P2pdProcess, place: str, peer_id: str) -> None:
    circuit = Multiaddr(f"{place}/p2p-circuit").to_bytes()
    connect = messages.ConnectRequest(peer=_peer_bytes(peer_id), addrs=[circuit], timeout=5)
    await caller.control._ask(messages.Request(type=messages.Request.CONNECT, connect=connect), 6)


async def test_a_relayed_connection_is_reported_as_relayed(tmp_path: Path) -> None:
    """Both ends are unreachable, so that p2pd cannot replace the relayed connection by a direct one."""
    relay, hidden, place = await relay_and_hidden(tmp_path)
    caller = await start("caller", tmp_path, Reachability(nat_port_map=False, auto_nat=False, relay=True, no_listen=True))
    try:

        async def reached() -> bool:
            try:
                await dial_through(caller, place, hidden.control.peer_id)
            except ConnectionError:  # the hidden peer has no place at the relay yet
                return False
            return True

        await until(reached)
        for peer, other in ((caller, hidden), (hidden, caller)):
            seen = await peer.control.connections()
            assert link_of(seen[other.control.peer_id]) == "relayed"
            assert link_of(seen[relay.control.peer_id]) == "direct"
        heard = asyncio.Queue[bytes]()

        async def hear(stream: Stream) -> None:
            heard.put_nowait(await stream.read_exactly(2))

        await hidden.control.serve("/test/1", hear)
        stream = await caller.control.open_stream(hidden.control.peer_id, "/test/1")
        await stream.write(b"hi")
        assert await heard.get() == b"hi"
    finally:
        for process in (caller, hidden, relay):
            await process.close()


async def test_no_peer_relays_for_strangers_by_default(tmp_path: Path) -> None:
    """p2pd does by itself, for every libp2p peer of the world, and with `-relay=0` too."""
    public = Forced(nat_port_map=False, auto_nat=False, more=("-forceReachabilityPublic",))
    host, stranger = await start("host", tmp_path, public), await start("stranger", tmp_path, public)
    try:
        await stranger.control.connect(host.control.peer_id, await host.control.addresses())
        with pytest.raises(ConnectionError, match="protocols not supported"):
            await stranger.control.open_stream(host.control.peer_id, "/libp2p/circuit/relay/0.2.0/hop")
    finally:
        await host.close()
        await stranger.close()
