"""Audits by idle nodes, as `node.services.auditor`."""

from __future__ import annotations

import itertools
from typing import Literal

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.messages import LendAudit, StartAudit
from lutetia.coordinator.ledger.run_state import PendingAudit
from lutetia.node.pacing import AUDIT_SIGN_SECONDS, AUDIT_WATCH_SECONDS, audit_pause
from lutetia.protocol.transport.base import DIAL_TIMEOUT
from lutetia.simulation.interfaces import Coordinator, Node, World
from lutetia.simulation.network.blobs import SimulatedDelay, drive
from lutetia.simulation.peers.streams import shard_parcel
from lutetia.system.errors import UnreachableError

AuditorPolicy = Literal["honest", "valid", "invalid"]
"""Whether an auditor reports what it found, or always the same without a replay."""


def replay_finding(world: World, audit: PendingAudit) -> AuditFinding:
    """The finding of a replay: the first steps show that none were taken, only the whole epoch shows a faked end."""
    faked = world.blobs.contents[audit.checkpoint].faked
    caught = faked == "all" or (faked == "end" and audit.whole)
    return AuditFinding(outcome="invalid", text="the replay gave other losses") if caught else AuditFinding(outcome="valid")


def is_free(device: Node) -> bool:
    """Whether a device has no work of its own, as `node.runtime.shell.is_free`."""
    return device.device_ok and device.state.phase == "idle" and device.state.disk_full_since is None


class SimulatedAuditor:
    """The auditor of one node."""

    def __init__(self, node: Node) -> None:
        self._node, self._world = node, node.world
        self.policy: AuditorPolicy = "honest"

    def begin(self, boot: int, wait: float = 0.0) -> None:
        """Ask about once per heartbeat, or after the time that the coordinator names, while the process lives."""
        node = self._node
        pause = audit_pause(self._world.config.heartbeat, wait, node.rules.jitter("audit", int(node.clock())))
        self._world.queue.after(pause, self._ask, boot)

    def _ask(self, boot: int) -> None:
        if boot != self._node.boot or not self._node.running:
            return
        if self._free(boot):
            drive(self._world.queue, self._once(boot), lambda wait: self.begin(boot, wait))
        else:
            self.begin(boot)

    def _free(self, boot: int) -> bool:
        node = self._node
        return node.answering and boot == node.boot and any(map(is_free, node.devices))

    async def _once(self, boot: int) -> float:
        """Do one audit if there is one. Returns the seconds until the next question."""
        for coordinator in self._world.coordinators:
            lend = await self._ask_coordinator(coordinator)
            if lend is None:
                continue
            if lend.audit is None:
                return lend.retry_after
            try:
                finding = await self._replayed(coordinator, lend.audit, boot, lend.until)
            except UnreachableError:
                return 0.0
            if finding:
                await self._send_report(coordinator, lend.audit, finding, boot, lend.until)
        return 0.0

    async def _ask_coordinator(self, coordinator: Coordinator) -> LendAudit | None:
        node, links = self._node, self._world.links
        if not links.dials(node, coordinator):
            await SimulatedDelay(DIAL_TIMEOUT)
            return None
        await SimulatedDelay(links.stream(node, coordinator) + links.stream(coordinator, node))
        self._world.costs.audit_exchanged()
        return coordinator.lend(node) if links.dials(node, coordinator) and coordinator.serving else None

    async def _replayed(self, coordinator: Coordinator, job: StartAudit, boot: int, until: float) -> AuditFinding | None:
        """None when it took too long or the node got work of its own. Raises UnreachableError when a blob cannot be fetched."""
        node, world, audit = self._node, self._world, job.audit
        if self.policy != "honest":
            return AuditFinding(outcome=self.policy, text="reported without a replay")
        config, own_work = world.config, set(itertools.chain(*(disk.digests for disk in node.trainer.disks.values())))
        parcels = {shard_parcel(audit.shard): config.shard_bytes}
        if job.parent:
            parcels[job.parent.checkpoint] = config.weights_bytes + config.state_bytes
        if audit.whole:
            parcels[audit.checkpoint] = config.weights_bytes + config.state_bytes
        fetched = [parcel for parcel in parcels if not world.blobs.has(parcel, node)]
        try:
            for parcel in fetched:
                await world.blobs.fetch(node, parcel, parcels[parcel], world.coordinators)
            asked = node.clock()
            left = config.epoch_seconds * job.steps / world.manifest.steps_per_epoch / node.machine.speed
            while left > 0:
                if not self._free(boot) or node.clock() >= until:
                    return None
                if node.clock() - asked >= AUDIT_SIGN_SECONDS:
                    lend, asked = await self._ask_coordinator(coordinator), node.clock()
                    if lend and (lend.audit is None or lend.audit.audit.checkpoint != audit.checkpoint):
                        return None
                part = min(left, AUDIT_WATCH_SECONDS)
                await SimulatedDelay(part)
                left -= part
            return replay_finding(world, audit)
        finally:
            for parcel in fetched:
                if parcel not in own_work and all(
                    not device.state.work or parcel != device.state.work.checkpoint for device in node.devices
                ):
                    world.blobs.drop(parcel, node)

    async def _send_report(
        self, coordinator: Coordinator, job: StartAudit, finding: AuditFinding, boot: int, until: float
    ) -> None:
        """Send the report; retry until `until`."""
        node, links = self._node, self._world.links
        for attempt in itertools.count(1):
            if boot != node.boot or not node.running:
                return
            if links.dials(node, coordinator):
                await SimulatedDelay(links.stream(node, coordinator, 4000))
                self._world.costs.audit_exchanged()
                if links.dials(node, coordinator) and coordinator.serving and boot == node.boot:
                    coordinator.receive_report(node, job.audit.checkpoint, finding)
                    return
            wait = node.rules.backoff(attempt, "audit")
            if node.clock() + wait > until:
                return
            await SimulatedDelay(wait)
