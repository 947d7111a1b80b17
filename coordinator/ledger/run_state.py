"""The state of a run, as its events add up: its shards, peers, due audits and quarantines, as immutable values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple, TypedDict, Unpack

from lutetia.coordinator.credit.accounts import PeerCredit
from lutetia.coordinator.ledger.events import (
    CheckerRefuted,
    MergeRefused,
    MixtureStitched,
    Outcome,
    PeerQuarantined,
    QuarantineRecovered,
    ResultDoubted,
    ResultRefused,
    ResultSuperseded,
    RouterTrained,
    SnapshotDropped,
)
from lutetia.coordinator.ledger.persistent_map import AsPairs, PersistentMap
from lutetia.protocol.claims import ShardView, shard_and_lane
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, TrainedWith
from lutetia.protocol.schema.status import AuditState
from lutetia.protocol.schema.verdicts import CheckName

LOSS_CHECKS: frozenset[CheckName] = frozenset({"holdout", "raw"})
"""Honest training can fail these: what they find depends on the parent and on a few held-out clips."""
BUDGETS = 3
"""Different epoch budgets that are remembered."""
PACES = 64
"""Shards of which a peer's pace is remembered."""
HISTORY = 64
"""Accepted epochs of a shard that can still be audited and rolled back."""


@dataclass(frozen=True, slots=True)
class WaitingResult:
    """A result that waits for its checks."""

    record: CheckpointRecord
    seen: float
    """When it arrived: Unix seconds."""
    attempts: int = 0
    """Inconclusive checks so far."""
    not_before: float = 0.0
    """Unix seconds before which it is not checked again."""
    doubt: ResultDoubted | None = None
    """It failed a loss check and waits for the replay of its epoch."""


Undecided = Annotated[Mapping[tuple[str, str], WaitingResult], AsPairs()]
"""(owner, checkpoint) -> a result that waits for its checks: of each owner at most one in each lane."""
Judged = Annotated[Mapping[tuple[str, str], ResultRefused | ResultSuperseded], AsPairs()]
"""(owner, checkpoint) -> final verdict."""


@dataclass(frozen=True, slots=True)
class AcceptedEpoch:
    """One accepted epoch of a lineage."""

    acceptance: AcceptanceRecord
    at: float
    """When it was accepted: Unix seconds."""
    budgets: tuple[int, ...]
    """Epoch budgets of the manifest's versions up to then, newest first.

    A cosine schedule depends on the budget, and an epoch may be accepted under a later version than it was begun under.
    """
    trace: BlobRef | None = None
    """Of its checkpoint record, as is `made`."""
    made: TrainedWith | None = None
    audit: AuditState = "not due"
    proved: bool = False
    """Whether it was accepted although it failed a loss check."""
    whole: bool = False
    """Whether its last audit replayed the whole epoch."""
    samples: int = 0
    """What its author is credited with; 0 once an audit found it invalid."""
    sources: tuple[AcceptedEpoch, ...] = ()
    """The accepted results of the lanes from which it was merged, by lane; empty where one node trained it."""

    @property
    def makers(self) -> tuple[AcceptedEpoch, ...]:
        """What was trained for it: what is audited, and whose authors are credited."""
        return self.sources or (self,)

    @property
    def lane(self) -> int:
        """Of the accepted result of one lane."""
        return self.acceptance.lanes[0] if self.acceptance.lanes else 0


class PendingAuditChanges(TypedDict, total=False):
    """New values for fields of PendingAudit."""

    whole: bool
    attempts: int
    not_before: float
    reported: tuple[str, str] | None
    reported_samples: int


@dataclass(frozen=True, slots=True)
class PendingAudit:
    """An audit that is due."""

    shard: int
    epoch: int
    owner: str
    checkpoint: str
    since: float
    """When its result was accepted: the oldest is audited first."""
    whole: bool = False
    """Replay the whole epoch, not only its first steps."""
    attempts: int = 0
    """Inconclusive tries so far."""
    not_before: float = 0.0
    """Unix seconds before which it is not tried again."""
    reported: tuple[str, str] | None = None
    """A peer's report that the coordinator has yet to verify: (public key, outcome)."""
    reported_samples: int = 0
    """Samples that this peer replayed."""
    lane: int = 0
    """Of its shard, in a run with lanes."""

    def updated(self, **changes: Unpack[PendingAuditChanges]) -> PendingAudit:
        return replace(self, **changes)


