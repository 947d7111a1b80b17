"""`coordinator restore`: make a run's folder from a backup, with every byte verified, or nothing."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from lutetia.coordinator.admin.backup import BackupIndex, OnProgress, read_index
from lutetia.coordinator.holdouts import holdout_store
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.mixing.description import FILE as MIXTURE_FILE
from lutetia.models.mixing.description import SignedMixture, verify_mixture
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import open_manifest
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import AuthorisationError, ConfigError, IntegrityError
from lutetia.system.files import disk_errors, fsync_folder, make_folder, write_atomic

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,3}")


def restore_run(backup: Path, root: Path, on_progress: OnProgress = lambda stage, done, total: None) -> BackupIndex:
    """Make `root` the run that `backup` holds. When it is served, the coordinator recovers what the backup lacks from peers.

    Raises ConfigError (`root` exists, no backup there), AuthorisationError (signatures), IntegrityError (bytes) or DiskError;
    then `root` is not made.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{root} exists already; a run is never overwritten, name a new folder")
    index = _verified_index(backup)
    with disk_errors(root):
        make_folder(root.absolute().parent)
        part = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".part", dir=root.absolute().parent))
        try:
            _fill(backup, RunFolder(part), index, on_progress)
            part.chmod(0o755)
            os.rename(part, root)
            fsync_folder(root.absolute().parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return index


def _verified_index(backup: Path) -> BackupIndex:
    """The index, after the keys in the ticket and the signatures on manifest and index were checked."""
    signed = read_index(backup)
    index = signed.index
    if bad := next((name for name in index.files if not _SAFE.fullmatch(name) or ".." in PurePosixPath(name).parts), None):
        raise IntegrityError(f"the backup {backup} names the file {bad!r}, which would leave its folder; refused")
    for name in ("manifest.json", "ticket.txt", "coordinator.json", "coordinator.key", "ledger.sqlite"):
        if name not in index.files:
            raise IntegrityError(f"the backup {backup} lacks {name}; use another backup")
    ticket = Ticket.decode(_checked(backup, index, "ticket.txt").decode())
    manifest = open_manifest(
        _checked(backup, index, "manifest.json"), now=0.0, run=ticket.run, owner=ticket.owner
    ).manifest  # an expired run may be restored and extended
    if manifest.run_id != index.run:
        raise AuthorisationError(
            f"the manifest in {backup} is of run {manifest.run_id[:12]}, its index of {index.run[:12]}; refused"
        )
    signed.check(manifest, backup)
    return index


def _checked(backup: Path, index: BackupIndex, name: str) -> bytes:
    """A file's bytes. Raises IntegrityError when their hash is not that in the index."""
    try:
        data = (backup / index.folder / name).read_bytes()
    except OSError as error:
        raise IntegrityError(f"the backup {backup} lacks {name} ({error.strerror}); use another backup") from error
    if hashlib.sha256(data).hexdigest() != index.files[name]:
        raise IntegrityError(f"{backup / index.folder / name} has changed since the backup was made; use another backup")
    return data


def _fill(backup: Path, run: RunFolder, index: BackupIndex, on_progress: OnProgress) -> None:
    for name in index.files:
        if name != f"mixture/{MIXTURE_FILE}":
            mode = 0o600 if name.endswith(".key") else 0o644
            write_atomic(run.root / name, _checked(backup, index, name), mode)
    ledger = Ledger.open(run.ledger, index.run)
    head = ledger.head
    ledger.close()
    if head != (index.events, index.chain):
        raise IntegrityError(
            f"the ledger in {backup} ends at event {head[0]}, not at {index.events} as signed; use another backup"
        )
    source, store, done = BlobStore(backup / "blobs"), BlobStore(run.blobs), 0
    own = holdout_store(run)
    for target, blob in [*((store, blob) for blob in index.blobs), *((own, blob) for blob in index.holdouts)]:
        if not source.has(blob.digest) or target.add_file(source.path(blob.digest)) != blob:
            raise IntegrityError(f"blob {blob.digest[:12]} in {backup} is missing or damaged; use another backup")
        done += blob.size
        on_progress("blobs", done, index.bytes)
    _restore_mixture(backup, run, index, store)
    write_atomic(run.restored, b"")


def _restore_mixture(backup: Path, run: RunFolder, index: BackupIndex, store: BlobStore) -> None:
    """Make the mixture's folder from its description and blobs. If a blob is missing, the coordinator stitches again."""
    name = f"mixture/{MIXTURE_FILE}"
    if name not in index.files:
        return
    data = _checked(backup, index, name)
    try:
        files = SignedMixture.model_validate_json(data).mixture.files
    except ValidationError as error:
        raise IntegrityError(f"{backup / name} is malformed; use another backup") from error
    if not all(_SAFE.fullmatch(file) and store.has(ref.digest) for file, ref in files.items()):
        return
    for file, ref in files.items():
        target = run.mixture / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store.path(ref.digest), target)
    write_atomic(run.mixture / MIXTURE_FILE, data)
    verify_mixture(run.mixture, run.read_manifest(now=0.0).manifest.coordinators)
