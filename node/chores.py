"""What takes long and may fail: fetching a shard, preparing a trainer, publishing a checkpoint. Each ends in an event."""

from __future__ import annotations

import asyncio
import logging
import time

from ..protocol.manifest import BlobRef
from ..system.errors import DiskError, IntegrityError, LutetiaError, UnreachableError
from ..system.files import disk_errors, make_folder
from . import messages as m
from .assignment import Assignment
from .material import Material
from .network import Network
from .prober import Prober
from .settings import NodeSettings
from .workfolder import Kept

log = logging.getLogger("lutetia.node.chores")


class Chores:
    """`disk_problem` is set when a chore failed for want of disk space; whoever reads it clears it."""

    def __init__(self, settings: NodeSettings, network: Network, material: Material, prober: Prober) -> None:
        self.settings, self.network, self.material, self.prober = settings, network, material, prober
        self.manifest = network.manifest
        self.disk_problem: str | None = None

    # --- fetching -----------------------------------------------------------------------------------------------------------

    async def sync(self, action: m.Sync) -> m.SyncDone | m.SyncFailed:
        """Have the shard's data and the accepted state here, and know our own checkpoints on top of it."""
        shard, epoch, checkpoint = action.shard, action.epoch, action.checkpoint
        try:
            await self._fetch(self.manifest.shards[shard].train)
            if epoch:
                await self._fetch_base(shard, epoch, checkpoint)
            elif init := self.manifest.expert_of(shard).init:
                await self._fetch(init)
            kept = await asyncio.to_thread(self.material.pending, shard, epoch, checkpoint)
        except (LutetiaError, ConnectionError) as error:
            self._note_disk(error)
            return m.SyncFailed(time.time(), shard, _one_line(error))
        return m.SyncDone(time.time(), shard, epoch, checkpoint, tuple(item.candidate for item in kept))

    async def _fetch_base(self, shard: int, epoch: int, checkpoint: str | None) -> None:
        accepted = self.network.acceptances.get(shard)
        base = await asyncio.to_thread(self.material.base, shard, epoch, checkpoint, accepted)
        if base is None:
            raise UnreachableError(f"the acceptance of epoch {epoch} of shard {shard} is not in the DHT now; waiting for it")
        await self._fetch(base.weights)
        await self._fetch(base.state)
        await asyncio.to_thread(self.material.set_base, shard, base)

    async def _fetch(self, ref: BlobRef) -> None:
        held = await asyncio.to_thread(self.material.held)
        await asyncio.to_thread(self.material.make_room, ref.size, held)
        await self.network.fetch(ref)

    # --- training -----------------------------------------------------------------------------------------------------------

    async def assignment(self, action: m.StartTrainer) -> Assignment | m.TrainerExited:
        """What the trainer is to do, from the newest state that descends from the accepted one."""
        try:
            return await asyncio.to_thread(self._assignment, action)
        except LutetiaError as error:
            self._note_disk(error)
            reason: m.Exit = "disk-full" if isinstance(error, DiskError) else "bad-state"
            return m.TrainerExited(time.time(), action.run, reason, _one_line(error))

    def _assignment(self, action: m.StartTrainer) -> Assignment:
        shard, finding, settings = action.shard, self.prober.finding, self.settings
        assert finding
        work = self.material.work(shard)
        if action.shrink:
            work.drop_local()  # its epoch was begun with another split
        base = self.material.base(shard, action.epoch, action.checkpoint, self.network.acceptances.get(shard))
        start = self.material.start(shard, action.epoch, action.checkpoint, base)
        with disk_errors(work.path):
            make_folder(work.path)
        log.info("trainer %d starts from %s, epoch %d", action.run, start.place.source, start.place.epoch)
        whole = finding.shards[shard].micro_batch or self.manifest.optimisation.batch
        return Assignment(
            manifest=self.material.places.manifest, shard=shard,
            data=self.network.store.path(self.manifest.shards[shard].train.digest), folder=work.path,
            epoch=start.place.epoch, parent=start.place.parent, weights=start.weights, state=start.state,
            local=start.place.local, until=action.until, device=finding.device, precision=finding.precision,
            micro_batch=max(1, whole >> action.shrink), threads=settings.threads, duty=settings.duty,
            save_every=settings.save_every,
        )  # fmt: skip

    # --- publishing ---------------------------------------------------------------------------------------------------------

    async def publish(self, candidate: m.Candidate) -> m.OfferAnswered:
        """Put the checkpoint's blobs where others can fetch them, say so, and offer it. Idempotent."""
        verdict: m.Verdict = "unreachable"
        text, after = "", None
        try:
            kept = await asyncio.to_thread(self._servable, candidate)
            await self.network.announce([ref.digest for ref in kept.refs])
            reply = await self.network.offer(kept)
            verdict, text, after = reply.verdict, " ".join(reply.text.split()), reply.retry_after
            if reply.rung == "quarantine":
                verdict = "quarantined"
        except IntegrityError as error:
            verdict, text = "invalid", _one_line(error)
        except (DiskError, ConnectionError) as error:
            self._note_disk(error)
            text = _one_line(error)
        return m.OfferAnswered(time.time(), candidate.digest, verdict, text, after)

    def _servable(self, candidate: m.Candidate) -> Kept:
        """The checkpoint, after its files went into the store. Blocks on the disk; raises IntegrityError or DiskError."""
        for kept in self.material.work(candidate.shard).kept():
            if kept.digest == candidate.digest:
                self.material.into_store(kept, self.material.held())
                return kept
        raise IntegrityError(f"checkpoint {candidate.epoch} of shard {candidate.shard} is not on disk any more; train it again")

    def _note_disk(self, error: Exception) -> None:
        if isinstance(error, DiskError):
            self.disk_problem = str(error)


def _one_line(error: Exception) -> str:
    """Libraries write errors over several lines."""
    return " ".join(str(error).split())
