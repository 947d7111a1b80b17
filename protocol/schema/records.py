"""The signed records of the DHT. Each is small, names its own key, belongs to one owner and expires."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lutetia.protocol.schema.canonical import Frozen, WireDocument, canonical, digest_of, read_json
from lutetia.protocol.schema.fields import (
    MOST_LANES,
    Bytes,
    Count,
    Digest,
    EpochCount,
    EpochNumber,
    LaneIndex,
    MeasuredLoss,
    Moment,
    OpenWord,
    PeerId,
    PeerName,
    PublicKey,
    Rate,
    ReportedBatch,
    ReportedLoss,
    ShardIndex,
    Signature,
    Tally,
    Word,
    added,
)
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.protocol.schema.manifest import first_problem, lease_seconds
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.ticket import Address
from lutetia.system.errors import LutetiaError

MAX_RECORD_BYTES = 4096
NODE_BUCKETS = 16
MAX_QUARANTINED = 48
MOST_DEVICES = 16
MOST_AUTHORS = 20
"""Authors of merged lanes that an acceptance has room for by their public keys."""
MOST_MORE_AUTHORS, AUTHOR_MARK = 44, 16
"""Further ones that it has room for by the first so many digits of theirs: nobody makes a key to 64 given bits for a lane."""
_REMEMBERED = 8192  # records whose signatures are known: about 20 MB
_SIGNING_DOMAIN = b"lutetia-record-1\n"

NodeState = Literal["joining", "probing", "idle", "claiming", "syncing", "training", "publishing", "paused", "draining", "left"]
Addresses = Annotated[tuple[Address, ...], Field(max_length=8)]


class RecordRefused(LutetiaError):
    """A record must not be stored or believed. The text says why."""

    code, name = 50, "integrity"


class _Record(WireDocument):
    run: Digest = Field(description="Run id")
    owner: PublicKey = Field(description="Public key of the peer that signed the record")
    issued: Moment = Field(description="When it was made, in Unix seconds")

    def key(self) -> str:
        raise TypeError("only a concrete record has a key")


class Hardware(WireDocument):
    """The hardware that a node offers."""

    device: Word = Field(description="Kind of device, for instance cpu or cuda")
    name: Word = Field(default="", description="Model of the device, for people")
    memory_bytes: Bytes = Field(description="Memory of the device in bytes")
    cores: int = Field(ge=1, le=65536, description="CPU cores")


class TrainedWith(WireDocument):
    """How a result was trained, according to its author. An audit chooses its tolerance by it, within fixed bounds."""

    device: Literal["cpu", "cuda", "mps", "other"] = Field(default="cpu", description="Kind of device")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="Precision of the forward and backward pass")
    micro_batch: ReportedBatch = Field(default=1, description="Samples computed at once")
    software: Word = Field(default="", description="Version of Lutetia; trust earned with one is lost with the next")
    moments: Literal["float32", "8bit"] = added("float32", "Form in which AdamW's moments were kept from step to step")
    weights: Literal["float32", "bfloat16"] = added(
        "float32", "Form in which the weights were kept; bfloat16 with what it rounds off in a second number"
    )
    kernels: OpenWord = added(
        "plain", "Attention kernel and whether blocks were compiled, like flash compiled; plain: neither was chosen"
    )


class DeviceEntry(WireDocument):
    """One of several devices of a node."""

    device: Word = Field(description="Its name on that machine, for instance cuda:1")
    state: NodeState = Field(description="What it is doing")
    shard: ShardIndex | None = Field(default=None, description="Index of the shard that it works on; null: none")
    samples_per_second: Rate = Field(default=0.0, description="Training speed in samples per second; 0: unknown")


class NodeRecord(_Record):
    """A node: where it is, what it offers and what it does."""

    kind: Literal["node"] = Field(default="node", description="Kind of record")
    peer_id: PeerId = Field(description="libp2p peer id of the owner")
    addresses: Addresses = Field(default=(), description="Multiaddrs with peer id at which it can be dialled")
    hardware: Hardware = Field(description="Its device")
    samples_per_second: Rate = Field(description="Training speed in samples per second, as measured by itself; 0: unknown")
    software: Word = Field(description="Version of Lutetia")
    state: NodeState = Field(description="What it is doing")
    shard: ShardIndex | None = Field(default=None, description="Index of the shard that it works on; null: none")
    operator: PublicKey | None = Field(
        default=None, description="Public key of the operator; nodes of one operator do not audit each other"
    )
    relayed: bool = Field(default=False, description="Not used: whoever is connected to a node sees how")
    name: PeerName = added("", "What its volunteer calls it; empty: nothing. A name proves nothing")
    devices: tuple[DeviceEntry, ...] = added(
        (), "Its devices, if it has several; state, shard and speed above then sum them up", max_length=MOST_DEVICES
    )

    def key(self) -> str:
        return node_key(self.run, self.owner)


class ClaimRecord(_Record):
    """A peer's claim to train a shard."""

    kind: Literal["claim"] = Field(default="claim", description="Kind of record")
    shard: ShardIndex = Field(description="Index of the shard")
    epoch: EpochCount = Field(description="The accepted epoch that the peer trains on top of; 0: from the start")
    samples: Tally = Field(description="Samples of the shard trained so far, earlier epochs included, according to the peer")
    state: Literal["claiming", "training", "draining", "released"] = Field(
        description="`released` takes the claim back: a DHT cannot delete"
    )

    lane: LaneIndex = added(0, "Lane of the shard, in a run with lanes")

    def key(self) -> str:
        return claim_key(self.run, self.shard, self.lane)


