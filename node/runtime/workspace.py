"""The files of a run's training: fetched blobs, own checkpoints, and the removal of those that are not needed.

Layout of the state folder: `identity.key`, `daemon.pid`, `control.sock`, `blobs/`, and per run
`runs/<run>/{manifest.json, peers.json, devices.json, probe-<device>.json, contributions.json, work/<slot>/…}`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from lutetia.models.data.parts.index import ShardIndex
from lutetia.node.runtime.data_parts import DataParts
from lutetia.node.trainer.checkpoint_folder import (
    CHECKPOINT,
    FILES,
    CheckpointFolder,
    KeptCheckpoint,
    ResumePoint,
    chain,
    resume_point,
    slots_in,
)
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.claims import shard_and_lane, slot_name
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.fields import Digest
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import IntegrityError, LutetiaError
from lutetia.system.files import disk_errors, write_atomic

log = logging.getLogger(__name__)

BASE = "base.json"


class CheckpointDiscarded(LutetiaError):
    """An own checkpoint was discarded while it was being published."""


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run in the state folder `state`."""

    state: Path
    run: str

    @property
    def folder(self) -> Path:
        return self.state / "runs" / self.run[:16]

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"  # written by `enter_swarm`

    def probe_result(self, device: str) -> Path:
        return self.folder / f"probe-{device.replace(':', '-')}.json"

    @property
    def devices(self) -> Path:
        """The devices that were found last."""
        return self.folder / "devices.json"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def blobs(self) -> Path:
        return self.state / "blobs"

    @property
    def borrowed(self) -> Path:
        """What a check for the coordinator needs; never served."""
        return self.state / "borrowed"


class AcceptedBase(Frozen):
    """The accepted checkpoint from which a shard's work continues."""

    epoch: int = Field(description="Accepted epoch")
    checkpoint: Digest = Field(description="Digest of the checkpoint")
    weights: BlobRef = Field(description="Its weights")
    state: BlobRef = Field(description="Its training state")


def _base_of(kept: KeptCheckpoint) -> AcceptedBase:
    return AcceptedBase(epoch=kept.epoch, checkpoint=kept.digest, weights=kept.weights, state=kept.state)


@dataclass(frozen=True)
class TrainerFiles:
    """The files that a trainer starts from."""

    place: ResumePoint
    weights: Path | None
    state: Path | None


