"""What the events of a run add up to: its shards, peers, due audits and quarantines, as immutable values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lutetia.coordinator.ledger.events import (
    MixtureStitched,
    Outcome,
    PeerQuarantined,
    QuarantineRecovered,
    ResultRefused,
    ResultSuperseded,
    RouterTrained,
)
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.protocol.claims import ShardView
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, TrainedWith
from lutetia.protocol.schema.status import AuditState
from lutetia.protocol.schema.verdicts import CheckName

BUDGETS = 3
HISTORY = 64
"""Accepted epochs of a shard that can still be audited and rolled back."""


@dataclass(frozen=True, slots=True)
class WaitingResult:
    """A result that waits for judgement; `not_before` delays the next attempt after an inconclusive one."""

    record: CheckpointRecord
    seen: float
    attempts: int = 0
    not_before: float = 0.0


Judged = Mapping[tuple[str, str], ResultRefused | ResultSuperseded]


@dataclass(frozen=True, slots=True)
class AcceptedEpoch:
    """One accepted epoch of a lineage. `trace` and `made` are its record's.

    `budgets` are those of the manifest's versions up to then, newest first: a cosine schedule knows its end, and an epoch may
    have been begun under an earlier version than it was accepted under.
    """

    acceptance: AcceptanceRecord
    at: float
    budgets: tuple[int, ...]
    trace: BlobRef | None = None
    made: TrainedWith | None = None
    audit: AuditState = "not due"


@dataclass(frozen=True, slots=True)
class PendingAudit:
    """An audit that is due. `since` is when its result was accepted: the oldest goes first.

    `reported` is a peer's word on it, (public key, outcome), that the coordinator has yet to check.
    """

    shard: int
    epoch: int
    owner: str
    checkpoint: str
    since: float
    whole: bool = False
    attempts: int = 0
    not_before: float = 0.0
    reported: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ShardLedger:
    """One shard. `judged` holds the final verdicts, by (owner, checkpoint), on results for the epoch after `epoch`.

    `term` counts its roll-backs; `lineage` are the last HISTORY accepted epochs, oldest first.
    """

    epoch: int = 0
    acceptance: AcceptanceRecord | None = None
    accepted_at: float | None = None
    baseline: float | None = None
    term: int = 0
    lineage: tuple[AcceptedEpoch, ...] = ()
    candidates: Mapping[str, WaitingResult] = field(default_factory=dict)
    judged: Judged = field(default_factory=dict)

    @property
    def accepted(self) -> str | None:
        """Digest of the accepted checkpoint: the only parent that the next one may have."""
        return self.acceptance.checkpoint if self.acceptance else None

    @property
    def parent_loss(self) -> float | None:
        """What the next result's held-out loss is compared with; None until the initial model is measured."""
        return self.acceptance.holdout_loss if self.acceptance else self.baseline

    @property
    def audit(self) -> AuditState | None:
        """How the accepted checkpoint stands with the auditors."""
        return self.lineage[-1].audit if self.lineage else None

    def link(self, checkpoint: str) -> AcceptedEpoch | None:
        """The accepted epoch of that digest, where it is still known and not rolled back."""
        return next((link for link in reversed(self.lineage) if link.acceptance.checkpoint == checkpoint), None)

    def before(self, link: AcceptedEpoch) -> AcceptedEpoch | None:
        """The epoch on which `link` stands; None at the beginning, or when it is too long ago."""
        place = self.lineage.index(link)
        return self.lineage[place - 1] if place else None


@dataclass(frozen=True, slots=True)
class PeerLedger:
    """What a peer's work came to. `interval`: measured seconds per accepted epoch.

    `streak` counts consecutive results that were audited and found valid, all of the same `build` (software and kind of expert);
    `audited` and `convicted` count audits. As an auditor it has `trust`: consecutive reports that were re-checked and right.
    """

    accepted: int = 0
    rejected: int = 0
    streak: int = 0
    build: str = ""
    audited: int = 0
    convicted: int = 0
    trust: int = 0
    shard: int | None = None
    checkpoint: str | None = None
    last_accepted: float | None = None
    interval: float | None = None


@dataclass(frozen=True, slots=True)
class CheckCosts:
    """What one rung has taken in all, by outcome: how often, seconds, bytes."""

    count: int = 0
    seconds: float = 0.0
    size: int = 0

    def plus(self, seconds: float, size: int) -> CheckCosts:
        return CheckCosts(self.count + 1, self.seconds + seconds, self.size + size)


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything that the ledger says about a run. `shards` by index, `peers` and `quarantined` by public key.

    `audits` are those that are due, by checkpoint; `budgets` the last different numbers of epochs of the manifest, newest first;
    `pardoned` says when whose last quarantine was lifted.
    """

    run: str = ""
    name: str = ""
    owner: str = ""
    coordinator: str = ""
    epochs: int = 0
    budgets: tuple[int, ...] = ()
    manifest_version: int = 0
    manifest: str = ""
    shards: PersistentMap[int, ShardLedger] = field(default_factory=PersistentMap)
    peers: PersistentMap[str, PeerLedger] = field(default_factory=PersistentMap)
    router: RouterTrained | None = None
    mixture: MixtureStitched | None = None
    finished: bool = False
    audits: Mapping[str, PendingAudit] = field(default_factory=dict)
    quarantined: Mapping[str, PeerQuarantined | QuarantineRecovered] = field(default_factory=dict)
    pardoned: Mapping[str, float] = field(default_factory=dict)
    refusals: tuple[ResultRefused, ...] = ()
    spent: Mapping[tuple[CheckName, Outcome], CheckCosts] = field(default_factory=dict)
    accepted: int = 0
    rejected: int = 0
    events: int = 0

    def peer(self, owner: str) -> PeerLedger:
        return self.peers.get(owner, _STRANGER)

    def lineage(self, shard: int) -> ShardView:
        """The accepted lineage of a shard as peers see it in the DHT, without claims."""
        ledger = self.shards[shard]
        return ShardView(shard, acceptance=ledger.acceptance, reset=ledger.term)

    @property
    def accepted_epochs(self) -> tuple[int, ...]:
        return tuple(self.shards[index].epoch for index in range(len(self.shards)))

    @property
    def terms(self) -> tuple[int, ...]:
        return tuple(self.shards[index].term for index in range(len(self.shards)))

    def stands(self, mixture: MixtureStitched) -> bool:
        """Whether nothing that it was stitched from was taken back since."""
        return not mixture.terms or mixture.terms == self.terms

    @property
    def budgets_done(self) -> bool:
        return bool(self.shards) and all(shard.epoch >= self.epochs for shard in self.shards.values())


_STRANGER = PeerLedger()
