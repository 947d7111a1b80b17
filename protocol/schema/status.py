"""The status document of a run: table, `--json`, web page, metrics and status stream all show this one."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.ledger_head import SignedHead
from lutetia.protocol.schema.manifest import Digest, PublicKey
from lutetia.protocol.schema.records import NodeState, ShortText
from lutetia.protocol.schema.verdicts import CheckName

MAX_STATUS_BYTES = 4 << 20
AuditState = Literal["not due", "due", "valid", "invalid", "inconclusive", "not carried out"]
ShardState = Literal["unclaimed", "claimed", "training", "overdue", "done"]


class TolerantDocument(Frozen):
    """A part of the status, which nobody signs or hashes. An older reader ignores fields that a newer coordinator adds."""

    model_config = ConfigDict(extra="ignore")


class ShardStatus(TolerantDocument):
    """The accepted work of one shard and who holds it."""

    shard: int = Field(description="Index of the shard")
    name: str = Field(description="Name of its cluster")
    epoch: int = Field(description="Accepted epochs")
    epochs: int = Field(description="Epochs in its budget")
    samples: int = Field(description="Accepted training samples")
    samples_budget: int = Field(description="Training samples in its budget")
    state: ShardState = Field(description="Whether it is claimed, trained in time, late or done")
    owner: PublicKey | None = Field(default=None, description="Public key of the peer that holds it; null: none")
    claim_expires: float | None = Field(default=None, description="Expiry of the holder's claim in Unix seconds")
    holdout_loss: float | None = Field(default=None, description="Held-out loss of the accepted checkpoint")
    checkpoint: Digest | None = Field(default=None, description="Digest of the accepted checkpoint")
    last_accepted: float | None = Field(default=None, description="Time of the last acceptance in Unix seconds")
    due: float | None = Field(default=None, description="When the next acceptance is expected at the latest, in Unix seconds")
    initial_loss: float | None = Field(default=None, description="Held-out loss before any training")
    waiting: int = Field(default=0, description="Results that wait for their checks")
    audit: AuditState | None = Field(default=None, description="Audit of the accepted checkpoint")
    term: int = Field(default=0, description="How often it was rolled back")
    copies: int | None = Field(
        default=None, description="Live peers besides coordinators that say they hold the accepted checkpoint; null: not counted"
    )


class NodeStatus(TolerantDocument):
    """A node and the state of its work."""

    owner: PublicKey = Field(description="Public key of the node")
    peer_id: str = Field(description="libp2p peer id")
    state: NodeState = Field(description="What it says it is doing")
    health: Literal["working", "starting", "standby", "paused", "overdue", "quarantined"] = Field(
        description="`working` only while its own results are being accepted in time (invariant I6)"
    )
    device: ShortText = Field(description="Kind of device, for instance cpu or cuda")
    samples_per_second: float = Field(description="Training speed in samples per second, as measured by itself")
    shard: int | None = Field(default=None, description="Index of the shard that it holds; null: none")
    accepted: int = Field(default=0, description="Its accepted results")
    rejected: int = Field(default=0, description="Its results that were found invalid")
    last_accepted: float | None = Field(default=None, description="Time of its last acceptance in Unix seconds")
    last_seen: float = Field(description="When it made its newest record, in Unix seconds")
    relayed: bool = Field(default=False, description="Whether it can be reached only through a relay")
    software: ShortText = Field(default="", description="Version of Lutetia")


class RouterStatus(TolerantDocument):
    """The quality of the router on held-out clips."""

    accuracy: float = Field(description="Share of held-out samples whose cluster it names")
    accuracy_by_time: tuple[float, ...] = Field(default=(), description="The same share for ten equal bins of t")
    trained_at: float = Field(description="When it was trained, in Unix seconds")
    epochs: tuple[int, ...] = Field(default=(), description="Accepted epoch of each shard at that time")
    calibration_error: float | None = Field(default=None, description="Expected calibration error of its probabilities")


class RefusalStatus(TolerantDocument):
    """A result that was not accepted."""

    time: float = Field(description="When it was refused, in Unix seconds")
    shard: int = Field(description="Index of its shard")
    epoch: int = Field(description="The epoch that it would have been")
    owner: PublicKey = Field(description="Public key of its author")
    checkpoint: Digest = Field(description="Digest of the result")
    verdict: Literal["invalid", "inconclusive"] = Field(description="An inconclusive result may be tried again")
    check: CheckName = Field(description="The check that it failed")
    text: str = Field(description="Reason, for people")


class CheckStatus(TolerantDocument):
    """What one acceptance check has cost, for one outcome."""

    check: CheckName = Field(description="The check")
    outcome: Literal["valid", "invalid", "inconclusive"] = Field(description="How the results came out of it")
    count: int = Field(description="Results with this outcome")
    seconds: float = Field(description="Seconds that the check took for them, in all")
    size: int = Field(description="Bytes that were checked, in all")


class QuarantineStatus(TolerantDocument):
    """A peer whose work an audit found to be faked."""

    time: float = Field(description="When it was found, in Unix seconds")
    owner: PublicKey = Field(description="Public key of the peer")
    shard: int = Field(description="Index of the shard of the faked result")
    epoch: int = Field(description="Epoch of the faked result")
    text: str = Field(description="What the audit found, for people")


class SwarmStatus(TolerantDocument):
    """The whole run as its coordinator sees it."""

    format: Literal[1] = Field(default=1, description="Version of this document's format")
    run: Digest = Field(description="Run id")
    name: str = Field(description="Name of the run")
    manifest_version: int = Field(description="Version of the manifest in force")
    time: float = Field(description="When the document was made, in Unix seconds")
    coordinator: PublicKey = Field(description="Public key of the coordinator")
    software: str = Field(description="Version of Lutetia that the coordinator runs")
    shards: tuple[ShardStatus, ...] = Field(description="One entry per shard, in order")
    nodes: tuple[NodeStatus, ...] = Field(default=(), description="The nodes that are online, ordered by public key")
    router: RouterStatus | None = Field(default=None, description="The last router; null: none yet")
    mixture: Digest | None = Field(default=None, description="Digest of the last stitched mixture's description")
    accepted: int = Field(default=0, description="Accepted results")
    rejected: int = Field(default=0, description="Results that were found invalid")
    events: int = Field(default=0, description="Events in the coordinator's ledger")
    refusals: tuple[RefusalStatus, ...] = Field(default=(), description="The last refusals, oldest first")
    checks: tuple[CheckStatus, ...] = Field(default=(), description="What the acceptance checks have cost, by check and outcome")
    audits_due: int = Field(default=0, description="Accepted results that wait for an audit")
    quarantined: tuple[QuarantineStatus, ...] = Field(default=(), description="The last quarantined peers, oldest first")
    mixture_epochs: tuple[int, ...] = Field(default=(), description="Accepted epoch of each shard in the last mixture")
    ledger: SignedHead | None = Field(default=None, description="Signed head of the coordinator's ledger at the last acceptance")
    finished: bool = Field(default=False, description="Whether every budget is done and the final mixture is stitched")

    @property
    def done(self) -> bool:
        """Whether every shard's budget is done."""
        return all(shard.epoch >= shard.epochs for shard in self.shards)
