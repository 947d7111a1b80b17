"""Gives audits to peers that have no shard, and turns their reports into findings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding, compare
from lutetia.coordinator.acceptance.audit_policy import steps_of
from lutetia.coordinator.acceptance.intake.rate_limits import RateWindow
from lutetia.coordinator.acceptance.messages import AuditDelivered, AuditWanted, LendAudit, StartAudit
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.worker.client import WorkerFailed, WorkerRefused
from lutetia.protocol.blobs.store import BlobMissing
from lutetia.protocol.rpc.audit_request import AuditAnswer, AuditJob, AuditReport, AuditRequest, serve_audits
from lutetia.protocol.schema.identity import public_key_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import NodeRecord, RecordRefused, TrainedWith
from lutetia.protocol.transport.base import Stream, Transport

_LOCAL = ("/ip4/127.", "/ip6/::1/", "/ip4/10.", "/ip4/192.168.", "/ip4/172.")


@dataclass
class AuditService:
    """Answers the audit stream.

    Args:
        peers: the node records that the DHT has now.
        pace: bounds how often one address asks.
        lends_checks: audits are lent as checks, on their own stream, and none on this one.
    """

    transport: Transport
    judge_loop: JudgeLoop
    check_runner: NetworkCheckRunner
    peers: Callable[[], list[NodeRecord]]
    pace: RateWindow = field(default_factory=lambda: RateWindow(120))
    lends_checks: bool = False

    async def serve(self) -> None:
        await serve_audits(self.transport, self._answer, self._admit, self.manifest.steps_per_epoch)

    def _admit(self, stream: Stream) -> AuditAnswer | None:
        orders = self.manifest.orders
        if orders.bans(stream.peer_id):
            return AuditAnswer(retry_after=3600.0, text=orders.refusal_of(public_key_of(stream.peer_id) or ""))
        if wait := self.pace.wait(stream.origin, self.transport.now()):
            return AuditAnswer(retry_after=wait, text="too many requests for audits from this address")
        return None

    @property
    def manifest(self) -> Manifest:
        return self.check_runner.manifest

    async def _answer(self, request: AuditRequest) -> AuditAnswer:
        if request.report is not None:
            return await self._take(request.report)
        if self.lends_checks:
            return AuditAnswer(retry_after=self.judge_loop.rules.audit_wait / 4, lends_checks=True)
        related = relatives(request.owner, self.peers())
        lend = await self.judge_loop.submit(AuditWanted(request.owner, self.transport.now(), related))
        assert isinstance(lend, LendAudit)
        if lend.audit is None:
            return AuditAnswer(retry_after=lend.retry_after)
        return AuditAnswer(job=job_of(lend.audit, lend.until, self.manifest))

    async def _take(self, report: AuditReport) -> AuditAnswer:
        run = self.judge_loop.state.run
        if report.run != run.run:
            raise RecordRefused(f"the report is of run {report.run[:12]}, not of {run.run[:12]}")
        lent = self.judge_loop.state.lent.get(report.checkpoint)
        if lent is None or lent.owner != report.owner:
            raise RecordRefused("no audit of that result was lent to this peer")
        finding = await self._finding(report, run)
        delivered = AuditDelivered(report.owner, report.checkpoint, finding, report.seconds, self.transport.now())
        await self.judge_loop.submit(delivered)
        return AuditAnswer()

    async def _finding(self, report: AuditReport, run: RunState) -> AuditFinding:
        """Compare the peer's losses with the author's trace, which the peer did not get."""
        audit = run.audits.get(report.checkpoint)
        link = audit and run.shards[audit.shard].link(report.checkpoint)
        if audit is None or link is None or link.trace is None or link.made is None:
            return AuditFinding(outcome="inconclusive", text="the result was rolled back meanwhile")
        asked = steps_of(self.judge_loop.rules, audit)
        if len(report.losses) != asked or (audit.whole and report.drift is None):
            return AuditFinding(
                outcome="inconclusive", text=f"it reports {len(report.losses)} losses; {asked} steps were asked for"
            )
        try:
            published = await self.check_runner.published(link.trace)
        except (WorkerFailed, WorkerRefused, BlobMissing) as error:
            return AuditFinding(outcome="inconclusive", text=str(error))
        losses = [math.nan if loss is None else loss for loss in report.losses]
        return compare(published, losses, report.drift, link.made, report.made)


def free_auditors(view: LiveView) -> frozenset[str] | None:
    """The peers that can carry out an audit, by their own records; None while no record was seen.

    A node with several devices can while one of them is idle, whatever the others do.
    """
    free = frozenset(node.record.owner for node in view.nodes if _has_idle_device(node.record))
    return free if view.nodes else None


def _has_idle_device(node: NodeRecord) -> bool:
    return node.state == "idle" or any(device.state == "idle" for device in node.devices)


def relatives(owner: str, peers: list[NodeRecord]) -> frozenset[str]:
    """The peers that share an operator or a public address with `owner`, by their own records."""
    records = [record for record in peers if record.owner == owner]
    operators = {record.operator for record in records if record.operator} | {owner}
    hosts = {host for record in records for host in _hosts(record)}
    return frozenset(
        record.owner for record in peers if record.operator in operators or record.owner in operators or hosts & _hosts(record)
    )


def _hosts(record: NodeRecord) -> set[str]:
    """The public IP addresses among a peer's multiaddrs."""
    return {"/".join(address.split("/")[:3]) for address in record.addresses if not address.startswith(_LOCAL)}


def job_of(audit: StartAudit, until: float, manifest: Manifest) -> AuditJob:
    """Tell the peer where to begin and how far to go, but not the author's losses."""
    due, link, parent = audit.audit, audit.link, audit.parent
    given = link.acceptance
    init, made = manifest.expert_of(due.shard).init, link.made or TrainedWith()
    return AuditJob(
        checkpoint=due.checkpoint, shard=due.shard, epoch=due.epoch, epochs=link.budgets[0],
        lane=due.lane, steps=audit.steps, precision=made.precision, moments=made.moments, kept_weights=made.weights,
        kernels=made.kernels,
        weights=parent.weights if parent else init, state=parent.state if parent else None,
        end_weights=given.weights if due.whole else None, end_state=given.state if due.whole else None, until=until,
    )  # fmt: skip