class ShardChanges(TypedDict, total=False):
    """New values for fields of ShardLedger."""

    epoch: int
    acceptance: AcceptanceRecord | None
    accepted_at: float | None
    baseline: float | None
    term: int
    lineage: tuple[AcceptedEpoch, ...]
    suspects: tuple[str, ...]
    candidates: Undecided
    judged: Judged
    gathered: Mapping[int, AcceptedEpoch]
    refused_merge: MergeRefused | None
    refuted: int
    refuted_at: float


@dataclass(frozen=True, slots=True)
class ShardLedger:
    """One shard."""

    epoch: int = 0
    """The accepted epoch."""
    acceptance: AcceptanceRecord | None = None
    accepted_at: float | None = None
    """When `epoch` was accepted: Unix seconds."""
    baseline: float | None = None
    """Held-out loss of the initial model, once measured."""
    term: int = 0
    """How often the shard was rolled back."""
    lineage: tuple[AcceptedEpoch, ...] = ()
    """The last HISTORY accepted epochs, oldest first."""
    suspects: tuple[str, ...] = ()
    """Accepted epochs that an audit found invalid, while it is not decided whether the epochs after them are kept."""
    candidates: Undecided = field(default_factory=dict)
    judged: Judged = field(default_factory=dict)
    """Final verdicts on results for the epoch after `epoch`; refusals only those under the newest manifest."""
    gathered: Mapping[int, AcceptedEpoch] = field(default_factory=dict)
    """By lane: accepted results for the epoch after `epoch`, which wait for their merge."""
    refused_merge: MergeRefused | None = None
    """The last merge of its lanes that failed a check, until several are merged again."""
    refuted: int = 0
    """How often a replay did not confirm a result for that epoch which had failed a loss check."""
    refuted_at: float = 0.0
    """When it last did not: Unix seconds."""

    def updated(self, **changes: Unpack[ShardChanges]) -> ShardLedger:
        return replace(self, **changes)

    @property
    def accepted(self) -> str | None:
        """Digest of the accepted checkpoint: the only parent that the next one may have."""
        return self.acceptance.checkpoint if self.acceptance else None

    def undecided_of(self, owner: str) -> tuple[WaitingResult, ...]:
        """The results of this peer that wait for their checks: in a run without lanes at most one."""
        return tuple(candidate for candidate in self.candidates.values() if candidate.record.owner == owner)

    @property
    def failed_losses(self) -> tuple[ResultRefused, ...]:
        """The results for the next epoch that were refused at a loss check, oldest first."""
        return tuple(
            verdict
            for verdict in self.judged.values()
            if isinstance(verdict, ResultRefused) and verdict.verdict == "invalid" and verdict.check in LOSS_CHECKS
        )

    @property
    def audit(self) -> AuditState | None:
        """State of the accepted checkpoint's audit."""
        return self.lineage[-1].audit if self.lineage else None

    def link(self, checkpoint: str) -> AcceptedEpoch | None:
        """The accepted epoch, or accepted result of a lane, of that digest, if it is within the history and not rolled back."""
        known = (one for link in reversed(self.lineage) for one in (link, *link.sources))
        return next((one for one in (*known, *self.gathered.values()) if one.acceptance.checkpoint == checkpoint), None)

    def before(self, link: AcceptedEpoch) -> AcceptedEpoch | None:
        """The epoch before `link`; None at the beginning, or when it is no longer in the history."""
        epoch = link.acceptance.epoch - 1
        return next((earlier for earlier in self.lineage if earlier.acceptance.epoch == epoch), None)

    @property
    def trained(self) -> tuple[AcceptedEpoch, ...]:
        """All that was accepted of what peers trained, oldest epoch first."""
        return (*(maker for link in self.lineage for maker in link.makers), *self.gathered.values())


