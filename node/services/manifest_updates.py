"""How a running node gets newer versions of its manifest: peers announce them, and it asks once per lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lutetia.node.pacing import manifest_pause
from lutetia.node.runtime.network import NodeNetwork
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.rpc.manifest_sync import MANIFEST_UPDATE, LiveManifest, fetch_newer, read_version, version_at
from lutetia.protocol.schema.records import NodeRecord, node_keys
from lutetia.protocol.transport.base import Stream, Transport
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)


class ManifestUpdates:
    """Keeps `live` at the newest version of the swarm; `changed` is called after each change."""

    def __init__(self, network: NodeNetwork, live: LiveManifest, changed: Callable[[], None]) -> None:
        self.network, self.live, self._changed = network, live, changed
        self._fetching = asyncio.Lock()
        self._checked_at = float("-inf")
        self._refused: dict[str, float] = {}

    async def serve(self, transport: Transport) -> None:
        """Handle announcements on `transport`."""
        await transport.serve(MANIFEST_UPDATE, self._announced)

    async def _announced(self, stream: Stream) -> None:
        """Any peer may announce a version; the fetched manifest must carry the owner's signature. One fetch at a time.

        Checking a manifest takes a good part of a second. Coordinators may cause that at any time, other peers rarely.
        """
        version = await read_version(stream)
        if version <= self.live.version or self._fetching.locked():
            return
        if stream.peer_id in dict(self.network.coordinators):
            await self._fetch(stream.peer_id, ())
            return
        source, now = stream.origin or stream.peer_id, asyncio.get_running_loop().time()
        if self.may_announce(source, now) and not await self._fetch(stream.peer_id, ()):
            self.refuse(source, now)

    def may_announce(self, source: str, now: float) -> bool:
        """Whether to check an announcement of this network origin at `now` (seconds): one per heartbeat from all of them."""
        if now - self._checked_at < self.network.manifest.timing.heartbeat or now < self._refused.get(source, now):
            return False
        self._checked_at = now
        return True

    def refuse(self, source: str, now: float) -> None:
        """The announcement was false: ignore this origin for a lease."""
        self._refused = {other: until for other, until in self._refused.items() if until > now}
        self._refused[source] = now + self.network.manifest.timing.lease

    async def run(self) -> None:
        """Ask for the version about once per lease until cancelled; nodes do so at different times."""
        count = 0
        while True:
            await asyncio.sleep(manifest_pause(self.network.manifest.timing.lease, self.network.identity.public_key))
            count += 1
            await self._ask_peers(count)

    async def _ask_peers(self, count: int) -> None:
        """Ask the coordinators; if none answers, ask another peer, so that versions spread without coordinators."""
        for peer, addresses in self.network.coordinators:
            if await self._ask(peer, addresses):
                return
        for peer, addresses in await self._another(count):
            await self._ask(peer, addresses)

    async def _ask(self, peer: str, addresses: tuple[str, ...]) -> bool:
        """Whether it answered."""
        try:
            run, version = await version_at(self.network.transport, peer, addresses)
        except ConnectionError as error:
            log.debug("cannot ask peer %s for its manifest version: %s", peer, error)
            return False
        if run == self.live().run_id and version > self.live.version:
            await self._fetch(peer, addresses)
        return True

    async def _another(self, count: int) -> list[tuple[str, tuple[str, ...]]]:
        """One other peer from the DHT, a different one each time."""
        nodes: list[NodeRecord] = []
        try:
            keys = node_keys(self.live().run_id)
            for records in await asyncio.gather(*(read_records(self.network.transport, key) for key in keys)):
                nodes += [record for record, _ in records if isinstance(record, NodeRecord)]
        except ConnectionError:
            return []
        others = [record for record in nodes if record.peer_id != self.network.identity.peer_id and record.state != "left"]
        if not others:
            return []
        chosen = others[count % len(others)]
        return [(chosen.peer_id, chosen.addresses)]

    async def _fetch(self, peer: str, addresses: tuple[str, ...]) -> bool:
        """Whether the peer served a newer version."""
        async with self._fetching:
            try:
                newer = await fetch_newer(self.network.transport, self.live, peer, addresses)
            except (LutetiaError, ConnectionError) as error:
                log.warning("refused a manifest from peer %s: %s", peer, error)
                return False
        if newer:
            self._changed()
        return newer
