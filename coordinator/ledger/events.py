"""What happens in a run, as its coordinator writes it down: one tagged, frozen fact each. `reducer.apply` adds them up.

The ledger on disk is a file format. The values of `kind` and the names of fields stay; a renamed field keeps its old name as an
alias for reading (`check` was `rung`), and a new field has a default.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, TypeAdapter

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import (
    MOST_LANES,
    MOST_SHARDS,
    Count,
    Digest,
    EpochCount,
    EpochNumber,
    EpochsByShard,
    LaneIndex,
    MeasuredLoss,
    Moment,
    Name,
    OpenWord,
    PublicKey,
    Seconds,
    Sentence,
    ShardIndex,
    Share,
    Tally,
)
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.owner.orders import GivenOrder
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.protocol.schema.verdicts import CheckName

Outcome = Literal["valid", "invalid", "inconclusive"]
Refusal = Literal["invalid", "inconclusive"]
AuditOutcome = Literal["valid", "invalid", "inconclusive", "not carried out"]
DoubtReason = Literal["author", "refusals"]
AuditReason = Literal["streak", "lottery", "re-audit", "refusals", "newcomer", "depth", "lineage", "proof"]
RollbackReason = Literal["invalid", "operator"]
_Shard = Annotated[ShardIndex, Field(description="Index of the shard.")]
_Term = Annotated[EpochNumber, Field(description="Term of the shard from now on: how often it was rolled back.")]
_CheckField = Annotated[
    CheckName, Field(validation_alias=AliasChoices("check", "rung"), description="The check; `rung` in older ledgers.")
]
FlopsByShard = Annotated[tuple[Annotated[int, Field(ge=1, le=10**21)], ...], Field(max_length=MOST_SHARDS)]
_Epochs = Annotated[EpochsByShard, Field(description="Accepted epoch of each shard, in the order of the shards.")]


class _Event(WireDocument):
    time: Moment = Field(description="When it happened: Unix seconds of the coordinator's clock.")


class RunCreated(_Event):
    """The first event of every ledger."""

    kind: Literal["run-created"] = "run-created"
    run: Digest = Field(description="Id of the run.")
    name: Name = Field(description="Name of the run.")
    owner: PublicKey = Field(description="Who signs the run's manifest.")
    coordinator: PublicKey = Field(description="The coordinator that keeps this ledger.")
    shards: int = Field(ge=1, le=MOST_SHARDS, description="Number of shards.")
    epochs: EpochNumber = Field(description="Budget of each shard in epochs.")
    flops: FlopsByShard = Field(default=(), description="FLOPs of training one sample, by shard; empty: not measured yet.")


class SampleCostMeasured(_Event):
    """What one sample costs was measured, in a run whose creation does not say it. Credit is counted with it."""

    kind: Literal["sample-cost-measured"] = "sample-cost-measured"
    flops: FlopsByShard = Field(description="FLOPs of training one sample (forward and backward), by shard.")


class ManifestPublished(_Event):
    """Peers are given this version of the manifest from now on."""

    kind: Literal["manifest-published"] = "manifest-published"
    version: Count = Field(description="Version of the manifest.")
    digest: Digest = Field(description="Digest of the manifest.")
    expires: Moment = Field(description="When its signature expires: Unix seconds.")
    epochs: EpochNumber | None = Field(default=None, description="Budget of each shard in epochs; null: unchanged.")
    coordinator: PublicKey | None = Field(default=None, description="The coordinator that serves it; null: unchanged.")
    orders: tuple[GivenOrder, ...] = Field(default=(), max_length=4096, description="What the owner orders with it.")


class CoordinatorStarted(_Event):
    """The service started, for the first time or again from disk."""

    kind: Literal["coordinator-started"] = "coordinator-started"
    software: Sentence = Field(description="Name and version of the software.")


class CoordinatorStopped(_Event):
    """The service was asked to stop, and did."""

    kind: Literal["coordinator-stopped"] = "coordinator-stopped"


class SnapshotDropped(_Event):
    """The coordinator had started from a snapshot that does not follow from the ledger; it has added all events up again."""

    kind: Literal["snapshot-dropped"] = "snapshot-dropped"
    events: Count = Field(description="How many events the snapshot covered.")


class BaselineMeasured(_Event):
    """The initial model of a shard was measured; its first checkpoint is compared with this."""

    kind: Literal["baseline-measured"] = "baseline-measured"
    shard: _Shard
    loss: MeasuredLoss = Field(description="Held-out loss of the initial model.")


class ResultSeen(_Event):
    """A result arrived that passed the free checks; it waits for the others."""

    kind: Literal["checkpoint-seen"] = "checkpoint-seen"
    record: CheckpointRecord = Field(description="The signed record of the result.")
    via: Literal["offer", "poll"] = Field(description="By the offer stream, or read from the DHT.")


class _Verdict(_Event):
    shard: _Shard
    epoch: EpochNumber = Field(description="Epoch of the result.")
    owner: PublicKey = Field(description="Author of the result.")
    checkpoint: Digest = Field(description="Digest of the result.")


class CheckCost(WireDocument):
    """One check that was run on one result."""

    check: _CheckField
    outcome: Outcome = Field(description="What it found.")
    seconds: Seconds = Field(description="Seconds that it took.")
    size: Tally = Field(default=0, description="Bytes that it fetched or read.")


class ResultRefused(_Verdict):
    """`invalid` is final. `inconclusive` could not be checked; it is tried again, or given up."""

    kind: Literal["checkpoint-refused"] = "checkpoint-refused"
    verdict: Refusal = Field(description="Whether the refusal is final.")
    check: _CheckField
    text: Sentence = Field(description="Why, in words.")
    again_at: Moment | None = Field(default=None, description="When it is checked again: Unix seconds; null: not any more.")
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16, description="The checks that were run.")


class ResultDoubted(_Verdict):
    """A result failed a loss check, but its training may be right: its whole epoch is replayed before it is decided."""

    kind: Literal["checkpoint-doubted"] = "checkpoint-doubted"
    check: CheckName = Field(description="The check that it failed.")
    text: Sentence = Field(description="Why, in words.")
    loss: MeasuredLoss = Field(description="Its held-out loss.")
    parent_loss: MeasuredLoss = Field(description="Held-out loss of its parent on the same rows.")
    why: DoubtReason = Field(description="Its author has audited work, or other results on the same parent failed, too.")
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16, description="The checks that were run.")


class ResultSuperseded(_Verdict):
    """Another result was accepted for the same epoch first: the first valid one wins, and the others did nothing wrong."""

    kind: Literal["checkpoint-superseded"] = "checkpoint-superseded"
    by: Digest = Field(description="Digest of the accepted result.")


class CheckpointAccepted(_Event):
    """A result passed all checks and is the next epoch of its shard."""

    kind: Literal["checkpoint-accepted"] = "checkpoint-accepted"
    acceptance: AcceptanceRecord = Field(description="The acceptance as it is signed and published.")
    parent_loss: MeasuredLoss = Field(description="Held-out loss of the parent, with which its loss was compared.")
    note: Sentence = Field(
        default="", description="The check that it failed, and the replay that proved its training; empty: it passed all checks."
    )
    build: str = Field(
        default="",
        max_length=128,
        description="The author's software and kind of expert: trust is counted for each, as BOINC counts it by app version.",
    )
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16, description="The checks that were run.")


class LaneAccepted(_Event):
    """The result of a lane passed all checks; it waits for the merge into the next epoch of its shard."""

    kind: Literal["lane-accepted"] = "lane-accepted"
    acceptance: AcceptanceRecord = Field(description="What an acceptance of this result alone would say; it is not published.")
    samples: Count = Field(description="Samples that the lane trained, with which its author is credited.")
    parent_loss: MeasuredLoss = Field(description="Held-out loss of the parent, with which its loss was compared.")
    note: Sentence = Field(
        default="", description="The check that it failed, and the replay that proved its training; empty: it passed all checks."
    )
    build: str = Field(default="", max_length=128, description="The author's software and kind of expert.")
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16, description="The checks that were run.")


class LaneDropped(_Verdict):
    """An accepted result that waits for its merge is left out."""

    kind: Literal["lane-dropped"] = "lane-dropped"
    lane: LaneIndex = Field(description="Lane of the result.")
    why: Literal["quarantine", "unreadable"] = Field(
        default="quarantine", description="Its author was quarantined, or the coordinator cannot make an epoch of it any more."
    )


class LanesMerged(_Event):
    """Accepted results of lanes became the next epoch of their shard."""

    kind: Literal["lanes-merged"] = "lanes-merged"
    acceptance: AcceptanceRecord = Field(description="The acceptance as it is signed and published; it names the lanes.")
    trace: BlobRef = Field(description="Blob of the mean loss of every training step.")
    sources: tuple[Digest, ...] = Field(max_length=MOST_LANES, description="Digests of the merged results, by lane.")
    parent_loss: MeasuredLoss = Field(description="Held-out loss of the parent, with which its loss was compared.")
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16, description="The checks that were run on the merged epoch.")


class MergeRefused(_Event):
    """Merged lanes failed a check: the best of the results is taken over alone."""

    kind: Literal["merge-refused"] = "merge-refused"
    shard: _Shard
    epoch: EpochNumber = Field(description="The epoch that it would have been.")
    lanes: tuple[LaneIndex, ...] = Field(max_length=MOST_LANES, description="The merged lanes.")
    check: CheckName = Field(description="The check that failed.")
    text: Sentence = Field(description="Why, in words.")
    costs: tuple[CheckCost, ...] = Field(default=(), max_length=16, description="The checks that were run.")


class AcceptanceRecovered(_Event):
    """This coordinator's own signed acceptance, which the ledger had lost and peers still held; epochs between stay unknown."""

    kind: Literal["acceptance-recovered"] = "acceptance-recovered"
    acceptance: AcceptanceRecord = Field(description="The recovered acceptance.")


