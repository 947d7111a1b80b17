"""The state of a run as the sum of its events: `apply(state, event) -> state`, pure, total and cheap.

Nothing is changed in place and nothing of the size of the history is copied, so a replay of 10^5 events takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from ..system.errors import IntegrityError
from .events import (
    AuditDone,
    AuditDue,
    BaselineMeasured,
    CheckpointAccepted,
    CheckpointRefused,
    CheckpointSeen,
    CheckpointSuperseded,
    CoordinatorStarted,
    CoordinatorStopped,
    Event,
    ManifestPublished,
    MixtureStitched,
    RouterTrained,
    RunCreated,
    RunFinished,
)
from .offers import Rung
from .persistent import Table
from .records import AcceptanceRecord, CheckpointRecord
from .status import AuditState

REMEMBERED_REFUSALS = 32
_REMEMBERED_VERDICTS = 256
_BLAMELESS_RUNGS: frozenset[Rung] = frozenset({"signature", "lineage", "transfer"})
"""Anybody can send a forged record in a peer's name, and a partition makes honest lineages stale: no evidence of bad work."""


class LedgerOutOfOrder(IntegrityError):
    """An event that cannot follow the ones before it: two acceptances of one epoch, for instance."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A result that waits for judgement; `not_before` delays the next attempt after an inconclusive one."""

    record: CheckpointRecord
    seen: float
    attempts: int = 0
    not_before: float = 0.0


Judged = Mapping[tuple[str, str], CheckpointRefused | CheckpointSuperseded]


@dataclass(frozen=True, slots=True)
class ShardLedger:
    """One shard. `judged` holds the final verdicts, by (owner, checkpoint), on results for the epoch after `epoch`."""

    epoch: int = 0
    acceptance: AcceptanceRecord | None = None
    accepted_at: float | None = None
    baseline: float | None = None
    audit: AuditState | None = None
    candidates: Mapping[str, Candidate] = field(default_factory=dict)
    judged: Judged = field(default_factory=dict)

    @property
    def accepted(self) -> str | None:
        """Digest of the accepted checkpoint: the only parent that the next one may have."""
        return self.acceptance.checkpoint if self.acceptance else None

    @property
    def parent_loss(self) -> float | None:
        """What the next result's held-out loss is compared with; None until the initial model is measured."""
        return self.acceptance.holdout_loss if self.acceptance else self.baseline


