"""A served run takes up a newer manifest: watch the file, adopt it, and tell the peers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.rpc.manifest_sync import LiveManifest, announce_version
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import NodeRecord
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import AuthorisationError, LutetiaError

_log = logging.getLogger(__name__)


_WATCH_SECONDS = 1.0


_TOLD_AT_ONCE = 16


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


class ManifestNotifier:
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
                        await announce_version(self._transport, version, node.peer_id, node.addresses)
                except (ConnectionError, TimeoutError) as error:
                    _log.debug("could not tell %s of version %d: %s", node.peer_id, version, error)
                else:
                    self._told[node.owner] = version

        await asyncio.gather(*map(one, due))
