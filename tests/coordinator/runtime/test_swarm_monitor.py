"""What the coordinator sees of the swarm: how often it reads node records, and how many peers hold accepted checkpoints."""

from __future__ import annotations

from lutetia.coordinator.ledger.status_builder import status
from lutetia.coordinator.runtime.swarm_monitor import FULL_PACE, SwarmMonitor, nodes_pause
from lutetia.protocol.dht_records import publish
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.records import Hardware, NodeRecord, ProviderRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, drive_judge
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual

HEARTBEAT = 20.0


def test_node_records_of_a_large_swarm_are_read_less_often():
    assert nodes_pause(FULL_PACE, HEARTBEAT) == 0
    assert nodes_pause(3 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 4
    assert nodes_pause(1000 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 2


async def _ignore(record: object) -> None: ...


def test_copies_count_online_peers_that_hold_all_blobs():
    c = drive_judge()
    c.accept(PEERS[0])
    given = c.state.run.shards[0].acceptance
    assert given

    async def scenario() -> None:
        network = MemoryNetwork()
        check = record_check(c.manifest, network.now)
        eye = network.peer(COORDINATOR, check)
        monitor = SwarmMonitor(eye, c.manifest, _ignore, lambda: [given])

        def shown() -> list[int | None]:
            return [shard.copies for shard in status(c.state.run, c.manifest, monitor.view, network.now()).shards]

        assert shown() == [None, None], "not counted yet is not none"
        for number, who in enumerate((*PEERS[:3], COORDINATOR)):
            transport = eye if who is COORDINATOR else network.peer(who, check)
            place = {"run": c.manifest.run_id, "owner": who.public_key, "issued": network.now(), "peer_id": who.peer_id}
            hardware, state = Hardware(device="cpu", memory_bytes=1, cores=1), "left" if number == 2 else "idle"
            node = NodeRecord(**place, hardware=hardware, samples_per_second=1.0, software="0", state=state)  # type: ignore[arg-type]
            assert await publish(transport, who, node, 5)
            for ref in (given.weights,) if number == 1 else (given.weights, given.state):
                assert await publish(transport, who, ProviderRecord(**place, blob=ref.digest), 30)
        await monitor.look_at_peers()
        await monitor.count_copies()
        assert shown() == [1, None], "the second lacks half of it, the third has left, the coordinator does not count"
        await monitor.look_at_peers()
        assert shown() == [1, None], "the next look at the peers keeps the count"

    run_virtual(scenario, START)
