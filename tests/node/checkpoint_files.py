"""Checkpoint folders as a trainer leaves them, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lutetia.node.runtime.workspace import Workspace
from lutetia.node.trainer.checkpoint_folder import CHECKPOINT, FILES, KeptCheckpoint
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.claims import shard_and_lane
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.blob_ref import BlobRef

NOTHING = BlobRef(digest="0" * 64, size=0)


def kept(epoch: int, parent: str | None, run: str = "ab" * 32, slot: int = 0, **refs: BlobRef) -> KeptCheckpoint:
    weights, state, trace = (refs.get(name, NOTHING) for name in ("weights", "state", "trace"))
    shard, lane = shard_and_lane(slot)
    return KeptCheckpoint(
        run=run, shard=shard, lane=lane, epoch=epoch, parent=parent, samples=epoch * 8, loss=0.5, weights=weights, state=state,
        trace=trace,
    )  # fmt: skip


def write_checkpoint(workspace: Workspace, epoch: int, parent: str | None, slot: int = 0) -> KeptCheckpoint:
    folder = workspace.work(slot).epoch_folder(epoch)
    folder.mkdir(parents=True)
    refs = {}
    for name in FILES:
        path = folder / f"{name}.safetensors"
        path.write_bytes(f"{name} of epoch {epoch} of slot {slot}".encode() * 100)
        refs[name] = ChunkTable.of_file(path).ref
    item = kept(epoch, parent, workspace.manifest.run_id, slot, **refs)
    (folder / CHECKPOINT).write_bytes(canonical(item))
    return item


class SlowBlobStore(BlobStore):
    """A store whose `add_file` calls `meanwhile` first, as if something happened while it hashes the file."""

    def __init__(self, root: Path, meanwhile: Callable[[], None]) -> None:
        super().__init__(root)
        self.meanwhile = meanwhile

    def add_file(self, path: Path, move: bool = False) -> BlobRef:
        self.meanwhile()
        return super().add_file(path, move)
