"""What happens in a run, as its coordinator writes it down: one tagged, frozen fact each. `ledger_state.apply` adds them up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import BlobRef, Digest, Name, PublicKey
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.protocol.schema.verdicts import CheckName

Refusal = Literal["invalid", "inconclusive"]
AuditOutcome = Literal["valid", "invalid", "inconclusive", "not carried out"]
AuditReason = Literal["streak", "lottery", "re-audit"]
Sentence = Annotated[str, Field(max_length=1000)]


class _Event(Frozen):
    """`time` is Unix seconds of the coordinator's clock."""

    time: float


class RunCreated(_Event):
    """The first event of every ledger: whose run it is, and how many shards and epochs it has."""

    kind: Literal["run-created"] = "run-created"
    run: Digest
    name: Name
    owner: PublicKey
    coordinator: PublicKey
    shards: int = Field(ge=1, le=4096)
    epochs: int = Field(ge=1)


class ManifestPublished(_Event):
    """Peers are given this version of the manifest from now on; `epochs` is its budget, `coordinator` who serves it."""

    kind: Literal["manifest-published"] = "manifest-published"
    version: int = Field(ge=1)
    digest: Digest
    expires: float
    epochs: int | None = Field(default=None, ge=1)
    coordinator: PublicKey | None = None


class CoordinatorStarted(_Event):
    """The service came up, for the first time or again from disk."""

    kind: Literal["coordinator-started"] = "coordinator-started"
    software: str


class CoordinatorStopped(_Event):
    """The service was asked to end, and did."""

    kind: Literal["coordinator-stopped"] = "coordinator-stopped"


class BaselineMeasured(_Event):
    """Held-out loss of a shard's initial model: what its first checkpoint is compared with."""

    kind: Literal["baseline-measured"] = "baseline-measured"
    shard: int = Field(ge=0)
    loss: float


class ResultSeen(_Event):
    """A result came in whose signature and lineage are right; it waits for judgement."""

    kind: Literal["checkpoint-seen"] = "checkpoint-seen"
    record: CheckpointRecord
    via: Literal["offer", "poll"]


class _Verdict(_Event):
    shard: int = Field(ge=0)
    epoch: int = Field(ge=1)
    owner: PublicKey
    checkpoint: Digest


class CheckCost(Frozen):
    """One rung of the ladder, climbed: what came of it, and what it took in seconds and in bytes fetched or read."""

    rung: CheckName
    outcome: Literal["valid", "invalid", "inconclusive"]
    seconds: float = Field(ge=0)
    size: int = Field(default=0, ge=0)


class ResultRefused(_Verdict):
    """`invalid` is final. `inconclusive` could not be judged; it is tried again at `again_at`, or given up when that is None."""

    kind: Literal["checkpoint-refused"] = "checkpoint-refused"
    verdict: Refusal
    rung: CheckName
    text: Sentence
    again_at: float | None = None
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16)


class ResultSuperseded(_Verdict):
    """Another result was accepted for the same epoch first. No blame: the first valid one wins."""

    kind: Literal["checkpoint-superseded"] = "checkpoint-superseded"
    by: Digest


class CheckpointAccepted(_Event):
    """The signed yes. `parent_loss` is what `acceptance.holdout_loss` was compared with.

    `build` names the author's software and the kind of expert: trust is counted for each, as BOINC counts it by app version.
    """

    kind: Literal["checkpoint-accepted"] = "checkpoint-accepted"
    acceptance: AcceptanceRecord
    parent_loss: float
    build: str = Field(default="", max_length=128)
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16)


class AcceptanceRecovered(_Event):
    """This coordinator's own signed acceptance, which the ledger had lost and peers still held; epochs between stay unknown."""

    kind: Literal["acceptance-recovered"] = "acceptance-recovered"
    acceptance: AcceptanceRecord


class ResetRecovered(_Event):
    """This coordinator's own signed reset, which the ledger had lost: `shard` stands at its beginning, in term `term`."""

    kind: Literal["reset-recovered"] = "reset-recovered"
    shard: int = Field(ge=0)
    term: int = Field(ge=1)


