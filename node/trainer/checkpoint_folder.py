"""The shard in work on disk: whole checkpoints of our own, and the newest local state, each naming what it descends from.

A shard's folder holds `epoch-000004/{weights,state,trace}.safetensors` with `checkpoint.json` (the folder gets its name when all
is written; when it is published, the blob store links to the same files), and `local-4-17.safetensors`, named by `local.json`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from lutetia.node.machine.messages import OwnCheckpoint
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.manifest import BlobRef, Digest, PublicKey
from lutetia.protocol.schema.records import CheckpointRecord, TrainedWith
from lutetia.system.files import write_atomic

CHECKPOINT, LOCAL = "checkpoint.json", "local.json"
FILES = ("weights", "state", "trace")


class KeptCheckpoint(Frozen):
    """A whole checkpoint of our own: epoch `epoch` on top of checkpoint `parent`, after `samples` samples of the shard."""

    run: Digest
    shard: int
    epoch: int = Field(ge=1)
    parent: Digest | None
    weights: BlobRef
    state: BlobRef
    trace: BlobRef
    samples: int
    loss: float
    made: TrainedWith = TrainedWith()

    def record(self, owner: PublicKey, peer_id: str, addresses: Sequence[str], issued: float) -> CheckpointRecord:
        """What is offered to the coordinator."""
        return CheckpointRecord(owner=owner, peer_id=peer_id, addresses=tuple(addresses), issued=issued, **self.model_dump())

    @property
    def digest(self) -> Digest:
        """The digest of the checkpoint, whoever offers it."""
        return self.record("0" * 64, "0" * 20, (), 0.0).digest

    @property
    def refs(self) -> tuple[BlobRef, BlobRef, BlobRef]:
        return self.weights, self.state, self.trace

    @property
    def candidate(self) -> OwnCheckpoint:
        return OwnCheckpoint(self.shard, self.epoch, self.digest, self.parent)


class LocalState(Frozen):
    """The newest local state: `step` steps into the epoch on top of checkpoint `parent` at `epoch`.

    `budget`: the epochs of the manifest under which those steps were taken; None where older software wrote it.
    """

    file: str = Field(pattern=r"^local-\d+-\d+\.safetensors$")
    epoch: int
    step: int
    parent: Digest | None
    budget: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class ResumePoint:
    """Where a trainer starts: at `epoch` on top of `parent`, from its own state, its own checkpoint, or the accepted base."""

    source: Literal["local", "kept", "base"]
    epoch: int
    parent: str | None
    kept: KeptCheckpoint | None = None
    local: LocalState | None = None


def chain(epoch: int, checkpoint: str | None, kept: Sequence[KeptCheckpoint]) -> list[KeptCheckpoint]:
    """Those of `kept` that descend without a gap from (`epoch`, `checkpoint`), oldest first."""
    found: list[KeptCheckpoint] = []
    by_parent = {(item.epoch, item.parent): item for item in kept}
    while item := by_parent.get((epoch + 1, checkpoint)):
        found.append(item)
        epoch, checkpoint = item.epoch, item.digest
    return found


def resume_point(epoch: int, checkpoint: str | None, kept: Sequence[KeptCheckpoint], local: LocalState | None) -> ResumePoint:
    """The newest state that descends from accepted (`epoch`, `checkpoint`)."""
    own = chain(epoch, checkpoint, kept)
    head, parent = (own[-1].epoch, own[-1].digest) if own else (epoch, checkpoint)
    if local and (local.epoch, local.parent) == (head, parent):
        return ResumePoint("local", head, parent, own[-1] if own else None, local)
    return ResumePoint("kept" if own else "base", head, parent, own[-1] if own else None)


class CheckpointFolder:
    """The files of one shard. Methods block on the disk."""

    def __init__(self, work: Path, run: str, shard: int) -> None:
        self.run, self.shard = run, shard
        self.path = work / f"{shard:04d}"

    def epoch_folder(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:06d}"

    def kept(self) -> list[KeptCheckpoint]:
        """Whole checkpoints of this run and shard, by epoch; what cannot be read is not whole."""
        found = []
        for path in sorted(self.path.glob(f"epoch-*/{CHECKPOINT}")):
            with contextlib.suppress(ValidationError, OSError):
                item = KeptCheckpoint.model_validate_json(path.read_bytes())
                if (item.run, item.shard) == (self.run, self.shard) and path.parent == self.epoch_folder(item.epoch):
                    found.append(item)
        return found

    def local(self) -> LocalState | None:
        with contextlib.suppress(ValidationError, OSError):
            local = LocalState.model_validate_json((self.path / LOCAL).read_bytes())
            if (self.path / local.file).is_file():
                return local
        return None

    def set_local(self, local: LocalState) -> None:
        """`local.file` is whole: from now on it is the one to resume from."""
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
        """Remove what a killed trainer left half-written, where the disk takes changes now."""
        for path in self.path.glob("**/.*.part"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        for path in self.path.glob("epoch-*.part"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def remembered_shards(work: Path, run: str) -> frozenset[int]:
    """Shards of which this box holds checkpoints or local states of the run."""
    found = set()
    for path in work.glob("*"):
        if re.fullmatch(r"\d{4}", path.name):
            folder = CheckpointFolder(work, run, int(path.name))
            if folder.local() or folder.kept():
                found.add(folder.shard)
    return frozenset(found)
