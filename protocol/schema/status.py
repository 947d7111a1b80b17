"""The status document of a run: table, `--json`, web page, metrics and status stream all show this one."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, ConfigDict, Field, computed_field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import (
    MOST_LANES,
    MOST_SHARDS,
    Count,
    Digest,
    EpochCount,
    EpochNumber,
    EpochsByShard,
    Explanation,
    LaneIndex,
    MeasuredLoss,
    Moment,
    OpenWord,
    PeerId,
    PeerName,
    PublicKey,
    Rate,
    Seconds,
    Sentence,
    ShardIndex,
    Share,
    Tally,
    Word,
    added,
)
from lutetia.protocol.schema.ledger_head import SignedHead

MAX_STATUS_BYTES = 4 << 20
MOST_NODES = 16384
"""Nodes that a reader takes; a coordinator shows fewer (`coordinator.ledger.status_builder.NODES_SHOWN`)."""
AuditState = Literal["not due", "due", "valid", "invalid", "inconclusive", "not carried out"]
ShardState = Literal["unclaimed", "claimed", "training", "overdue", "done"]


class TolerantDocument(Frozen):
    """A part of the status, which nobody signs or hashes. An older reader ignores fields that a newer coordinator adds.

    States, verdicts and names of checks are open words: a reader shows one that it does not know as it is.
    """

    model_config = ConfigDict(extra="ignore")


class StallStatus(TolerantDocument):
    """What does not go on or is in question, and what to do."""

    kind: OpenWord = Field(
        description="Says what is concerned: a shard, a lineage on an invalid epoch, a merge of lanes, an audit, a node, or the "
        "run's ledger"
    )
    shard: ShardIndex | None = Field(default=None, description="Index of the shard, also of an audit's; null: a node without one")
    epoch: EpochNumber | None = Field(default=None, description="The accepted epoch that an audit is to replay, or found invalid")
    owner: PublicKey | None = Field(default=None, description="Public key of the node, or of the invalid epoch's author")
    since: Moment = Field(description="Since when, in Unix seconds")
    why: Explanation = Field(description="What holds it up, for people")
    remedy: Explanation = Field(description="What to do, for people")


class LaneStatus(TolerantDocument):
    """One lane of a shard at which a node works, or of which the result is there."""

    lane: LaneIndex = Field(description="Number of the lane")
    owner: PublicKey = Field(description="Public key of the node that trains it, or that trained its result")
    state: OpenWord = Field(
        description="claimed, training, late (the others are merged without it), gathered (its result is accepted and waits for "
        "the merge), or merging"
    )
    merged: bool = added(False, "Whether the newest accepted epoch was merged from a result of this lane among others")


class MergeStatus(TolerantDocument):
    """The next merge of a shard's lanes."""

    lanes: Count = Field(description="Lanes of the shard")
    quorum: Count = Field(description="Accepted results that are enough for the merge")
    gathered: Tally = Field(description="Accepted results that wait for it, or are being merged")
    deadline: Seconds = Field(description="Seconds after the first of them in which they are merged at the latest")
    due: Moment | None = Field(
        default=None, description="From when they are merged, as far as is known now, in Unix seconds; null: none is there"
    )


class ShardStatus(TolerantDocument):
    """The accepted work of one shard and who holds it."""

    shard: ShardIndex = Field(description="Index of the shard")
    name: Word = Field(description="Name of its cluster")
    epoch: EpochCount = Field(description="Accepted epochs")
    epochs: EpochNumber = Field(description="Epochs in its budget")
    samples: Tally = Field(description="Accepted training samples")
    samples_budget: Count = Field(description="Training samples in its budget")
    state: OpenWord = Field(description="Whether it is claimed, trained in time, late or done")
    owner: PublicKey | None = Field(default=None, description="Public key of the peer that holds it; null: none")
    claim_expires: Moment | None = Field(default=None, description="Expiry of the holder's claim in Unix seconds")
    holdout_loss: MeasuredLoss | None = Field(default=None, description="Held-out loss of the accepted checkpoint")
    checkpoint: Digest | None = Field(default=None, description="Digest of the accepted checkpoint")
    last_accepted: Moment | None = Field(default=None, description="Time of the last acceptance in Unix seconds")
    due: Moment | None = Field(default=None, description="When the next acceptance is expected at the latest, in Unix seconds")
    initial_loss: MeasuredLoss | None = Field(default=None, description="Held-out loss before any training")
    waiting: Tally = Field(default=0, description="Results that wait for their checks")
    audit: OpenWord | None = Field(default=None, description="Audit of the accepted checkpoint")
    term: EpochCount = Field(default=0, description="How often it was rolled back")
    copies: Tally | None = Field(
        default=None, description="Live peers besides coordinators that say they hold the accepted checkpoint; null: not counted"
    )
    lanes: tuple[LaneStatus, ...] = added(
        (), "In a run with lanes: those at which nodes work or whose results are there", max_length=MOST_LANES
    )
    merge: MergeStatus | None = added(None, "In a run with lanes: the next merge; null also where the document has no room")