class QuarantineRecovered(_Event):
    """This coordinator's own signed word that `owner` is quarantined, which the ledger had lost.

    For which result is unknown; `shard` and `epoch` are 0.
    """

    kind: Literal["quarantine-recovered"] = "quarantine-recovered"
    owner: PublicKey
    shard: Literal[0] = 0
    epoch: Literal[0] = 0
    text: Sentence = "the ledger that said why was lost; the swarm still held that this peer is quarantined"


class AuditDue(_Verdict):
    """This result is to be replayed, `whole` or only its first steps.

    `why`: the author's `streak` results found valid in a row are too few, the lottery of 1/streak fell on it, or a later result
    of its author was found invalid.
    """

    kind: Literal["audit-due"] = "audit-due"
    streak: int = Field(ge=0)
    whole: bool = False
    why: AuditReason = "streak"


class AuditDone(_Verdict):
    """What came of a due audit. Only `valid` earns trust. `inconclusive` is tried again at `again_at`; None: it is given up.

    `closer`: the next try replays the whole epoch. `doubt`: given up, but the end is not where honest work was ever seen to end.
    `by` is the peer that replayed it, None the coordinator itself; `seconds` of replaying. Ledgers of the first version say `not
    carried out` where nobody replayed.
    """

    kind: Literal["audit-done"] = "audit-done"
    outcome: AuditOutcome
    text: Sentence = ""
    by: PublicKey | None = None
    seconds: float = Field(default=0.0, ge=0)
    closer: bool = False
    doubt: bool = False
    again_at: float | None = None


class AuditReported(_Verdict):
    """Peer `by` replayed this result and said `outcome`; it is not believed before the coordinator has replayed it, too."""

    kind: Literal["audit-reported"] = "audit-reported"
    by: PublicKey
    outcome: Literal["valid", "invalid", "inconclusive"]
    text: Sentence = ""
    seconds: float = Field(default=0.0, ge=0)


class PeerQuarantined(_Verdict):
    """An audit found this result of `owner` invalid: from now on its results are refused and its claims do not count."""

    kind: Literal["peer-quarantined"] = "peer-quarantined"
    text: Sentence = ""


class PeerPardoned(_Event):
    """The run's operator lifted the quarantine of `owner`, who begins without trust."""

    kind: Literal["peer-pardoned"] = "peer-pardoned"
    owner: PublicKey


class LineageRolledBack(_Event):
    """`shard` stands at `epoch` again, in the new term `term`, because `checkpoint` of a later epoch was found invalid."""

    kind: Literal["lineage-rolled-back"] = "lineage-rolled-back"
    shard: int = Field(ge=0)
    epoch: int = Field(ge=0)
    term: int = Field(ge=1)
    dropped: int = Field(ge=1)
    checkpoint: Digest


class RouterTrained(_Event):
    """A router that knows the experts at `epochs` (one number per shard)."""

    kind: Literal["router-trained"] = "router-trained"
    epochs: tuple[int, ...]
    router: BlobRef
    accuracy: float
    accuracy_by_time: tuple[float, ...] = ()
    calibration_error: float | None = None


class MixtureStitched(_Event):
    """The mixture folder now holds the experts at `epochs`; `mixture` is the digest of its description.

    `terms`: how often each shard had been rolled back when stitching began; empty in ledgers of earlier versions.
    """

    kind: Literal["mixture-stitched"] = "mixture-stitched"
    epochs: tuple[int, ...]
    terms: tuple[int, ...] = ()
    mixture: Digest


class RunFinished(_Event):
    """Every budget is done and the final mixture is stitched."""

    kind: Literal["run-finished"] = "run-finished"
    mixture: Digest


Event = Annotated[
    RunCreated
    | ManifestPublished
    | CoordinatorStarted
    | CoordinatorStopped
    | BaselineMeasured
    | ResultSeen
    | ResultRefused
    | ResultSuperseded
    | CheckpointAccepted
    | AcceptanceRecovered
    | ResetRecovered
    | QuarantineRecovered
    | AuditDue
    | AuditDone
    | AuditReported
    | PeerQuarantined
    | PeerPardoned
    | LineageRolledBack
    | RouterTrained
    | MixtureStitched
    | RunFinished,
    Field(discriminator="kind"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def read_event(data: bytes | str) -> Event:
    """The event that `canonical` wrote. Raises pydantic's ValidationError for anything else."""
    return _EVENT.validate_json(data)


Outcome = Literal["valid", "invalid", "inconclusive"]
