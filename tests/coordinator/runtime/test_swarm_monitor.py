"""What the coordinator sees of the swarm: how often it reads node records, and how many peers hold accepted checkpoints."""

from __future__ import annotations

from pathlib import Path

from lutetia.coordinator.ledger.status_builder import status
from lutetia.coordinator.runtime.swarm_monitor import FULL_PACE, SwarmMonitor, nodes_pause
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import publish
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import Hardware, NodeRecord, ProviderRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, drive_judge
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual

HEARTBEAT = 20.0
LIAR = Identity.derived("says that it holds everything")


def test_node_records_of_a_large_swarm_are_read_less_often():
    assert nodes_pause(FULL_PACE, HEARTBEAT) == 0
    assert nodes_pause(3 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 4
    assert nodes_pause(1000 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 2


async def _ignore(record: object) -> None: ...


def test_copies_count_online_peers_that_hold_all_blobs(tmp_path: Path):
    store = BlobStore(tmp_path / "blobs")
    weights, state = (store.add_bytes(text * 3_000_000) for text in (b"w", b"s"))
    c = drive_judge()
    c.accept(PEERS[0])
    given = c.state.run.shards[0].acceptance
    assert given
    given = given.model_copy(update={"weights": weights, "state": state})

    async def scenario() -> None:
        network = MemoryNetwork()
        check = record_check(c.manifest, network.now)
        eye = network.peer(COORDINATOR, check)
        monitor = SwarmMonitor(eye, c.manifest, _ignore, lambda: [given])

        def shown() -> list[int | None]:
            return [shard.copies for shard in status(c.state.run, c.manifest, monitor.view, network.now()).shards]

        assert shown() == [None, None], "not counted yet is not none"
        for number, who in enumerate((*PEERS[:3], COORDINATOR, LIAR)):
            transport = eye if who is COORDINATOR else network.peer(who, check)
            place = {"run": c.manifest.run_id, "owner": who.public_key, "issued": network.now(), "peer_id": who.peer_id}
            hardware, state = Hardware(device="cpu", memory_bytes=1, cores=1), "left" if number == 2 else "idle"
            node = NodeRecord(**place, hardware=hardware, samples_per_second=1.0, software="0", state=state)  # type: ignore[arg-type]
            assert await publish(transport, who, node, 5)
            if who is not LIAR:
                await serve_blobs(transport, store)
            for ref in (given.weights,) if number == 1 else (given.weights, given.state):
                assert await publish(transport, who, ProviderRecord(**place, blob=ref.digest), 30)
        await monitor.look_at_peers()
        await monitor.count_copies()
        assert shown() == [1, None], "one lacks half, one has left, the coordinator does not count, the liar answers no chunk"
        await monitor.look_at_peers()
        assert shown() == [1, None], "the next look at the peers keeps the count"

    run_virtual(scenario, START)
