"""Peers that connect and do nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.hivemind import transport as transport_module
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from lutetia.protocol.transport.idle_connections import IDLE_PER_PREFIX, idle_to_close
from tests.attacks.hivemind_swarm import manifest_of_now, network


def test_idle_connections_of_one_network_are_few() -> None:
    """700 of one /24: those in use stay, and 64 others."""
    crowd = {f"liar {n}": f"/ip4/203.0.114.{n % 256}/tcp/{n}" for n in range(700)}
    others = {f"peer {n}": f"/ip4/8.{n}.1.1/tcp/1" for n in range(100)} | {"relayed": "/ip4/8.8.1.1/tcp/1/p2p/x/p2p-circuit"}
    closing = idle_to_close(crowd | others, {f"liar {n}" for n in range(10)}, IDLE_PER_PREFIX)
    assert len(closing) == 700 - 10 - IDLE_PER_PREFIX
    assert set(closing) <= set(crowd) - {f"liar {n}" for n in range(10)}


@pytest.mark.timeout(120)
async def test_idle_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four peers at one address connect: one has a stream open, one has accepted work, one of the idle ones stays."""
    monkeypatch.setattr(transport_module, "IDLE_PER_PREFIX", 1)
    async with network(tmp_path, manifest_of_now()) as start:
        host = await start("host")
        arrived = asyncio.Event()

        async def wait(stream: Stream) -> None:
            await stream.read_exactly(1)
            arrived.set()
            await stream.read_exactly(1)

        await host.serve("/test/wait", wait)
        visitors = [
            await HivemindTransport.start(
                Identity.derived(f"visitor {n}"), listen="/ip4/127.0.0.2/tcp/0", state_folder=tmp_path / f"visitor {n}"
            )
            for n in range(4)
        ]
        try:
            for visitor in visitors:
                assert await visitor.dial_each(host.addresses()) == {}
            stream = await visitors[0].open_stream(host.peer_id, "/test/wait")
            await stream.write(b"1")
            await arrived.wait()  # p2pd says that a stream is open before the other side has it
            host.favour(lambda peer_id: peer_id == visitors[1].peer_id)
            assert len(await host.connections()) == 4
            left = set(await host.connections())
            while len(left) > 3:  # a visitor's p2pd dials again while it fills its own tables; the next round closes that, too
                await host._maintain()
                left = set(await host.connections())
                assert {visitors[0].peer_id, visitors[1].peer_id} < left
            assert len(left) == 3
            await stream.close()
        finally:
            for visitor in visitors:
                await visitor.close()
