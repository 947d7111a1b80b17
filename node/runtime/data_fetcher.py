"""Fetches the parts of the held slot's data while it is trained, in the order in which its batches need them.

Under a disk limit parts that are used later make room for those that are used sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import numpy as np

from lutetia.models.data.parts.index import PartSpec, ShardIndex
from lutetia.models.data.parts.order import next_uses, to_fetch
from lutetia.node.machine import messages as m
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.protocol.claims import shard_and_lane
from lutetia.system.errors import DiskError, LutetiaError

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Parts that are fetched at the same time: each takes a connection of its own."""
LOOK_SECONDS = 10.0
"""Seconds after which it is looked again whether a part is missing: training goes on, and parts may have been removed."""


class DataFetcher:
    """A service beside a device's shell. `run` until it is cancelled."""

    def __init__(self, shell: DeviceShell) -> None:
        self.shell = shell
        self._failures = 0

    async def run(self) -> None:
        """Fetch what is missing; look again when the node's state or the trainer's place has changed, or after a failure."""
        while True:
            self.shell.data_wanted.clear()
            try:
                busy = await self.fetch_some()
                self._failures = 0
            except (LutetiaError, ConnectionError) as error:
                await asyncio.sleep(self._pause_after(error))
            else:
                if not busy:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_SECONDS):
                            await self.shell.data_wanted.wait()

    async def fetch_some(self) -> bool:
        """Fetch the next missing parts, at most AT_ONCE. Returns whether it fetched any."""
        shell, work = self.shell, self.shell.state.work
        if work is None or shell.state.phase not in ("training", "draining") or shell.state.disk_full_since is not None:
            return False
        index = await asyncio.to_thread(shell.workspace.data.index, shell.workspace.store, shell.workspace.shard_of(work.shard))
        if index is None:
            return False
        parts = await asyncio.to_thread(self._next_parts, work.shard, index)
        fetches = [asyncio.create_task(self._fetch(work.shard, part)) for part in parts]
        try:
            for fetch in asyncio.as_completed(fetches):
                await fetch
                await shell.trainer.data_arrived()
        finally:
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)
        return bool(parts)

    def _next_parts(self, slot: int, index: ShardIndex) -> list[PartSpec]:
        """The next parts to fetch, after room was made for them; none if all that fit are here. Blocks on the disk."""
        workspace = self.shell.workspace
        shard, lane = shard_and_lane(slot)
        uses = next_uses(workspace.manifest, shard, index, self._samples(slot), lane)
        workspace.set_next_use(slot, index, uses)
        here = np.array([workspace.store.has(part.blob.digest) for part in index.parts])
        missing = to_fetch(uses, here)[:AT_ONCE]
        keep = workspace.needed(slot, workspace.known_base(slot))
        for count in (len(missing), 1) if missing else ():
            last = uses[missing[count - 1]]
            sooner = {part.blob.digest for part, use in zip(index.parts, uses, strict=True) if use <= last}
            need = sum(index.parts[number].blob.size for number in missing[:count])
            workspace.make_room(need, {*keep, *sooner})
            if workspace.has_room(need):
                return [index.parts[number] for number in missing[:count]]
        if missing and uses[missing[0]] < workspace.soon:
            workspace.store.check_room(index.parts[missing[0]].blob.size)  # raises, with the limit to raise
        return []

    def _samples(self, slot: int) -> int:
        """Samples of the shard's budget that are trained in this lane, as far as this process knows."""
        report, manifest = self.shell.trainer.report, self.shell.manifest
        if report and report.steps:
            return report.epoch * manifest.checkpoint_samples + report.step * manifest.optimisation.batch
        return self.shell.tasks.places.get(slot, 0)

    async def _fetch(self, slot: int, part: PartSpec) -> None:
        await self.shell.network.fetch(part.blob, listed_by=self.shell.workspace.shard_of(slot).train)

    def _pause_after(self, error: Exception) -> float:
        """Report a failure; returns the seconds until the next attempt.

        A trainer that waits for the part ends if that takes too long, and the machine then decides.
        """
        self._failures += 1
        text = " ".join(str(error).split())
        if isinstance(error, DiskError):
            self.shell.feed(m.DiskFull(time.time(), text))
        pause = self.shell.rules.backoff(self._failures, "data")
        log.log(logging.WARNING if self._failures == 1 else logging.DEBUG, "data: %s; trying again in %.0f s", text, pause)
        return pause
