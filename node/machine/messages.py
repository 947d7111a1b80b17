"""What the node's state machine hears (events, each with the time it happened) and what it asks for (actions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lutetia.protocol.claims import ShardView

Verb = Literal["pause", "resume", "finish", "leave"]
Verdict = Literal["queued", "busy", "accepted", "superseded", "invalid", "quarantined", "inconclusive", "unreachable"]
Exit = Literal["stopped", "crash", "out-of-memory", "disk-full", "bad-shard", "bad-state", "hardware"]


@dataclass(frozen=True, slots=True)
class OwnCheckpoint:
    """A checkpoint of our own that is whole on disk: epoch `epoch` of `shard` on top of `parent` (a checkpoint digest)."""

    shard: int
    epoch: int
    digest: str
    parent: str | None


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClockTick:
    """Time passed; due when `next_wake` says so."""

    now: float


@dataclass(frozen=True, slots=True)
class Joined:
    """The network side is up for the first time and the manifest is known."""

    now: float


@dataclass(frozen=True, slots=True)
class NetworkLost:
    now: float


@dataclass(frozen=True, slots=True)
class NetworkBack:
    now: float


@dataclass(frozen=True, slots=True)
class Probed:
    """What this box can do: shard -> fitness in 0..1 (0: does not fit)."""

    now: float
    fitness: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    now: float
    reason: str


@dataclass(frozen=True, slots=True)
class SwarmSeen:
    """The answer to `LookAtShards`: what the DHT shows of these shards."""

    now: float
    views: tuple[ShardView, ...]


@dataclass(frozen=True, slots=True)
class WatchedShardsSet:
    """Which shards this node looks after while it stands by, until another list comes or `until`; None: all of them."""

    now: float
    shards: frozenset[int] | None
    until: float


@dataclass(frozen=True, slots=True)
class SyncDone:
    """The shard's data and the state of accepted `epoch` are here; `pending` are own checkpoints on top of it, oldest first."""

    now: float
    shard: int
    epoch: int
    checkpoint: str | None
    pending: tuple[OwnCheckpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class SyncFailed:
    now: float
    shard: int
    reason: str


@dataclass(frozen=True, slots=True)
class TrainerProgress:
    """Trainer number `run` works on top of `epoch`; `waiting` when it may not go on (see `AllowEpochs`)."""

    now: float
    run: int
    epoch: int
    samples: int
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class TrainerExited:
    now: float
    run: int
    reason: Exit
    text: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointReady:
    now: float
    run: int
    candidate: OwnCheckpoint


@dataclass(frozen=True, slots=True)
class OfferAnswered:
    """How the offered checkpoint `digest` stands with the coordinator.

    `unreachable`: nobody answered, or publishing failed. `quarantined`: nothing of ours is judged any more.
    """

    now: float
    digest: str
    verdict: Verdict
    text: str = ""
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class UserVerb:
    """The volunteer's wish; `until` (Unix seconds) ends a pause by itself."""

    now: float
    verb: Verb
    until: float | None = None


@dataclass(frozen=True, slots=True)
class DiskFull:
    now: float
    text: str


@dataclass(frozen=True, slots=True)
class DiskFree:
    now: float


@dataclass(frozen=True, slots=True)
class ManifestChanged:
    """A newer version of the manifest counts from now on; the rules are its. `training`: trainers would take other steps."""

    now: float
    version: int
    training: bool = False


@dataclass(frozen=True, slots=True)
class HoursChanged:
    """One of the volunteer's windows has ended, and the next begins at `closed_until` (Unix seconds); None: one has begun."""

    now: float
    closed_until: float | None


Event = (
    ClockTick | Joined | NetworkLost | NetworkBack | Probed | ProbeFailed | SwarmSeen | WatchedShardsSet | SyncDone | SyncFailed
    | TrainerProgress | TrainerExited | CheckpointReady | OfferAnswered | UserVerb | DiskFull | DiskFree | ManifestChanged
    | HoursChanged
)  # fmt: skip


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbeHardware:
    """Find out what this box can do; answer with Probed or ProbeFailed."""


@dataclass(frozen=True, slots=True)
class LookAtShards:
    """Read claims and acceptances of these shards; answer with SwarmSeen."""

    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim to store: `released` tells the others at once that the shard is free."""

    shard: int
    epoch: int
    samples: int
    state: Literal["claiming", "training", "draining", "released"]


@dataclass(frozen=True, slots=True)
class PublishClaim:
    """Store a first claim, or with state `released` withdraw it."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class RenewRecords:
    """Heartbeat: the node record, the claim if we hold one, and whatever else of ours is about to expire."""

    claim: Claim | None


@dataclass(frozen=True, slots=True)
class Sync:
    """Fetch the shard's data and the accepted state `checkpoint` at `epoch` (None: none yet); answer SyncDone or SyncFailed."""

    shard: int
    epoch: int
    checkpoint: str | None


@dataclass(frozen=True, slots=True)
class StartTrainer:
    """Start trainer number `run` from the newest state that descends from (`epoch`, `checkpoint`).

    It may train on top of epochs below `until`. `shrink`: how many times the micro-batch is to be halved.
    """

    run: int
    shard: int
    epoch: int
    checkpoint: str | None
    until: int
    shrink: int = 0


@dataclass(frozen=True, slots=True)
class AllowEpochs:
    """The trainer may now train on top of epochs below `until`."""

    until: int


@dataclass(frozen=True, slots=True)
class StopTrainer:
    """End the trainer, with a local checkpoint first if `save`; kill it if it does not answer."""

    save: bool


@dataclass(frozen=True, slots=True)
class PublishCheckpoint:
    """Store its blobs, announce it and offer it to the coordinator (idempotent); answer OfferAnswered."""

    candidate: OwnCheckpoint


@dataclass(frozen=True, slots=True)
class DiscardWork:
    """Our work on this shard beyond accepted `epoch` is void: remove it. None: trust nothing of ours, check what was fetched."""

    shard: int
    epoch: int | None


@dataclass(frozen=True, slots=True)
class CheckpointsSuperseded:
    """Own checkpoints of this shard older than `epoch` are no longer needed."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class LogSentence:
    """A sentence for the log."""

    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Everything is put away: close the network and end."""


Action = (
    ProbeHardware | LookAtShards | PublishClaim | RenewRecords | Sync | StartTrainer | AllowEpochs | StopTrainer
    | PublishCheckpoint | DiscardWork | CheckpointsSuperseded | LogSentence | Leave
)  # fmt: skip
