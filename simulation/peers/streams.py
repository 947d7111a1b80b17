"""What a node does over streams, in virtual time: fetch a shard and its accepted state, offer a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lutetia.node.machine import messages as m
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.simulation.network.blobs import SimulatedDelay
from lutetia.system.errors import UnreachableError

if TYPE_CHECKING:
    from lutetia.simulation.peers.coordinator import SimulatedCoordinator
    from lutetia.simulation.peers.node import SimulatedNode

DIAL_TIMEOUT = 3.0
_ANSWER_TIMEOUT = 10.0
_RECORD_AGAIN = 600.0
_OFFER_LIFE = 6 * 3600.0


def shard_parcel(shard: int) -> str:
    return f"the data of shard {shard}"


async def sync_round(peer: SimulatedNode, action: m.Sync, boot: int) -> tuple[Any, ...]:
    """As `node.runtime.tasks.sync`: the data, the accepted state, and what of our own stands on it."""
    world, shard, epoch, checkpoint = peer.world, action.shard, action.epoch, action.checkpoint
    try:
        await world.goods.fetch(peer, shard_parcel(shard), world.setting.shard_bytes, world.offices)
        if epoch:
            assert checkpoint is not None
            accepted = peer.network.acceptances.get(shard)
            known = accepted is not None and (accepted.epoch, accepted.checkpoint) == (epoch, checkpoint)
            if not known and not world.goods.has(checkpoint, peer):
                raise UnreachableError(f"the acceptance of epoch {epoch} of shard {shard} is not in the DHT now; waiting for it")
            size = world.setting.weights_bytes + world.setting.state_bytes
            await world.goods.fetch(peer, checkpoint, size, world.offices)
        if peer.disk_full:
            raise UnreachableError("no space left on device")
    except UnreachableError as error:
        await SimulatedDelay(0.05)
        return m.SyncFailed, shard, str(error)
    await SimulatedDelay(0.05)
    return m.SyncDone, shard, epoch, checkpoint, peer.hands.pending(shard, epoch, checkpoint)


async def offer_round(peer: SimulatedNode, candidate: m.OwnCheckpoint, boot: int) -> tuple[m.Verdict, str, float | None]:
    """As `node.runtime.tasks.publish` and `node.runtime.network.offer`: file the record, then offer it to the coordinators in
    turn.
    """
    world = peer.world
    record = peer.hands.kept(candidate.shard, candidate.digest)
    await SimulatedDelay(0.02)
    if record is None:
        return "invalid", f"checkpoint {candidate.epoch} of shard {candidate.shard} is not on disk any more", None
    if not peer.answering or boot != peer.boot:
        return "unreachable", "this box is offline", None
    record = record.model_copy(update={"issued": peer.clock()})
    if peer.network.first_filing(candidate.digest, _RECORD_AGAIN):
        peer.network.file(record, record.key(), _OFFER_LIFE)
        world.costs.stored("provider", world.setting.replicas, world.dht.size, 3)
    for office in world.offices:
        if (reply := await _offer(peer, office, record, boot)) is not None:
            verdict = "quarantined" if reply.check == "quarantine" else reply.verdict
            return verdict, " ".join(reply.text.split()), reply.retry_after
    return "unreachable", "no coordinator answered", None


async def _offer(peer: SimulatedNode, office: SimulatedCoordinator, record: Any, boot: int) -> OfferReply | None:
    """Dial, send, and wait for the answer. None: nobody there, or the answer is lost with the line."""
    lines = peer.world.lines
    if not lines.dials(peer, office):
        await SimulatedDelay(DIAL_TIMEOUT)
        return None
    there = lines.stream(peer, office) + lines.stream(office, peer) + lines.stream(peer, office, 2000)
    await SimulatedDelay(min(there, _ANSWER_TIMEOUT))
    if there >= _ANSWER_TIMEOUT or boot != peer.boot or not lines.dials(peer, office):
        return None
    peer.world.costs.offered()
    if not office.serving:
        return None
    reply = office.offered(
        record, peer.network.sealed(record, record.issued + _OFFER_LIFE) if peer.box.identity else b"", _OFFER_LIFE
    )
    back = lines.stream(office, peer)
    await SimulatedDelay(back)
    return reply if boot == peer.boot and lines.together(peer.index, office.index) and office.running else None
