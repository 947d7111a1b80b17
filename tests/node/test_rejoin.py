"""A daemon whose p2pd dies comes back on the network, also when that fails half-way: real p2pd, a coordinator in the test."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from lutetia.node.daemon import NodeDaemon
from lutetia.node.machine.messages import UserVerb
from lutetia.node.settings import NodeSettings
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from tests.node.scripted_coordinator import children_of, eventually, running, toy_coordinator
from tests.node.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)


class Stumbling(NodeDaemon):
    """Its new p2pd dies, too, just when it begins to serve for the second time."""

    served = 0

    async def serve(self, transport: Transport, store: BlobStore) -> None:
        self.served += 1
        if self.served == 2:
            raise ConnectionError("p2pd went away")
        await super().serve(transport, store)


async def test_rejoin_after_a_failed_attempt(tmp_path: Path):
    before = children_of(os.getpid())
    run = make_run(tmp_path / "run", heartbeat=2.0)
    async with toy_coordinator(run, tmp_path / "coordinator") as toy:
        settings = NodeSettings(
            ticket=toy.ticket.encode(), state_folder=tmp_path / "box", listen="/ip4/127.0.0.1/tcp/0", device="cpu", threads=1,
            audits=False, copies=False,
        )  # fmt: skip
        daemon = Stumbling(settings, Identity.derived("a box that comes back"))
        at_work = asyncio.create_task(daemon.run())
        try:

            async def online() -> bool:
                assert not at_work.done(), at_work.result()
                return daemon.status().online

            await eventually(online)
            assert daemon.shell
            first = daemon.shell.network.transport
            assert isinstance(first, HivemindTransport)
            first._daemon.process.kill()

            async def back() -> bool:
                assert daemon.shell
                return await online() and daemon.shell.network.transport is not first

            await eventually(back, 60)
            assert daemon.served == 3
            assert daemon.shell.network.transport.alive()
        finally:
            daemon.say(UserVerb(time.time(), "leave"))
            await at_work
    assert not running(children_of(os.getpid()) - before)
