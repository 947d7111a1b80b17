"""`coordinator backup`: a consistent copy of a run, also while it is served. A second backup copies only what is new.

A backup has a folder `blobs/`, a folder `state-…` with the run's small files and its ledger, and `backup.json`, the signed index,
which names the state folder. The index is written last, so an interrupted backup leaves the one before it intact. A backup holds
the run's keys: keep it as safe as the run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from lutetia.coordinator.holdouts import holdout_store
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.data.parts.index import parts_of
from lutetia.models.mixing.description import FILE as MIXTURE_FILE
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.fields import Digest, Signature
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.protocol.schema.manifest import Manifest, first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import AuthorisationError, ConfigError, IntegrityError
from lutetia.system.files import disk_errors, fsync_folder, make_folder, write_atomic

_log = logging.getLogger(__name__)

INDEX = "backup.json"
_SIGNING_DOMAIN = b"lutetia-backup-1\n"
_SECRET = frozenset({"owner.key", "coordinator.key"})
_ROUNDS = 5
_PART = ".ledger.sqlite.part"

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all)."""


class BackupIndex(Frozen):
    """What a backup holds."""

    format: Literal[1] = Field(default=1, description="Version of this format")
    run: Digest = Field(description="The run's id")
    name: str = Field(description="The run's name")
    time: float = Field(description="When the backup was made (Unix seconds)")
    manifest_version: int = Field(description="Version of the manifest")
    events: int = Field(ge=1, description="Number of events in the ledger")
    chain: Digest = Field(description="Hash of the ledger's last event, which covers all events before it")
    accepted: int = Field(description="Number of accepted checkpoints")
    folder: str = Field(pattern=r"^state-\d{8}-[0-9a-f]{8}$", description="Folder of the small files and the ledger")
    files: dict[str, Digest] = Field(description="SHA-256 of each file in that folder, by relative path")
    blobs: tuple[BlobRef, ...] = Field(description="All blobs that the run serves")
    holdouts: tuple[BlobRef, ...] = Field(
        default=(), description="Blobs of held-out clips, which are never served; older backups have them among the others"
    )

    @property
    def bytes(self) -> int:
        """Size of all blobs."""
        return sum(blob.size for blob in (*self.blobs, *self.holdouts))


class SignedBackup(Frozen):
    """An index and the coordinator's signature over its canonical bytes."""

    index: BackupIndex = Field(description="What the backup holds")
    signature: Signature = Field(description="Signature by the coordinator's key (hex)")

    @classmethod
    def sign(cls, index: BackupIndex, coordinator: Identity) -> SignedBackup:
        return cls(index=index, signature=coordinator.sign(_signed_bytes(index)))

    def check(self, manifest: Manifest, where: Path) -> None:
        """Raises AuthorisationError unless one of the run's coordinators signed it."""
        message = _signed_bytes(self.index)
        if not any(verify(key, message, self.signature) for key in manifest.coordinators):
            raise AuthorisationError(f"{where / INDEX} is not signed by a coordinator of its run; use another backup")


def _signed_bytes(index: BackupIndex) -> bytes:
    """Without `holdouts` where there are none: older backups were signed before that field existed."""
    return _SIGNING_DOMAIN + canonical(index.model_dump(mode="json", exclude=None if index.holdouts else {"holdouts"}))


@dataclass(frozen=True)
class BackedUp:
    """What `backup_run` did; `copied`: bytes of blobs that the backup did not have before."""

    index: BackupIndex
    copied: int


def read_index(backup: Path) -> SignedBackup:
    """Raises ConfigError when `backup` holds none, IntegrityError when it is malformed."""
    try:
        return SignedBackup.model_validate_json((backup / INDEX).read_bytes())
    except OSError as error:
        raise ConfigError(f"{backup} holds no backup ({INDEX}: {error.strerror}); name the folder of a backup") from error
    except ValidationError as error:
        raise IntegrityError(f"{backup / INDEX} is malformed: {first_problem(error)}; use another backup") from error


def backup_run(root: Path, out: Path, on_progress: OnProgress = lambda stage, done, total: None) -> BackedUp:
    """Update the backup in `out` to the run's present state; the run may be served meanwhile.

    Raises ConfigError (no run there, or `out` holds something else), IntegrityError (a blob of the run is damaged) or DiskError.
    """
    folder = RunFolder(root)
    manifest = folder.read_manifest(now=0.0).manifest
    _check_target(out, manifest.run_id)
    with disk_errors(out):
        make_folder(out)
        out.chmod(0o700)
    for _ in range(_ROUNDS):
        state, (events, chain) = _copy_ledger(folder, out)
        blobs, holdouts, copied = _copy_blobs(folder, out, on_progress)
        if not (missing := needed(state, manifest, folder) - {blob.digest for blob in (*blobs, *holdouts)}):
            break
        _log.info("the run accepted new checkpoints during the copy (%d blobs are missing); copying again", len(missing))
    else:
        raise IntegrityError(
            f"{folder.blobs} lacks blob {min(missing)[:12]}, which the ledger needs; serve the run until it is fetched"
        )
    name = f"state-{events:08d}-{chain[:8]}"
    index = BackupIndex(
        run=manifest.run_id, name=manifest.name, time=time.time(), manifest_version=state.manifest_version, events=events,
        chain=chain, accepted=state.accepted, folder=name, files=_copy_files(folder, out, out / name), blobs=tuple(blobs),
        holdouts=tuple(holdouts),
    )  # fmt: skip
    write_atomic(out / INDEX, canonical(SignedBackup.sign(index, Identity.load(folder.coordinator_key))))
    _remove_outdated(out, index)
    return BackedUp(index, copied)