class Pace(NamedTuple):
    """How fast a peer's results of one shard are accepted: when the last one was, in Unix seconds, and seconds per epoch."""

    last_accepted: float
    interval: float | None


class PeerChanges(TypedDict, total=False):
    """New values for fields of PeerLedger."""

    accepted: int
    rejected: int
    streak: int
    forfeited: int
    build: str
    audited: int
    convicted: int
    proved: int
    trust: int
    shard: int | None
    checkpoint: str | None
    last_accepted: float | None
    interval: float | None
    paces: Mapping[int, Pace]


@dataclass(frozen=True, slots=True)
class PeerLedger:
    """The record of one peer's work."""

    accepted: int = 0
    """Results accepted."""
    rejected: int = 0
    """Results found invalid."""
    streak: int = 0
    """Consecutive results of the same `build` that were audited and found valid."""
    forfeited: int = 0
    """The streak that a refusal at a loss check ended; given back when a replay shows that such a refusal was nobody's fault."""
    build: str = ""
    """Software and kind of expert of its last accepted result."""
    audited: int = 0
    """Audits of its results that found them valid or invalid."""
    convicted: int = 0
    """Audits that found its result invalid."""
    proved: int = 0
    """Its results that a replay of the whole epoch found valid since the last one that was invalid or in doubt."""
    trust: int = 0
    """As an auditor: consecutive reports that the coordinator verified and found right."""
    shard: int | None = None
    """Shard of its last accepted result."""
    checkpoint: str | None = None
    """Digest of its last accepted result."""
    last_accepted: float | None = None
    """When that was accepted: Unix seconds."""
    interval: float | None = None
    """Measured seconds per accepted epoch on `shard`."""
    paces: Mapping[int, Pace] = field(default_factory=dict)
    """By shard, those of the last PACES shards: the devices of one peer train several at a time."""

    def updated(self, **changes: Unpack[PeerChanges]) -> PeerLedger:
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class CheckCosts:
    """What one check has cost in all, for one outcome: how often it ran, seconds, bytes."""

    count: int = 0
    seconds: float = 0.0
    size: int = 0

    def plus(self, seconds: float, size: int) -> CheckCosts:
        return CheckCosts(self.count + 1, self.seconds + seconds, self.size + size)


Spent = Annotated[Mapping[tuple[CheckName, Outcome], CheckCosts], AsPairs()]
"""What the checks have cost in all."""


