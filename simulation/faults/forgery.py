"""Forged records, sent to the replicas' real checks. Needs a signed setting."""

from __future__ import annotations

import json

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import ClaimRecord, claim_key, seal
from lutetia.simulation.interfaces import World
from lutetia.simulation.network.dht import SimulatedRecord

KINDS = ("unbounded", "future", "foreign", "prolonged", "oversized", "unknown field")


def forge(world: World, liar: int, victim: int, kind: str) -> None:
    """`liar` sends every replica a forged claim of this kind on the victim's shard (or on shard 0), without its own check."""
    source, target = world.nodes[liar], world.nodes[victim]
    assert source.machine.identity
    assert target.machine.identity
    shard = target.state.work.shard if target.state.work else 0
    now, lease, key = world.queue.now, world.config.lease, claim_key(world.manifest.run_id, shard)
    record = ClaimRecord(
        run=world.manifest.run_id, owner=source.machine.owner, issued=now, shard=shard, epoch=0, samples=0, state="training"
    )  # fmt: skip
    expires, owner = now + lease, source.machine.owner
    identity: Identity = source.machine.identity
    match kind:
        case "unbounded":
            expires = now + 365 * 86400
        case "future":
            record, expires = record.model_copy(update={"issued": now + 3600}), now + 3600 + lease
        case "foreign":  # the victim's claim, released by the liar
            owner = target.machine.owner
            record = record.model_copy(update={"owner": owner, "state": "released"})
            expires = now + 2 * lease
    sealed = seal(record, identity, expires)
    if kind == "prolonged":  # a real claim, published again with a later expiry
        expires += 10 * lease
    elif kind == "oversized":
        sealed = sealed[:-1] + b" " * 5000 + b"}"
    elif kind == "unknown field":
        document = json.loads(sealed)
        document["record"]["priority"] = 9
        sealed = json.dumps(document).encode()
    world.dht.force_store(source, key, owner, SimulatedRecord(record, expires, sealed, world.queue.cause))
