"""While a run is served: watch its manifest file, adopt a newer version, and notify the peers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from lutetia.coordinator.admin.upgrade import put_version
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.rpc.manifest_sync import LiveManifest, announce_version
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.manifest_upgrade import check_upgrade
from lutetia.protocol.schema.records import NodeRecord
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import AuthorisationError, LutetiaError

_log = logging.getLogger(__name__)

_WATCH_SECONDS = 1.0
_NOTIFY_AT_ONCE = 16
_NOTIFY_SECONDS = 10.0


class ManifestWatch:
    """Adopts every newer version of the run's manifest file and calls `apply`."""

    def __init__(self, folder: RunFolder, live: LiveManifest, identity: Identity, apply: Callable[[], Awaitable[None]]) -> None:
        self._folder, self._live, self._identity, self._apply = folder, live, identity, apply
        self._seen: tuple[int, int] | None = None
        self._adopting = asyncio.Lock()

    def _mark(self) -> tuple[int, int]:
        status = self._folder.manifest.stat()
        return status.st_ino, status.st_mtime_ns

    async def run(self) -> None:
        """Watch until cancelled. Raises AuthorisationError when a newer version no longer names this coordinator."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            async with self._adopting:
                await self._look()

    async def _look(self) -> None:
        try:
            if (mark := self._mark()) == self._seen:
                return
            self._seen = mark
            newer = self._live.adopt(self._folder.manifest.read_bytes(), time.time())
        except (OSError, LutetiaError) as error:
            _log.error("the manifest in %s is not adopted: %s", self._folder.root, error)
            return
        if newer:
            _check_named(self._live(), self._identity)
            await self._apply()

    async def take(self, newer: SignedManifest, accepted_epochs: int = 0) -> None:
        """Put the version that follows into the folder, and apply it at once. Raises LutetiaError; then nothing was changed."""
        async with self._adopting:
            old = self._live.signed
            if self._identity.public_key not in newer.manifest.coordinators:
                raise AuthorisationError("the version names no key of this coordinator; use `lutetia run rotate` on its machine")
            check_upgrade(old.manifest, newer.manifest, accepted_epochs)
            await asyncio.to_thread(put_version, self._folder, old, newer)
            await self._look()


def _check_named(manifest: Manifest, identity: Identity) -> None:
    if identity.public_key not in manifest.coordinators:
        raise AuthorisationError(
            f"version {manifest.version} of the manifest names another coordinator's key; serve the run with the new key"
        )


class ManifestNotifier:
    """Notifies every peer that is online of a newer version, once each."""

    def __init__(self, transport: Transport, live: LiveManifest) -> None:
        self._transport, self._live = transport, live
        self._notified: dict[str, int] = {}

    async def notify(self, nodes: list[NodeRecord]) -> None:
        """Notify the `nodes` that do not know the newest version. A peer that cannot be reached is tried again next time.

        Nothing is sent for the first version, because peers get it when they join.
        """
        version = self._live.version
        due = [node for node in nodes if version > 1 and self._notified.get(node.owner, 0) < version and node.state != "left"]

        async def notify(node: NodeRecord) -> None:
            try:
                async with asyncio.timeout(_NOTIFY_SECONDS):
                    await announce_version(self._transport, version, node.peer_id, node.addresses)
            except (ConnectionError, TimeoutError) as error:
                _log.debug("could not notify %s of version %d: %s", node.peer_id, version, error)
            else:
                self._notified[node.owner] = version

        await gather_bounded(notify, due, _NOTIFY_AT_ONCE)
