"""The signed records of the DHT. Each is small, names its own key, belongs to one owner and expires."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lutetia.protocol.schema.canonical import Frozen, canonical, digest_of
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.protocol.schema.manifest import BlobRef, Digest, PublicKey, Signature, first_problem, lease_seconds
from lutetia.protocol.schema.ticket import Address
from lutetia.system.errors import LutetiaError

MAX_RECORD_BYTES = 4096
NODE_BUCKETS = 16
MAX_QUARANTINED = 48
_REMEMBERED = 8192  # records whose signatures are known: about 20 MB
_SIGNING_DOMAIN = b"lutetia-record-1\n"

NodeState = Literal["joining", "probing", "idle", "claiming", "syncing", "training", "publishing", "paused", "draining", "left"]
Addresses = Annotated[tuple[Address, ...], Field(max_length=8)]
PeerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9]{20,80}$")]
Word = Annotated[str, Field(max_length=64)]


class RecordRefused(LutetiaError):
    """A record that must not be stored or believed; the text says why."""

    code, name = 50, "integrity"


class _Record(Frozen):
    run: Digest
    owner: PublicKey
    issued: float

    def key(self) -> str:
        raise TypeError("only a concrete record has a key")


class Hardware(Frozen):
    """What a volunteer's box offers."""

    device: Word
    name: Word = ""
    memory_bytes: int = Field(ge=0)
    cores: int = Field(ge=1)


