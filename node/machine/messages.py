"""Events (input, each with its time in Unix seconds) and actions (output) of the node's state machine.

In a run with lanes a number of a shard is that of a slot, one lane of a shard (`protocol.claims.slot_of`). Hardware is probed for
shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lutetia.protocol.claims import ShardView

Verb = Literal["pause", "resume", "finish", "leave"]
Verdict = Literal["queued", "busy", "accepted", "gathered", "superseded", "invalid", "quarantined", "inconclusive", "unreachable"]
Exit = Literal["stopped", "crash", "out-of-memory", "disk-full", "bad-shard", "bad-state", "hardware"]


@dataclass(frozen=True, slots=True)
class OwnCheckpoint:
    """A complete checkpoint of this node on disk: `epoch` of `shard`, trained from `parent` (a checkpoint digest)."""

    shard: int
    epoch: int
    digest: str
    parent: str | None


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClockTick:
    """Time passed. Sent when `next_wake` says so."""

    now: float


@dataclass(frozen=True, slots=True)
class Joined:
    """The network is up for the first time and the manifest is known."""

    now: float


@dataclass(frozen=True, slots=True)
class NetworkLost:
    now: float


@dataclass(frozen=True, slots=True)
class NetworkBack:
    now: float


@dataclass(frozen=True, slots=True)
class Probed:
    """Result of the hardware probe: shard -> fitness in 0..1 (0: does not fit). `rate`: samples per second; 0: not known."""

    now: float
    fitness: Mapping[int, float]
    rate: float = 0.0


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
    """The shards that this node watches while it stands by, until `until` or the next such event; None: all."""

    now: float
    shards: frozenset[int] | None
    until: float


@dataclass(frozen=True, slots=True)
class SyncDone:
    """The shard's data and accepted state are on disk. `pending`: own checkpoints that descend from it, oldest first."""

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
    """Trainer number `run` trains after `epoch`; `waiting`: it waits for `AllowEpochs`. `samples`: of the shard, in total."""

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
    """The coordinator's answer to the offered checkpoint `digest`. `retry_after` in seconds.

    `unreachable`: no coordinator answered, or publishing failed. `quarantined`: the coordinator judges nothing of this peer.
    `room`: how many more checkpoints this disk may keep while no coordinator answers.
    """

    now: float
    digest: str
    verdict: Verdict
    text: str = ""
    retry_after: float | None = None
    room: int = 0


@dataclass(frozen=True, slots=True)
class UserVerb:
    """A command of the volunteer. `until` (Unix seconds): when a pause ends; None: at `resume`."""

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
    """A newer manifest version applies; the rules follow it. `training`: it changes the training steps."""

    now: float
    version: int
    training: bool = False
    resumed: bool = False
    """The owner has ended a pause: nobody was late during it."""


@dataclass(frozen=True, slots=True)
class HoursChanged:
    """The schedule closed until `closed_until` (Unix seconds); None: it opened."""

    now: float
    closed_until: float | None


@dataclass(frozen=True, slots=True)
class BytesAllowed:
    """What the volunteer's cap on bytes allows: no new epoch until `until` (Unix seconds), for the reason `why`; None: all.

    `offers`: whether results that are whole may still be offered, because their upload fits.
    """

    now: float
    until: float | None
    why: str = ""
    offers: bool = True


@dataclass(frozen=True, slots=True)
class ShardsTaken:
    """The shards that the node's other devices claim or work on; this device leaves them alone."""

    now: float
    shards: frozenset[int]


@dataclass(frozen=True, slots=True)
class HardwareChanged:
    """Cards or drivers of this machine changed: a device that is missing or fits nothing is probed again at once."""

    now: float


@dataclass(frozen=True, slots=True)
class DeviceGone:
    """This device is not there any more, or not to be used any more: hand its shard back and end."""

    now: float
    reason: str


Event = (
    ClockTick | Joined | NetworkLost | NetworkBack | Probed | ProbeFailed | SwarmSeen | WatchedShardsSet | SyncDone | SyncFailed
    | TrainerProgress | TrainerExited | CheckpointReady | OfferAnswered | UserVerb | DiskFull | DiskFree | ManifestChanged
    | HoursChanged | BytesAllowed | ShardsTaken | HardwareChanged | DeviceGone
)  # fmt: skip


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbeHardware:
    """Probe the hardware; answer with Probed or ProbeFailed."""


@dataclass(frozen=True, slots=True)
class LookAtShards:
    """Read claims and acceptances of these shards; answer with SwarmSeen."""

    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim to store. `released` tells other peers at once that the shard is free."""

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
    """Heartbeat: store the node record, the claim if there is one, and our other records that are about to expire."""

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

    It may start epochs from parents below `until`. `halvings`: how often to halve the micro-batch.
    """

    run: int
    shard: int
    epoch: int
    checkpoint: str | None
    until: int
    halvings: int = 0


@dataclass(frozen=True, slots=True)
class AllowEpochs:
    """The trainer may now start epochs from parents below `until`."""

    until: int


@dataclass(frozen=True, slots=True)
class StopTrainer:
    """Stop the trainer, after a local checkpoint if `save`; kill it if it does not answer. `again`: a start follows soon."""

    save: bool
    again: bool = False


@dataclass(frozen=True, slots=True)
class PublishCheckpoint:
    """Store its blobs, announce it and offer it to the coordinator (idempotent); answer OfferAnswered."""

    candidate: OwnCheckpoint


@dataclass(frozen=True, slots=True)
class DiscardWork:
    """Remove our work on this shard after accepted `epoch`. None: remove all of it and verify what was fetched."""

    shard: int
    epoch: int | None


@dataclass(frozen=True, slots=True)
class CheckpointsSuperseded:
    """Our checkpoint of `epoch` was accepted: older ones of this shard are not needed any more."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class LogSentence:
    """Write `text` to the log."""

    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class Leave:
    """All work is released: close the network and end."""


Action = (
    ProbeHardware | LookAtShards | PublishClaim | RenewRecords | Sync | StartTrainer | AllowEpochs | StopTrainer
    | PublishCheckpoint | DiscardWork | CheckpointsSuperseded | LogSentence | Leave
)  # fmt: skip
