"""`run upgrade`: the owner signs the next version of a run's manifest; a serving coordinator adopts it at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutetia.coordinator.ledger.events import ManifestPublished
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.schema.owner.orders import OwnerOrders, given_orders
from lutetia.system.errors import ConfigError, LutetiaError
from lutetia.system.files import write_atomic


@dataclass(frozen=True)
class Upgraded:
    """What `upgrade_run` did."""

    old: Manifest
    new: Manifest


def upgrade_run(folder: RunFolder, changes: Mapping[str, Any], owner_key: Path | None = None) -> Upgraded:
    """Sign the next version of the manifest in `folder` with `changes` by dotted field, and put it there.

    The old version is kept in `manifests/`. Raises UpgradeRefused (a field that may not change), ConfigError (no run there),
    IdentityError (no owner's key) or AuthorisationError (not the owner's key).
    """
    if not changes:
        raise ConfigError("no change is given; name one with --set, for example --set samples_per_shard=128000")
    now = time.time()
    old = folder.read_manifest(now=0.0)  # an expired run may be extended
    ledger = Ledger.open(folder.ledger, old.manifest.run_id)
    done = max(ledger.state.accepted_epochs, default=0)
    ledger.close()
    new = next_version(old.manifest, changes, now, done)
    if new.expires <= now:
        raise ConfigError("the new version has already expired; set valid_days too")
    publish_version(folder, old, new, Identity.load(owner_key or folder.owner_key))
    return Upgraded(old.manifest, new)


def publish_version(folder: RunFolder, old: SignedManifest, new: Manifest, owner: Identity) -> None:
    """Sign `new`, replace `old` with it and keep `old` as an earlier version.

    Raises AuthorisationError for another key, ConfigError when it is larger than peers read.
    """
    put_version(folder, old, sign_version(new, owner))


def sign_version(new: Manifest, owner: Identity) -> SignedManifest:
    """Raises AuthorisationError for another key than the owner's, ConfigError when it is larger than peers read."""
    signed = SignedManifest.sign(new, owner)
    if (size := len(signed.to_bytes())) > MAX_MANIFEST_BYTES:
        raise ConfigError(f"the manifest would have {size} bytes, and peers read {MAX_MANIFEST_BYTES}; shorten its lists")
    return signed


def put_version(folder: RunFolder, old: SignedManifest, new: SignedManifest) -> None:
    """Replace `old` in the folder with `new`, and keep `old` as an earlier version. Blocks on the disk."""
    write_atomic(folder.version(old.manifest.version), old.to_bytes())
    write_atomic(folder.manifest, new.to_bytes())


def published(manifest: Manifest, coordinator: str, now: float, before: OwnerOrders | None = None) -> ManifestPublished:
    """The event for a version that is served from now on. `before`: the owner's orders until then; None: none."""
    return ManifestPublished(
        time=now, version=manifest.version, digest=digest_of(manifest), expires=manifest.expires, epochs=manifest.epochs,
        coordinator=coordinator, orders=given_orders(before or OwnerOrders(), manifest.orders),
    )  # fmt: skip


def published_since(folder: RunFolder, manifest: Manifest, known: int, coordinator: str, now: float) -> list[ManifestPublished]:
    """The events for all versions after `known`, which the owner signed while the run was not served.

    A version whose file is gone is left out; what it ordered is told with the next.
    """
    events, before = [], _version(folder, known)
    for number in range(known + 1, manifest.version + 1):
        version = manifest if number == manifest.version else _version(folder, number)
        if version:
            events.append(published(version, coordinator, now, before.orders if before else None))
            before = version
    return events


def _version(folder: RunFolder, number: int) -> Manifest | None:
    try:
        return open_manifest(folder.version(number).read_bytes(), now=0.0).manifest
    except (OSError, LutetiaError):
        return None


def check_version(folder: RunFolder, manifest: Manifest, state: RunState) -> bool:
    """Whether `manifest` is newer than the ledger's. Raises ConfigError when it is older, or differs with the same version."""
    known, where = state.manifest_version, folder.manifest
    if manifest.version < known or (manifest.version == known and state.manifest not in ("", digest_of(manifest))):
        difference = "older than" if manifest.version < known else "different from"
        raise ConfigError(
            f"{where} is version {manifest.version}, {difference} version {known} that the ledger has "
            "published; restore the newest version from a backup, because peers refuse this one"
        )
    return manifest.version > known