class CheckpointRecord(_Record):
    """A result: a checkpoint offered for acceptance."""

    kind: Literal["checkpoint"] = Field(default="checkpoint", description="Kind of record")
    shard: ShardIndex = Field(description="Index of the shard")
    epoch: EpochNumber = Field(description="The epoch that it would be, 1 for the first")
    parent: Digest | None = Field(
        description="Digest of the accepted checkpoint that it was trained on; null for the first epoch"
    )
    weights: BlobRef = Field(description="Blob of the averaged weights, which the mixture uses")
    state: BlobRef = Field(description="Blob of the training state, from which training continues")
    trace: BlobRef = Field(description="Blob of the loss of every training step, which audits compare")
    samples: Count = Field(description="Samples of the shard trained so far, earlier epochs included")
    loss: ReportedLoss = Field(description="Mean training loss of the epoch, according to the author")
    peer_id: PeerId = Field(description="libp2p peer id of the author")
    addresses: Addresses = Field(default=(), description="Multiaddrs with peer id at which its blobs can be fetched")
    made: TrainedWith = Field(default=TrainedWith(), description="Device, precision and software of the training")
    lane: LaneIndex = added(0, "Lane that was trained, in a run with lanes; `samples` counts its epoch as whole")

    @property
    def digest(self) -> Digest:
        """The name of the result itself: it depends on blobs and lineage only, not on who offers it or when."""
        blobs = [(ref.digest, ref.size) for ref in (self.weights, self.state, self.trace)]
        return _result_digest(self.run, self.shard, self.epoch, self.parent, *blobs, self.samples, self.lane)

    def key(self) -> str:
        return checkpoint_key(self.run, self.shard)


class ProviderRecord(_Record):
    """A peer's statement that it holds a blob."""

    kind: Literal["provider"] = Field(default="provider", description="Kind of record")
    blob: Digest = Field(description="Digest of the blob")
    peer_id: PeerId = Field(description="libp2p peer id of the owner")
    addresses: Addresses = Field(default=(), description="Multiaddrs with peer id at which the blob can be fetched")

    def key(self) -> str:
        return provider_key(self.run, self.blob)


