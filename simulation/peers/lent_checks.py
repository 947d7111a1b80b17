"""Checks lent to nodes: the real desk (`coordinator.lending`) under a model of its shell, and a model of the nodes that check."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from lutetia.coordinator.acceptance.checks import CheckFailed
from lutetia.coordinator.acceptance.loss_bounds import Losses
from lutetia.coordinator.ledger.events import CheckerRefuted
from lutetia.coordinator.lending.agreement import Settled, numbers
from lutetia.coordinator.lending.loans import Asker, LendingDesk, LentCheck, end_check_loans, lend_check, take_report
from lutetia.coordinator.runtime.audit_service import free_auditors, relatives
from lutetia.node.pacing import AUDIT_SIGN_SECONDS, AUDIT_WATCH_SECONDS, audit_pause
from lutetia.protocol.rpc.check_request import CheckReport
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.simulation.interfaces import Coordinator, Node
from lutetia.simulation.network.blobs import Content, SimulatedDelay, drive, untrained_loss
from lutetia.simulation.peers.auditor import is_free
from lutetia.simulation.peers.check_runner import SimulatedCheckRunner
from lutetia.system.errors import UnreachableError

CheckerPolicy = Literal["honest", "praises", "blames", "silent", "slow"]
"""What a node makes of a check: reports what it found, half the losses, twice the losses, nothing, or it takes SLOW as long."""
SLOW = 40.0
_ASKS = 1.0
_DEVICES = 1e-4
"""Relative difference of honest losses from device to device."""


class SimulatedLender:
    """The coordinator's side. A crash loses desk and reports; the judge then has the checks carried out again."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.desk = LendingDesk()
        self.records: dict[str, tuple[CheckpointRecord, AcceptanceRecord | None]] = {}
        self._outcomes: dict[str, Settled] = {}
        self._numbers = itertools.count(1)

    async def ask(self, record: CheckpointRecord, parent: AcceptanceRecord | None, boot: int) -> Settled:
        """Have nodes check the result, however long that takes. Raises CheckFailed when the coordinator has crashed."""
        coordinator, known = self._coordinator, [sighting.record for sighting in self._coordinator.view.nodes]
        self.records[record.digest] = record, parent
        excluded = relatives(record.owner, known) | {record.owner}
        check = LentCheck(record.digest, "result", record.shard, coordinator.clock(), excluded=excluded)
        self.desk = self.desk.with_check(check)
        while record.digest not in self._outcomes:
            await SimulatedDelay(_ASKS)
            if boot != coordinator.boot:
                raise CheckFailed("inconclusive", "holdout", "the coordinator has crashed")
            free = free_auditors(coordinator.view)
            self.desk = end_check_loans(self.desk, free, coordinator.clock(), coordinator.world.config.lease)
        del self.records[record.digest]
        return self._outcomes.pop(record.digest)

    def lend(self, asking: Node) -> LentCheck | None:
        coordinator, owner = self._coordinator, asking.machine.owner
        run = coordinator.state.run
        if owner in run.quarantined or owner in run.refuted_checkers:
            return None
        known = [sighting.record for sighting in coordinator.view.nodes] if coordinator.world.config.operators else []
        asker = Asker(
            owner, frozenset({"result"}), frozenset(range(coordinator.world.config.shards)), relatives(owner, known) | {owner},
            run.has_accepted_work(owner),
        )  # fmt: skip
        free = frozenset(filter(run.has_accepted_work, free_auditors(coordinator.view) or ()))
        id_ = f"{next(self._numbers):064x}"
        self.desk, check = lend_check(self.desk, asker, id_, coordinator.clock(), free)
        return check

    def receive(self, report: CheckReport) -> None:
        coordinator = self._coordinator
        self.desk, check, settled = take_report(self.desk, report, coordinator.clock())
        if check and settled:
            self._outcomes[check.name] = settled
            for liar in sorted(settled.liars):
                coordinator.note(
                    CheckerRefuted(
                        time=coordinator.clock(),
                        owner=liar,
                        check="result",
                        shard=check.shard or 0,
                        epoch=self.records[check.name][0].epoch,
                        text="its report contradicts two that agree",
                    )  # fmt: skip
                )