class TrainedWith(Frozen):
    """With what a result was trained, as its author says. It chooses the tolerance of an audit, which is bounded in any case.

    `software` is the author's version of Lutetia; trust that was earned with one version does not carry over to the next.
    """

    device: Literal["cpu", "cuda", "mps", "other"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int = Field(default=1, ge=1)
    software: Word = ""


class NodeRecord(_Record):
    """A peer, its addresses, what it can do and does."""

    kind: Literal["node"] = "node"
    peer_id: PeerId
    addresses: Addresses = ()
    hardware: Hardware
    samples_per_second: float = Field(ge=0)
    software: Word
    state: NodeState
    shard: int | None = Field(default=None, ge=0)
    operator: PublicKey | None = None
    relayed: bool = False

    def key(self) -> str:
        return node_key(self.run, self.owner)


class ClaimRecord(_Record):
    """A peer's claim to train `shard` on top of accepted `epoch`. `released` takes a claim back (a DHT cannot delete)."""

    kind: Literal["claim"] = "claim"
    shard: int = Field(ge=0)
    epoch: int = Field(ge=0)
    samples: int = Field(ge=0)
    state: Literal["claiming", "training", "draining", "released"]

    def key(self) -> str:
        return claim_key(self.run, self.shard)


class CheckpointRecord(_Record):
    """A result offered for acceptance: epoch `epoch` on top of `parent` (None for the first)."""

    kind: Literal["checkpoint"] = "checkpoint"
    shard: int = Field(ge=0)
    epoch: int = Field(ge=1)
    parent: Digest | None
    weights: BlobRef
    state: BlobRef
    trace: BlobRef
    samples: int = Field(ge=1)
    loss: float
    peer_id: PeerId
    addresses: Addresses = ()
    made: TrainedWith = TrainedWith()

    @property
    def digest(self) -> Digest:
        """Names the result itself: same weights, state, trace and lineage, same digest, whoever offers it and when."""
        blobs = [(ref.digest, ref.size) for ref in (self.weights, self.state, self.trace)]
        return _result_digest(self.run, self.shard, self.epoch, self.parent, *blobs, self.samples)

    def key(self) -> str:
        return checkpoint_key(self.run, self.shard)


class ProviderRecord(_Record):
    """Says: I hold this blob."""

    kind: Literal["provider"] = "provider"
    blob: Digest
    peer_id: PeerId
    addresses: Addresses = ()

    def key(self) -> str:
        return provider_key(self.run, self.blob)


class AcceptanceRecord(_Record):
    """A coordinator's signed yes: `checkpoint` is now epoch `epoch` of `shard`; its author has tenure until then.

    `term` counts the roll-backs of the shard before it.
    """

    kind: Literal["acceptance"] = "acceptance"
    shard: int = Field(ge=0)
    epoch: int = Field(ge=1)
    checkpoint: Digest
    parent: Digest | None
    weights: BlobRef
    state: BlobRef
    samples: int = Field(ge=1)
    author: PublicKey
    tenure_until: float
    holdout_loss: float
    term: int = Field(default=0, ge=0)

    def key(self) -> str:
        return acceptance_key(self.run, self.shard)


class ResetRecord(_Record):
    """A coordinator's word that `shard` stands at its beginning again: in term `term` nothing is accepted yet.

    Every roll-back of a shard raises its term; the latest acceptance is the one of the highest term, then of the highest epoch.
    """

    kind: Literal["reset"] = "reset"
    shard: int = Field(ge=0)
    term: int = Field(ge=1)

    def key(self) -> str:
        return acceptance_key(self.run, self.shard)


class QuarantineRecord(_Record):
    """A coordinator's word that these peers' work was found to be faked: their claims do not count.

    It has room for MAX_QUARANTINED: those who claim something go first, then whom the last audits convicted.
    """

    kind: Literal["quarantine"] = "quarantine"
    peers: tuple[PublicKey, ...] = Field(max_length=MAX_QUARANTINED)

    def key(self) -> str:
        return quarantine_key(self.run)


Record = Annotated[
    NodeRecord | ClaimRecord | CheckpointRecord | ProviderRecord | AcceptanceRecord | ResetRecord | QuarantineRecord,
    Field(discriminator="kind"),
]
COORDINATORS_ONLY = ("acceptance", "reset", "quarantine")


@lru_cache(maxsize=_REMEMBERED)
def node_bucket(owner: str) -> int:
    return int(hashlib.sha256(owner.encode()).hexdigest(), 16) % NODE_BUCKETS


_Blob = tuple[str, int]


@lru_cache(maxsize=_REMEMBERED)
def _result_digest(
    run: str, shard: int, epoch: int, parent: str | None, weights: _Blob, state: _Blob, trace: _Blob, samples: int
) -> Digest:
    """Asked for several times at every look at every result. Blobs are given as (digest, size)."""
    blobs = {
        name: {"digest": digest, "size": size}
        for name, (digest, size) in (("weights", weights), ("state", state), ("trace", trace))
    }
    return digest_of({"run": run, "shard": shard, "epoch": epoch, "parent": parent, **blobs, "samples": samples})


def node_key(run: str, owner: str) -> str:
    return f"{run}/nodes/{node_bucket(owner):02d}"


def node_keys(run: str) -> list[str]:
    return [f"{run}/nodes/{bucket:02d}" for bucket in range(NODE_BUCKETS)]


def claim_key(run: str, shard: int) -> str:
    return f"{run}/claims/{shard:04d}"


def checkpoint_key(run: str, shard: int) -> str:
    return f"{run}/checkpoints/{shard:04d}"


def provider_key(run: str, blob: str) -> str:
    return f"{run}/providers/{blob}"


def acceptance_key(run: str, shard: int) -> str:
    return f"{run}/accepted/{shard:04d}"


def quarantine_key(run: str) -> str:
    return f"{run}/quarantined"


@dataclass(frozen=True)
class RecordLimits:
    """Longest time to live in seconds of each kind, and how far clocks may differ."""

    heartbeat: float
    maximum_clock_skew: float = 30.0

    def longest(self, kind: str) -> float:
        """A node or claim lives one lease, a provider minutes, checkpoints and acceptances hours."""
        lease = lease_seconds(self.heartbeat)
        return {"node": lease, "claim": lease, "provider": 600.0}.get(kind, 6 * 3600.0)


class _Envelope(Frozen):
    record: Record
    signature: Signature


def _signed_bytes(record: _Record, expires: float) -> bytes:
    """Key, owner (the subkey), value and expiry in one: a record cannot be filed elsewhere, prolonged or replayed later."""
    return _SIGNING_DOMAIN + canonical({"key": record.key(), "expires": expires, "record": record.model_dump(mode="json")})


def seal(record: Record, identity: Identity, expires: float) -> bytes:
    """The bytes to store under `record.key()`, subkey `record.owner`, until `expires` (Unix seconds)."""
    return canonical(_Envelope(record=record, signature=identity.sign(_signed_bytes(record, expires))))


def open_record(
    data: bytes,
    *,
    key: str | None,
    subkey: str,
    expires: float,
    now: float,
    limits: RecordLimits,
    coordinators: tuple[str, ...] = (),
) -> Record:
    """Parse and check a stored record; `key` None means that the caller compares `record.key()` itself (hashed keys).

    Raises RecordRefused: too large, malformed, wrong key or owner, bad signature, outside the clock window, TTL too long,
    or an acceptance, reset or quarantine by somebody who is no coordinator of the run.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise RecordRefused(f"record of {len(data)} bytes is larger than {MAX_RECORD_BYTES}")
    try:
        record = _parsed(data).record
    except ValidationError as error:
        raise RecordRefused(f"record is malformed: {first_problem(error)}") from error
    if key is not None and record.key() != key:
        raise RecordRefused(f"record of {record.key()} was filed under {key}")
    if record.owner != subkey:
        raise RecordRefused(f"record of owner {record.owner[:16]}… was filed under {subkey[:16]}…")
    check_times(record.kind, record.issued, expires, now, limits)
    if record.kind in COORDINATORS_ONLY and record.owner not in coordinators:
        raise RecordRefused(f"{record.kind} by {record.owner[:16]}…, who is no coordinator of this run")
    if not _signature_holds(data, expires):
        raise RecordRefused("record's signature is wrong")
    return record


def check_times(kind: str, issued: float, expires: float, now: float, limits: RecordLimits) -> None:
    """Raises RecordRefused: dated in the future, expired, or wanting to live too long. All times are Unix seconds."""
    if not math.isfinite(expires):  # a DHT carries whatever a peer sent, and NaN is neither early nor late
        raise RecordRefused("record does not say when it expires")
    if issued > now + limits.maximum_clock_skew:
        raise RecordRefused(f"record is dated {issued - now:.0f} s in the future")
    if expires <= now:
        raise RecordRefused("record has expired")
    if expires > min(issued, now) + limits.longest(kind) + limits.maximum_clock_skew:
        raise RecordRefused(f"record wants to live {expires - now:.0f} s; a {kind} record may live {limits.longest(kind):.0f} s")


def read_envelope(data: bytes) -> Record:
    """The record inside bytes that `open_record` has checked before."""
    return _parsed(data).record


@lru_cache(maxsize=_REMEMBERED)
def _parsed(data: bytes) -> _Envelope:
    """A reader meets one record many times: from every replica, at every look. Only what depends on the clock is checked anew."""
    return _Envelope.model_validate_json(data, strict=True)


@lru_cache(maxsize=_REMEMBERED)
def _signature_holds(data: bytes, expires: float) -> bool:
    envelope = _parsed(data)
    return verify(envelope.record.owner, _signed_bytes(envelope.record, expires), envelope.signature)