class _CheckNamed(TolerantDocument):
    """Names a check. Its field was `rung` before release 0.1; it is read under either name and written under both."""

    check: OpenWord = Field(validation_alias=AliasChoices("check", "rung"), description="The check")

    @computed_field(description="The same as `check`, for readers that are older than release 0.1")
    @property
    def rung(self) -> OpenWord:
        return self.check


class NodeStatus(TolerantDocument):
    """A node and the state of its work."""

    owner: PublicKey = Field(description="Public key of the node")
    peer_id: PeerId = Field(description="libp2p peer id")
    state: OpenWord = Field(description="What it says it is doing")
    health: OpenWord = Field(description="`working` only while its own results are being accepted in time (invariant I6)")
    device: Word = Field(description="Kind of device, for instance cpu or cuda")
    samples_per_second: Rate = Field(description="Training speed in samples per second, as measured by itself")
    shard: ShardIndex | None = Field(
        default=None, description="Index of the shard that it holds, of several the one that `health` speaks of; null: none"
    )
    shards: tuple[ShardIndex, ...] = added(
        (), "Indexes of the shards that its devices hold, if there are several", max_length=MOST_SHARDS
    )
    accepted: Tally = Field(default=0, description="Its accepted results")
    rejected: Tally = Field(default=0, description="Its results that were found invalid")
    last_accepted: Moment | None = Field(default=None, description="Time of its last acceptance in Unix seconds")
    last_seen: Moment = Field(description="When it made its newest record, in Unix seconds")
    relayed: bool = Field(default=False, description="Whether the coordinator is connected to it through a relay only")
    link: OpenWord | None = Field(
        default=None, description="How the coordinator is connected to it: direct or relayed; null: not connected"
    )
    software: Word = Field(default="", description="Version of Lutetia")
    name: PeerName = Field(default="", description="What its volunteer calls it; empty: nothing, or the owner hides it")


class RouterStatus(TolerantDocument):
    """The quality of the router on held-out clips."""

    accuracy: Share = Field(description="Share of held-out samples whose cluster it names")
    accuracy_by_time: tuple[Share, ...] = Field(default=(), max_length=64, description="The same share for ten equal bins of t")
    trained_at: Moment = Field(description="When it was trained, in Unix seconds")
    epochs: EpochsByShard = Field(default=(), description="Accepted epoch of each shard at that time")
    calibration_error: Share | None = Field(default=None, description="Expected calibration error of its probabilities")


class HeldMixtureStatus(TolerantDocument):
    """The newest mixture, which did not become current."""

    mixture: Digest = Field(description="Digest of its description")
    time: Moment = Field(description="When it was made, in Unix seconds")
    text: Explanation = Field(default="", description="Why it is not current, for people")


class RefusalStatus(_CheckNamed):
    """A result that was not accepted."""

    time: Moment = Field(description="When it was refused, in Unix seconds")
    shard: ShardIndex = Field(description="Index of its shard")
    epoch: EpochCount = Field(description="The epoch that it would have been")
    owner: PublicKey = Field(description="Public key of its author")
    checkpoint: Digest = Field(description="Digest of the result")
    verdict: OpenWord = Field(description="An inconclusive result may be tried again")
    text: Sentence = Field(description="Reason, for people")


class CheckStatus(_CheckNamed):
    """What one acceptance check has cost, for one outcome."""

    outcome: OpenWord = Field(description="How the results came out of it")
    count: Tally = Field(description="Results with this outcome")
    seconds: Seconds = Field(description="Seconds that the check took for them, in all")
    size: Tally = Field(description="Bytes that were checked, in all")


