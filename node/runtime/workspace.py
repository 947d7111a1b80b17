"""What a shard's training needs and leaves on disk: blobs fetched and kept, own checkpoints offered, old ones removed.

Layout of the state folder: `identity.key`, `daemon.pid`, `control.sock`, `blobs/`, and per run
`runs/<run>/{manifest.json, peers.json, probe.json, contributions.json, work/<shard>/…}`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lutetia.node.trainer.checkpoint_folder import (
    CHECKPOINT,
    FILES,
    CheckpointFolder,
    KeptCheckpoint,
    ResumePoint,
    chain,
    resume_point,
)
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.manifest import BlobRef, Digest, Manifest
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import IntegrityError, LutetiaError
from lutetia.system.files import disk_errors, write_atomic

log = logging.getLogger(__name__)

BASE = "base.json"


class CheckpointDiscarded(LutetiaError):
    """A checkpoint of our own that became void while it was being published."""


@dataclass(frozen=True)
class RunPaths:
    """Where things of one run lie in the state folder."""

    state: Path
    run: str

    @property
    def folder(self) -> Path:
        return self.state / "runs" / self.run[:16]

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"  # written by `join_swarm`

    @property
    def finding(self) -> Path:
        return self.folder / "probe.json"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def blobs(self) -> Path:
        return self.state / "blobs"


class AcceptedBase(Frozen):
    """The accepted checkpoint on which a shard's work stands."""

    epoch: int
    checkpoint: Digest
    weights: BlobRef
    state: BlobRef


def _base_of(kept: KeptCheckpoint) -> AcceptedBase:
    return AcceptedBase(epoch=kept.epoch, checkpoint=kept.digest, weights=kept.weights, state=kept.state)


@dataclass(frozen=True)
class TrainerFiles:
    """Files from which a trainer starts."""

    place: ResumePoint
    weights: Path | None
    state: Path | None


