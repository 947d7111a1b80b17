"""`run upgrade`: the owner signs the next version of a run's manifest; a coordinator that serves the run takes it up at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..protocol.canonical import digest_of
from ..protocol.events import ManifestPublished
from ..protocol.identity import Identity
from ..protocol.ledger_state import RunState
from ..protocol.live_manifest import LiveManifest, tell_news
from ..protocol.manifest import Manifest, SignedManifest
from ..protocol.records import NodeRecord
from ..protocol.transport import Transport
from ..protocol.upgrade import next_version
from ..system.errors import AuthorisationError, ConfigError, LutetiaError
from ..system.files import write_atomic
from .ledger import Ledger
from .run_folder import RunFolder

_log = logging.getLogger("lutetia.coordinator.upgrading")

_WATCH_SECONDS = 1.0
_TOLD_AT_ONCE = 16


@dataclass(frozen=True)
class Upgraded:
    """What `upgrade_run` did."""

    old: Manifest
    new: Manifest


def upgrade_run(folder: RunFolder, changes: Mapping[str, Any], owner_key: Path | None = None) -> Upgraded:
    """Sign the next version of the manifest in `folder` with `changes` by dotted field, and put it there.

    The version before stays in `manifests/`. Raises UpgradeRefused (what may not change), ConfigError (no run there),
    IdentityError (no owner's key) or AuthorisationError (another key than the owner's).
    """
    if not changes:
        raise ConfigError("nothing is to be changed; name it with --set, for instance --set samples_per_shard=128000")
    now = time.time()
    old = folder.read_manifest(now=0.0)  # an expired run may be prolonged
    ledger = Ledger.open(folder.ledger, old.manifest.run_id)
    done = max(ledger.state.accepted_epochs, default=0)
    ledger.close()
    new = next_version(old.manifest, changes, now, done)
    if new.expires <= now:
        raise ConfigError("the new version would have expired already; set valid_days too")
    publish_version(folder, old, new, Identity.load(owner_key or folder.owner_key))
    return Upgraded(old.manifest, new)


def publish_version(folder: RunFolder, old: SignedManifest, new: Manifest, owner: Identity) -> None:
    """Sign `new` and put it in the place of `old`, which is kept. Raises AuthorisationError for another owner's key."""
    signed = SignedManifest.sign(new, owner)
    write_atomic(folder.version(old.manifest.version), old.to_bytes())
    write_atomic(folder.manifest, signed.to_bytes())


def published(manifest: Manifest, coordinator: str, now: float) -> ManifestPublished:
    """The ledger's entry for a version that is served from now on."""
    return ManifestPublished(
        time=now, version=manifest.version, digest=digest_of(manifest), expires=manifest.expires, epochs=manifest.epochs,
        coordinator=coordinator,
    )  # fmt: skip


def check_version(folder: RunFolder, manifest: Manifest, state: RunState) -> bool:
    """Whether `manifest` is newer than the ledger's. Raises ConfigError when it is older, or another of the same version."""
    known, where = state.manifest_version, folder.manifest
    if manifest.version < known or (manifest.version == known and state.manifest not in ("", digest_of(manifest))):
        kind = "older than" if manifest.version < known else "another than"
        raise ConfigError(
            f"{where} is version {manifest.version}, {kind} version {known} that the ledger has published; "
            "put the newest version back from a backup, for peers refuse this one"
        )
    return manifest.version > known


class ManifestWatch:
    """Looks at the run's manifest file and hands every newer version to `apply`, which carries it out."""

    def __init__(self, folder: RunFolder, live: LiveManifest, identity: Identity, apply: Callable[[], Awaitable[None]]) -> None:
        self._folder, self._live, self._identity, self._apply = folder, live, identity, apply
        self._seen: tuple[int, int] | None = None

    def _mark(self) -> tuple[int, int]:
        found = self._folder.manifest.stat()
        return found.st_ino, found.st_mtime_ns

    async def run(self) -> None:
        """Until cancelled. Raises AuthorisationError when a newer version does not name this coordinator any more."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                if (mark := self._mark()) == self._seen:
                    continue
                self._seen = mark
                newer = self._live.adopt(self._folder.manifest.read_bytes(), time.time())
            except (OSError, LutetiaError) as error:
                _log.error("the manifest in %s is not taken up: %s", self._folder.root, error)
                continue
            if newer:
                _check_named(self._live(), self._identity)
                await self._apply()


def _check_named(manifest: Manifest, identity: Identity) -> None:
    if identity.public_key not in manifest.coordinators:
        raise AuthorisationError(
            f"version {manifest.version} of the manifest names another coordinator's key; stop this one and serve the run "
            "with the new key"
        )


class Herald:
    """Tells every peer that is online of a newer version, once each."""

    def __init__(self, transport: Transport, live: LiveManifest) -> None:
        self._transport, self._live = transport, live
        self._told: dict[str, int] = {}

    async def tell(self, nodes: list[NodeRecord]) -> None:
        """Nothing for the first version: who joins has it. A peer that cannot be told now is told next time, or asks itself."""
        version = self._live.version
        due = [node for node in nodes if version > 1 and self._told.get(node.owner, 0) < version and node.state != "left"]
        places = asyncio.Semaphore(_TOLD_AT_ONCE)

        async def one(node: NodeRecord) -> None:
            async with places:
                try:
                    async with asyncio.timeout(10):
                        await tell_news(self._transport, version, node.peer_id, node.addresses)
                except (ConnectionError, TimeoutError) as error:
                    _log.debug("could not tell %s of version %d: %s", node.peer_id, version, error)
                else:
                    self._told[node.owner] = version

        await asyncio.gather(*map(one, due))
