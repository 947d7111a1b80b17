"""Audits by an idle node: ask the coordinator for an epoch, replay it, and send a report.

It runs beside the state machine. As soon as the node has work of its own, the replay ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from lutetia.models.data.parts.order import parts_used
from lutetia.models.training.kernels.choice import reproduced
from lutetia.models.training.memory.options import MemoryOptions
from lutetia.node.runtime.data_parts import check_index_size
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.shell import NodeShell, is_free
from lutetia.node.services.borrowing import Borrowing, borrow_when_free, clean_up, fetch_blob_of, in_time, send_until_taken
from lutetia.node.trainer.messages import ReplayFinished, ReplayQuestion, RequestFailed, RunReplay, parse_report
from lutetia.protocol.rpc.audit_request import AuditJob, AuditReport, AuditRequest, ask_audit, sign_report
from lutetia.protocol.rpc.introduction import software_version
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import TrainedWith

log = logging.getLogger(__name__)


async def run_audits(node: NodeShell, borrowing: Borrowing) -> None:
    """Audit whenever a device of the node has nothing else to do, until cancelled."""

    async def once(device: DeviceShell) -> float:
        return await NodeAuditor(device, borrowing).once()

    await borrow_when_free(node, borrowing, "audit", once, lambda: True)


class NodeAuditor:
    """Audits on one device, while it has no work of its own."""

    def __init__(self, shell: DeviceShell, borrowing: Borrowing | None = None) -> None:
        self.shell, self.borrowing = shell, borrowing or Borrowing()

    @property
    def _free(self) -> bool:
        return is_free(self.shell)

    async def once(self) -> float:
        """Do one audit if there is one. Returns the seconds until the next question."""
        network = self.shell.network
        request = AuditRequest(owner=network.identity.public_key)
        for peer, addresses in network.coordinators:
            answer = await ask_audit(network.transport, peer, request, addresses)
            (self.borrowing.lenders.add if answer.lends_checks else self.borrowing.lenders.discard)(peer)
            if answer.job is None:
                return answer.retry_after
            report = await self._replay_in_time(answer.job, peer, addresses)
            if report:
                await self._send_report(sign_report(report, network.identity), peer, addresses, answer.job.until)
                self.shell.contributions.count_help(time.time(), "audits")
                log.debug("replayed epoch %d of shard %d for the coordinator", answer.job.epoch, answer.job.shard)
        return 0.0

    async def _send_report(self, report: AuditRequest, peer: str, addresses: tuple[str, ...], until: float) -> None:
        async def send() -> tuple[float, str]:
            answer = await ask_audit(self.shell.network.transport, peer, report, addresses)
            return answer.retry_after, answer.text

        await send_until_taken(send, lambda attempt: self.shell.rules.backoff(attempt, "audit"), until, "audit report")

    async def _replay_in_time(self, job: AuditJob, peer: str, addresses: tuple[str, ...]) -> AuditReport | None:
        """The report; None if it took too long, the node got work of its own, or the audit is no longer lent to it."""
        return await in_time(
            self._replay(job), lambda: self._free, lambda: job.until, lambda: self._still_lent(job, peer, addresses)
        )

    async def _still_lent(self, job: AuditJob, peer: str, addresses: tuple[str, ...]) -> bool:
        """Show the coordinator that this node still works on `job`. A coordinator that is away or busy ends nothing."""
        network = self.shell.network
        try:
            answer = await ask_audit(network.transport, peer, AuditRequest(owner=network.identity.public_key), addresses)
        except ConnectionError:
            return True
        return bool(answer.text) or (answer.job is not None and answer.job.checkpoint == job.checkpoint)

    async def _replay(self, job: AuditJob) -> AuditReport | None:
        replayed = await self.replay(job)
        if replayed is None:
            return None
        finished, seconds = replayed
        network = self.shell.network
        return AuditReport(
            run=network.manifest.run_id, owner=network.identity.public_key, checkpoint=job.checkpoint,
            losses=finished.losses, drift=finished.drift, made=made_with(finished), seconds=seconds,
        )  # fmt: skip

    async def replay(self, job: AuditJob, doubt: tuple[float, float, bool] | None = None) -> tuple[ReplayFinished, float] | None:
        """Fetch what the job needs and replay it. Returns the outcome and its seconds; None if the process crashed.

        Args:
            job: what to replay.
            doubt: the drifts between which the epoch's own noise is measured, and whether in the other precision.

        Raises UnreachableError, IntegrityError or DiskError.
        """
        network = self.shell.network
        data = network.manifest.shards[job.shard].train
        named = {name: getattr(job, name) for name in ("weights", "state", "end_weights", "end_state")} | {"data": data}
        refs = {name: ref for name, ref in named.items() if ref is not None}
        fetched = list(refs.values())
        try:
            check_index_size(network.manifest.shards[job.shard])
            keep = {*await asyncio.to_thread(self.shell.served), *(ref.digest for ref in refs.values())}
            paths = {name: await fetch_blob_of(self.shell, ref, keep) for name, ref in refs.items()}
            parts = await asyncio.to_thread(self._parts, job)
            model = self.shell.workspace.model_blobs()
            keep |= {blob.digest for blob in (*parts, *model)}
            for blob in model:
                await fetch_blob_of(self.shell, blob, keep)
            for part in parts:
                fetched.append(part)
                await fetch_blob_of(self.shell, part, keep, listed_by=data)
            began = time.monotonic()
            replayed = await self._replay_in_child(job, paths, doubt)
            return replayed and (replayed, time.monotonic() - began)
        finally:
            await clean_up(self.shell, job.shard, fetched)

    def _parts(self, job: AuditJob) -> list[BlobRef]:
        """The parts of the shard's data that the replayed steps need, and no others. Blocks on the disk."""
        manifest = self.shell.network.manifest
        index = self.shell.workspace.data.index(self.shell.network.store, manifest.shards[job.shard])
        if index is None:
            return []
        whole = manifest.lane_steps(job.lane)
        steps = whole if job.end_weights else min(job.steps, whole)
        first = (job.epoch - 1) * manifest.checkpoint_samples
        used = parts_used(manifest, job.shard, index, first, steps * manifest.optimisation.batch, job.lane)
        return [index.parts[number].blob for number in used]

    async def _replay_in_child(
        self, job: AuditJob, paths: dict[str, Path], doubt: tuple[float, float, bool] | None
    ) -> ReplayFinished | None:
        """Replay in a trainer process, which is ended when the replay is cancelled."""
        question, trainer = self._question(job, paths, doubt), self.shell.trainer
        message = None
        child = await trainer.take()
        try:
            await child.send(RunReplay(question=question).to_wire())
            message = await anext(child.messages(), None)
        finally:
            await (trainer.give_back(child) if message else child.kill())
        report = parse_report(message) if message else None
        if not isinstance(report, ReplayFinished):
            why = report.text if isinstance(report, RequestFailed) else "it crashed"
            log.warning("could not replay epoch %d of shard %d: %s", job.epoch, job.shard, why)
            return None
        return report

    def _question(self, job: AuditJob, paths: dict[str, Path], doubt: tuple[float, float, bool] | None) -> ReplayQuestion:
        """How this node replays a job: in the author's forms, with what its own probe found."""
        result = self.shell.prober.result
        assert result
        fit, forms = result.shards[job.shard], {"moments": job.moments, "weights": job.kept_weights}
        values = {
            **job.model_dump(include={"shard", "lane", "epochs", "steps", "precision"}), **paths,
            "manifest": self.shell.workspace.paths.manifest, "epoch": job.epoch - 1, "device": result.device,
            "micro_batch": fit.micro_batch, "memory": MemoryOptions.model_validate({**fit.memory.model_dump(), **forms}),
            "kernels": reproduced(job.kernels, fit.kernels),
            "threads": self.shell.choice.threads, "base": self.shell.workspace.base_model(), "doubt": doubt,
        }  # fmt: skip
        return ReplayQuestion.model_validate(values)


def made_with(replayed: ReplayFinished) -> TrainedWith:
    """With what a replay was computed, this node's software included."""
    return TrainedWith.model_validate({**replayed.made.model_dump(), "software": software_version()})
