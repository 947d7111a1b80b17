"""Tells the owner of red lines while the run is served. What was told is kept on disk: a restart tells nothing twice."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lutetia.coordinator.alerts.causes import MOST_CAUSES, Told, causes_of, look
from lutetia.coordinator.alerts.channels import channels_of, deliver
from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.coordinator.settings import AlertSettings
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import DiskError, plain
from lutetia.system.files import write_atomic

_log = logging.getLogger(__name__)

LOOK_SECONDS = 30.0


@dataclass
class OwnerAlerts:
    """`path` keeps what was told. A channel that fails is logged once, and gets what it missed with the next message."""

    settings: AlertSettings
    status: Callable[[], SwarmStatus]
    manifest: Callable[[], Manifest]
    path: Path
    bootstrap: Callable[[], Sequence[BootstrapFault]] = lambda: ()
    told: Told = field(default_factory=Told)
    _missed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _failing: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.told = read_told(self.path)
        if channels := channels_of(self.settings):
            _log.info("the owner is told of red lines by %s", ", ".join(channels))

    async def run(self) -> None:
        """Look until cancelled."""
        while channels_of(self.settings):
            await self.look_once(await asyncio.to_thread(_free, self.path.parent))
            await asyncio.sleep(LOOK_SECONDS)

    async def look_once(self, disk_free: int) -> None:
        """Look at the status, and tell what is new on all channels at once."""
        status, manifest = self.status(), self.manifest()
        causes = causes_of(status, manifest.timing.tenure, manifest.expires, disk_free, self.bootstrap())
        before, (self.told, lines) = self.told, look(self.told, causes, status.time)
        if self.told.known != before.known:
            await self._keep()
        if lines:
            names = channels_of(self.settings)
            await asyncio.gather(*(self._tell(name, manifest.name, lines) for name in names))

    async def _tell(self, channel: str, run: str, lines: tuple[str, ...]) -> None:
        missed = self._missed.pop(channel, ())
        failure = await deliver(channel, self.settings, run, [plain(line) for line in (*missed, *lines)][-MOST_CAUSES:])
        if not failure:
            self._failing.discard(channel)
            return
        self._missed[channel] = (*missed, *lines)[-MOST_CAUSES:]
        if channel not in self._failing:
            self._failing.add(channel)
            _log.error("the owner was not told by %s: %s; it is tried again with the next message", channel, plain(failure))

    async def _keep(self) -> None:
        document = {"known": dict(self.told.known)}
        try:
            await asyncio.to_thread(write_atomic, self.path, canonical(document))
        except DiskError as error:
            _log.debug("what the owner was told is not kept: %s", error)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def read_told(path: Path) -> Told:
    """What the owner was told before this start; nothing if it cannot be read."""
    try:
        known = json.loads(path.read_bytes())["known"]
        return Told({str(name): None if at is None else float(at) for name, at in list(known.items())[: 2 * MOST_CAUSES]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Told()
