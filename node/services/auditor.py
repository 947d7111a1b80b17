"""What a node without a shard does for the others: it asks the coordinator for an audit, replays it, and reports.

It runs beside the state machine and never in its way: as soon as the node has something of its own to do, the replay ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable
from typing import Any

from lutetia.node.runtime.shell import NodeShell
from lutetia.protocol.rpc.audit_request import AuditJob, AuditReport, AuditRequest, ask_audit, sign_report
from lutetia.protocol.rpc.introduction import software_version
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.schema.records import TrainedWith
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.5


class NodeAuditor:
    """A companion of the shell."""

    def __init__(self, shell: NodeShell) -> None:
        self.shell = shell

    @property
    def _free(self) -> bool:
        state, shell = self.shell.state, self.shell
        fit = shell.prober.finding is not None and state.disk_full_since is None and shell.slowed is None
        return state.phase == "idle" and state.online and fit

    async def run(self) -> None:
        """Ask about once per heartbeat, or when the coordinator says, until cancelled."""
        wait = 0.0
        while True:
            pause = max(wait, self.shell.network.manifest.timing.heartbeat)
            await asyncio.sleep(pause * (1 + self.shell.rules.jitter("audit", int(time.time())) / 4))
            wait = 0.0
            if self._free:
                try:
                    wait = await self._once()
                except (LutetiaError, ConnectionError) as error:
                    log.info("no audit now: %s", " ".join(str(error).split()))

    async def _once(self) -> float:
        """One audit, if there is one. Returns after how many seconds to ask again."""
        network = self.shell.network
        request = AuditRequest(owner=network.identity.public_key)
        for peer, addresses in network.coordinators:
            answer = await ask_audit(network.transport, peer, request, addresses)
            if answer.job is None:
                return answer.retry_after
            report = await self._within(answer.job)
            if report:
                await self._hand_in(sign_report(report, network.identity), peer, addresses, answer.job.until)
                log.info("replayed epoch %d of shard %d for the coordinator", answer.job.epoch, answer.job.shard)
        return 0.0

    async def _hand_in(self, report: AuditRequest, peer: str, addresses: tuple[str, ...], until: float) -> None:
        """Again and again while it is wanted: the work is done, and only the last step of it may fail."""
        for attempt in itertools.count(1):
            try:
                answer = await ask_audit(self.shell.network.transport, peer, report, addresses)
                if not answer.retry_after:
                    return
                wait, why = answer.retry_after, answer.text
            except ConnectionError as error:
                wait, why = self.shell.rules.backoff(attempt, "audit"), str(error)
            if time.time() + wait > until:
                raise ConnectionError(f"the coordinator did not take the report of an audit: {why}")
            await asyncio.sleep(wait)

    async def _within(self, job: AuditJob) -> AuditReport | None:
        """The report; None when its time was up, or the node got work of its own."""
        replaying = asyncio.create_task(self._replayed(job))
        try:
            while not replaying.done() and self._free and time.time() < job.until:
                await asyncio.wait([replaying], timeout=_WATCH_SECONDS)
            return replaying.result() if replaying.done() else None
        finally:
            replaying.cancel()
            await asyncio.gather(replaying, return_exceptions=True)

    async def _replayed(self, job: AuditJob) -> AuditReport | None:
        network, material = self.shell.network, self.shell.material
        data = network.manifest.shards[job.shard].train
        named = {name: getattr(job, name) for name in ("weights", "state", "end_weights", "end_state")} | {"data": data}
        refs = {name: ref for name, ref in named.items() if ref is not None}
        try:
            paths = {}
            keep = {*await asyncio.to_thread(self.shell.served), *(ref.digest for ref in refs.values())}
            for name, ref in refs.items():
                if not await asyncio.to_thread(network.store.has, ref.digest):
                    await asyncio.to_thread(material.make_room, ref.size, keep)
                paths[name] = str(await network.fetch(ref))
            began = time.monotonic()
            found = await self._ask_child(job, paths)
            if found is None:
                return None
            made = TrainedWith.model_validate({**found["made"], "software": software_version()})
            return AuditReport(
                run=network.manifest.run_id, owner=network.identity.public_key, checkpoint=job.checkpoint,
                losses=tuple(found["losses"]), drift=found["drift"], made=made, seconds=time.monotonic() - began,
            )  # fmt: skip
        finally:
            await self._tidy(job.shard, refs.values())

    async def _tidy(self, shard: int, refs: Iterable[BlobRef]) -> None:
        """Remove what was fetched for a replay, but for what this box serves by now, or needs for work of its own."""
        wanted = await asyncio.to_thread(self._wanted, shard)
        for ref in refs:
            if ref.digest not in wanted:
                await asyncio.to_thread(self.shell.network.store.remove, ref.digest)

    def _wanted(self, shard: int) -> set[str]:
        """What this box keeps of the blobs of a shard. Blocks on the disk."""
        material, work, wanted = self.shell.material, self.shell.state.work, set(self.shell.served())
        if work and work.shard == shard:
            accepted = self.shell.network.acceptances.get(shard)
            wanted |= material.needed(shard, material.base(shard, work.epoch, work.checkpoint, accepted))
        return wanted

    async def _ask_child(self, job: AuditJob, paths: dict[str, str]) -> dict[str, Any] | None:
        """In a child of the trainer's kind, which is ended when the replay is given up."""
        finding, threads = self.shell.prober.finding, self.shell.settings.threads
        assert finding
        question = {
            "manifest": str(self.shell.material.places.manifest), **paths,
            **{name: getattr(job, name) for name in ("shard", "epochs", "steps", "precision")},
            "epoch": job.epoch - 1, "device": finding.device, "threads": threads,
            "micro_batch": finding.shards[job.shard].micro_batch,
        }  # fmt: skip
        hands, message = self.shell.hands, None
        child = await hands.take()
        try:
            await child.send({"do": "replay", "question": question})
            message = await anext(child.messages(), None)
        finally:
            await (hands.give_back(child) if message else child.kill())
        if message is None or message.get("say") != "replayed":
            why = (message or {}).get("text", "it crashed")
            log.warning("could not replay epoch %d of shard %d: %s", job.epoch, job.shard, why)
            return None
        return message
