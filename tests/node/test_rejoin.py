"""A daemon whose p2pd hangs rejoins the network, even if an attempt fails: real p2pd, coordinator in the test."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from lutetia.node.daemon import NodeDaemon
from lutetia.node.machine.messages import UserVerb
from lutetia.node.settings import NodeSettings
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.hivemind import transport as hivemind_transport
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from tests.node.scripted_coordinator import children_of, eventually, running, scripted_coordinator
from tests.node.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)


class FailingDaemon(NodeDaemon):
    """Fails the second time that it starts to serve, as if the new p2pd had died too."""

    served = 0

    async def serve(self, transport: Transport, store: BlobStore) -> None:
        self.served += 1
        if self.served == 2:
            raise ConnectionError("p2pd went away")
        await super().serve(transport, store)


async def test_rejoin_after_a_failed_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """p2pd is stopped, not killed: it lives, and answers nothing."""
    monkeypatch.setattr(hivemind_transport, "HEALTH_PERIOD", 0.2)
    monkeypatch.setattr(hivemind_transport, "HEALTH_TIMEOUT", 3.0)
    before = children_of(os.getpid())
    run = make_run(tmp_path / "run", heartbeat=2.0)
    async with scripted_coordinator(run, tmp_path / "coordinator") as coordinator:
        settings = NodeSettings(
            ticket=coordinator.ticket.encode(), state_folder=tmp_path / "node", listen="/ip4/127.0.0.1/tcp/0",
            device="cpu", threads=1, audits=False, copies=False,
        )  # fmt: skip
        daemon = FailingDaemon(settings, Identity.derived("a node that rejoins"))
        at_work = asyncio.create_task(daemon.run())
        try:

            async def online() -> bool:
                assert not at_work.done(), at_work.result()
                return daemon.status().online

            await eventually(online)
            assert daemon.shell
            first = daemon.shell.network.transport
            assert isinstance(first, HivemindTransport)
            first._daemon.process.send_signal(signal.SIGSTOP)

            async def offline() -> bool:
                return not daemon.status().online

            await eventually(offline, 60)

            async def back() -> bool:
                assert daemon.shell
                return await online() and daemon.shell.network.transport is not first

            await eventually(back, 60)
            assert daemon.served == 3
            assert daemon.shell.network.transport.alive()
        finally:
            daemon.apply_verb(UserVerb(time.time(), "leave"))
            await at_work
    assert not running(children_of(os.getpid()) - before)
