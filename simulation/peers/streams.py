"""What a node does over streams, in virtual time: fetch a shard and its accepted state, offer a checkpoint."""

from __future__ import annotations

from typing import Any

from lutetia.node.machine import messages as m
from lutetia.node.pacing import CHECKPOINT_RECORD_SECONDS
from lutetia.protocol.claims import shard_and_lane
from lutetia.protocol.rpc.checkpoint_offer import OFFER_TIMEOUT, OfferReply
from lutetia.protocol.transport.base import DIAL_TIMEOUT
from lutetia.simulation.interfaces import Coordinator, Node
from lutetia.simulation.network.blobs import SimulatedDelay
from lutetia.system.errors import UnreachableError


def shard_parcel(shard: int) -> str:
    return f"the data of shard {shard}"


async def sync_round(peer: Node, action: m.Sync, boot: int) -> tuple[Any, ...]:
    """As `node.runtime.tasks.sync`: fetch the data and the accepted state, and find own checkpoints that descend from it."""
    world, shard, epoch, checkpoint = peer.world, action.shard, action.epoch, action.checkpoint
    try:
        await world.blobs.fetch(peer.host, shard_parcel(shard_and_lane(shard)[0]), world.config.shard_bytes, world.coordinators)
        if epoch:
            assert checkpoint is not None
            accepted = peer.network.acceptances.get(shard)
            known = accepted is not None and (accepted.epoch, accepted.checkpoint) == (epoch, checkpoint)
            if not known and not world.blobs.has(checkpoint, peer.host):
                raise UnreachableError(f"the acceptance of epoch {epoch} of shard {shard} is not in the DHT; waiting for it")
            size = world.config.weights_bytes + world.config.state_bytes
            await world.blobs.fetch(peer.host, checkpoint, size, world.coordinators)
        if peer.disk_full:
            raise UnreachableError("no space left on device")
    except UnreachableError as error:
        await SimulatedDelay(0.05)
        return m.SyncFailed, shard, str(error)
    await SimulatedDelay(0.05)
    return m.SyncDone, shard, epoch, checkpoint, peer.trainer.pending(shard, epoch, checkpoint)


async def offer_round(peer: Node, candidate: m.OwnCheckpoint, boot: int) -> tuple[m.Verdict, str, float | None]:
    """As `node.runtime.tasks.publish` and `network.offer`: publish the record, then offer it to the coordinators in turn."""
    world = peer.world
    record = peer.trainer.kept(candidate.shard, candidate.digest)
    await SimulatedDelay(0.02)
    if record is None:
        return "invalid", f"checkpoint {candidate.epoch} of shard {candidate.shard} is no longer on disk", None
    if not peer.answering or boot != peer.boot:
        return "unreachable", "this node is offline", None
    record = record.model_copy(update={"issued": peer.clock()})
    if peer.network.record_due(candidate.digest, CHECKPOINT_RECORD_SECONDS):
        peer.network.publish(record, record.key(), peer.network.limits.longest("checkpoint"))
        world.costs.stored("provider", world.config.replicas, world.dht.size, 3)
    for coordinator in world.coordinators:
        if (reply := await _offer(peer, coordinator, record, boot)) is not None:
            verdict = "quarantined" if reply.check == "quarantine" else reply.verdict
            return verdict, " ".join(reply.text.split()), reply.retry_after
    return "unreachable", "no coordinator answered", None


async def _offer(peer: Node, coordinator: Coordinator, record: Any, boot: int) -> OfferReply | None:
    """Dial, send, and wait for the answer. None: unreachable, or the connection broke before the answer."""
    links, host = peer.world.links, peer.host
    if not links.dials(host, coordinator):
        await SimulatedDelay(DIAL_TIMEOUT)
        return None
    outward = links.stream(host, coordinator) + links.stream(coordinator, host) + links.stream(host, coordinator, 2000)
    await SimulatedDelay(min(outward, OFFER_TIMEOUT))
    if outward >= OFFER_TIMEOUT or boot != peer.boot or not links.dials(host, coordinator):
        return None
    peer.world.costs.offer_exchanged()
    if not coordinator.serving:
        return None
    life = peer.network.limits.longest("checkpoint")
    sealed = peer.network.sealed(record, record.issued + life) if peer.machine.identity else b""
    reply = coordinator.offered(record, sealed, life)
    back = links.stream(coordinator, host)
    await SimulatedDelay(back)
    return reply if boot == peer.boot and links.together(host.index, coordinator.index) and coordinator.running else None
