"""Reads who is online: what a node looks after while it stands by, and what it keeps for others, follows from it."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import islice

from lutetia.node.machine import messages as m
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.services.standby_policy import WAVES, buckets_before, enough, own_duty, pace
from lutetia.protocol.rpc.accepted_checkpoints import live_nodes
from lutetia.protocol.schema.records import NodeRecord
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)


class Membership:
    """A companion of the shell. `copies`: also keep copies of accepted checkpoints that too few peers hold."""

    def __init__(self, shell: NodeShell, *, copies: bool) -> None:
        self.shell, self.copies = shell, copies
        self._seeding: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Read twice per lease, less often in a large swarm, until cancelled."""
        wait = self.shell.network.manifest.timing.lease / 2
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(wait)
                try:
                    wait = await self._read(group)
                except (LutetiaError, ConnectionError) as error:
                    log.info("cannot read who is online now: %s", error)

    async def _read(self, group: asyncio.TaskGroup) -> float:
        """Read once, and begin what follows. Returns after how many seconds to read again."""
        network, now = self.shell.network, time.time()
        manifest, owner = network.manifest, network.identity.public_key
        nodes = await self._nodes(manifest.run_id, owner)
        lease = manifest.timing.lease
        wait = lease / 2 * pace(len(nodes))
        shards = own_duty(manifest.run_id, owner, nodes, len(manifest.shards), int(now // lease))
        self.shell.feed(m.WatchedShardsSet(now, shards, now + 2 * wait))
        if self.copies and (self._seeding is None or self._seeding.done()):
            self._seeding = group.create_task(self.shell.seeder.tend(nodes))
        return wait

    async def _nodes(self, run: str, owner: str) -> list[NodeRecord]:
        """The node records of our own bucket, and of those before it while they may matter to us."""
        nodes: list[NodeRecord] = []
        buckets = iter(buckets_before(owner))
        for wave in WAVES:
            nodes += await live_nodes(self.shell.network.transport, run, islice(buckets, wave))
            if enough(run, owner, nodes):
                break
        return nodes
