"""Processor time of the real node shell code in virtual time, per node and hour, against what the simulator may cost.

Each part runs alone on the network in memory of the tests: real sealed records, real checks, real streams, a virtual clock. The
simulator's budget is 60 s for 1,000 nodes and one hour, for everything together.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from benchmarks.report import Row
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.events import RunCreated
from lutetia.coordinator.runtime.announcer import Announcer
from lutetia.coordinator.runtime.swarm_monitor import SwarmMonitor, look_pause
from lutetia.node.machine.messages import Claim
from lutetia.node.machine.state import MachineState, NodeRules
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.services.auditor import run_audits
from lutetia.node.services.borrowing import Borrowing
from lutetia.node.services.manifest_updates import ManifestUpdates
from lutetia.node.services.membership import Membership
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.audit_request import AuditAnswer, AuditRequest, serve_audits
from lutetia.protocol.rpc.introduction import serve_introduction
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.records import AcceptanceRecord, Hardware, RecordLimits, read_envelope
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import RecordCheck, Transport
from lutetia.simulation.config import COORDINATOR, OWNER, SimulationConfig, blob, make_manifest
from lutetia.simulation.event_queue import START
from lutetia.simulation.rules_under_test import replayed
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual

BUDGET = 60 / 1000
CONFIG = SimulationConfig(shards=16)
SIGNED = SignedManifest.sign(make_manifest(CONFIG), OWNER)
_TIMING = SIGNED.manifest.timing.model_copy(update={"heartbeat": 3600.0})
LASTING = SIGNED.manifest.model_copy(update={"timing": _TIMING})
"""For the limits of records alone: what is published once stays, so that readers can be measured without writers."""
LOOK_PAUSE = 128.0
"""Seconds between the looks of one node in a swarm of 1,000 nodes on 16 shards."""
RETRY_AFTER = 215.0
"""After how many seconds 1,000 nodes on standby are told to ask for an audit again."""
HARDWARE = Hardware(device="cuda", memory_bytes=1 << 34, cores=8)


class Swarm:
    """Nodes with the parts of a shell that the services use, and a coordinator."""

    def __init__(self, folder: Path, nodes: int, *, trusting: bool) -> None:
        """`trusting`: no record is verified, as in the simulator's settings without forgers."""
        self.network, self.trusting = MemoryNetwork(latency=0.04), trusting
        self.live = LiveManifest(SIGNED)
        self.coordinator = self.network.peer(COORDINATOR, self._check())
        ticket = Ticket(run=SIGNED.manifest.run_id, owner=OWNER.public_key, addresses=tuple(self.coordinator.addresses()))
        store = BlobStore(folder)
        self.nodes = [self._node(Identity.derived(f"node {number}"), ticket, store) for number in range(nodes)]

    def _check(self) -> RecordCheck:
        def trust(key: str | None, subkey: str, value: bytes, expires: float) -> str:
            return key or read_envelope(value).key()

        return trust if self.trusting else record_check(LASTING, self.network.now)

    def _node(self, identity: Identity, ticket: Ticket, store: BlobStore) -> NodeNetwork:
        node = NodeNetwork(identity, self.network.peer(identity, self._check()), SIGNED.manifest, ticket, store)
        node.limits = RecordLimits(LASTING.timing.heartbeat)
        return node

    def shell(self, node: NodeNetwork) -> NodeShell:
        """What services see of an idle node's shell."""
        rules = NodeRules.of(SIGNED.manifest, node.identity.public_key)
        device = SimpleNamespace(
            network=node, rules=rules, slowed=None, state=MachineState(phase="idle", online=True),
            prober=SimpleNamespace(result=HARDWARE),
        )  # fmt: skip
        idle = SimpleNamespace(
            network=node, rules=rules, manifest=SIGNED.manifest, free_device=lambda: device, feed=lambda event: None
        )
        return cast(NodeShell, idle)

    async def serve(self) -> None:
        async def answer(request: AuditRequest) -> AuditAnswer:
            return AuditAnswer(retry_after=RETRY_AFTER)

        await serve_introduction(cast(Transport, self.coordinator), lambda: SIGNED)
        await serve_audits(cast(Transport, self.coordinator), answer)

    async def publish(self, number: int) -> None:
        """The records of one heartbeat; as many nodes hold a shard as there are shards."""
        node = self.nodes[number]
        shard = number if number < CONFIG.shards else None
        if shard is not None:
            await node.publish_claim(Claim(shard, 0, 0, "training"))
        await node.publish_node("idle" if shard is None else "training", HARDWARE, 12.5, shard)


Part = Callable[[Swarm], list[Coroutine[Any, Any, None]]]


async def _repeat(pause: float, offset: float, action: Callable[[], Awaitable[Any]]) -> None:
    await asyncio.sleep(offset)
    while True:
        await action()
        await asyncio.sleep(pause)


def _spread(swarm: Swarm, pause: float, action: Callable[[int], Awaitable[Any]]) -> list[Coroutine[Any, Any, None]]:
    """`action(node number)` of every node once per `pause`, one after the other."""
    count = len(swarm.nodes)
    return [_repeat(pause, pause * n / count, lambda n=n: action(n)) for n in range(count)]