class LentSimulatedCheckRunner(SimulatedCheckRunner):
    """As `coordinator.lending.runner`: fetches itself, and takes what two nodes agree on as the findings of the other checks."""

    def __init__(self, coordinator: Coordinator, lender: SimulatedLender) -> None:
        super().__init__(coordinator)
        self._lender, self._report = lender, None

    async def inspect(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None:
        parent = self._coordinator.state.run.shards[record.shard].acceptance
        settled = await self._lender.ask(record, parent, self._coordinator.boot)
        if settled.report is None:
            raise CheckFailed("inconclusive", "holdout", "no two nodes that checked it agree")
        if settled.report.outcome == "refused":
            raise CheckFailed("invalid", settled.report.check or "format", settled.report.text)
        self._report = settled.report

    async def parent_losses(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> Losses:
        return numbers(self._report.parent if self._report else ())

    async def losses(self, record: CheckpointRecord) -> Losses:
        return numbers(self._report.averages if self._report else ())

    async def raw_losses(self, record: CheckpointRecord) -> Losses:
        return numbers(self._report.raw if self._report else ())


class SimulatedChecker:
    """The checker of one node, as `node.services.checker`."""

    def __init__(self, node: Node) -> None:
        self._node, self._world = node, node.world
        self.policy: CheckerPolicy = "honest"

    def begin(self, boot: int) -> None:
        """Ask about once per heartbeat, while the process lives."""
        node = self._node
        pause = audit_pause(self._world.config.heartbeat, 0.0, node.rules.jitter("check", int(node.clock())))
        self._world.queue.after(pause, self._ask, boot)

    def _ask(self, boot: int) -> None:
        if boot != self._node.boot or not self._node.running:
            return
        drive(self._world.queue, self._once(boot), lambda _: self.begin(boot))

    def _free(self, boot: int) -> bool:
        node = self._node
        return node.answering and boot == node.boot and any(map(is_free, node.devices))

    async def _once(self, boot: int) -> None:
        for coordinator in self._world.coordinators:
            check = await self._lent(coordinator) if self._free(boot) else None
            if check is None:
                continue
            if self.policy == "silent":
                return
            record, parent = coordinator.lender.records[check.name]
            try:
                await self._world.blobs.fetch(
                    self._node, record.digest, self._world.config.weights_bytes + self._world.config.state_bytes, [coordinator]
                )
            except UnreachableError:
                return
            finally:
                if not any(device.state.work for device in self._node.devices):
                    self._world.blobs.drop(record.digest, self._node)
            if await self._worked(coordinator, check.name, boot):
                await self._report(coordinator, check.loans[self._node.machine.owner].id, record, parent)

    async def _lent(self, coordinator: Coordinator) -> LentCheck | None:
        node, links = self._node, self._world.links
        if not links.dials(node, coordinator):
            return None
        await SimulatedDelay(links.stream(node, coordinator) + links.stream(coordinator, node))
        self._world.costs.audit_exchanged()
        return coordinator.lender.lend(node) if links.dials(node, coordinator) and coordinator.serving else None

    async def _worked(self, coordinator: Coordinator, name: str, boot: int) -> bool:
        """Whether the check was carried out to its end; it ends early with work of the node's own."""
        left = self._world.config.check_seconds / self._node.machine.speed * (SLOW if self.policy == "slow" else 1.0)
        asked = self._node.clock()
        while left > 0:
            if not self._free(boot):
                return False
            if self._node.clock() - asked >= AUDIT_SIGN_SECONDS:
                again, asked = await self._lent(coordinator), self._node.clock()
                if again is not None and again.name != name:
                    return False
            part = min(left, AUDIT_WATCH_SECONDS)
            await SimulatedDelay(part)
            left -= part
        return True

    async def _report(
        self, coordinator: Coordinator, id_: str, record: CheckpointRecord, parent: AcceptanceRecord | None
    ) -> None:
        node, links = self._node, self._world.links
        await SimulatedDelay(links.stream(node, coordinator, 4000))
        if not (links.dials(node, coordinator) and coordinator.serving):
            return
        report = CheckReport(
            run=self._world.manifest.run_id, owner=node.machine.owner, id=id_, seconds=1.0, **self._found(record, parent)
        )
        coordinator.lender.receive(report)

    def _found(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> dict[str, Any]:
        contents = self._world.blobs.contents
        content = contents[record.digest]
        before = contents[parent.checkpoint].loss if parent else untrained_loss(record.shard)
        if not content.sound and self.policy != "praises":
            return {"outcome": "refused", "check": "numbers", "text": "its tensors are not those of the manifest"}
        loss = self._said(content, before) * (1 + _DEVICES * node_number(self._node.machine.owner))
        return {"outcome": "done", "parent": (before,), "averages": (loss,), "raw": (loss,)}

    def _said(self, content: Content, before: float) -> float:
        match self.policy:
            case "praises":
                return 0.5 * before
            case "blames":
                return 2.0 * before
            case _:
                return content.loss


def node_number(owner: str) -> float:
    """Between -1 and 1: how a node's device differs from others."""
    return int(owner[:8], 16) / 2**31 - 1
