"""Answers the owner's requests from other machines: each is the next version of the manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.intake.rate_limits import RateWindow
from lutetia.coordinator.runtime.manifest_watch import ManifestWatch
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.rpc.owner_request import OwnerAnswer, open_request, serve_owner
from lutetia.protocol.transport.base import Stream, Transport

_log = logging.getLogger(__name__)

REQUESTS_PER_MINUTE = 12


@dataclass
class OwnerService:
    """`pace` bounds how often one address asks. `accepted_epochs`: most accepted epochs of any shard."""

    transport: Transport
    live: LiveManifest
    watch: ManifestWatch
    accepted_epochs: Callable[[], int]
    pace: RateWindow = field(default_factory=lambda: RateWindow(REQUESTS_PER_MINUTE))

    async def serve(self) -> None:
        await serve_owner(self.transport, self._carry, lambda: self.live.version, self._admit)

    def _admit(self, stream: Stream) -> str:
        wait = self.pace.wait(stream.origin, self.transport.now())
        return f"too many requests from this address; ask again in {wait:.0f} s" if wait else ""

    async def _carry(self, data: bytes) -> OwnerAnswer:
        manifest = self.live()
        newer = open_request(data, manifest, self.transport.now(), manifest.timing.maximum_clock_skew)
        await self.watch.take(newer, self.accepted_epochs())
        _log.info("the owner asked for version %d of the manifest from another machine", self.live.version)
        return OwnerAnswer(done=self.live.version == newer.manifest.version, version=self.live.version)