def _heartbeats(swarm: Swarm) -> list[Coroutine[Any, Any, None]]:
    return _spread(swarm, CONFIG.heartbeat, swarm.publish)


def _looks(swarm: Swarm) -> list[Coroutine[Any, Any, None]]:
    return _spread(swarm, LOOK_PAUSE, lambda n: swarm.nodes[n].look((n % CONFIG.shards,)))


def _membership(swarm: Swarm) -> list[Coroutine[Any, Any, None]]:
    return [Membership(swarm.shell(node), copies=False).run() for node in swarm.nodes]


def _manifest_updates(swarm: Swarm) -> list[Coroutine[Any, Any, None]]:
    return [ManifestUpdates(node, swarm.live, lambda: None).run() for node in swarm.nodes]


def _auditors(swarm: Swarm) -> list[Coroutine[Any, Any, None]]:
    return [run_audits(swarm.shell(node), Borrowing()) for node in swarm.nodes]


def _announcer(swarm: Swarm) -> list[Coroutine[Any, Any, None]]:
    """The coordinator's, with an acceptance of every shard."""
    manifest, key = SIGNED.manifest, COORDINATOR.public_key
    created = RunCreated(
        time=START, run=manifest.run_id, name=manifest.name, owner=manifest.owner, coordinator=key,
        shards=CONFIG.shards, epochs=manifest.epochs,
    )  # fmt: skip
    state = JudgeState(replayed([created]))
    records = [
        AcceptanceRecord(
            run=manifest.run_id, owner=key, issued=START, shard=shard, epoch=1, checkpoint="cd" * 32, parent=None,
            weights=blob("weights", 100), state=blob("state", 100), samples=manifest.checkpoint_samples,
            author=swarm.nodes[0].identity.public_key, tenure_until=START + CONFIG.tenure, holdout_loss=0.5,
        )
        for shard in range(CONFIG.shards)
    ]  # fmt: skip
    rules = JudgeRules(manifest, key, b"benchmark")
    announcer = Announcer(cast(Transport, swarm.coordinator), COORDINATOR, lambda: rules, lambda: state.run)

    async def renew() -> None:
        for record in records:
            await announcer.announce(record)

    return [_repeat(CONFIG.lease, 0.0, renew)]


def _monitor(swarm: Swarm) -> list[Coroutine[Any, Any, None]]:
    async def ignore(record: Any) -> None:
        return None

    monitor = SwarmMonitor(cast(Transport, swarm.coordinator), SIGNED.manifest, ignore)
    return [
        _repeat(look_pause(CONFIG.heartbeat), 0.0, monitor.look_at_peers),
        _repeat(look_pause(CONFIG.heartbeat), 0.0, monitor.look_at_checkpoints),
    ]


NODE_PARTS: dict[str, Part] = {
    "records of each heartbeat": _heartbeats,
    "looks at shards": _looks,
    "membership": _membership,
    "manifest updates": _manifest_updates,
    "auditor, without replays": _auditors,
}
COORDINATOR_PARTS: dict[str, Part] = {"announcer": _announcer, "swarm monitor": _monitor}


def _seconds(part: Part, nodes: int, minutes: float, *, trusting: bool) -> float:
    """Processor seconds of one part, scaled to a virtual hour of the whole swarm."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        with tempfile.TemporaryDirectory() as folder, mock.patch("time.time", loop.time), mock.patch("time.monotonic", loop.time):
            swarm = Swarm(Path(folder), nodes, trusting=trusting)
            await swarm.serve()
            for number in range(nodes):
                await swarm.publish(number)
            tasks = [asyncio.create_task(work) for work in part(swarm)]
            began = time.process_time()
            await asyncio.sleep(60 * minutes)
            spent = time.process_time() - began
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return spent * 60 / minutes

    return run_virtual(main, START)


def _rows(parts: dict[str, Part], nodes: int, minutes: float, per: int, budget: str, *, trusting: bool) -> list[Row]:
    how = f"{nodes} nodes, {'records unverified' if trusting else 'every record verified'}"
    spent = {name: _seconds(part, nodes, minutes, trusting=trusting) / per for name, part in parts.items()}
    spent["all together"] = sum(spent.values())
    return [
        Row.of(name, [seconds], "s per virtual hour", budget if name == "all together" else "", how)
        for name, seconds in spent.items()
    ]


def run(sizes: Sequence[tuple[int, float]] = ((32, 20.0), (256, 6.0))) -> list[Row]:
    """The processor time of one node, by part, then that of the coordinator. `sizes`: nodes, and virtual minutes to run."""
    rows: list[Row] = []
    for nodes, minutes in sizes:
        for trusting in (True, False):
            rows += _rows(NODE_PARTS, nodes, minutes, nodes, f"≤ {BUDGET:g}, all else included", trusting=trusting)
    return rows + _rows(COORDINATOR_PARTS, *sizes[-1], 1, "", trusting=True)
