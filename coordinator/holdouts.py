"""The held-out clips of a run, which only its coordinator reads unless it lends its checks.

They lie in a store of their own that is never served; the manifest's digests commit to them. Who trained on them could make an
epoch that no honest epoch after it equals, so noise and times of each score are secret, too.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.data.parts.index import parts_of
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import IntegrityError
from lutetia.system.files import disk_errors, write_atomic

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holdouts:
    """Held-out clips and the secret from which each score's noise and times are drawn."""

    store: BlobStore
    secret: bytes

    def path(self, ref: BlobRef) -> Path:
        """The file of a shard's held-out clips. Raises BlobMissing."""
        return self.store.path(ref.digest)

    def draw(self, checkpoint: str) -> str:
        """The draw of noise and times with which a result and its parent are scored; unpredictable without the secret."""
        return hmac.new(self.secret, checkpoint.encode(), hashlib.sha256).hexdigest()


def holdout_store(folder: RunFolder) -> BlobStore:
    """The store of a run's held-out clips, which other users of the machine cannot read."""
    store = BlobStore(folder.holdouts)
    with disk_errors(folder.holdouts):
        folder.holdouts.chmod(0o700)
    return store


def holdout_files(folder: RunFolder, manifest: Manifest) -> Iterator[Path]:
    """The files of the held-out clips of all shards, in order. Raises BlobMissing.

    A run of an earlier version that was never served since has them among the served blobs.
    """
    own, served = holdout_store(folder), BlobStore(folder.blobs)
    for shard in manifest.shards:
        digest = shard.holdout.digest
        yield (served if served.has(digest) and not own.has(digest) else own).path(digest)


def data_files(folder: RunFolder, manifest: Manifest) -> Iterator[Path]:
    """The files of the training clips of all shards, in order: indexes of parts, or whole shards. Raises BlobMissing."""
    served = BlobStore(folder.blobs)
    return (served.path(shard.train.digest) for shard in manifest.shards)


def withdraw_holdouts(folder: RunFolder, manifest: Manifest) -> None:
    """Take held-out clips that an earlier version served to peers out of the served blobs, and warn at each start from then on.

    Raises IntegrityError when the clips of a shard are in neither store: no result of that shard could be checked.
    """
    own, served = holdout_store(folder), BlobStore(folder.blobs)
    for shard in manifest.shards:
        waiting = [shard.holdout.digest]
        while waiting:
            digest = waiting.pop()
            if served.has(digest):
                write_atomic(folder.holdouts_served, b"")  # first: a crash in between must not lose the warning
                if not own.has(digest):
                    own.adopt(served.path(digest), served.table(digest))
                served.remove(digest)
            if not own.has(digest):
                raise IntegrityError(
                    f"{folder.holdouts} lacks the held-out clips of shard {shard.index} (blob {digest[:12]}); "
                    "restore a backup of the run"
                )
            if digest == shard.holdout.digest:
                waiting = [part.blob.digest for part in parts_of(own.path(digest))]
    if folder.holdouts_served.exists():
        _log.warning(
            "an earlier version served the held-out clips of this run to peers, so a peer may have trained on them; "
            "this run goes on with weaker checks, and only a new run on other held-out clips has the full ones"
        )
