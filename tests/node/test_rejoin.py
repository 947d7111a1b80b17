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
from lutetia.node.services import traffic as traffic_service
from lutetia.node.settings import NodeSettings
from lutetia.node.traffic.policy import ByteCaps, period_at
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import claim_key
from lutetia.protocol.transport import metered
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.hivemind import transport as hivemind_transport
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from lutetia.protocol.transport.metered import MeteredTransport
from tests.node.scripted_coordinator import ScriptedCoordinator, children_of, eventually, running, scripted_coordinator
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
    monkeypatch.setattr(metered, "SEARCH_BYTES", 100)  # a heartbeat of 2 s has many searches beside results of some KB
    monkeypatch.setattr(traffic_service, "LOOK_SECONDS", 0.1)  # an epoch takes a second here, not minutes
    before = children_of(os.getpid())
    run = make_run(tmp_path / "run", epochs=500, steps=100, heartbeat=2.0)
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
            assert isinstance(first, MeteredTransport)
            assert isinstance(first.inner, HivemindTransport)
            first.inner._daemon.process.send_signal(signal.SIGSTOP)

            async def offline() -> bool:
                return not daemon.status().online

            await eventually(offline, 60)

            async def back() -> bool:
                assert daemon.shell
                return await online() and daemon.shell.network.transport is not first

            await eventually(back, 60)
            assert daemon.served == 3
            assert daemon.shell.network.transport.alive()
            await spend_the_cap(daemon, coordinator)
        finally:
            daemon.apply_verb(UserVerb(time.time(), "leave"))
            await at_work
    assert not running(children_of(os.getpid()) - before)


async def spend_the_cap(daemon: NodeDaemon, coordinator: ScriptedCoordinator) -> None:
    """Bytes of before the rejoin count. The epoch under way ends and is accepted, the shard is handed back, the cap holds."""
    traffic, reached = daemon.traffic, coordinator.epoch

    async def one_more_begun() -> bool:
        work = daemon.status()
        return work.state == "training" and bool(work.step) and coordinator.epoch > reached

    await eventually(one_more_begun)
    counts, begun = traffic.counts, coordinator.epoch
    [device] = traffic.devices
    kept = traffic.records * (period_at(time.time()).day_ends - time.time()) + device.promised + 3 * device.result
    cap = int(counts.sent + counts.received + kept)  # also what waits for its verdict fits: on a busy machine that is much
    traffic.caps = ByteCaps(day=cap)

    async def paused() -> bool:
        return daemon.status().state == "paused"

    await eventually(paused)
    status = daemon.status()
    assert status.reason.startswith("the cap of ")
    assert status.reason.endswith("training goes on at midnight")
    assert status.pending == 0, "what was begun is judged"
    assert coordinator.epoch > begun
    assert status.traffic
    assert 0 < status.traffic.sent_today + status.traffic.received_today <= cap
    assert status.traffic.held_back == status.reason
    assert "results an hour" in (status.traffic.expected or "")

    async def free() -> bool:
        keys = [claim_key(coordinator.run.manifest.run_id, shard) for shard in (0, 1)]
        records = [claim for key in keys for claim in await coordinator.records(key)]
        return bool(records) and {claim.state for claim in records} == {"released"}

    await eventually(free)