def _check_target(out: Path, run: str) -> None:
    """Raises ConfigError unless `out` is empty or an older backup of the same run."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "blobs").is_dir()):
        raise ConfigError(f"{out} holds something else; name a new folder or that of an older backup of this run")
    if (out / INDEX).exists() and (other := read_index(out).index.run) != run:
        raise ConfigError(f"{out} is a backup of run {other[:12]}, not of {run[:12]}; name another folder")


def needed(state: RunState, manifest: Manifest, folder: RunFolder) -> set[str]:
    """Digests that the run needs to continue: its data, the accepted checkpoints and the router."""
    refs: list[BlobRef | None] = []
    for shard in manifest.shards:
        refs += [shard.train, shard.holdout, manifest.expert_of(shard.index).init]
    if manifest.adapter and manifest.adapter.base.served:
        refs += manifest.adapter.base.files.values()
    for shard in state.shards.values():
        refs += [shard.acceptance.weights, shard.acceptance.state] if shard.acceptance else []
    refs.append(state.router.router if state.router else None)
    for store in (BlobStore(folder.blobs), holdout_store(folder)):
        for index in (ref for shard in manifest.shards for ref in (shard.train, shard.holdout) if store.has(ref.digest)):
            refs += [part.blob for part in parts_of(store.path(index.digest))]
    return {ref.digest for ref in refs if ref}


def _copy_ledger(folder: RunFolder, out: Path) -> tuple[RunState, tuple[int, str]]:
    """A snapshot of the ledger in `out`, verified event by event: (its state, (events, chain))."""
    part = out / _PART
    part.unlink(missing_ok=True)
    ledger = Ledger.open(folder.ledger, to_read=True)
    try:
        ledger.copy_to(part)
    finally:
        ledger.close()
    copy = Ledger.open(part)
    state, head = copy.state, copy.head
    copy.close()
    for leftover in (part.with_name(part.name + "-wal"), part.with_name(part.name + "-shm")):
        leftover.unlink(missing_ok=True)
    return state, head


def _copy_blobs(folder: RunFolder, out: Path, on_progress: OnProgress) -> tuple[list[BlobRef], list[BlobRef], int]:
    """Copy the blobs that the backup does not have yet: (blobs that are served, held-out clips, bytes copied)."""
    target = BlobStore(out / "blobs")
    found: list[tuple[BlobStore, list[BlobRef], dict[str, int]]] = []
    for store in (BlobStore(folder.blobs), holdout_store(folder)):
        found.append((store, [], {digest: path.stat().st_size for digest, path in _present(store)}))
    total, copied, done = sum(sum(sizes.values()) for _, _, sizes in found), 0, 0
    for source, refs, digest, size in [(source, refs, *one) for source, refs, sizes in found for one in sizes.items()]:
        if not target.has(digest):
            try:
                path = source.path(digest)
                copy = target.add_file(path)
            except (BlobMissing, FileNotFoundError):
                continue  # an old training state that the coordinator has just removed
            if copy.digest != digest:
                target.remove(copy.digest)
                remedy = "remove it and fetch it from a peer" if source.root == folder.blobs else "take it from an older backup"
                raise IntegrityError(f"blob {digest[:12]} in {source.root} is damaged on disk; {remedy}")
            copied += size
        refs.append(BlobRef(digest=digest, size=size))
        done += size
        on_progress("blobs", done, total)
    (_, blobs, _), (_, holdouts, _) = found
    return blobs, holdouts, copied


def _present(store: BlobStore) -> Iterator[tuple[str, Path]]:
    for digest in store.digests():
        try:
            yield digest, store.path(digest)
        except BlobMissing:
            continue


def _small_files(folder: RunFolder) -> list[Path]:
    """The files of a run folder besides the ledger and the blobs."""
    files = [
        folder.manifest, folder.ticket, folder.endpoint, folder.owner_key, folder.coordinator_key, folder.peers, folder.head,
        folder.holdouts_served, folder.reserve,
        folder.mixture / MIXTURE_FILE, *sorted((folder.root / "manifests").glob("*.json")),
        *sorted(folder.mixtures.glob("*.json")), *sorted(folder.mixtures.glob("*.losses")),
    ]  # fmt: skip
    return [path for path in files if path.is_file()]


def _copy_files(folder: RunFolder, out: Path, target: Path) -> dict[str, str]:
    """Copy the small files and the ledger's snapshot: relative path -> SHA-256 (hex)."""
    digests = {}
    for source in _small_files(folder):
        name, data = source.relative_to(folder.root).as_posix(), source.read_bytes()
        write_atomic(target / name, data, mode=0o600 if source.name in _SECRET else 0o644)
        digests[name] = hashlib.sha256(data).hexdigest()
    with (out / _PART).open("rb") as file:
        digests[folder.ledger.name] = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    os.replace(out / _PART, target / folder.ledger.name)
    fsync_folder(target)
    return digests


def _remove_outdated(out: Path, index: BackupIndex) -> None:
    """Remove the earlier backup's state folder and the blobs that the index no longer names."""
    for folder in out.glob("state-*"):
        if folder.name != index.folder:
            shutil.rmtree(folder)
    store, wanted = BlobStore(out / "blobs"), {blob.digest for blob in (*index.blobs, *index.holdouts)}
    for digest in store.digests():
        if digest not in wanted:
            store.remove(digest)