class QuarantineStatus(TolerantDocument):
    """A peer whose work an audit found to be faked."""

    time: Moment = Field(description="When it was found, in Unix seconds")
    owner: PublicKey = Field(description="Public key of the peer")
    shard: ShardIndex = Field(description="Index of the shard of the faked result")
    epoch: EpochCount = Field(description="Epoch of the faked result")
    text: Sentence = Field(description="What the audit found, for people")


class PauseStatus(TolerantDocument):
    """The owner's pause: nothing is accepted and nothing is lost until the run is resumed."""

    since: Moment = Field(description="When the owner paused the run, in Unix seconds")
    text: Explanation = Field(default="", description="Why, for people")


class BanStatus(TolerantDocument):
    """A peer that the owner has banned."""

    owner: PublicKey = Field(description="Public key of the peer")
    since: Moment = Field(description="When it was banned, in Unix seconds")
    text: Explanation = Field(default="", description="Why, for people")


class SwarmStatus(TolerantDocument):
    """The whole run as its coordinator sees it."""

    format: Literal[1] = Field(default=1, description="Version of this document's format")
    run: Digest = Field(description="Run id")
    name: Word = Field(description="Name of the run")
    manifest_version: Tally = Field(description="Version of the manifest in force")
    time: Moment = Field(description="When the document was made, in Unix seconds")
    coordinator: PublicKey = Field(description="Public key of the coordinator")
    software: Word = Field(description="Version of Lutetia that the coordinator runs")
    shards: tuple[ShardStatus, ...] = Field(max_length=MOST_SHARDS, description="One entry per shard, in order")
    nodes: tuple[NodeStatus, ...] = Field(
        default=(),
        max_length=MOST_NODES,
        description="Nodes that are online, ordered by public key; where room is short, those with a shard or accepted work",
    )
    nodes_not_shown: Tally = Field(default=0, description="Further nodes that are online, for which the document has no room")
    router: RouterStatus | None = Field(default=None, description="The last router; null: none yet")
    mixture: Digest | None = Field(default=None, description="Digest of the current mixture's description")
    held_mixture: HeldMixtureStatus | None = Field(
        default=None, description="The newest mixture, if it is kept and not current; null: the newest is current"
    )
    accepted: Tally = Field(default=0, description="Accepted results")
    rejected: Tally = Field(default=0, description="Results that were found invalid")
    events: Tally = Field(default=0, description="Events in the coordinator's ledger")
    refusals: tuple[RefusalStatus, ...] = Field(default=(), max_length=1024, description="The last refusals, oldest first")
    checks: tuple[CheckStatus, ...] = Field(
        default=(), max_length=1024, description="What the acceptance checks have cost, by check and outcome"
    )
    audits_due: Tally = Field(default=0, description="Accepted results that wait for an audit")
    stalls: tuple[StallStatus, ...] = Field(
        default=(), max_length=64, description="What does not go on: shards, audits and nodes, the oldest of each kind first"
    )
    stalled_shards: tuple[ShardIndex, ...] = Field(
        default=(), max_length=MOST_SHARDS, description="Indexes of all shards that do not go on"
    )
    quarantined: tuple[QuarantineStatus, ...] = Field(
        default=(), max_length=1024, description="The last quarantined peers, oldest first"
    )
    mixture_epochs: EpochsByShard = Field(default=(), description="Accepted epoch of each shard in the current mixture")
    ledger: SignedHead | None = Field(default=None, description="Signed head of the coordinator's ledger at the last acceptance")
    paused: PauseStatus | None = Field(default=None, description="The owner's pause; null: the run goes on")
    banned: tuple[BanStatus, ...] = Field(
        default=(), max_length=1024, description="The peers that were banned last, oldest first"
    )
    finished: bool = Field(default=False, description="Whether every budget is done and the final mixture is stitched")

    @property
    def done(self) -> bool:
        """Whether every shard's budget is done."""
        return all(shard.epoch >= shard.epochs for shard in self.shards)


def name_of(stall: StallStatus) -> str:
    """What does not go on, in words for people."""
    shard = "" if stall.shard is None else f"expert {stall.shard:03d}"
    if stall.kind == "ledger":
        return "the coordinator's ledger"
    if stall.kind == "node":
        return f"node {(stall.owner or '?')[:8]}" + (f" on {shard}" if shard else "")
    return shard if stall.kind == "shard" else f"{stall.kind} of {shard} epoch {stall.epoch}"
