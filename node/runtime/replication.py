"""Keeps copies of accepted checkpoints that too few peers hold: looks, decides by `seeding`, fetches and says so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.replication_policy import WANTED, PeerRing, Replica, UnderReplicated, affordable, outdated
from lutetia.node.runtime.workspace import Workspace
from lutetia.protocol.rpc.accepted_checkpoints import HeldCheckpoint, live_nodes, newest_of
from lutetia.protocol.schema.records import NodeRecord, node_bucket
from lutetia.system.errors import LutetiaError
from lutetia.system.files import disk_errors, write_atomic

log = logging.getLogger(__name__)

_SEEDS = TypeAdapter(list[Replica])
_LOOKS_AT_ONCE = 8
_FREE_SHARE = 0.05
"""Of the disk, which seeds never take; other people's files come first."""


@dataclass
class Replicator:
    """`seeds` are what this box keeps for others, by shard; they survive a restart in `path`, with those that are still coming.

    Nothing is fetched before `path` names it: so whatever arrives of a copy is either kept, or removed once it is outdated.
    """

    network: NodeNetwork
    material: Workspace
    path: Path
    seeds: dict[int, Replica] = field(default_factory=dict)
    _coming: dict[int, Replica] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, ValidationError):
            for seed in _SEEDS.validate_json(self.path.read_bytes()):
                (self.seeds if self._whole(seed) else self._coming)[seed.shard] = seed

    def held(self) -> dict[str, int]:
        """Blobs that are kept for others, and their sizes."""
        refs = [ref for seed in self.seeds.values() for ref in (seed.weights, seed.state)]
        return {ref.digest: ref.size for ref in refs if self.material.store.has(ref.digest)}

    async def tend(self, nodes: Sequence[NodeRecord]) -> None:
        """One round: forget what is outdated, keep what is due. `nodes`: those online, as far as they may come before us."""
        try:
            with disk_errors(self.path):
                await self._look(nodes)
        except (LutetiaError, ConnectionError) as error:
            log.info("cannot look after accepted checkpoints now: %s", error)

    async def _look(self, nodes: Sequence[NodeRecord]) -> None:
        manifest, own = self.network.manifest, self.network.identity.public_key
        ring, now = PeerRing(manifest.run_id, nodes), self.network.transport.now()
        held = await self._held_by(sorted({*ring.looked_at(own, len(manifest.shards)), *self.seeds, *self._coming}))
        thin = self._thin(await self._online(held, {node.owner for node in nodes}))
        newest = {shard: found.seed for shard, found in thin.items()}
        for seed in outdated([*self.seeds.values(), *self._coming.values()], newest):
            await self._forget(seed, newest[seed.shard])
        heartbeat = manifest.timing.heartbeat
        due = [found for found in thin.values() if ring.is_due(own, found, now, heartbeat)]
        if due:
            for seed in affordable(due, await asyncio.to_thread(self._spare)):
                await self._keep(seed)

    async def _held_by(self, shards: Iterable[int]) -> dict[int, HeldCheckpoint]:
        """The newest accepted checkpoints of `shards`, and who says that it holds them."""
        places, found = asyncio.Semaphore(_LOOKS_AT_ONCE), {}

        async def one(shard: int) -> None:
            async with places:
                if held := await newest_of(self.network.transport, self.network.manifest, shard):
                    found[shard] = held

        await asyncio.gather(*map(one, shards))
        return found

    async def _online(self, found: dict[int, HeldCheckpoint], known: set[str]) -> dict[int, tuple[Replica, frozenset[str]]]:
        """Of the holders those that are online; `known` are. A box counts itself only while its copy is whole."""
        own, manifest = self.network.identity.public_key, self.network.manifest
        strangers = {node_bucket(owner) for held in found.values() for owner in held.holders if owner not in known}
        known = known | {node.owner for node in await live_nodes(self.network.transport, manifest.run_id, strangers)}
        online = {}
        for shard, held in found.items():
            seed = Replica.of(held.acceptance)
            holders = known & set(held.holders)
            online[shard] = seed, frozenset(holders if self._whole(seed) else holders - {own})
        return online

    def _thin(self, online: dict[int, tuple[Replica, frozenset[str]]]) -> dict[int, UnderReplicated]:
        """With how long each has had too few holders."""
        now, known, self._since = self.network.transport.now(), self._since, {}
        for seed, holders in online.values():
            if len(holders) < WANTED:
                self._since[seed.checkpoint] = known.get(seed.checkpoint, now)
        return {
            shard: UnderReplicated(seed, holders, self._since.get(seed.checkpoint, now))
            for shard, (seed, holders) in online.items()
        }

    async def _keep(self, seed: Replica) -> None:
        """Fetch it and say that we hold it; what arrived of it stays for the next attempt."""
        if self._coming.get(seed.shard) != seed:
            await asyncio.to_thread(self._save, seed)
            self._coming[seed.shard] = seed
        refs = {ref.digest: ref for ref in (seed.weights, seed.state)}
        need = sum(ref.size for ref in refs.values() if not self.material.store.has(ref.digest))
        await asyncio.to_thread(self.material.make_room, need, {*self.material.held(), *self.held(), *refs})
        for ref in refs.values():
            await self.network.fetch(ref)
        self.seeds[seed.shard] = self._coming.pop(seed.shard)
        await self.network.announce([seed.weights.digest, seed.state.digest])
        log.info("keeping a copy of epoch %d of shard %d: fewer than %d other peers do", seed.epoch, seed.shard, WANTED)

    async def _forget(self, seed: Replica, newer: Replica) -> None:
        """Unless this box's own work rests on it. The room first: on a full disk nothing can be noted before."""
        own = await asyncio.to_thread(self.material.held)
        for ref in (seed.weights, seed.state):
            if ref.digest not in own and ref not in (newer.weights, newer.state):
                await asyncio.to_thread(self.material.store.remove, ref.digest)
        for known in (self.seeds, self._coming):
            if known.get(seed.shard) == seed:
                del known[seed.shard]
        await asyncio.to_thread(self._save)

    def _spare(self) -> int:
        """Bytes that copies may take: what the disk limit leaves beside own work, and never the last of the disk."""
        usage = shutil.disk_usage(self.material.store.root)
        free = max(0, usage.free - int(_FREE_SHARE * usage.total))
        limit = self.material.store.limit_bytes
        if limit is None:
            return free
        return min(free, max(0, limit - sum({**self.material.held(), **self.held()}.values())))

    def _whole(self, seed: Replica) -> bool:
        return all(self.material.store.has(ref.digest) for ref in (seed.weights, seed.state))

    def _save(self, *more: Replica) -> None:
        seeds = [*self.seeds.values(), *self._coming.values(), *more]
        write_atomic(self.path, json.dumps([seed.model_dump(mode="json") for seed in seeds]).encode())