class AcceptanceRecord(_Record):
    """A coordinator's signed acceptance of a result as the newest epoch of its shard."""

    kind: Literal["acceptance"] = Field(default="acceptance", description="Kind of record")
    shard: ShardIndex = Field(description="Index of the shard")
    epoch: EpochNumber = Field(description="The epoch that the result is now")
    checkpoint: Digest = Field(description="Digest of the result")
    parent: Digest | None = Field(description="Digest of the accepted checkpoint before it; null for the first epoch")
    weights: BlobRef = Field(description="Blob of its averaged weights")
    state: BlobRef = Field(description="Blob of its training state")
    samples: Count = Field(description="Samples of the shard trained so far, earlier epochs included")
    author: PublicKey = Field(description="Public key of the peer that trained it")
    tenure_until: Moment = Field(description="Until when the author keeps the shard while its claim lives, in Unix seconds")
    holdout_loss: MeasuredLoss = Field(description="Loss on the held-out clips, measured by the coordinator")
    term: EpochCount = Field(default=0, description="How often the shard was rolled back before")
    lanes: Annotated[tuple[LaneIndex, ...], Field(max_length=MOST_LANES)] = added(
        (), "Lanes whose results were merged into this epoch; its author is then the coordinator"
    )
    authors: tuple[PublicKey, ...] = added(
        (), "Public keys of those who trained the first of these lanes, in the order of `lanes`", max_length=MOST_AUTHORS
    )
    more_authors: str = added(
        "", "First 16 digits of the public keys of those who trained the lanes after these, one after the other",
        pattern=f"^([0-9a-f]{{{AUTHOR_MARK}}})*$", max_length=MOST_MORE_AUTHORS * AUTHOR_MARK,
    )  # fmt: skip

    @property
    def author_marks(self) -> tuple[str, ...]:
        """Of the lanes' authors, in the order of `lanes`, the public keys or their first digits, as far as there was room."""
        more = self.more_authors
        return (*self.authors, *(more[start : start + AUTHOR_MARK] for start in range(0, len(more), AUTHOR_MARK)))

    def key(self) -> str:
        return acceptance_key(self.run, self.shard)


class ResetRecord(_Record):
    """A coordinator's statement that a shard was rolled back to its start: in this term nothing is accepted yet.

    Every rollback of a shard raises its term. The latest acceptance is the one with the highest term, then the highest epoch.
    """

    kind: Literal["reset"] = Field(default="reset", description="Kind of record")
    shard: ShardIndex = Field(description="Index of the shard")
    term: EpochNumber = Field(description="How often the shard has been rolled back")

    def key(self) -> str:
        return acceptance_key(self.run, self.shard)


class QuarantineRecord(_Record):
    """The peers whose work a coordinator found to be faked. Their claims do not count.

    A record has room for MAX_QUARANTINED: first those with a live claim, then those that the last audits convicted.
    """

    kind: Literal["quarantine"] = Field(default="quarantine", description="Kind of record")
    peers: tuple[PublicKey, ...] = Field(max_length=MAX_QUARANTINED, description="Public keys of the peers")

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
    run: str, shard: int, epoch: int, parent: str | None, weights: _Blob, state: _Blob, trace: _Blob, samples: int,
    lane: int,
) -> Digest:  # fmt: skip
    """Cached, because every look at a result asks for it several times. Blobs are given as (digest, size)."""
    blobs = {
        name: {"digest": digest, "size": size}
        for name, (digest, size) in (("weights", weights), ("state", state), ("trace", trace))
    }
    place = {"run": run, "shard": shard, "epoch": epoch, "parent": parent} | ({"lane": lane} if lane else {})
    return digest_of({**place, **blobs, "samples": samples})


def node_key(run: str, owner: str) -> str:
    return f"{run}/nodes/{node_bucket(owner):02d}"


def node_keys(run: str) -> list[str]:
    return [f"{run}/nodes/{bucket:02d}" for bucket in range(NODE_BUCKETS)]


def claim_key(run: str, shard: int, lane: int = 0) -> str:
    return f"{run}/claims/{shard:04d}" + (f"/{lane}" if lane else "")


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
    """How long records may live. `heartbeat` and `maximum_clock_skew` are the manifest's, in seconds."""

    heartbeat: float
    maximum_clock_skew: float = 30.0

    def longest(self, kind: str) -> float:
        """Longest time to live in seconds: a lease for a node or claim, minutes for a provider, hours for all others."""
        lease = lease_seconds(self.heartbeat)
        return {"node": lease, "claim": lease, "provider": 600.0}.get(kind, 6 * 3600.0)


