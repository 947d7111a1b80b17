"""Messages and bytes that the swarm sends, by kind; record sizes are those of really sealed records."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
    CheckpointRecord,
    ClaimRecord,
    Hardware,
    NodeRecord,
    ProviderRecord,
    QuarantineRecord,
    Record,
    ResetRecord,
    seal,
)

QUESTION_BYTES = 120
"""Assumed for one DHT request without a value (key, peer id, protobuf and noise framing)."""
_BUCKET = 20


@lru_cache(maxsize=1)
def record_bytes() -> dict[str, int]:
    """Sealed size of a typical record of each kind."""
    peer, ref = Identity.derived("size"), BlobRef(digest="ab" * 32, size=10**9)
    run, now = "ab" * 32, 1_800_000_000.123456
    common = {"run": run, "owner": peer.public_key, "issued": now}
    place = {"peer_id": peer.peer_id, "addresses": (f"/ip4/203.0.113.7/tcp/45678/p2p/{peer.peer_id}",)}
    records: list[Record] = [
        NodeRecord(
            **common, **place, hardware=Hardware(device="cuda", name="some card", memory_bytes=10**10, cores=8),
            samples_per_second=12.5, software="0.1.0", state="training", shard=17,
        ),
        ClaimRecord(**common, shard=17, epoch=12, samples=9600, state="training"),
        CheckpointRecord(
            **common, **place, shard=17, epoch=12, parent="cd" * 32, weights=ref, state=ref, trace=ref, samples=9600,
            loss=0.123456,
        ),
        ProviderRecord(**common, **place, blob=ref.digest),
        ResetRecord(**common, shard=17, term=1),
        QuarantineRecord(**common, peers=(peer.public_key,)),
        AcceptanceRecord(
            **common, shard=17, epoch=12, checkpoint="cd" * 32, parent="ef" * 32, weights=ref, state=ref, samples=9600,
            author=peer.public_key, tenure_until=now, holdout_loss=0.123456,
        ),
    ]  # fmt: skip
    return {record.kind: len(seal(record, peer, now + 60)) for record in records}


@dataclass
class Costs:
    """Counts since the start, by kind: kind of record, `look`, `list`, `watch` (the coordinator's reads), `offer`, …"""

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    shards_seen: int = 0
    """How often a node looked at a shard."""
    judged: int = 0
    """Number of stimuli of the judge."""
    received: float = 0.0
    """Bytes of blobs that coordinators fetched."""
    served: float = 0.0
    """Bytes of blobs that nodes fetched from coordinators."""

    def stored(self, kind: str, replicas: int, members: int, times: int = 1) -> None:
        """One record published: a lookup, then request and answer for each replica."""
        hops = lookup_hops(members)
        self.messages[kind] += 2 * (hops + replicas) * times
        self.bytes[kind] += times * (2 * hops * QUESTION_BYTES + replicas * (record_bytes()[kind] + QUESTION_BYTES))

    def looked(self, shards: int, claims: int, replicas: int, members: int, kind: str = "look") -> None:
        """One look at claims and acceptance of `shards`, with `claims` claims in all."""
        hops = lookup_hops(members)
        sizes = record_bytes()
        self.shards_seen += shards if kind == "look" else 0
        self.messages[kind] += 4 * shards * (hops + replicas)
        answers = replicas * (claims * sizes["claim"] + shards * sizes["acceptance"])
        self.bytes[kind] += 2 * shards * (2 * hops + replicas) * QUESTION_BYTES + answers

    def listed(self, buckets: int, nodes: int, replicas: int, members: int, kind: str = "list") -> None:
        """One read of `nodes` node records in so many buckets, one lookup each."""
        steps = lookup_hops(members) + replicas
        self.messages[kind] += 2 * buckets * steps
        self.bytes[kind] += 2 * buckets * steps * QUESTION_BYTES + replicas * nodes * record_bytes()["node"]

    def moved(self, size: float) -> None:
        """`size` bytes of a blob were transferred."""
        self.messages["blob"] += 1 + int(size) // (1 << 20)
        self.bytes["blob"] += int(size)

    def audit_exchanged(self) -> None:
        """One audit request or report, and its answer."""
        self.messages["audit"] += 2
        self.bytes["audit"] += 2 * QUESTION_BYTES

    def offer_exchanged(self) -> None:
        self.messages["offer"] += 2
        self.bytes["offer"] += record_bytes()["checkpoint"] + 200


@lru_cache(maxsize=1024)
def lookup_hops(members: int) -> int:
    """Requests of a Kademlia lookup until the replicas are known: about log2(members / bucket size) (Maymounkov 2002)."""
    return max(0, math.ceil(math.log2(members / _BUCKET))) if members > _BUCKET else 0
