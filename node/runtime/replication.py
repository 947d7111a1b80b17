"""Keeps copies of accepted checkpoints that too few peers hold: looks, decides by `replication_policy`, fetches, announces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.replication_policy import COPIES_WANTED, PeerRing, Replica, UnderReplicated, affordable, outdated
from lutetia.node.runtime.workspace import Workspace
from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.blobs.holder_proofs import HolderProofs
from lutetia.protocol.blobs.worker import Provider
from lutetia.protocol.rpc.accepted_checkpoints import HeldCheckpoint, live_nodes, newest_of
from lutetia.protocol.schema.records import NodeRecord, node_bucket
from lutetia.system.errors import LutetiaError
from lutetia.system.files import disk_errors, write_atomic

log = logging.getLogger(__name__)

_REPLICAS = TypeAdapter(list[Replica])
_LOOKS_AT_ONCE = 8
COPIED_BYTES = 2
"""A copy is fetched, and then served: so many of its bytes count against the cap on bytes."""
_FREE_SHARE = 0.05
"""Share of the disk that copies leave free; the volunteer's own files come first."""


@dataclass
class Replicator:
    """The copies that this node keeps for other peers.

    The file `path` lists them, and those that are still being fetched, across restarts. A copy is listed before any of it is
    fetched, so that every fetched blob is either kept or removed once it is outdated.
    """

    network: NodeNetwork
    workspace: Workspace
    path: Path
    replicas: dict[int, Replica] = field(default_factory=dict)
    """Complete copies, by shard."""
    _incomplete: dict[int, Replica] = field(default_factory=dict)
    _rare_since: dict[str, float] = field(default_factory=dict)
    _proofs: HolderProofs = field(default_factory=HolderProofs)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, ValidationError):
            for replica in _REPLICAS.validate_json(self.path.read_bytes()):
                (self.replicas if self._is_complete(replica) else self._incomplete)[replica.shard] = replica

    def held(self) -> dict[str, int]:
        """Blobs that are kept for other peers, and their sizes in bytes."""
        refs = [ref for replica in self.replicas.values() for ref in (replica.weights, replica.state)]
        return {ref.digest: ref.size for ref in refs if self.workspace.store.has(ref.digest)}

    async def run_round(self, nodes: Sequence[NodeRecord]) -> None:
        """Remove outdated copies and fetch those that are due. `nodes`: online nodes, at least those that may rank before us."""
        try:
            with disk_errors(self.path):
                await self._update(nodes)
        except (LutetiaError, ConnectionError) as error:
            log.debug("cannot check the copies of accepted checkpoints now: %s", error)

    async def _update(self, nodes: Sequence[NodeRecord]) -> None:
        manifest, owner = self.network.manifest, self.network.identity.public_key
        ring, now = PeerRing(manifest.run_id, nodes), self.network.transport.now()
        held = await self._held_by(
            sorted({*ring.shards_to_check(owner, len(manifest.shards)), *self.replicas, *self._incomplete})
        )
        rare = self._under_replicated(await self._online(held, {node.owner: node for node in nodes}))
        newest = {shard: checkpoint.replica for shard, checkpoint in rare.items()}
        for replica in outdated([*self.replicas.values(), *self._incomplete.values()], newest):
            await self._remove(replica, newest[replica.shard])
        heartbeat = manifest.timing.heartbeat
        due = [checkpoint for checkpoint in rare.values() if ring.is_due(owner, checkpoint, now, heartbeat)]
        if due:
            spare = min(await asyncio.to_thread(self._spare), self.network.spare_bytes / COPIED_BYTES)
            for replica in affordable(due, int(spare)):
                await self._fetch(replica)

    async def _held_by(self, shards: Sequence[int]) -> dict[int, HeldCheckpoint]:
        """The newest accepted checkpoint of each shard, with the peers that announce it."""
        held = await gather_bounded(
            lambda shard: newest_of(self.network.transport, self.network.manifest, shard), shards, _LOOKS_AT_ONCE
        )
        return {shard: checkpoint for shard, checkpoint in zip(shards, held, strict=True) if checkpoint}

    async def _online(
        self, checkpoints: dict[int, HeldCheckpoint], known: dict[str, NodeRecord]
    ) -> dict[int, tuple[Replica, frozenset[str]]]:
        """Each checkpoint with the online holders that answered a random chunk. `known`: nodes known to be online, by owner.

        This node counts only with a full copy.
        """
        owner, transport, run = self.network.identity.public_key, self.network.transport, self.network.manifest.run_id
        unknown = {node_bucket(holder) for held in checkpoints.values() for holder in held.holders if holder not in known}
        known = known | {node.owner: node for node in await live_nodes(transport, run, unknown)}
        online = {}
        for shard, held in checkpoints.items():
            replica = Replica.of(held.acceptance)
            others = {known[holder].peer_id: holder for holder in held.holders if holder in known and holder != owner}
            candidates = [Provider(peer_id, known[holder].addresses) for peer_id, holder in others.items()]
            proved = await self._proofs.proved(transport, candidates, [replica.weights, replica.state])
            own = {owner} if owner in held.holders and owner in known and self._is_complete(replica) else set[str]()
            online[shard] = replica, frozenset(own | {others[peer_id] for peer_id in proved})
        return online

    def _under_replicated(self, online: dict[int, tuple[Replica, frozenset[str]]]) -> dict[int, UnderReplicated]:
        """Note since when each checkpoint has had too few holders."""
        now, before, self._rare_since = self.network.transport.now(), self._rare_since, {}
        for replica, holders in online.values():
            if len(holders) < COPIES_WANTED:
                self._rare_since[replica.checkpoint] = before.get(replica.checkpoint, now)
        return {
            shard: UnderReplicated(replica, holders, self._rare_since.get(replica.checkpoint, now))
            for shard, (replica, holders) in online.items()
        }

    async def _fetch(self, replica: Replica) -> None:
        """Fetch the copy and announce it. If that fails, what has arrived stays for the next attempt."""
        if self._incomplete.get(replica.shard) != replica:
            await asyncio.to_thread(self._save, replica)
            self._incomplete[replica.shard] = replica
        refs = {ref.digest: ref for ref in (replica.weights, replica.state)}
        need = sum(ref.size for ref in refs.values() if not self.workspace.store.has(ref.digest))
        await asyncio.to_thread(self.workspace.make_room, need, {*self.workspace.held(), *self.held(), *refs})
        for ref in refs.values():
            await self.network.fetch(ref)
        self.replicas[replica.shard] = self._incomplete.pop(replica.shard)
        await self.network.announce([replica.weights.digest, replica.state.digest])
        log.debug(
            "keeping a copy of epoch %d of shard %d: fewer than %d other peers do", replica.epoch, replica.shard, COPIES_WANTED
        )

    async def _remove(self, replica: Replica, newer: Replica) -> None:
        """Remove the copy's blobs unless own work needs them. Blobs go first, because a full disk takes no new list before."""
        needed = await asyncio.to_thread(self.workspace.held)
        for ref in (replica.weights, replica.state):
            if ref.digest not in needed and ref not in (newer.weights, newer.state):
                await asyncio.to_thread(self.workspace.store.remove, ref.digest)
        for known in (self.replicas, self._incomplete):
            if known.get(replica.shard) == replica:
                del known[replica.shard]
        await asyncio.to_thread(self._save)

    def _spare(self) -> int:
        """Bytes that copies may take: what the disk limit leaves beside own work, without the last _FREE_SHARE of the disk."""
        usage = shutil.disk_usage(self.workspace.store.root)
        free = max(0, usage.free - int(_FREE_SHARE * usage.total))
        limit = self.workspace.store.limit_bytes
        if limit is None:
            return free
        return min(free, max(0, limit - sum({**self.workspace.held(), **self.held()}.values())))

    def _is_complete(self, replica: Replica) -> bool:
        return all(self.workspace.store.has(ref.digest) for ref in (replica.weights, replica.state))

    def _save(self, *more: Replica) -> None:
        replicas = [*self.replicas.values(), *self._incomplete.values(), *more]
        write_atomic(self.path, json.dumps([replica.model_dump(mode="json") for replica in replicas]).encode())
