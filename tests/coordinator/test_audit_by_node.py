"""A real node without a shard audits another node's epoch over the audit stream; its report is checked before it counts."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.ledger.describe import read_events, tell
from lutetia.coordinator.ledger.events import AuditDone, AuditReported
from lutetia.coordinator.settings import RunSettings
from lutetia.protocol.dht_records import publish
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy, Timing
from lutetia.protocol.schema.records import ClaimRecord
from lutetia.protocol.schema.ticket import Ticket
from tests.coordinator.scripted_node import Coordinator, ScriptedNode, free_port, joined, until
from tests.coordinator.test_serve import up
from tests.coordinator.test_with_node import start_node
from tests.coordinator.tiny_data import build_tiny

HEARTBEAT = 4.0
EPOCHS = 50


def reports_in(folder: Path) -> list[AuditReported]:
    return [event for event in read_events(folder) if isinstance(event, AuditReported)]


async def hold(peer: ScriptedNode) -> None:
    """Keep the claim on the only shard, so that the node stands by."""
    while True:
        claim = ClaimRecord(
            run=peer.signed.manifest.run_id, owner=peer.identity.public_key, issued=peer.transport.now(), shard=0, epoch=0,
            samples=int(peer.transport.now()), state="training",
        )  # fmt: skip
        await publish(peer.transport, peer.identity, claim, 3 * HEARTBEAT)
        await asyncio.sleep(HEARTBEAT / 4)


@pytest.mark.timeout(900)
async def test_node_without_a_shard_audits_an_epoch(tmp_path: Path):
    timing = Timing(heartbeat=HEARTBEAT, tenure=300.0)
    settings = RunSettings(
        preset="tiny", name="audited", addresses=(f"127.0.0.1:{free_port()}",), timing=timing, audit=AuditPolicy(streak=EPOCHS),
        samples_per_shard=8 * EPOCHS,
    )  # fmt: skip
    run = create_run(build_tiny(tmp_path / "data", 1), tmp_path / "run", settings)
    coordinator = await Coordinator.start(run.folder, json.dumps({"stitch": "end", "gallery": False}))
    node: asyncio.subprocess.Process | None = None
    try:
        await up(coordinator)
        async with joined("ann", Ticket.decode(run.ticket), tmp_path) as ann:
            holding = asyncio.create_task(hold(ann))
            node = await start_node(run.ticket, tmp_path / "node")

            async def standing_by() -> bool:
                peers = [peer for peer in (await ann.status()).nodes if peer.owner != ann.identity.public_key]
                return [peer.state for peer in peers] == ["idle"]

            await until(standing_by, "the node to stand by")
            while not reports_in(run.folder):  # the coordinator itself replays what comes before the node's first question
                assert (await ann.verdict(ann.train(0))).verdict == "accepted"

                async def decided() -> bool:
                    status = await ann.status()
                    return status.audits_due == 0 and status.shards[0].audit == "valid"

                await until(decided, "the audit")
            holding.cancel()
    finally:
        for process in (node, coordinator.process):
            if process and process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await asyncio.wait_for(process.wait(), 300)
    history, reports = "\n".join(tell(run.folder)), reports_in(run.folder)
    done = [event.outcome for event in read_events(run.folder) if isinstance(event, AuditDone)]
    auditor = Identity.load(tmp_path / "node" / "identity.key").public_key
    assert {(event.by, event.outcome) for event in reports} == {(auditor, "valid")}, history
    assert set(done) == {"valid"}, history
    assert "to be verified" in history
