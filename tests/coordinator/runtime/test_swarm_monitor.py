"""What the coordinator sees of the swarm: how often it reads who is there, and how many peers hold what it accepted."""

from __future__ import annotations

import asyncio

from lutetia.coordinator.ledger.status_builder import status
from lutetia.coordinator.runtime.swarm_monitor import FULL_PACE, SwarmMonitor, nodes_pause
from lutetia.protocol.dht_records import publish
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.records import ClaimRecord, Hardware, NodeRecord, ProviderRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, drive_judge
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual

HEARTBEAT = 20.0


def test_the_node_records_of_a_large_swarm_are_read_less_often_but_twice_in_their_life():
    assert nodes_pause(FULL_PACE, HEARTBEAT) == 0
    assert nodes_pause(3 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 4
    assert nodes_pause(1000 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 2


async def _ignore(record: object) -> None: ...


def test_copies_are_counted_of_peers_that_are_online_and_hold_all_of_it():
    c = drive_judge()
    c.accept(PEERS[0])
    given = c.state.run.shards[0].acceptance
    assert given

    async def story() -> None:
        network = MemoryNetwork()
        check = record_check(c.manifest, network.now)
        eye = network.peer(COORDINATOR, check)
        lookout = SwarmMonitor(eye, c.manifest, _ignore, lambda: [given])

        def shown() -> list[int | None]:
            return [shard.copies for shard in status(c.state.run, c.manifest, lookout.view, network.now()).shards]

        assert shown() == [None, None], "not counted yet is not none"
        for number, who in enumerate((*PEERS[:3], COORDINATOR)):
            transport = eye if who is COORDINATOR else network.peer(who, check)
            place = {"run": c.manifest.run_id, "owner": who.public_key, "issued": network.now(), "peer_id": who.peer_id}
            hardware, state = Hardware(device="cpu", memory_bytes=1, cores=1), "left" if number == 2 else "idle"
            node = NodeRecord(**place, hardware=hardware, samples_per_second=1.0, software="0", state=state)  # type: ignore[arg-type]
            assert await publish(transport, who, node, 5)
            for ref in (given.weights,) if number == 1 else (given.weights, given.state):
                assert await publish(transport, who, ProviderRecord(**place, blob=ref.digest), 30)
        await lookout.look_at_peers()
        await lookout.count_copies()
        assert shown() == [1, None], "the second lacks half of it, the third has left, the coordinator does not count"
        await lookout.look_at_peers()
        assert shown() == [1, None], "the next look at the peers keeps the count"

    run_virtual(story, START)


def test_each_look_extends_the_history_of_a_claim():
    c = drive_judge()

    async def run() -> None:
        network = MemoryNetwork()
        transport = network.peer(COORDINATOR, record_check(c.manifest, network.now))
        monitor = SwarmMonitor(transport, c.manifest, _ignore, shard_view=c.state.run.shard_view)
        owner, began = PEERS[0].public_key, network.now()
        for samples in (0, 4, 4):
            place = {"run": c.manifest.run_id, "owner": owner, "issued": network.now(), "shard": 0, "epoch": 0}
            record = ClaimRecord(**place, samples=samples, state="training")
            assert await publish(transport, PEERS[0], record, 5)
            await monitor.look_at_peers()
            await asyncio.sleep(1)
        history = monitor.view.histories[0][owner]
        assert (history.samples, history.since, history.moved, history.seen) == (4, began, began + 1, began + 2)

    run_virtual(run, START)