class ResetRecovered(_Event):
    """This coordinator's own signed reset of a shard to its beginning, which the ledger had lost and peers still held."""

    kind: Literal["reset-recovered"] = "reset-recovered"
    shard: _Shard
    term: _Term


class QuarantineRecovered(_Event):
    """This coordinator's own signed quarantine of a peer, which the ledger had lost and peers still held."""

    kind: Literal["quarantine-recovered"] = "quarantine-recovered"
    owner: PublicKey = Field(description="The quarantined peer.")
    shard: Literal[0] = Field(default=0, description="Always 0: the result that caused it is unknown.")
    epoch: Literal[0] = Field(default=0, description="Always 0: the result that caused it is unknown.")
    text: Sentence = Field(
        default="the ledger that said why was lost; the swarm still held that this peer is quarantined",
        description="Why, in words.",
    )


class AuditDue(_Verdict):
    """This accepted result is to be replayed."""

    kind: Literal["audit-due"] = "audit-due"
    streak: Tally = Field(description="The author's consecutive results that were audited and found valid.")
    whole: bool = Field(default=False, description="Replay the whole epoch, not only its first steps.")
    why: AuditReason = Field(
        default="streak",
        description="The streak is too short, the lottery of 1/streak drew it, a later result of its author was invalid, "
        "results of several authors that were built on it were refused, its author is new, many epochs before it were not "
        "replayed whole, an epoch before it is invalid, or it was accepted by the proof of a replay.",
    )


