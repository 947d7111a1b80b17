"""The work on one slot on disk: complete own checkpoints and the newest local state, each with its parent.

The folder of a slot has the number of its shard, `0007`, and that of a lane above the first also the lane: `0007-2`. It holds
`epoch-000004/{weights,state,trace}.safetensors` with `checkpoint.json`, and `local-4-17.safetensors`, named by `local.json`. The
epoch folder gets its name when all files are written. Once it is published, the blob store links to the same files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from lutetia.node.machine.messages import OwnCheckpoint
from lutetia.protocol.claims import shard_and_lane, slot_of
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.fields import Digest, PublicKey, added
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import CheckpointRecord, TrainedWith
from lutetia.system.files import is_part, write_atomic

CHECKPOINT, LOCAL = "checkpoint.json", "local.json"
FILES = ("weights", "state", "trace")


class KeptCheckpoint(Frozen):
    """A complete checkpoint of this node, as `checkpoint.json` holds it."""

    run: Digest = Field(description="The run's id")
    shard: int = Field(description="Index of the shard")
    epoch: int = Field(ge=1, description="The epoch that it ends")
    parent: Digest | None = Field(description="Checkpoint that it was trained from; None for epoch 1")
    weights: BlobRef = Field(description="Exponential moving average of the weights")
    state: BlobRef = Field(description="Training state without the average")
    trace: BlobRef = Field(description="Loss of every step")
    samples: int = Field(description="Samples of the shard seen so far")
    loss: float = Field(description="Mean training loss of the epoch")
    made: TrainedWith = Field(default=TrainedWith(), description="Device, precision and software of the training")
    lane: int = added(0, "Lane that was trained", ge=0)

    def record(self, owner: PublicKey, peer_id: str, addresses: Sequence[str], issued: float) -> CheckpointRecord:
        """The record that is offered to the coordinator. `issued` in Unix seconds."""
        return CheckpointRecord(owner=owner, peer_id=peer_id, addresses=tuple(addresses), issued=issued, **self.model_dump())

    @property
    def digest(self) -> Digest:
        """The checkpoint's digest; it does not depend on the author."""
        return self.record("0" * 64, "0" * 20, (), 0.0).digest

    @property
    def refs(self) -> tuple[BlobRef, BlobRef, BlobRef]:
        return self.weights, self.state, self.trace

    @property
    def slot(self) -> int:
        return slot_of(self.shard, self.lane)

    @property
    def candidate(self) -> OwnCheckpoint:
        return OwnCheckpoint(self.slot, self.epoch, self.digest, self.parent)


class LocalState(Frozen):
    """The newest state within an epoch, as `local.json` holds it."""

    file: str = Field(pattern=r"^local-\d+-\d+\.safetensors$", description="Name of the file in the same folder")
    epoch: int = Field(description="Parent epoch")
    step: int = Field(description="Steps since the parent")
    parent: Digest | None = Field(description="Parent checkpoint; None at epoch 0")
    budget: int | None = Field(default=None, ge=1, description="Epoch budget of the manifest; None if older software wrote it")


@dataclass(frozen=True)
class ResumePoint:
    """Where a trainer starts: after `epoch` and `parent`, from a local state, an own checkpoint, or the accepted base."""

    source: Literal["local", "kept", "base"]
    epoch: int
    parent: str | None
    kept: KeptCheckpoint | None = None
    local: LocalState | None = None


def chain(epoch: int, checkpoint: str | None, kept: Sequence[KeptCheckpoint]) -> list[KeptCheckpoint]:
    """Those of `kept` that descend without a gap from (`epoch`, `checkpoint`), oldest first."""
    descendants: list[KeptCheckpoint] = []
    by_parent = {(item.epoch, item.parent): item for item in kept}
    while item := by_parent.get((epoch + 1, checkpoint)):
        descendants.append(item)
        epoch, checkpoint = item.epoch, item.digest
    return descendants


def resume_point(epoch: int, checkpoint: str | None, kept: Sequence[KeptCheckpoint], local: LocalState | None) -> ResumePoint:
    """The newest state that descends from accepted (`epoch`, `checkpoint`)."""
    descendants = chain(epoch, checkpoint, kept)
    newest = descendants[-1] if descendants else None
    head, parent = (newest.epoch, newest.digest) if newest else (epoch, checkpoint)
    if local and (local.epoch, local.parent) == (head, parent):
        return ResumePoint("local", head, parent, newest, local)
    return ResumePoint("kept" if newest else "base", head, parent, newest)


class CheckpointFolder:
    """The files of one slot. Methods block on the disk."""

    def __init__(self, work: Path, run: str, slot: int) -> None:
        self.run, self.slot = run, slot
        self.shard, self.lane = shard_and_lane(slot)
        self.path = work / (f"{self.shard:04d}-{self.lane}" if self.lane else f"{self.shard:04d}")

    @property
    def compiled(self) -> Path:
        """Where code is kept that the trainer at work has compiled."""
        return self.path / "compiled.part"

    def epoch_folder(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:06d}"

    def kept(self) -> list[KeptCheckpoint]:
        """Complete checkpoints of this run and slot, by epoch; unreadable ones are left out."""
        checkpoints = []
        for path in sorted(self.path.glob(f"epoch-*/{CHECKPOINT}")):
            with contextlib.suppress(ValidationError, OSError):
                item = KeptCheckpoint.model_validate_json(path.read_bytes())
                if (item.run, item.slot) == (self.run, self.slot) and path.parent == self.epoch_folder(item.epoch):
                    checkpoints.append(item)
        return checkpoints

    def local(self) -> LocalState | None:
        with contextlib.suppress(ValidationError, OSError):
            local = LocalState.model_validate_json((self.path / LOCAL).read_bytes())
            if (self.path / local.file).is_file():
                return local
        return None

    def set_local(self, local: LocalState) -> None:
        """Resume from `local` from now on; its file is complete. Other local states are removed."""
        write_atomic(self.path / LOCAL, canonical(local))
        for path in self.path.glob("local-*.safetensors"):
            if path.name != local.file:
                path.unlink(missing_ok=True)

    def drop_local(self) -> None:
        (self.path / LOCAL).unlink(missing_ok=True)
        for path in self.path.glob("local-*.safetensors"):
            path.unlink(missing_ok=True)

    def drop_epoch(self, epoch: int) -> None:
        shutil.rmtree(self.epoch_folder(epoch), ignore_errors=True)

    def sweep(self) -> None:
        """Remove partial files and compiled code of a killed trainer; a read-only disk is ignored."""
        for place, _, names in os.walk(self.path):  # unlike glob it goes on where an epoch's folder is removed meanwhile
            for path in [Path(place, name) for name in names if is_part(name)]:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        for path in (self.compiled, *self.path.glob("epoch-*.part")):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def slots_in(work: Path) -> list[int]:
    """The slots that have a folder in `work`, in ascending order."""
    found = (re.fullmatch(r"(\d{4})(?:-([1-9]\d{0,2}))?", path.name) for path in work.glob("[0-9]*"))
    return sorted(slot_of(int(match[1]), int(match[2] or 0)) for match in found if match)


def remembered_slots(work: Path, run: str) -> frozenset[int]:
    """Slots of the run with checkpoints or local states in `work`."""
    folders = [CheckpointFolder(work, run, slot) for slot in slots_in(work)]
    return frozenset(folder.slot for folder in folders if folder.local() or folder.kept())
