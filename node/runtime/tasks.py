"""Long operations that may fail: fetch a shard, prepare a trainer, publish a checkpoint. Each returns an event."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Collection

from lutetia.models.data.parts.order import next_uses
from lutetia.node.machine import messages as m
from lutetia.node.runtime.data_parts import check_index, check_index_size
from lutetia.node.runtime.devices.hardware_prober import HardwareProber
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.workspace import AcceptedBase, CheckpointDiscarded, Workspace
from lutetia.node.settings import NodeSettings
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.checkpoint_folder import KeptCheckpoint
from lutetia.protocol.claims import shard_and_lane, slot_name
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import DiskError, HardwareError, IntegrityError, LutetiaError, UnreachableError
from lutetia.system.files import disk_errors, make_folder

log = logging.getLogger(__name__)


class NodeTasks:
    """The operations. `disk_problem` is set when one failed because the disk is full; the reader clears it."""

    def __init__(self, settings: NodeSettings, network: NodeNetwork, workspace: Workspace, prober: HardwareProber) -> None:
        self.settings, self.network, self.workspace, self.prober = settings, network, workspace, prober
        self.manifest = network.manifest
        self.disk_problem: str | None = None
        self.places: dict[int, int] = {}
        """Samples of each slot's budget that were trained when its trainer began."""

    # --- fetching -----------------------------------------------------------------------------------------------------------

    async def sync(self, action: m.Sync) -> m.SyncDone | m.SyncFailed:
        """Fetch the slot's accepted state and data, and find own checkpoints that descend from it.

        Of data that lie in parts, those of the first batch are fetched; `DataFetcher` fetches the others while they are trained.
        """
        slot, epoch, checkpoint = action.shard, action.epoch, action.checkpoint
        try:
            with disk_errors(self.settings.state_folder):
                base = await self._base(slot, epoch, checkpoint) if epoch else None
                await self._fetch_index(slot, base)
                keep = await asyncio.to_thread(self.workspace.needed, slot, base)
                for ref in self.workspace.inputs(slot, base):
                    await self._fetch(ref, keep)
                await asyncio.to_thread(self.workspace.set_base, slot, base)
                kept = await asyncio.to_thread(self.workspace.pending, slot, epoch, checkpoint)
                await self._fetch_first_parts(slot, epoch, checkpoint, base)
        except (LutetiaError, ConnectionError) as error:
            self._note_disk(error)
            return m.SyncFailed(time.time(), slot, _one_line(error))
        return m.SyncDone(time.time(), slot, epoch, checkpoint, tuple(item.candidate for item in kept))

    async def _base(self, slot: int, epoch: int, checkpoint: str | None) -> AcceptedBase:
        shard = shard_and_lane(slot)[0]
        accepted = self.network.acceptances.get(shard)
        base = await asyncio.to_thread(self.workspace.base, slot, epoch, checkpoint, accepted)
        if base is None:
            raise UnreachableError(f"the acceptance of epoch {epoch} of shard {shard} is not in the DHT; waiting for it")
        return base

    async def _fetch_index(self, slot: int, base: AcceptedBase | None) -> None:
        """Fetch the index of data that lie in parts. Raises IntegrityError if the manifest names a larger one than any may be."""
        spec = self.workspace.shard_of(slot)
        if spec.data_bytes is None:
            return
        check_index_size(spec)
        await self._fetch(spec.train, await asyncio.to_thread(self.workspace.needed, slot, base))
        await asyncio.to_thread(check_index, self.workspace.store, spec)

    async def _fetch_first_parts(self, slot: int, epoch: int, checkpoint: str | None, base: AcceptedBase | None) -> None:
        """Fetch the parts of the batch that the trainer begins with."""
        (shard, lane), spec = shard_and_lane(slot), self.workspace.shard_of(slot)
        index = await asyncio.to_thread(self.workspace.data.index, self.workspace.store, spec)
        if index is None:
            return
        start = await asyncio.to_thread(self.workspace.start, slot, epoch, checkpoint, base)
        place = self.places[slot] = self.workspace.place(start.place)
        uses = await asyncio.to_thread(next_uses, self.manifest, shard, index, place, lane)
        self.workspace.set_next_use(slot, index, uses)
        keep = await asyncio.to_thread(self.workspace.needed, slot, base)
        for part, use in zip(index.parts, uses, strict=True):
            if use < self.manifest.optimisation.batch:
                await self._fetch(part.blob, keep, spec.train)

    async def _fetch(self, ref: BlobRef, keep: Collection[str], listed_by: BlobRef | None = None) -> None:
        if not await asyncio.to_thread(self.workspace.store.has, ref.digest):
            await asyncio.to_thread(self.workspace.make_room, ref.size, keep)
            await self.network.fetch(ref, listed_by=listed_by)

    # --- training -----------------------------------------------------------------------------------------------------------

    async def assignment(self, action: m.StartTrainer) -> Assignment | m.TrainerExited:
        """The trainer's assignment, from the newest state that descends from the accepted one."""
        try:
            with disk_errors(self.settings.state_folder):
                return await asyncio.to_thread(self._assignment, action)
        except LutetiaError as error:
            self._note_disk(error)
            return m.TrainerExited(time.time(), action.run, _exit_reason(error), _one_line(error))

    def _assignment(self, action: m.StartTrainer) -> Assignment:
        slot, probed, settings, choice = action.shard, self.prober.result, self.settings, self.prober.choice
        if probed is None:
            raise HardwareError("there is no result of the hardware probe; it is probed again")
        shard, lane = shard_and_lane(slot)
        work = self.workspace.work(slot)
        if action.halvings:
            work.drop_local()  # it was trained with another micro-batch
        base = self.workspace.base(slot, action.epoch, action.checkpoint, self.network.acceptances.get(shard))
        start = self.workspace.start(slot, action.epoch, action.checkpoint, base)
        self.places[slot] = self.workspace.place(start.place)
        make_folder(work.path)
        log.info("trainer %d starts from %s, epoch %d", action.run, start.place.source, start.place.epoch)
        fit = probed.shards[shard]
        whole = fit.micro_batch or self.manifest.optimisation.batch
        return Assignment(
            manifest=self.workspace.paths.manifest, shard=shard, lane=lane,
            data=self.network.store.path(self.manifest.shards[shard].train.digest), folder=work.path,
            epoch=start.place.epoch, parent=start.place.parent, weights=start.weights, state=start.state,
            local=start.place.local, base=self.workspace.base_model(),
            until=action.until, device=probed.device, precision=fit.precision or probed.precision,
            micro_batch=max(1, whole >> action.halvings), memory=fit.memory, kernels=fit.kernels,
            threads=choice.threads, duty=settings.duty,
            losses=settings.losses, clips_every=settings.clips_every,
            save_every=settings.save_every, local_bytes_per_day=choice.local_bytes_per_day,
        )  # fmt: skip

    # --- publishing ---------------------------------------------------------------------------------------------------------

    async def publish(self, candidate: m.OwnCheckpoint) -> m.OfferAnswered:
        """Store the checkpoint's blobs, announce them, and offer it to the coordinator. Idempotent."""
        verdict: m.Verdict = "unreachable"
        text, after, room = "", None, 0
        try:
            with disk_errors(self.settings.state_folder):
                kept = await asyncio.to_thread(self._stored, candidate)
            room = await asyncio.to_thread(self._room, sum(ref.size for ref in kept.refs))
            await self.network.announce([ref.digest for ref in kept.refs])
            reply = await self.network.offer(kept)
            verdict, text, after = reply.verdict, " ".join(reply.text.split()), reply.retry_after
            if reply.check == "quarantine":
                verdict = "quarantined"
        except IntegrityError as error:
            verdict, text = "invalid", _one_line(error)
        except (DiskError, CheckpointDiscarded, ConnectionError) as error:
            self._note_disk(error)
            text = _one_line(error)
        return m.OfferAnswered(time.time(), candidate.digest, verdict, text, after, room)

    def _room(self, size: int) -> int:
        """How many more checkpoints of `size` bytes half of the free space takes. Blocks on the disk."""
        store, free = self.workspace.store, shutil.disk_usage(self.settings.state_folder).free
        if store.limit_bytes is not None:
            free = min(free, max(0, store.limit_bytes - store.used_bytes()))
        return free // 2 // max(1, size)

    def _stored(self, candidate: m.OwnCheckpoint) -> KeptCheckpoint:
        """The checkpoint, with its files in the store. Blocks on the disk; raises what `store_checkpoint` raises."""
        for kept in self.workspace.work(candidate.shard).kept():
            if kept.digest == candidate.digest:
                self.workspace.store_checkpoint(kept, self.workspace.needed(kept.slot, self.workspace.known_base(kept.slot)))
                return kept
        raise IntegrityError(f"checkpoint {candidate.epoch} of {slot_name(candidate.shard)} is no longer on disk; train it again")

    def _note_disk(self, error: Exception) -> None:
        if isinstance(error, DiskError):
            self.disk_problem = str(error)


def _exit_reason(error: LutetiaError) -> m.Exit:
    match error:
        case DiskError():
            return "disk-full"
        case HardwareError():
            return "hardware"
    return "bad-state"


def _one_line(error: Exception) -> str:
    """Errors of libraries may have several lines."""
    return " ".join(str(error).split())