class AuditDone(_Verdict):
    """An audit was carried out. Only `valid` earns trust; `inconclusive` is tried again, or given up."""

    kind: Literal["audit-done"] = "audit-done"
    outcome: AuditOutcome = Field(description="What it found; `not carried out` in ledgers of the first version only.")
    text: Sentence = Field(default="", description="Why, in words.")
    by: PublicKey | None = Field(default=None, description="The peer that replayed it; null: the coordinator itself.")
    seconds: Seconds = Field(default=0.0, description="Seconds that the replay took.")
    closer: bool = Field(default=False, description="The next try replays the whole epoch.")
    doubt: bool = Field(default=False, description="Given up, but honest work was never seen to end where this epoch ends.")
    again_at: Moment | None = Field(default=None, description="When it is tried again: Unix seconds; null: not any more.")
    samples: Tally = Field(default=0, description="Samples that the peer `by` replayed and is credited with.")


class AuditReported(_Verdict):
    """A peer reported on an audit that it was lent; the report counts once the coordinator has replayed the result, too."""

    kind: Literal["audit-reported"] = "audit-reported"
    by: PublicKey = Field(description="The peer that replayed it.")
    outcome: Outcome = Field(description="What it reported.")
    text: Sentence = Field(default="", description="Why, in words.")
    seconds: Seconds = Field(default=0.0, description="Seconds that the replay took.")
    samples: Tally = Field(default=0, description="Samples that it replayed, and is credited with once the report proves right.")


class PeerQuarantined(_Verdict):
    """An audit found this result invalid: its author's results are refused and its claims ignored from now on."""

    kind: Literal["peer-quarantined"] = "peer-quarantined"
    text: Sentence = Field(default="", description="What the audit found, in words.")


class PeerPardoned(_Event):
    """The run's operator lifted a quarantine; the peer starts without trust."""

    kind: Literal["peer-pardoned"] = "peer-pardoned"
    owner: PublicKey = Field(description="The pardoned peer.")


class CheckerRefuted(_Event):
    """This peer's report on a check contradicts those of two others that agree: it is not asked again until a pardon."""

    kind: Literal["checker-refuted"] = "checker-refuted"
    owner: PublicKey = Field(description="The peer whose report is contradicted.")
    check: OpenWord = Field(description="What it was to check: result, replay, router or router-report.")
    shard: _Shard
    epoch: EpochCount = Field(default=0, description="Epoch of the result; 0 for the router.")
    text: Sentence = Field(default="", description="Why, in words.")


class CopyKept(WireDocument):
    """One peer's part in keeping copies of a shard's accepted checkpoints."""

    owner: PublicKey = Field(description="The peer.")
    shard: _Shard
    samples: Tally = Field(description="Samples of the shard that it is credited with for it.")


class CopiesKept(_Event):
    """Peers that proved that they hold copies of accepted checkpoints since the last such event."""

    kind: Literal["copies-kept"] = "copies-kept"
    copies: tuple[CopyKept, ...] = Field(max_length=1024, description="Who kept copies of which shards.")


