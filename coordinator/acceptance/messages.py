"""Events and actions of the judge: the stimuli that it receives and the actions that it wants carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Limits, Verdict
from lutetia.coordinator.ledger.events import Event
from lutetia.coordinator.ledger.run_state import AcceptedEpoch, PendingAudit
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ResetRecord

# --- stimuli; `now` is the coordinator's clock in Unix seconds ----------------------------------------------------------------


@dataclass(frozen=True)
class Offered:
    """A record with a valid signature arrived by the offer stream, or was read from the DHT (`poll`)."""

    record: CheckpointRecord
    now: float
    via: Literal["offer", "poll"] = "offer"
    origin: str = ""
    """The network from which it was offered; empty when that is not known."""


@dataclass(frozen=True)
class FetchDone:
    """The blobs of a candidate have arrived, or not: the verdict of the check `transfer`."""

    record: CheckpointRecord
    verdict: Verdict
    now: float


@dataclass(frozen=True)
class CheckDone:
    """The verdict of the checks on a candidate."""

    record: CheckpointRecord
    verdict: Verdict
    now: float


@dataclass(frozen=True)
class Audited:
    """The finding of a replay of accepted `checkpoint`, which took `seconds`.

    `by`: the peer that replayed it, None for the coordinator itself. `again`: whether another try can find more when this one
    was inconclusive. `whole`: whether the whole epoch was replayed; None: as much as was due.
    """

    checkpoint: str
    finding: AuditFinding
    now: float
    seconds: float = 0.0
    by: str | None = None
    again: bool = True
    whole: bool | None = None


@dataclass(frozen=True)
class Proved:
    """The finding of the replay of a doubted result's whole epoch, which took `seconds`."""

    record: CheckpointRecord
    finding: AuditFinding
    now: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Merged:
    """The merge of these results of a shard has ended: the verdict of the checks on it, and its record if there is one."""

    shard: int
    sources: tuple[str, ...]
    record: CheckpointRecord | None
    verdict: Verdict
    now: float


@dataclass(frozen=True)
class AuditWanted:
    """Peer `owner` is free to audit. `related`: peers of its operator or address, whose work it must not judge."""

    owner: str
    now: float
    related: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AuditDelivered:
    """Peer `owner` reports on an audit that it was lent; `finding` is what the coordinator concludes from its losses."""

    owner: str
    checkpoint: str
    finding: AuditFinding
    seconds: float
    now: float


@dataclass(frozen=True)
class LimitsKnown:
    """The size limits of each shard's blobs; nothing is fetched before they are known."""

    limits: Limits
    now: float


@dataclass(frozen=True)
class JudgeTick:
    """Time has passed: retries may be due.

    `auditors`: the peers whose node records say that they are free; None: not known. `at_work`: by shard the lanes that are
    claimed; None: not known, or the run has no lanes.
    """

    now: float
    auditors: frozenset[str] | None = None
    at_work: Mapping[int, frozenset[int]] | None = None


@dataclass(frozen=True)
class LedgerFacts:
    """Facts from outside, such as a stitched mixture or a recovered acceptance. Those out of date are dropped."""

    events: tuple[Event, ...]
    now: float


Stimulus = (
    Offered
    | FetchDone
    | CheckDone
    | Audited
    | Proved
    | Merged
    | AuditWanted
    | AuditDelivered
    | LimitsKnown
    | JudgeTick
    | LedgerFacts
)


# --- actions ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """Append to the ledger, durably, before any later action is carried out."""

    event: Event


@dataclass(frozen=True)
class Answer:
    """Reply to the offer."""

    reply: OfferReply


@dataclass(frozen=True)
class StartFetch:
    """Fetch the blobs of this candidate, within the fraction `patience` of the usual time, then send `FetchDone`."""

    record: CheckpointRecord
    patience: float


@dataclass(frozen=True)
class StartCheck:
    """Run the checks on this candidate, whose blobs have arrived, then send `CheckDone`.

    `parent` None: compare it with the initial model.
    """

    record: CheckpointRecord
    parent: AcceptanceRecord | None


@dataclass(frozen=True)
class Publish:
    """Keep the accepted blobs, and publish the signed acceptance."""

    acceptance: AcceptanceRecord
    record: CheckpointRecord


@dataclass(frozen=True)
class KeepResult:
    """Keep the blobs of a lane's accepted result: they are merged, and audits replay it."""

    record: CheckpointRecord


@dataclass(frozen=True)
class StartMerge:
    """Merge these accepted results, by lane, into `epoch` of the shard, check it, then send `Merged`.

    `parent` None: they were trained from the initial model.
    """

    shard: int
    epoch: int
    parent: AcceptanceRecord | None
    sources: tuple[AcceptedEpoch, ...]


ReplayProcess = Literal["audit", "parent", "proof"]
"""Who carries a replay out, so that none waits for another: an audit, one that a proof waits for, that of a doubted result."""


@dataclass(frozen=True)
class StartAudit:
    """Replay `steps` first steps of this accepted epoch from `parent` (None: from the beginning), then send `Audited`."""

    audit: PendingAudit
    link: AcceptedEpoch
    parent: AcceptanceRecord | None
    steps: int
    process: ReplayProcess = "audit"


@dataclass(frozen=True)
class StartProof:
    """Replay the whole epoch of this doubted result, then send `Proved`."""

    record: CheckpointRecord
    replay: StartAudit


@dataclass(frozen=True)
class LendAudit:
    """The answer to an audit request: an audit and until when it is lent, or after how many seconds to ask again."""

    audit: StartAudit | None
    until: float = 0.0
    retry_after: float = 0.0


@dataclass(frozen=True)
class PublishReset:
    """A shard was rolled back: publish its accepted epoch, or its reset to the beginning."""

    record: AcceptanceRecord | ResetRecord


@dataclass(frozen=True)
class DiscardCandidate:
    """The candidate is decided against: its fetch ends, and what has arrived may be removed."""

    record: CheckpointRecord


Action = (
    Write | Answer | StartFetch | StartCheck | Publish | KeepResult | StartMerge | StartAudit | StartProof | LendAudit
    | PublishReset | DiscardCandidate
)  # fmt: skip
