"""What the judge hears (stimuli) and what it wants done (actions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Limits, Verdict
from lutetia.coordinator.ledger.events import Event
from lutetia.coordinator.ledger.run_state import AcceptedEpoch, PendingAudit
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ResetRecord


@dataclass(frozen=True)
class Offered:
    """An opened, correctly signed record came in, by the offer stream or by reading the DHT."""

    record: CheckpointRecord
    now: float
    via: Literal["offer", "poll"] = "offer"


@dataclass(frozen=True)
class CheckDone:
    """The ladder's verdict on a candidate."""

    record: CheckpointRecord
    verdict: Verdict
    now: float


@dataclass(frozen=True)
class Audited:
    """What a replay of accepted `checkpoint` came to. `by`: the peer that replayed it, None the coordinator itself.

    `again`: whether trying again can bring more, where nothing was concluded.
    """

    checkpoint: str
    finding: AuditFinding
    now: float
    seconds: float = 0.0
    by: str | None = None
    again: bool = True


@dataclass(frozen=True)
class AuditWanted:
    """Peer `owner` is free to audit. `related`: those of its operator or address, whose work it does not judge."""

    owner: str
    now: float
    related: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AuditDelivered:
    """Peer `owner` reports on an audit that it was lent; `finding` is what the coordinator makes of its losses."""

    owner: str
    checkpoint: str
    finding: AuditFinding
    seconds: float
    now: float


@dataclass(frozen=True)
class LimitsKnown:
    """The size limits of each shard's blobs; nothing is fetched before."""

    limits: Limits
    now: float


@dataclass(frozen=True)
class JudgeTick:
    """Time passes: retries may be due."""

    now: float


@dataclass(frozen=True)
class LedgerFacts:
    """Facts from outside: a mixture was stitched, a lost acceptance found. What is out of date is dropped."""

    events: tuple[Event, ...]
    now: float


Stimulus = Offered | CheckDone | Audited | AuditWanted | AuditDelivered | LimitsKnown | JudgeTick | LedgerFacts


@dataclass(frozen=True)
class Write:
    """Append to the ledger, durably, before any later action is carried out."""

    event: Event


@dataclass(frozen=True)
class Answer:
    """Reply to the offer."""

    reply: OfferReply


@dataclass(frozen=True)
class StartCheck:
    """Climb the ladder with this candidate and come back with `CheckDone`."""

    record: CheckpointRecord
    parent_loss: float | None


@dataclass(frozen=True)
class Publish:
    """Keep the accepted blobs, and publish the signed acceptance."""

    acceptance: AcceptanceRecord
    record: CheckpointRecord


@dataclass(frozen=True)
class StartAudit:
    """Replay this accepted epoch from `parent` (None: from the beginning) and come back with `Audited`."""

    audit: PendingAudit
    link: AcceptedEpoch
    parent: AcceptanceRecord | None


@dataclass(frozen=True)
class LendAudit:
    """The answer to who wants an audit: one, until then; or when to ask again."""

    audit: StartAudit | None
    until: float = 0.0
    retry_after: float = 0.0


@dataclass(frozen=True)
class PublishReset:
    """A shard was rolled back: publish where it stands now."""

    record: AcceptanceRecord | ResetRecord


@dataclass(frozen=True)
class DiscardCandidate:
    """The candidate is out: what was fetched of it may go."""

    record: CheckpointRecord


Action = Write | Answer | StartCheck | Publish | StartAudit | LendAudit | PublishReset | DiscardCandidate
