"""How a running node learns of newer versions of its manifest: it is told, and asks once per lease besides."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lutetia.node.runtime.network import NodeNetwork
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.rpc.manifest_sync import MANIFEST_UPDATE, LiveManifest, fetch_newer, read_version, version_at
from lutetia.protocol.schema.records import NodeRecord, node_keys
from lutetia.protocol.transport.base import Stream, Transport
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)


class ManifestUpdates:
    """Keeps `live` at the newest version that the swarm has; `heard` is called after each change."""

    def __init__(self, network: NodeNetwork, live: LiveManifest, heard: Callable[[], None]) -> None:
        self.network, self.live, self._heard = network, live, heard
        self._fetching = asyncio.Lock()
        self._told_at = float("-inf")
        self._refused: dict[str, float] = {}

    async def serve(self, transport: Transport) -> None:
        """Answer those who tell us of a version."""
        await transport.serve(MANIFEST_UPDATE, self._told)

    async def _told(self, stream: Stream) -> None:
        """Anybody may tell: what counts is the owner's signature on what is fetched, one fetch at a time.

        To check a manifest takes a good part of a second: a coordinator may ask for that at any time, all others together seldom.
        """
        version = await read_version(stream)
        if version <= self.live.version or self._fetching.locked():
            return
        if stream.peer_id in dict(self.network.coordinators):
            await self._fetch(stream.peer_id, ())
            return
        source, now = stream.origin or stream.peer_id, asyncio.get_running_loop().time()
        if self.may_tell(source, now) and not await self._fetch(stream.peer_id, ()):
            self.refuse(source, now)

    def may_tell(self, source: str, now: float) -> bool:
        """Whether news from this origin are looked at now (seconds): one piece per heartbeat, whoever tells it."""
        if now - self._told_at < self.network.manifest.timing.heartbeat or now < self._refused.get(source, now):
            return False
        self._told_at = now
        return True

    def refuse(self, source: str, now: float) -> None:
        """What this origin told was none: it is not listened to for a lease."""
        self._refused = {other: until for other, until in self._refused.items() if until > now}
        self._refused[source] = now + self.network.manifest.timing.lease

    async def run(self) -> None:
        """Ask once per lease, not all peers at once, until cancelled."""
        share = int(self.network.identity.public_key[:8], 16) / 16**8
        turn = 0
        while True:
            await asyncio.sleep(self.network.manifest.timing.lease * (0.75 + 0.5 * share))
            turn += 1
            await self._ask_around(turn)

    async def _ask_around(self, turn: int) -> None:
        """The coordinators; one other peer when none of them answers, so that news spread without them too."""
        for peer, addresses in self.network.coordinators:
            if await self._ask(peer, addresses):
                return
        for peer, addresses in await self._another(turn):
            await self._ask(peer, addresses)

    async def _ask(self, peer: str, addresses: tuple[str, ...]) -> bool:
        """Whether it answered."""
        try:
            run, version = await version_at(self.network.transport, peer, addresses)
        except ConnectionError as error:
            log.debug("cannot ask %s for its manifest's version: %s", peer, error)
            return False
        if run == self.live().run_id and version > self.live.version:
            await self._fetch(peer, addresses)
        return True

    async def _another(self, turn: int) -> list[tuple[str, tuple[str, ...]]]:
        """Each time another peer of those that the DHT shows."""
        found: list[NodeRecord] = []
        try:
            keys = node_keys(self.live().run_id)
            for records in await asyncio.gather(*(read_records(self.network.transport, key) for key in keys)):
                found += [record for record, _ in records if isinstance(record, NodeRecord)]
        except ConnectionError:
            return []
        others = [record for record in found if record.peer_id != self.network.identity.peer_id and record.state != "left"]
        if not others:
            return []
        chosen = others[turn % len(others)]
        return [(chosen.peer_id, chosen.addresses)]

    async def _fetch(self, peer: str, addresses: tuple[str, ...]) -> bool:
        """Whether the peer served a newer version."""
        async with self._fetching:
            try:
                newer = await fetch_newer(self.network.transport, self.live, peer, addresses)
            except (LutetiaError, ConnectionError) as error:
                log.warning("peer %s offers a manifest that is refused: %s", peer, error)
                return False
        if newer:
            self._heard()
        return newer
