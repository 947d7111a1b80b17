"""Reads which nodes are online, and derives the shards to watch and the copies to keep from it."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import islice

from lutetia.node.machine import messages as m
from lutetia.node.machine.state import NodeRules
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.services.standby_policy import (
    WAVES,
    buckets_before,
    has_enough_standbys,
    read_pause,
    shards_to_watch,
    watch_until,
)
from lutetia.protocol.rpc.accepted_checkpoints import live_nodes
from lutetia.protocol.schema.records import NodeRecord
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)


class Membership:
    """A service beside the shell. `copies`: also keep copies of accepted checkpoints that too few peers hold."""

    def __init__(self, shell: NodeShell, *, copies: bool) -> None:
        self.shell, self.copies = shell, copies
        self._replicating: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Read twice per lease, less often in a large swarm, until cancelled."""
        wait = read_pause(self.shell.network.manifest.timing.lease)
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(wait)
                if not self._needed:
                    continue
                try:
                    wait = await self._read(group)
                except (LutetiaError, ConnectionError) as error:
                    log.debug("cannot read the node records now: %s", error)

    @property
    def _needed(self) -> bool:
        """Whether this node stands by, or may keep copies: else it saves the bytes."""
        standing_by = any(device.state.phase in ("idle", "claiming") for device in tuple(self.shell.devices.values()))
        return standing_by or self.shell.network.spare_bytes > 0

    async def _read(self, group: asyncio.TaskGroup) -> float:
        """Read the node records once and act on them. Returns the seconds until the next read."""
        network, now = self.shell.network, time.time()
        manifest, owner = network.manifest, network.identity.public_key
        nodes = await self._nodes(manifest.run_id, owner)
        lease = manifest.timing.lease
        wait = read_pause(lease, len(nodes))
        slots = NodeRules.of(manifest, owner).rates_needed
        shards = shards_to_watch(manifest.run_id, owner, nodes, slots, int(now // lease))
        self.shell.feed(m.WatchedShardsSet(now, shards, watch_until(now, wait)))
        if self.copies and (self._replicating is None or self._replicating.done()):
            self._replicating = group.create_task(self.shell.replicator.run_round(nodes))
        return wait

    async def _nodes(self, run: str, owner: str) -> list[NodeRecord]:
        """Node records of our own bucket, and of earlier buckets until they show enough standbys."""
        nodes: list[NodeRecord] = []
        buckets = iter(buckets_before(owner))
        for wave in WAVES:
            nodes += await live_nodes(self.shell.network.transport, run, islice(buckets, wave))
            if has_enough_standbys(run, owner, nodes):
                break
        return nodes