class Changes(TypedDict, total=False):
    """New values for fields of RunState. The reducer counts `events` itself."""

    run: str
    name: str
    owner: str
    coordinator: str
    epochs: int
    budgets: tuple[int, ...]
    manifest_version: int
    manifest: str
    resumed: float
    shards: PersistentMap[int, ShardLedger]
    peers: PersistentMap[str, PeerLedger]
    credit: PersistentMap[str, PeerCredit]
    flops: tuple[int, ...]
    router: RouterTrained | None
    mixture: MixtureStitched | None
    stitched: MixtureStitched | None
    held_back: int
    finished: bool
    audits: Mapping[str, PendingAudit]
    quarantined: Mapping[str, PeerQuarantined | QuarantineRecovered]
    pardoned: Mapping[str, float]
    refuted_checkers: Mapping[str, CheckerRefuted]
    burnt: Mapping[str, str]
    refusals: tuple[ResultRefused, ...]
    dropped_snapshot: SnapshotDropped | None
    spent: Spent
    accepted: int
    rejected: int


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything that the ledger says about a run."""

    run: str = ""
    name: str = ""
    owner: str = ""
    coordinator: str = ""
    epochs: int = 0
    """Budget of each shard, by the newest manifest."""
    budgets: tuple[int, ...] = ()
    """The last BUDGETS different budgets, newest first."""
    manifest_version: int = 0
    manifest: str = ""
    """Digest of the newest manifest."""
    resumed: float = 0.0
    """When the owner last ended a pause: Unix seconds."""
    shards: PersistentMap[int, ShardLedger] = field(default_factory=PersistentMap)
    """By index."""
    peers: PersistentMap[str, PeerLedger] = field(default_factory=PersistentMap)
    """By public key."""
    credit: PersistentMap[str, PeerCredit] = field(default_factory=PersistentMap)
    """By public key: only peers whose results were accepted or whose audits counted."""
    flops: tuple[int, ...] = ()
    """FLOPs of training one sample, by shard; empty: not measured yet."""
    router: RouterTrained | None = None
    mixture: MixtureStitched | None = None
    """The current one."""
    stitched: MixtureStitched | None = None
    """The newest one, current or not."""
    held_back: int = 0
    """Mixtures that were made since the current one and are not current."""
    finished: bool = False
    audits: Mapping[str, PendingAudit] = field(default_factory=dict)
    """Those that are due, by checkpoint."""
    quarantined: Mapping[str, PeerQuarantined | QuarantineRecovered] = field(default_factory=dict)
    """By public key."""
    pardoned: Mapping[str, float] = field(default_factory=dict)
    """Public key -> when its last quarantine was lifted: Unix seconds."""
    refuted_checkers: Mapping[str, CheckerRefuted] = field(default_factory=dict)
    """Public key -> its report that two others contradict: it is given no checks."""
    burnt: Mapping[str, str] = field(default_factory=dict)
    """Digest of held-out clips that strangers were given -> the result that is scored on them."""
    refusals: tuple[ResultRefused, ...] = ()
    """The last ones, oldest first."""
    dropped_snapshot: SnapshotDropped | None = None
    """The snapshot from which this coordinator had started, and which did not follow from the ledger."""
    spent: Spent = field(default_factory=dict)
    accepted: int = 0
    """Results accepted."""
    rejected: int = 0
    """Results found invalid."""
    events: int = 0
    """Events in the ledger."""

    def pace(self, owner: str, shard: int) -> Pace | None:
        """The peer's pace on the shard; None unless its last accepted result or the shard's newest epoch shows it there."""
        peer, ledger = self.peer(owner), self.shards[shard]
        acceptance, newest = ledger.acceptance, ledger.lineage[-1].sources if ledger.lineage else ()
        at_it = peer.shard == shard or (acceptance is not None and acceptance.author == owner)
        at_it = at_it or any(source.acceptance.author == owner for source in (*newest, *ledger.gathered.values()))
        return peer.paces.get(shard) if at_it else None

    def peer(self, owner: str) -> PeerLedger:
        return self.peers.get(owner, _UNKNOWN_PEER)

    def has_accepted_work(self, owner: str) -> bool:
        """Whether a result of this peer was accepted, and it is not quarantined."""
        return self.peer(owner).accepted > 0 and owner not in self.quarantined

    def shard_view(self, shard: int) -> ShardView:
        """The accepted lineage of a shard as peers see it in the DHT, without claims."""
        ledger = self.shards[shard]
        return ShardView(shard, acceptance=ledger.acceptance, reset=ledger.term)

    def slot_view(self, slot: int) -> ShardView:
        """The same of the shard of a slot, under the number of the slot."""
        ledger = self.shards[shard_and_lane(slot)[0]]
        return ShardView(slot, acceptance=ledger.acceptance, reset=ledger.term)

    @property
    def accepted_epochs(self) -> tuple[int, ...]:
        return tuple(self.shards[index].epoch for index in range(len(self.shards)))

    @property
    def terms(self) -> tuple[int, ...]:
        return tuple(self.shards[index].term for index in range(len(self.shards)))

    def is_current(self, mixture: MixtureStitched) -> bool:
        """Whether no shard was rolled back since the mixture was stitched."""
        return not mixture.terms or mixture.terms == self.terms

    @property
    def budgets_done(self) -> bool:
        return bool(self.shards) and all(shard.epoch >= self.epochs for shard in self.shards.values())


_UNKNOWN_PEER = PeerLedger()
