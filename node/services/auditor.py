"""Audits by an idle node: ask the coordinator for an epoch, replay it, and send a report.

It runs beside the state machine. As soon as the node has work of its own, the replay ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from lutetia.models.data.parts.order import parts_used
from lutetia.models.training.memory.options import MemoryOptions
from lutetia.node.pacing import AUDIT_SIGN_SECONDS, AUDIT_WATCH_SECONDS, audit_pause
from lutetia.node.runtime.data_parts import check_index_size
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.trainer.messages import ReplayFinished, ReplayQuestion, RequestFailed, RunReplay, parse_report
from lutetia.protocol.rpc.audit_request import AuditJob, AuditReport, AuditRequest, ask_audit, sign_report
from lutetia.protocol.rpc.introduction import software_version
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.schema.records import TrainedWith
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)


class NodeAuditor:
    """A service beside the shell. `run` until it is cancelled."""

    def __init__(self, shell: NodeShell) -> None:
        self.shell = shell

    @property
    def _free(self) -> bool:
        state, shell = self.shell.state, self.shell
        fit = shell.prober.result is not None and state.disk_full_since is None and shell.slowed is None
        return state.phase == "idle" and state.online and fit

    async def run(self) -> None:
        """Ask about once per heartbeat, or after the time that the coordinator names."""
        wait = 0.0
        while True:
            heartbeat = self.shell.network.manifest.timing.heartbeat
            await asyncio.sleep(audit_pause(heartbeat, wait, self.shell.rules.jitter("audit", int(time.time()))))
            wait = 0.0
            if self._free:
                try:
                    wait = await self._once()
                except (LutetiaError, ConnectionError) as error:
                    log.debug("no audit now: %s", " ".join(str(error).split()))

    async def _once(self) -> float:
        """Do one audit if there is one. Returns the seconds until the next question."""
        network = self.shell.network
        request = AuditRequest(owner=network.identity.public_key)
        for peer, addresses in network.coordinators:
            answer = await ask_audit(network.transport, peer, request, addresses)
            if answer.job is None:
                return answer.retry_after
            report = await self._replay_in_time(answer.job, peer, addresses)
            if report:
                await self._send_report(sign_report(report, network.identity), peer, addresses, answer.job.until)
                log.debug("replayed epoch %d of shard %d for the coordinator", answer.job.epoch, answer.job.shard)
        return 0.0

    async def _send_report(self, report: AuditRequest, peer: str, addresses: tuple[str, ...], until: float) -> None:
        """Retry until `until` (Unix seconds): the replay is done, and only sending it may fail."""
        for attempt in itertools.count(1):
            try:
                answer = await ask_audit(self.shell.network.transport, peer, report, addresses)
                if not answer.retry_after:
                    return
                wait, why = answer.retry_after, answer.text
            except ConnectionError as error:
                wait, why = self.shell.rules.backoff(attempt, "audit"), str(error)
            if time.time() + wait > until:
                raise ConnectionError(f"the coordinator did not take the audit report: {why}")
            await asyncio.sleep(wait)

    async def _replay_in_time(self, job: AuditJob, peer: str, addresses: tuple[str, ...]) -> AuditReport | None:
        """The report; None if it took too long, the node got work of its own, or the audit is no longer lent to it."""
        replaying, asked = asyncio.create_task(self._replay(job)), time.monotonic()
        try:
            while not replaying.done() and self._free and time.time() < job.until:
                await asyncio.wait([replaying], timeout=AUDIT_WATCH_SECONDS)
                if not replaying.done() and time.monotonic() - asked >= AUDIT_SIGN_SECONDS:
                    if not await self._still_lent(job, peer, addresses):
                        return None
                    asked = time.monotonic()
            return replaying.result() if replaying.done() else None
        finally:
            replaying.cancel()
            await asyncio.gather(replaying, return_exceptions=True)

    async def _still_lent(self, job: AuditJob, peer: str, addresses: tuple[str, ...]) -> bool:
        """Show the coordinator that this node still works on `job`. A coordinator that is away or busy ends nothing."""
        network = self.shell.network
        try:
            answer = await ask_audit(network.transport, peer, AuditRequest(owner=network.identity.public_key), addresses)
        except ConnectionError:
            return True
        return bool(answer.text) or (answer.job is not None and answer.job.checkpoint == job.checkpoint)

    async def _replay(self, job: AuditJob) -> AuditReport | None:
        network = self.shell.network
        data = network.manifest.shards[job.shard].train
        named = {name: getattr(job, name) for name in ("weights", "state", "end_weights", "end_state")} | {"data": data}
        refs = {name: ref for name, ref in named.items() if ref is not None}
        fetched = list(refs.values())
        try:
            check_index_size(network.manifest.shards[job.shard])
            keep = {*await asyncio.to_thread(self.shell.served), *(ref.digest for ref in refs.values())}
            paths = {name: await self._fetch(ref, keep) for name, ref in refs.items()}
            parts = await asyncio.to_thread(self._parts, job)
            model = self.shell.workspace.model_blobs()
            keep |= {blob.digest for blob in (*parts, *model)}
            for blob in model:
                await self._fetch(blob, keep)
            for part in parts:
                fetched.append(part)
                await self._fetch(part, keep, listed_by=data)
            began = time.monotonic()
            replayed = await self._replay_in_child(job, paths)
            if replayed is None:
                return None
            made = TrainedWith.model_validate({**replayed.made.model_dump(), "software": software_version()})
            return AuditReport(
                run=network.manifest.run_id, owner=network.identity.public_key, checkpoint=job.checkpoint,
                losses=replayed.losses, drift=replayed.drift, made=made, seconds=time.monotonic() - began,
            )  # fmt: skip
        finally:
            await self._clean_up(job.shard, fetched)

    async def _fetch(self, ref: BlobRef, keep: Collection[str], listed_by: BlobRef | None = None) -> Path:
        network = self.shell.network
        if not await asyncio.to_thread(network.store.has, ref.digest):
            await asyncio.to_thread(self.shell.workspace.make_room, ref.size, keep)
        return await network.fetch(ref, listed_by=listed_by)

    def _parts(self, job: AuditJob) -> list[BlobRef]:
        """The parts of the shard's data that the replayed steps need, and no others. Blocks on the disk."""
        manifest = self.shell.network.manifest
        index = self.shell.workspace.data.index(self.shell.network.store, manifest.shards[job.shard])
        if index is None:
            return []
        steps = manifest.steps_per_epoch if job.end_weights else min(job.steps, manifest.steps_per_epoch)
        first = (job.epoch - 1) * manifest.checkpoint_samples
        used = parts_used(manifest, job.shard, index, first, steps * manifest.optimisation.batch)
        return [index.parts[number].blob for number in used]

    async def _clean_up(self, shard: int, refs: Iterable[BlobRef]) -> None:
        """Remove what was fetched for the replay, except what this node serves or needs by now."""
        wanted = await asyncio.to_thread(self._wanted, shard)
        for ref in refs:
            if ref.digest not in wanted:
                await asyncio.to_thread(self.shell.network.store.remove, ref.digest)

    def _wanted(self, shard: int) -> set[str]:
        """Blobs of the shard that this node serves or needs. Blocks on the disk."""
        workspace, work, wanted = self.shell.workspace, self.shell.state.work, set(self.shell.served())
        if work and work.shard == shard:
            accepted = self.shell.network.acceptances.get(shard)
            wanted |= workspace.needed(shard, workspace.base(shard, work.epoch, work.checkpoint, accepted))
        return wanted

    async def _replay_in_child(self, job: AuditJob, paths: dict[str, Path]) -> ReplayFinished | None:
        """Replay in a trainer process, which is ended when the replay is cancelled."""
        result, trainer = self.shell.prober.result, self.shell.trainer
        assert result
        fit, forms = result.shards[job.shard], {"moments": job.moments, "weights": job.kept_weights}
        question = ReplayQuestion(
            manifest=self.shell.workspace.paths.manifest, shard=job.shard, epoch=job.epoch - 1, epochs=job.epochs,
            steps=job.steps, precision=job.precision, device=result.device,
            micro_batch=fit.micro_batch, memory=MemoryOptions.model_validate({**fit.memory.model_dump(), **forms}),
            threads=self.shell.settings.threads, base=self.shell.workspace.base_model(), **paths,
        )  # fmt: skip
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
