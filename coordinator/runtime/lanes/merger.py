"""Merges accepted results of lanes in a worker process, and puts the merged epoch beside the undecided results."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lutetia.coordinator.acceptance.checks import CheckFailed
from lutetia.coordinator.acceptance.messages import StartMerge
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed, WorkerRefused
from lutetia.coordinator.worker.messages import EpochMerged, MergeLanes, MergeSource
from lutetia.coordinator.worker.time_limits import patience_for
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.system.files import disk_errors, make_folder


@dataclass
class LaneMerger:
    """Makes merged epochs, one after the other.

    Args:
        folder: where a merge is written, on the disk of `incoming`. It is emptied at the start.
        manifest: returns the newest version.
        identity: the coordinator's, who is the author of merged epochs.
        blobs: the store of accepted results, those of lanes among them.
        incoming: the store of results that are not decided yet.
        worker: merges; nothing else waits for it.
        now: the coordinator's clock, in Unix seconds.
    """

    folder: Path
    manifest: Callable[[], Manifest]
    identity: Identity
    blobs: BlobStore
    incoming: BlobStore
    worker: WorkerClient
    now: Callable[[], float]

    def __post_init__(self) -> None:
        """Remove what a killed process left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    async def merge(self, order: StartMerge) -> CheckpointRecord:
        """The record of the merged epoch, whose blobs are then in `incoming`. It has not passed any check.

        The same results give the same record, except for its time, as often as they are merged.

        Raises CheckFailed: inconclusive where a blob is missing or the worker process ended, invalid where files do not fit.
        """
        refs = _refs(order)
        folder = self.folder / f"{order.shard}"
        try:
            await asyncio.to_thread(self._make_empty, folder)
            answer = await self.worker.ask(self._job(order, folder), limit=patience_for(sum(ref.size for ref in refs)))
            await asyncio.to_thread(self._take, folder, answer)
        except (BlobMissing, WorkerFailed) as error:
            raise CheckFailed("inconclusive", "transfer", f"the lanes cannot be merged now: {error}") from error
        except WorkerRefused as error:
            raise CheckFailed("invalid", error.check or "format", f"the lanes cannot be merged: {error}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        manifest = self.manifest()
        return CheckpointRecord(
            run=manifest.run_id, owner=self.identity.public_key, issued=self.now(), shard=order.shard, epoch=order.epoch,
            parent=order.parent and order.parent.checkpoint, weights=answer.weights, state=answer.state, trace=answer.trace,
            samples=order.epoch * manifest.checkpoint_samples, loss=answer.loss, peer_id=self.identity.peer_id,
        )  # fmt: skip

    def _make_empty(self, folder: Path) -> None:
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            make_folder(folder)

    def _job(self, order: StartMerge, folder: Path) -> MergeLanes:
        """Raises BlobMissing."""
        parent, manifest = order.parent, self.manifest()
        return MergeLanes(
            shard=order.shard, epoch=order.epoch, folder=folder,
            parent=parent and (self.blobs.path(parent.weights.digest), self.blobs.path(parent.state.digest)),
            sources=tuple(
                MergeSource(
                    lane=source.lane, samples=manifest.lane_steps(source.lane) * manifest.optimisation.batch,
                    weights=self.blobs.path(source.acceptance.weights.digest),
                    state=self.blobs.path(source.acceptance.state.digest),
                    trace=self.blobs.path(source.trace.digest if source.trace else ""),
                )
                for source in order.sources
            ),
        )  # fmt: skip

    def _take(self, folder: Path, answer: EpochMerged) -> None:
        """Raises DiskError."""
        for name, ref in (("weights", answer.weights), ("state", answer.state), ("trace", answer.trace)):
            stored = self.incoming.add_file(folder / name, move=True)
            if stored != ref:
                raise CheckFailed("inconclusive", "transfer", f"the merged {name} changed on the disk after it was written")


def _refs(order: StartMerge) -> Iterable[BlobRef]:
    """Everything that is read."""
    refs = [ref for source in order.sources for ref in (source.acceptance.weights, source.acceptance.state, source.trace) if ref]
    return refs + ([order.parent.weights, order.parent.state] if order.parent else [])