class Workspace:
    """The files of one run's work. Methods block on the disk."""

    def __init__(self, places: RunPaths, manifest: Manifest, store: BlobStore) -> None:
        self.places, self.manifest, self.store = places, manifest, store

    def work(self, shard: int) -> CheckpointFolder:
        return CheckpointFolder(self.places.work, self.manifest.run_id, shard)

    # --- bases --------------------------------------------------------------------------------------------------------------

    def base(self, shard: int, epoch: int, checkpoint: str | None, accepted: AcceptanceRecord | None) -> AcceptedBase | None:
        """The blobs of accepted (`epoch`, `checkpoint`): our own, or as the acceptance or an earlier sync named them."""
        for kept in self.work(shard).kept():
            if (kept.epoch, kept.digest) == (epoch, checkpoint):
                return _base_of(kept)
        if accepted and (accepted.epoch, accepted.checkpoint) == (epoch, checkpoint):
            return AcceptedBase(epoch=epoch, checkpoint=accepted.checkpoint, weights=accepted.weights, state=accepted.state)
        known = self.known_base(shard)
        return known if known and (known.epoch, known.checkpoint) == (epoch, checkpoint) else None

    def known_base(self, shard: int) -> AcceptedBase | None:
        """The accepted checkpoint that the last sync, or the acceptance of our own since, has left us on."""
        with contextlib.suppress(OSError, ValidationError):
            return AcceptedBase.model_validate_json((self.work(shard).path / BASE).read_bytes())
        return None

    def set_base(self, shard: int, base: AcceptedBase | None) -> None:
        """Remember what was fetched (None: work begins anew); what was fetched before it is not needed any more."""
        old = self.known_base(shard)
        if old and old != base:
            needed = [ref for kept in self.work(shard).kept() for ref in kept.refs] + ([base.weights, base.state] if base else [])
            for ref in (old.weights, old.state):
                if ref not in needed:
                    self.store.remove(ref.digest)
        if base:
            write_atomic(self.work(shard).path / BASE, canonical(base))
        else:
            (self.work(shard).path / BASE).unlink(missing_ok=True)

    # --- own checkpoints ----------------------------------------------------------------------------------------------------

    def pending(self, shard: int, epoch: int, checkpoint: str | None) -> list[KeptCheckpoint]:
        """Own whole checkpoints on top of (`epoch`, `checkpoint`); the rest of the chain after a damaged one is dropped."""
        work = self.work(shard)
        work.sweep()
        own = chain(epoch, checkpoint, work.kept())
        for index, kept in enumerate(own):
            if not all(self._file(kept, name).is_file() for name in FILES):
                log.warning("checkpoint %d of shard %d is damaged on disk; it is trained again", kept.epoch, shard)
                for lost in own[index:]:
                    work.drop_epoch(lost.epoch)
                return own[:index]
        return own

    def _file(self, kept: KeptCheckpoint, name: str) -> Path:
        return self.work(kept.shard).epoch_folder(kept.epoch) / f"{name}.safetensors"

    def start(self, shard: int, epoch: int, checkpoint: str | None, base: AcceptedBase | None) -> TrainerFiles:
        """The newest place to train from, and its files."""
        work = self.work(shard)
        place = resume_point(epoch, checkpoint, self.pending(shard, epoch, checkpoint), work.local())
        if place.kept:
            return TrainerFiles(place, self._file(place.kept, "weights"), self._file(place.kept, "state"))
        if base:
            return TrainerFiles(place, self.store.path(base.weights.digest), self.store.path(base.state.digest))
        init = self.manifest.expert_of(shard).init
        return TrainerFiles(place, self.store.path(init.digest) if init else None, None)

    def into_store(self, kept: KeptCheckpoint, keep: Collection[str]) -> None:
        """Make a checkpoint's files servable; they share the disk space of the work folder.

        Raises DiskError, IntegrityError (damaged or lost), or Discarded when they are removed meanwhile.
        """
        self.make_room(sum(ref.size for ref in kept.refs if not self.store.has(ref.digest)), keep)
        for name, ref in zip(FILES, kept.refs, strict=True):
            if not self.store.has(ref.digest):
                self._take_in(kept, name, ref)

    def _take_in(self, kept: KeptCheckpoint, name: str, ref: BlobRef) -> None:
        path = self._file(kept, name)
        link = path.with_suffix(".link")  # hashing takes long, and a trainer that starts meanwhile sweeps `.part` files away
        try:
            with disk_errors(link):
                link.unlink(missing_ok=True)
                try:
                    os.link(path, link)
                except FileNotFoundError:
                    raise
                except OSError:  # a file system without hard links
                    found = self.store.add_file(path)
                else:
                    found = self.store.add_file(link, move=True)
        except FileNotFoundError as error:
            if path.exists() or not path.with_name(CHECKPOINT).exists():
                raise CheckpointDiscarded(
                    f"the files of epoch {kept.epoch} of shard {kept.shard} were removed meanwhile"
                ) from error
            raise IntegrityError(f"{path} is missing; checkpoint {kept.epoch} of shard {kept.shard} is lost") from error
        if found != ref:
            self.store.remove(found.digest)
            raise IntegrityError(f"{path} was damaged on disk; checkpoint {kept.epoch} of shard {kept.shard} is lost")

    # --- housekeeping -------------------------------------------------------------------------------------------------------

    def superseded(self, shard: int, epoch: int) -> None:
        """Epoch `epoch` of ours was accepted: our older checkpoints, and the base that we had fetched, may go."""
        work = self.work(shard)
        kept = work.kept()
        needed = {ref.digest for item in kept if item.epoch >= epoch for ref in item.refs}
        for item in kept:
            if item.epoch < epoch:
                for ref in item.refs:
                    if ref.digest not in needed:
                        self.store.remove(ref.digest)
                work.drop_epoch(item.epoch)
        accepted = next((item for item in kept if item.epoch == epoch), None)
        if accepted:
            self.set_base(shard, _base_of(accepted))

    def discard(self, shard: int, epoch: int | None) -> None:
        """Our work beyond accepted `epoch` is void; an accepted checkpoint of our own stays, for it is served.

        With None nothing is trusted: blobs of this shard that were fetched and do not match their name go, too.
        """
        work = self.work(shard)
        work.drop_local()
        for kept in work.kept():
            if epoch is None or kept.epoch > epoch:
                for ref in kept.refs:
                    self.store.remove(ref.digest)
                work.drop_epoch(kept.epoch)
        if epoch is None:
            self._check_fetched(shard)

    def begins_with(self, shard: int, base: AcceptedBase | None) -> list[BlobRef]:
        """What others give for work on this shard on top of `base`: its data, and what its training begins with."""
        data, init = self.manifest.shards[shard].train, self.manifest.expert_of(shard).init
        if base:
            return [data, base.weights, base.state]
        return [data, init] if init else [data]

    def needed(self, shard: int, base: AcceptedBase | None) -> set[str]:
        """Blobs without which the work on this shard on top of `base` cannot go on, or not be handed in."""
        own = [kept for kept in self.work(shard).kept() if base is None or kept.epoch >= base.epoch]
        refs = [*self.begins_with(shard, base), *(ref for kept in own for ref in kept.refs)]
        return {ref.digest for ref in refs}

    def _check_fetched(self, shard: int) -> None:
        for ref in self.begins_with(shard, self.known_base(shard)):
            try:
                if self.store.has(ref.digest):
                    self.store.verify(ref.digest)
            except IntegrityError as error:
                log.warning("%s; it is fetched again", error)
                self.store.remove(ref.digest)

    def held(self) -> dict[str, int]:
        """Blobs that this box has for its work, now or earlier, and their sizes: own checkpoints, bases, shards. To be served."""
        found: dict[str, int] = {}
        for shard in self._shards():
            fetched = [*self.begins_with(shard, None), *self.begins_with(shard, self.known_base(shard))]
            refs = [*fetched, *(ref for kept in self.work(shard).kept() for ref in kept.refs)]
            found |= {ref.digest: ref.size for ref in refs if self.store.has(ref.digest)}
        return found

    def make_room(self, need: int, keep: Collection[str]) -> None:
        """Under a disk limit, remove blobs until `need` more bytes fit, or none is left: never `keep`, own checkpoints last.

        What a shard that is done or lost has left here is of use to others, but not at the price of the next shard.
        """
        limit = self.store.limit_bytes
        if limit is None or need == 0:
            return
        used = self.store.used_bytes()
        for digest, size in self._spare(keep):
            if used + need <= limit:
                break
            used -= size
            self.store.remove(digest)
            log.info("removed blob %s to stay within the disk limit", digest[:12])
        self._drop_removed()

    def _spare(self, keep: Collection[str]) -> list[tuple[str, int]]:
        """Blobs other than `keep`, and their sizes, in the order in which they go: own checkpoints last, older ones first."""
        own = {ref.digest for shard in self._shards() for kept in self.work(shard).kept() for ref in kept.refs}
        found = []
        for digest in set(self.store.digests()) - set(keep):
            with contextlib.suppress(FileNotFoundError, BlobMissing):  # another chore may remove it meanwhile
                status = self.store.path(digest).stat()
                found.append((digest in own, status.st_mtime, digest, status.st_size))
        return [(digest, size) for _, _, digest, size in sorted(found)]

    def _drop_removed(self) -> None:
        """Work folders share the disk space of blobs: an accepted checkpoint that is not whole in the store goes there, too."""
        for shard in self._shards():
            work, base = self.work(shard), self.known_base(shard)
            for kept in work.kept():
                if base and kept.epoch <= base.epoch and not all(self.store.has(ref.digest) for ref in kept.refs):
                    work.drop_epoch(kept.epoch)

    def _shards(self) -> list[int]:
        """Those that were ever worked on here."""
        return sorted(int(path.name) for path in self.places.work.glob("[0-9]*"))