@dataclass(frozen=True, slots=True)
class PeerLedger:
    """What a peer's work came to. `streak`: consecutive valid results; `interval`: measured seconds per accepted epoch."""

    accepted: int = 0
    rejected: int = 0
    streak: int = 0
    shard: int | None = None
    checkpoint: str | None = None
    last_accepted: float | None = None
    interval: float | None = None


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything that the ledger says about a run. `shards` by index, `peers` by public key."""

    run: str = ""
    name: str = ""
    owner: str = ""
    coordinator: str = ""
    epochs: int = 0
    manifest_version: int = 0
    manifest: str = ""
    shards: Table[int, ShardLedger] = field(default_factory=Table)
    peers: Table[str, PeerLedger] = field(default_factory=Table)
    router: RouterTrained | None = None
    mixture: MixtureStitched | None = None
    finished: bool = False
    refusals: tuple[CheckpointRefused, ...] = ()
    accepted: int = 0
    rejected: int = 0
    events: int = 0

    def peer(self, owner: str) -> PeerLedger:
        return self.peers.get(owner, _STRANGER)

    @property
    def accepted_epochs(self) -> tuple[int, ...]:
        return tuple(self.shards[index].epoch for index in range(len(self.shards)))

    @property
    def budgets_done(self) -> bool:
        return bool(self.shards) and all(shard.epoch >= self.epochs for shard in self.shards.values())


_STRANGER = PeerLedger()


def apply(state: RunState, event: Event) -> RunState:
    """The state after `event`. Raises LedgerOutOfOrder when it cannot follow."""
    if not state.events and not isinstance(event, RunCreated):
        raise LedgerOutOfOrder(f"a ledger must begin with run-created, not with {event.kind}; restore it from a backup")
    return replace(_changed(state, event), events=state.events + 1)


def _changed(state: RunState, event: Event) -> RunState:
    match event:
        case RunCreated():
            return _created(state, event)
        case ManifestPublished():
            return _published(state, event)
        case BaselineMeasured():
            return _with_shard(state, event.shard, replace(_shard(state, event.shard), baseline=event.loss))
        case CheckpointSeen():
            return _seen(state, event)
        case CheckpointRefused():
            return _refused(state, event)
        case CheckpointSuperseded():
            shard = _shard(state, event.shard)
            return _with_shard(state, event.shard, _settled(shard, event))
        case CheckpointAccepted():
            return _accepted(state, event)
        case AuditDue():
            return _with_shard(state, event.shard, replace(_shard(state, event.shard), audit="due"))
        case AuditDone():
            return _audited(state, event)
        case RouterTrained():
            return replace(state, router=event)
        case MixtureStitched():
            return replace(state, mixture=event)
        case RunFinished():
            return replace(state, finished=True)
        case CoordinatorStarted() | CoordinatorStopped():
            return state
        case _:
            assert_never(event)


def _shard(state: RunState, index: int) -> ShardLedger:
    try:
        return state.shards[index]
    except KeyError:
        raise LedgerOutOfOrder(f"the ledger speaks of shard {index}, which the run lacks; restore it from a backup") from None


def _with_shard(state: RunState, index: int, shard: ShardLedger) -> RunState:
    return replace(state, shards=state.shards.set(index, shard))


def _created(state: RunState, event: RunCreated) -> RunState:
    if state.events:
        raise LedgerOutOfOrder("the ledger creates its run twice; restore it from a backup")
    shards: Table[int, ShardLedger] = Table()
    for index in range(event.shards):
        shards = shards.set(index, ShardLedger())
    return RunState(
        run=event.run, name=event.name, owner=event.owner, coordinator=event.coordinator, epochs=event.epochs, shards=shards
    )


def _published(state: RunState, event: ManifestPublished) -> RunState:
    """A raised budget makes a finished run go on."""
    epochs = event.epochs or state.epochs
    return replace(
        state, manifest_version=event.version, manifest=event.digest, epochs=epochs,
        coordinator=event.coordinator or state.coordinator, finished=state.finished and epochs <= state.epochs,
    )  # fmt: skip


def _seen(state: RunState, event: CheckpointSeen) -> RunState:
    record = event.record
    shard = _shard(state, record.shard)
    if record.epoch != shard.epoch + 1 or record.parent != shard.accepted:
        raise LedgerOutOfOrder(f"a result for epoch {record.epoch} of shard {record.shard} cannot follow epoch {shard.epoch}")
    candidates = {**shard.candidates, record.owner: Candidate(record, event.time)}
    return _with_shard(state, record.shard, replace(shard, candidates=candidates))


def _settled(shard: ShardLedger, verdict: CheckpointRefused | CheckpointSuperseded) -> ShardLedger:
    """Without that candidate, remembering why; the oldest verdicts are forgotten so that a flood costs no memory."""
    candidate = shard.candidates.get(verdict.owner)
    waiting = shard.candidates
    if candidate and candidate.record.digest == verdict.checkpoint:
        waiting = {owner: other for owner, other in waiting.items() if owner != verdict.owner}
    if verdict.epoch != shard.epoch + 1:
        return replace(shard, candidates=waiting)
    judged = {**shard.judged, (verdict.owner, verdict.checkpoint): verdict}
    if len(judged) > _REMEMBERED_VERDICTS:
        del judged[next(iter(judged))]
    return replace(shard, candidates=waiting, judged=judged)


def _refused(state: RunState, event: CheckpointRefused) -> RunState:
    shard = _shard(state, event.shard)
    candidate = shard.candidates.get(event.owner)
    if event.again_at is not None and candidate and candidate.record.digest == event.checkpoint:
        again = replace(candidate, attempts=candidate.attempts + 1, not_before=event.again_at)
        shard = replace(shard, candidates={**shard.candidates, event.owner: again})
    else:
        shard = _settled(shard, event)
    state = replace(_with_shard(state, event.shard, shard), refusals=(*state.refusals[-REMEMBERED_REFUSALS + 1 :], event))
    if event.verdict == "inconclusive":
        return state
    peer = state.peer(event.owner)
    peer = replace(peer, rejected=peer.rejected + 1, streak=peer.streak if event.rung in _BLAMELESS_RUNGS else 0)
    return replace(state, peers=state.peers.set(event.owner, peer), rejected=state.rejected + 1)


def _accepted(state: RunState, event: CheckpointAccepted) -> RunState:
    given = event.acceptance
    shard = _shard(state, given.shard)
    if given.epoch != shard.epoch + 1 or given.parent != shard.accepted:
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} cannot be accepted on epoch {shard.epoch}")
    rest = {owner: other for owner, other in shard.candidates.items() if owner != given.author}
    shard = replace(
        shard, epoch=given.epoch, acceptance=given, accepted_at=event.time, audit="not due", candidates=rest, judged={}
    )
    peer = state.peer(given.author)
    interval = peer.interval if peer.shard == given.shard else None
    if peer.shard == given.shard and peer.last_accepted is not None:
        latest = max(0.0, event.time - peer.last_accepted)
        interval = latest if interval is None else (interval + latest) / 2
    peer = replace(
        peer, accepted=peer.accepted + 1, streak=peer.streak + 1, shard=given.shard, checkpoint=given.checkpoint,
        last_accepted=event.time, interval=interval,
    )  # fmt: skip
    state = replace(_with_shard(state, given.shard, shard), peers=state.peers.set(given.author, peer))
    return replace(state, accepted=state.accepted + 1)


def _audited(state: RunState, event: AuditDone) -> RunState:
    """A due audit that nobody carried out takes the acceptance back out of the streak: trust comes from checked work only."""
    shard = _shard(state, event.shard)
    if shard.accepted == event.checkpoint:
        state = _with_shard(state, event.shard, replace(shard, audit=event.outcome))
    peer = state.peer(event.owner)
    streak = {"valid": peer.streak, "invalid": 0}.get(event.outcome, max(0, peer.streak - 1))
    return replace(state, peers=state.peers.set(event.owner, replace(peer, streak=streak)))


def audit_due(streak: int, needed: int, lottery: float) -> bool:
    """BOINC's adaptive replication: always below `needed` consecutive valid results, then with probability 1/streak.

    `lottery` is uniform in [0, 1) and must be unpredictable to the peer.
    """
    return streak < needed or lottery * streak < 1