class _Envelope(Frozen):
    """Closed, because nothing around the record is signed."""

    record: Record = Field(description="The record")
    signature: Signature = Field(description="The owner's Ed25519 signature over key, record and expiry (hex)")


def _signed_bytes(key: str, expires: float, record: dict[str, Any]) -> bytes:
    """Key, owner (the subkey), value and expiry together: a record cannot be stored elsewhere, prolonged or replayed later.

    `record` is the value as its owner wrote it, with fields of later versions.
    """
    return _SIGNING_DOMAIN + canonical({"key": key, "expires": expires, "record": record})


def seal(record: Record, identity: Identity, expires: float) -> bytes:
    """The bytes to store under `record.key()`, subkey `record.owner`, until `expires` (Unix seconds)."""
    signature = identity.sign(_signed_bytes(record.key(), expires, record.model_dump(mode="json")))
    return canonical(_Envelope(record=record, signature=signature))


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
    """Parse and check a stored record.

    Args:
        data: The sealed record.
        key: The key under which it was stored; None: the caller compares `record.key()` itself (hashed keys).
        subkey: The owner under which it was stored.
        expires: The expiry with which it was stored, in Unix seconds.
        now: The reader's clock in Unix seconds.
        limits: How long records may live.
        coordinators: Public keys that may sign acceptances, resets and quarantines.

    Raises RecordRefused: too large, malformed, wrong key or owner, bad signature, dated in the future, expired, living too long,
    or a coordinator's kind of record by another peer.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise RecordRefused(f"record of {len(data)} bytes is larger than {MAX_RECORD_BYTES}")
    try:
        record = _parsed(data).record
    except ValidationError as error:
        raise RecordRefused(f"record is malformed: {first_problem(error)}") from error
    if key is not None and record.key() != key:
        raise RecordRefused(f"record of {record.key()} was stored under {key}")
    if record.owner != subkey:
        raise RecordRefused(f"record of owner {record.owner[:16]}… was stored under {subkey[:16]}…")
    check_times(record.kind, record.issued, expires, now, limits)
    if record.kind in COORDINATORS_ONLY and record.owner not in coordinators:
        raise RecordRefused(f"{record.kind} by {record.owner[:16]}…, which is not a coordinator of this run")
    if not _signature_holds(data, expires):
        raise RecordRefused("the record's signature is wrong")
    return record


def check_times(kind: str, issued: Moment, expires: float, now: float, limits: RecordLimits) -> None:
    """Raises RecordRefused: dated in the future, expired, or living too long. All times are Unix seconds."""
    if not math.isfinite(expires):  # a peer can send NaN, which is neither early nor late
        raise RecordRefused("record does not say when it expires")
    if issued > now + limits.maximum_clock_skew:
        raise RecordRefused(f"record is dated {issued - now:.0f} s in the future")
    if expires <= now:
        raise RecordRefused("record has expired")
    if expires > min(issued, now) + limits.longest(kind) + limits.maximum_clock_skew:
        raise RecordRefused(f"record would live {expires - now:.0f} s; a {kind} record may live {limits.longest(kind):.0f} s")


def read_envelope(data: bytes) -> Record:
    """The record in bytes that `open_record` has checked before."""
    return _parsed(data).record


@lru_cache(maxsize=_REMEMBERED)
def _parsed(data: bytes) -> _Envelope:
    """Cached, because a reader gets one record many times: from every replica, at every look.

    Parsed from canonical bytes, so that a name that stands twice means the same here and in what is signed.
    """
    return _Envelope.model_validate_json(canonical(read_json(data)), strict=True)


@lru_cache(maxsize=_REMEMBERED)
def _signature_holds(data: bytes, expires: float) -> bool:
    envelope, record = _parsed(data), read_json(data)["record"]
    return verify(envelope.record.owner, _signed_bytes(envelope.record.key(), expires, record), envelope.signature)
