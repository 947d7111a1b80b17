"""After a crash between the ledger and the DHT, acceptances, resets and quarantines are published again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from lutetia.coordinator.acceptance.messages import LedgerFacts
from lutetia.coordinator.ledger.events import PeerPardoned
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting
from lutetia.coordinator.runtime.announcer import Announcer
from lutetia.coordinator.runtime.swarm_monitor import SwarmMonitor
from lutetia.protocol.claims import latest_acceptance
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import (
    MAX_QUARANTINED,
    AcceptanceRecord,
    ClaimRecord,
    QuarantineRecord,
    ResetRecord,
    acceptance_key,
    quarantine_key,
)
from lutetia.protocol.transport.base import Transport
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, JudgeDriver, drive_judge, first_event
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual


def convicted() -> JudgeDriver:
    """Shard 0 is rolled back to epoch 1, shard 1 to its beginning."""
    c = drive_judge(epochs=5, holdout_tolerance=0.1)
    c.accept(PEERS[1])
    c.finish_audit("valid")
    c.accept(PEERS[0])
    c.finish_audit("invalid")
    c.accept(PEERS[2], 1)
    c.finish_audit("invalid")
    return c


def test_restart_publishes_what_a_crash_left_unpublished(tmp_path):
    c = convicted()
    ledger = Ledger.create(tmp_path / "ledger.sqlite", first_event(c.manifest))
    ledger.append(c.events[1:])
    ledger.close()
    restored = Ledger.open(tmp_path / "ledger.sqlite").state
    assert restored == c.state.run

    async def scenario(transport: Transport) -> None:
        first = c.state.run.shards[0].lineage[0].acceptance
        announcer = Announcer(transport, COORDINATOR, lambda: c.rules, lambda: restored)
        await announcer.announce(first.model_copy(update={"epoch": 2, "checkpoint": "f" * 64, "term": 0}))  # before the crash
        await announcer.renew()
        shown = [await read_records(transport, acceptance_key(c.manifest.run_id, shard)) for shard in (0, 1)]
        newest = [latest_acceptance(r for r, _ in found if isinstance(r, AcceptanceRecord | ResetRecord)) for found in shown]
        assert isinstance(newest[0], AcceptanceRecord)
        assert (newest[0].epoch, newest[0].term, newest[0].checkpoint) == (1, 1, first.checkpoint)
        assert isinstance(newest[1], ResetRecord)
        assert newest[1].term == 1
        assert set(await quarantined(transport, c)) == {PEERS[0].public_key, PEERS[2].public_key}

    on_a_network(c, scenario)


def test_renewal_does_not_replace_a_newer_announcement():
    c = drive_judge(epochs=5)
    for shard in (0, 1):
        c.accept(PEERS[0], shard)

    async def scenario(transport: Transport) -> None:
        announcer = Announcer(transport, COORDINATOR, lambda: c.rules, lambda: c.state.run)
        renewal = asyncio.create_task(announcer.renew())
        await asyncio.sleep(0)  # it publishes shard 0, which takes a while
        c.accept(PEERS[1], 1)
        accepted = c.state.run.shards[1].acceptance
        assert accepted is not None
        await announcer.announce(accepted)
        await renewal
        found = await read_records(transport, acceptance_key(c.manifest.run_id, 1))
        assert [record.epoch for record, _ in found if isinstance(record, AcceptanceRecord)] == [2]

    on_a_network(c, scenario)


def test_quarantine_record_names_peers_with_claims_first():
    c = convicted()
    entry = c.state.run.quarantined[PEERS[0].public_key]
    others = [Identity.derived(f"convict {number}").public_key for number in range(60)]
    quarantined_peers = {owner: entry.model_copy(update={"owner": owner, "time": START + n}) for n, owner in enumerate(others)}
    run = replace(c.state.run, quarantined=quarantined_peers)
    claim = ClaimRecord(run=run.run, owner=others[3], issued=START, shard=0, epoch=0, samples=0, state="training")

    async def scenario(transport: Transport) -> None:
        monitor = SwarmMonitor(transport, c.manifest, _ignore)
        monitor.view = LiveView((), (Sighting(claim, START + 60, START),))
        announcer = Announcer(transport, COORDINATOR, lambda: c.rules, lambda: run, monitor)
        await announcer.publish_quarantine()
        published = await quarantined(transport, c)
        assert len(published) == MAX_QUARANTINED
        assert published[0] == others[3]
        assert published[1:] == others[:-MAX_QUARANTINED:-1][: MAX_QUARANTINED - 1]

    on_a_network(c, scenario)


def test_quarantine_record_is_empty_after_the_last_pardon():
    c = convicted()
    c.send(LedgerFacts(tuple(PeerPardoned(time=c.now, owner=owner) for owner in c.state.run.quarantined), c.now))

    async def scenario(transport: Transport) -> None:
        announcer = Announcer(transport, COORDINATOR, lambda: c.rules, lambda: c.state.run)
        await announcer.publish_quarantine()
        assert await quarantined(transport, c) == []

    on_a_network(c, scenario)


async def _ignore(record: object) -> None: ...


async def quarantined(transport: Transport, c: JudgeDriver) -> list[str]:
    found = await read_records(transport, quarantine_key(c.manifest.run_id))
    return [peer for record, _ in found if isinstance(record, QuarantineRecord) for peer in record.peers]


def on_a_network(c: JudgeDriver, scenario: Callable[[Transport], Awaitable[None]]) -> None:
    async def main() -> None:
        network = MemoryNetwork()
        await scenario(network.peer(COORDINATOR, record_check(c.manifest, network.now)))

    run_virtual(main, START)