class Workspace:
    """The files of one run. Methods block on the disk.

    Work belongs to slots (`protocol.claims.slot_of`). Lanes of one shard share its data and the checkpoint that they start from.
    """

    def __init__(self, paths: RunPaths, manifest: Manifest, store: BlobStore) -> None:
        self.paths, self.manifest, self.store = paths, manifest, store
        self.data = DataParts()
        self.at_work: Mapping[int, tuple[int, str | None]] = {}
        """The slots that the node's devices work on, with the accepted epoch and checkpoint that each goes on from."""
        self.local_model: dict[str, Path] | None = None
        """Files of the base that the run's experts adapt, where this machine had them before; None: they come as blobs."""
        self._bases = threading.Lock()

    def work(self, slot: int) -> CheckpointFolder:
        return CheckpointFolder(self.paths.work, self.manifest.run_id, slot)

    def slots(self) -> list[int]:
        """Slots with a work folder here."""
        return slots_in(self.paths.work)

    # --- bases --------------------------------------------------------------------------------------------------------------

    def base(self, slot: int, epoch: int, checkpoint: str | None, accepted: AcceptanceRecord | None) -> AcceptedBase | None:
        """The blobs of accepted (`epoch`, `checkpoint`): from an own checkpoint, the acceptance, or an earlier sync."""
        for kept in self.work(slot).kept():
            if (kept.epoch, kept.digest) == (epoch, checkpoint):
                return _base_of(kept)
        if accepted and (accepted.epoch, accepted.checkpoint) == (epoch, checkpoint):
            return AcceptedBase(epoch=epoch, checkpoint=accepted.checkpoint, weights=accepted.weights, state=accepted.state)
        known = self.known_base(slot)
        return known if known and (known.epoch, known.checkpoint) == (epoch, checkpoint) else None

    def known_base(self, slot: int) -> AcceptedBase | None:
        """The accepted checkpoint of the last sync, or of our own checkpoint accepted since then."""
        with contextlib.suppress(OSError, ValidationError):
            return AcceptedBase.model_validate_json((self.work(slot).path / BASE).read_bytes())
        return None

    def set_base(self, slot: int, base: AcceptedBase | None) -> None:
        """Remember the fetched base and remove the previous one. None: the work starts from epoch 0.

        In a run with lanes own results up to it go, too: what they held is in the merged epoch, or came too late for it.
        """
        work = self.work(slot)
        with self._bases:  # two devices that go on from one merge together would each leave the old base to the other
            old = self.known_base(slot)
            if base and self.manifest.team:
                for kept in work.kept():
                    if kept.epoch <= base.epoch and kept.digest != base.checkpoint:
                        self._drop(kept, (base.weights, base.state))
            if old and old != base:
                needed = [*(ref for kept in work.kept() for ref in kept.refs), *((base.weights, base.state) if base else ())]
                self._remove(slot, [ref for ref in (old.weights, old.state) if ref not in needed])
            if base:
                write_atomic(work.path / BASE, canonical(base))
            else:
                (work.path / BASE).unlink(missing_ok=True)

    def _remove(self, slot: int, refs: Sequence[BlobRef]) -> None:
        """Remove blobs, except those that another lane of the shard needs here."""
        shared = self._of_other_lanes(slot)
        for ref in refs:
            if ref.digest not in shared:
                self.store.remove(ref.digest)

    def _of_other_lanes(self, slot: int) -> set[str]:
        """Digests of what other lanes of the slot's shard start from, or have made, on this machine."""
        shard, found = shard_and_lane(slot)[0], set[str]()
        if self.manifest.team is None:
            return found
        for other in {*self.slots(), *self.at_work} - {slot}:
            if shard_and_lane(other)[0] == shard:
                bases = [self.known_base(other), self.base(other, *self.at_work[other], None) if other in self.at_work else None]
                found |= {ref.digest for base in bases if base for ref in (base.weights, base.state)}
                found |= {ref.digest for kept in self.work(other).kept() for ref in kept.refs}
        return found

    def _drop(self, kept: KeptCheckpoint, needed: Collection[BlobRef] = ()) -> None:
        """Remove an own checkpoint, and its blobs except `needed`."""
        self._remove(kept.slot, [ref for ref in kept.refs if ref not in needed])
        self.work(kept.slot).drop_epoch(kept.epoch)

    # --- own checkpoints ----------------------------------------------------------------------------------------------------

    def pending(self, slot: int, epoch: int, checkpoint: str | None) -> list[KeptCheckpoint]:
        """Complete own checkpoints that descend from (`epoch`, `checkpoint`). A damaged one is dropped, and all after it."""
        work = self.work(slot)
        work.sweep()
        descendants = chain(epoch, checkpoint, work.kept())
        for index, kept in enumerate(descendants):
            if not all(self._file(kept, name).is_file() for name in FILES):
                log.warning("checkpoint %d of %s is damaged on disk; it is trained again", kept.epoch, slot_name(slot))
                for lost in descendants[index:]:
                    work.drop_epoch(lost.epoch)
                return descendants[:index]
        return descendants

    def _file(self, kept: KeptCheckpoint, name: str) -> Path:
        return self.work(kept.slot).epoch_folder(kept.epoch) / f"{name}.safetensors"

    def start(self, slot: int, epoch: int, checkpoint: str | None, base: AcceptedBase | None) -> TrainerFiles:
        """The newest state to train from, and its files."""
        work = self.work(slot)
        place = resume_point(epoch, checkpoint, self.pending(slot, epoch, checkpoint), work.local())
        if place.kept:
            return TrainerFiles(place, self._file(place.kept, "weights"), self._file(place.kept, "state"))
        if base:
            return TrainerFiles(place, self.store.path(base.weights.digest), self.store.path(base.state.digest))
        init = self.manifest.expert_of(shard_and_lane(slot)[0]).init
        return TrainerFiles(place, self.store.path(init.digest) if init else None, None)

    def store_checkpoint(self, kept: KeptCheckpoint, keep: Collection[str]) -> None:
        """Put a checkpoint's files into the blob store, as hard links where possible. `keep`: digests of blobs that must stay.

        Raises DiskError, IntegrityError (damaged or lost), or CheckpointDiscarded when they were removed meanwhile.
        """
        self.make_room(sum(ref.size for ref in kept.refs if not self.store.has(ref.digest)), keep)
        for name, ref in zip(FILES, kept.refs, strict=True):
            if not self.store.has(ref.digest):
                self._store_file(kept, name, ref)

    def _store_file(self, kept: KeptCheckpoint, name: str, ref: BlobRef) -> None:
        path = self._file(kept, name)
        link = path.with_suffix(".link")  # not `.part`: hashing takes long, and a trainer that starts meanwhile removes those
        try:
            with disk_errors(link):
                link.unlink(missing_ok=True)
                try:
                    os.link(path, link)
                except FileNotFoundError:
                    raise
                except OSError:  # a file system without hard links
                    stored = self.store.add_file(path)
                else:
                    stored = self.store.add_file(link, move=True)
        except FileNotFoundError as error:
            if path.exists() or not path.with_name(CHECKPOINT).exists():
                raise CheckpointDiscarded(
                    f"the files of epoch {kept.epoch} of {slot_name(kept.slot)} were removed meanwhile"
                ) from error
            raise IntegrityError(f"{path} is missing; checkpoint {kept.epoch} of {slot_name(kept.slot)} is lost") from error
        if stored != ref:
            self.store.remove(stored.digest)
            raise IntegrityError(f"{path} was damaged on disk; checkpoint {kept.epoch} of {slot_name(kept.slot)} is lost")

    # --- removing files ------------------------------------------------------------------------------------------------------

    def superseded(self, slot: int, epoch: int) -> None:
        """Our checkpoint of `epoch` was accepted: remove older own checkpoints and the fetched base."""
        kept = self.work(slot).kept()
        needed = [ref for item in kept if item.epoch >= epoch for ref in item.refs]
        for item in kept:
            if item.epoch < epoch:
                self._drop(item, needed)
        accepted = next((item for item in kept if item.epoch == epoch), None)
        if accepted:
            self.set_base(slot, _base_of(accepted))

    def discard(self, slot: int, epoch: int | None) -> None:
        """Remove our work after accepted `epoch`; an accepted own checkpoint stays, because it is served.

        With None remove all own work, and fetched blobs of this slot that do not match their digest.
        """
        work = self.work(slot)
        work.drop_local()
        for kept in work.kept():
            if epoch is None or kept.epoch > epoch:
                self._drop(kept)
        if epoch is None:
            self._check_fetched(slot)

    def inputs(self, slot: int, base: AcceptedBase | None) -> list[BlobRef]:
        """Blobs to fetch before work on this slot from `base`: its data or their index, and what the expert starts from."""
        spec = self.shard_of(slot)
        data, init = [*self.model_blobs(), spec.train], self.manifest.expert_of(spec.index).init
        if base:
            return [*data, base.weights, base.state]
        return [*data, init] if init else data

    def shard_of(self, slot: int) -> ShardSpec:
        """The shard of a slot."""
        return self.manifest.shards[shard_and_lane(slot)[0]]

    def parts(self, slot: int) -> list[BlobRef]:
        """The parts of a slot's data; none while their index is not here."""
        return self.data.refs(self.store, self.shard_of(slot))

    @property
    def soon(self) -> int:
        """Samples ahead of the trainer's place whose parts are never removed: its batch and the one that it makes ahead."""
        return 2 * self.manifest.optimisation.batch

    def has_room(self, need: int) -> bool:
        """Whether `need` more bytes of blobs fit below the disk limit."""
        return self.store.limit_bytes is None or self.store.used_bytes() + need <= self.store.limit_bytes

    def place(self, start: ResumePoint) -> int:
        """Samples of the shard's budget that are trained at `start`."""
        done = start.local.step * self.manifest.optimisation.batch if start.local else 0
        return start.epoch * self.manifest.checkpoint_samples + done

    def model_blobs(self) -> list[BlobRef]:
        """Blobs of the frozen model that the experts adapt, where it has to be fetched."""
        adapter = self.manifest.adapter
        return list(adapter.base.files.values()) if adapter and self.local_model is None else []

    def base_model(self) -> dict[str, Path] | None:
        """Files of the frozen model that the experts adapt, by name; None where they are trained whole. Raises BlobMissing."""
        if self.manifest.adapter is None or self.local_model is not None:
            return self.local_model
        return {name: self.store.path(ref.digest) for name, ref in self.manifest.adapter.base.files.items()}

    def needed(self, slot: int, base: AcceptedBase | None) -> set[str]:
        """Digests of the blobs needed to continue the work on this slot from `base`, or to offer it.

        Parts of its data that are used later than `soon` are not among them: they can be fetched again in time.
        """
        own = [kept for kept in self.work(slot).kept() if base is None or kept.epoch >= base.epoch]
        parts = self.data.used_within(self.store, self.shard_of(slot), slot, self.soon)
        refs = [*self.inputs(slot, base), *parts, *(ref for kept in own for ref in kept.refs)]
        return {ref.digest for ref in refs}

    def set_next_use(self, slot: int, index: ShardIndex, uses: Sequence[int] | NDArray[np.int64]) -> None:
        """Remember how many samples are trained before each part of a slot's data is used, beside other devices' slots."""
        self.data.set_next_use(slot, index, uses, self.at_work)

    def needed_at_work(self, shard: int | None = None, accepted: AcceptanceRecord | None = None) -> set[str]:
        """Digests of the blobs that the node's devices need to continue; `shard`, `accepted`: only those of one shard."""
        held = {slot: base for slot, base in self.at_work.items() if shard in (None, shard_and_lane(slot)[0])}
        return {digest for slot, base in held.items() for digest in self.needed(slot, self.base(slot, *base, accepted))}

    def _check_fetched(self, slot: int) -> None:
        for ref in [*self.inputs(slot, self.known_base(slot)), *self.parts(slot)]:
            try:
                if self.store.has(ref.digest):
                    self.store.verify(ref.digest)
            except IntegrityError as error:
                log.warning("%s; fetching it again", error)
                self.store.remove(ref.digest)

    def held(self) -> dict[str, int]:
        """Blobs of current and earlier work (own checkpoints, bases, shards), which are served, and their sizes in bytes."""
        sizes: dict[str, int] = {}
        for slot in self.slots():
            fetched = [*self.inputs(slot, None), *self.inputs(slot, self.known_base(slot)), *self.parts(slot)]
            refs = [*fetched, *(ref for kept in self.work(slot).kept() for ref in kept.refs)]
            sizes |= {ref.digest: ref.size for ref in refs if self.store.has(ref.digest)}
        return sizes

    def unannounced(self) -> set[str]:
        """Held blobs without provider records."""
        return {digest for slot in self.slots() for digest in self.data.unannounced(self.store, self.shard_of(slot))}

    def make_room(self, need: int, keep: Collection[str]) -> None:
        """Under a disk limit, remove blobs until `need` more bytes fit or none is left: never `keep`, own checkpoints last.

        Blobs of a finished or lost shard are useful to other peers, but the next shard needs the space more. What the node's
        devices need to continue stays in any case.
        """
        limit = self.store.limit_bytes
        if limit is None or need == 0:
            return
        used = self.store.used_bytes()
        if used + need <= limit:
            return
        for digest, size in self._spare({*keep, *self.needed_at_work()}):
            if used + need <= limit:
                break
            used -= size
            self.store.remove(digest)
            log.debug("removed blob %s to stay within the disk limit", digest[:12])
        self._drop_removed()

    def _spare(self, keep: Collection[str]) -> list[tuple[str, int]]:
        """(digest, bytes) of all blobs except `keep`, in the order of removal.

        Own checkpoints come last, before them the parts of the held shard's data, those first that are used last; others by age.
        """
        own = {ref.digest for slot in self.slots() for kept in self.work(slot).kept() for ref in kept.refs}
        spare = []
        for digest in set(self.store.digests()) - set(keep):
            with contextlib.suppress(FileNotFoundError, BlobMissing):  # another task may remove it meanwhile
                status = self.store.path(digest).stat()
                later = -self.data.next_use(digest)
                spare.append((digest in own, later, status.st_mtime, digest, status.st_size))
        return [(digest, size) for *_, digest, size in sorted(spare)]

    def _drop_removed(self) -> None:
        """Remove accepted checkpoints whose blobs were removed: their hard links would keep the disk space."""
        for slot in self.slots():
            work, base = self.work(slot), self.known_base(slot)
            for kept in work.kept():
                if base and kept.epoch <= base.epoch and not all(self.store.has(ref.digest) for ref in kept.refs):
                    work.drop_epoch(kept.epoch)