class LentCheckCounted(_Event):
    """Peers carried out a check that was lent to them, and their reports agree: each is credited with it."""

    kind: Literal["lent-check-counted"] = "lent-check-counted"
    shard: _Shard
    epoch: EpochCount = Field(description="Epoch of the result that was checked.")
    check: OpenWord = Field(description="What was checked: result or replay.")
    samples: Tally = Field(description="Samples of the shard that each is credited with.")
    owners: tuple[PublicKey, ...] = Field(max_length=16, description="The peers.")


class HoldoutBurnt(_Event):
    """Held-out clips were given to strangers to check one result, and are used for no other."""

    kind: Literal["holdout-burnt"] = "holdout-burnt"
    shard: _Shard
    holdout: Digest = Field(description="Digest of the file of these clips.")
    checkpoint: Digest = Field(description="The result that is scored on them.")


class LineageRolledBack(_Event):
    """A shard is at an earlier epoch again: a result accepted after it was found invalid, or the run's operator asked for it."""

    kind: Literal["lineage-rolled-back"] = "lineage-rolled-back"
    shard: _Shard
    epoch: EpochCount = Field(description="The epoch from which the shard goes on.")
    term: _Term
    dropped: EpochNumber = Field(description="Number of accepted epochs that are void.")
    checkpoint: Digest = Field(description="The oldest void result; it is the invalid one, if one is.")
    kept: tuple[Digest, ...] = Field(
        default=(), max_length=MOST_LANES, description="Results of other lanes of the first void epoch, which are merged again."
    )
    why: RollbackReason = Field(default="invalid", description="An audit found a result invalid, or the operator asked for it.")


class LineageSuspected(_Verdict):
    """An audit found this accepted result invalid. The epochs after it may be good: they are audited before a rollback."""

    kind: Literal["lineage-suspected"] = "lineage-suspected"


class LineageKept(_Verdict):
    """An audit found this accepted result invalid. The lineage is kept, because the epochs after it proved good."""

    kind: Literal["lineage-kept"] = "lineage-kept"
    text: Sentence = Field(default="", description="Why, in words.")


class RouterTrained(_Event):
    """A router was trained."""

    kind: Literal["router-trained"] = "router-trained"
    epochs: _Epochs
    router: BlobRef = Field(description="The router's weights.")
    accuracy: Share = Field(description="Held-out accuracy, 0 to 1.")
    accuracy_by_time: tuple[Share, ...] = Field(
        default=(), max_length=64, description="Accuracy in equal bins of the diffusion time t."
    )
    calibration_error: Share | None = Field(default=None, description="Expected calibration error, 0 to 1.")


class MixtureStitched(_Event):
    """A new mixture was made and is kept; if it is `current`, the mixture folder holds it."""

    kind: Literal["mixture-stitched"] = "mixture-stitched"
    epochs: _Epochs
    terms: EpochsByShard = Field(
        default=(), description="Term of each shard when stitching began; empty in ledgers of earlier versions."
    )
    mixture: Digest = Field(description="Digest of the mixture's description.")
    current: bool = Field(default=True, description="Whether it is the run's mixture from now on, in place of the one before.")
    text: Sentence = Field(default="", description="Why it is current or not, in words; empty in ledgers of earlier versions.")
    loss: MeasuredLoss | None = Field(default=None, description="Its mean held-out loss; null: not measured.")
    rows: Tally = Field(default=0, description="Held-out rows that it was measured on.")


class RunFinished(_Event):
    """Every budget is done and the final mixture is stitched."""

    kind: Literal["run-finished"] = "run-finished"
    mixture: Digest = Field(description="Digest of the final mixture's description.")


Event = Annotated[
    RunCreated
    | SampleCostMeasured
    | ManifestPublished
    | CoordinatorStarted
    | CoordinatorStopped
    | SnapshotDropped
    | BaselineMeasured
    | ResultSeen
    | ResultRefused
    | ResultDoubted
    | ResultSuperseded
    | CheckpointAccepted
    | LaneAccepted
    | LaneDropped
    | LanesMerged
    | MergeRefused
    | AcceptanceRecovered
    | ResetRecovered
    | QuarantineRecovered
    | AuditDue
    | AuditDone
    | AuditReported
    | PeerQuarantined
    | PeerPardoned
    | CheckerRefuted
    | CopiesKept
    | LentCheckCounted
    | HoldoutBurnt
    | LineageRolledBack
    | LineageSuspected
    | LineageKept
    | RouterTrained
    | MixtureStitched
    | RunFinished,
    Field(discriminator="kind"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def read_event(data: bytes | str) -> Event:
    """The event that `canonical` wrote, also in earlier versions. Raises pydantic's ValidationError for anything else."""
    return _EVENT.validate_json(data)
