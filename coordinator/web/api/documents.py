"""The documents of the web API. Times are Unix seconds; `event` is a number in the coordinator's ledger, from 1."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.coordinator.web.api.people import CreditDocument
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.status import NodeStatus, PauseStatus, ShardStatus, StallStatus


class _Point(Frozen):
    event: int = Field(ge=1, description="Number of the event in the ledger")
    time: float = Field(description="When it happened, in Unix seconds")


class _ResultPoint(_Point):
    shard: int = Field(description="Index of the shard")
    epoch: int = Field(description="Epoch of the result")


class AcceptedPoint(_ResultPoint):
    """An accepted result."""

    samples: int = Field(description="Samples of the shard trained so far, earlier epochs included")
    trained: int = Field(description="Samples of this epoch alone: what its author is credited with")
    loss: float = Field(description="Held-out loss")
    parent_loss: float | None = Field(description="Held-out loss of its parent on the same rows; null: not known")
    author: str = Field(description="Public key of the peer that trained it")
    checkpoint: str = Field(description="Digest of the result")
    weights: str = Field(description="Digest of the blob of its weights, at /blobs/{digest}")
    weights_size: int = Field(description="Size of that blob in bytes")
    note: str = Field(
        default="", description="The check that it failed and the replay that proved it; empty: it passed all checks"
    )
    void: bool = Field(default=False, description="Whether it was rolled back since")
    void_event: int | None = Field(default=None, description="Number of the event that rolled it back; null: none did")


class RefusedPoint(_ResultPoint):
    """A result that was refused for good."""

    owner: str = Field(description="Public key of its author")
    checkpoint: str = Field(description="Digest of the result")
    verdict: str = Field(description="invalid, or inconclusive if it could not be checked")
    check: str = Field(description="The check")
    text: str = Field(description="Why, in words")


class SupersededPoint(_ResultPoint):
    """A result for whose epoch another one was accepted first."""

    by: str = Field(description="Digest of the accepted result")


class AuditPoint(_ResultPoint):
    """A finished audit."""

    outcome: str = Field(description="What it found")
    text: str = Field(description="Why, in words")


class RouterPoint(_Point):
    """A trained router."""

    accuracy: float = Field(description="Share of held-out noisy clips whose cluster it names, 0 to 1")
    accuracy_by_time: tuple[float, ...] = Field(description="The same share in equal bins of the diffusion time t")
    calibration_error: float | None = Field(description="Expected calibration error, 0 to 1; null: not measured")
    router: str = Field(description="Digest of the blob of its weights")


class MixturePoint(_Point):
    """A stitched mixture."""

    mixture: str = Field(description="Digest of its description")
    epochs: tuple[int, ...] = Field(description="Accepted epoch of each shard in it")
    current: bool = Field(default=True, description="Whether it became the run's mixture when it was made")
    loss: float | None = Field(default=None, description="Its mean held-out loss; null: not measured")
    text: str = Field(default="", description="Why it became current or not, in words")


class MixturesPage(Frozen):
    """Mixtures that were made, newest first. Each stays addressable by its digest."""

    mixtures: tuple[MixturePoint, ...] = Field(description="The mixtures")
    current: str | None = Field(description="Digest of the run's mixture now; null: none")
    next: int | None = Field(description="`before` of the next page; null: there is none")


class Arrival(Frozen):
    """When the budgets will be done, and from what that follows."""

    seconds: float | None = Field(description="Seconds until then; null: not known")
    basis: str = Field(description="From what it follows, in words")


class RunDocument(Frozen):
    """The run in a few numbers."""

    run: str = Field(description="Run id")
    name: str = Field(description="Name of the run")
    owner: str = Field(description="Public key that signs the manifest")
    coordinator: str = Field(description="Public key of the coordinator")
    software: str = Field(description="Version of Lutetia that the coordinator runs")
    manifest_version: int = Field(description="Version of the manifest in force")
    created: float = Field(description="When the run was created, in Unix seconds")
    expires: float = Field(description="When the manifest expires, in Unix seconds")
    time: float = Field(description="When this document was made, in Unix seconds")
    state: Literal["training", "stalled", "stitching", "finished", "paused"] = Field(description="State of the run")
    paused: PauseStatus | None = Field(default=None, description="The owner's pause, and why; null: the run goes on")
    experts: int = Field(description="Number of experts")
    samples: int = Field(description="Accepted samples of all shards")
    samples_budget: int = Field(description="Samples of all budgets")
    samples_per_second: float = Field(description="Samples accepted per second, mean of the last hour")
    arrival: Arrival = Field(description="When all budgets will be done")
    peers_working: int = Field(description="Peers whose results are being accepted in time")
    peers_online: int = Field(description="Peers that are online")
    peers_day: int = Field(description="Peers that had a result accepted in the last 24 hours")
    accepted: int = Field(description="Accepted results")
    rejected: int = Field(description="Results that were found invalid")
    events: int = Field(description="Events in the ledger")
    ticket: str = Field(description="The ticket with which volunteers join; empty: its file is lost")
    join: str = Field(description="The command that joins the run; empty without a ticket")
    memory_bytes: int = Field(description="Memory that a volunteer's device must have, in bytes; 0: any")
    disk_bytes: int = Field(description="Free disk space that a volunteer must have, in bytes; 0: any")
    stalls: tuple[StallStatus, ...] = Field(description="What does not go on, why, and what to do")
    about: str = Field(default="", description="What the owner says of the run, in one sentence")
    bytes_accepted: int = Field(default=0, description="Bytes of the weights of all accepted results, void ones included")
    disk_free_bytes: int | None = Field(default=None, description="Free space of the coordinator's disk; null: not known")
    disk_needed_bytes: int = Field(default=0, description="Below so much free space the next results may not fit")
    reach: Literal["machine", "network", "anyone"] | None = Field(
        default=None, description="Who can dial an address of the ticket: this machine, its network, or anyone; null: no ticket"
    )
    bootstrap: tuple[BootstrapFault, ...] = Field(default=(), description="Addresses of the ticket that do not answer now")


class ShardDocument(Frozen):
    """A shard: its state and its history."""

    status: ShardStatus = Field(description="Its state now")
    clips: int = Field(description="Training clips in the shard")
    prior: float = Field(description="Share of the shard in all data, 0 to 1")
    expert: str = Field(description="diffusers class of its expert")
    initial_loss: float | None = Field(description="Held-out loss before any training; null: not measured yet")
    accepted: tuple[AcceptedPoint, ...] = Field(description="Its accepted results, void ones included, oldest first")
    refused: tuple[RefusedPoint, ...] = Field(description="The last results that were refused for good, oldest first")
    flops: int | None = Field(default=None, description="FLOPs of training its expert on one sample; null: not counted yet")
    sheet: str | None = Field(default=None, description="Where its contact sheet of training clips is; null: it has none")
    whole: bool = Field(
        default=True, description="Whether both lists are whole; false: they hold what came after the event that was asked for"
    )


class ShardsDocument(Frozen):
    """All shards."""

    events: int = Field(description="Events of the ledger that this covers: `after` of the next request")
    shards: tuple[ShardDocument, ...] = Field(description="The shards, in order")


class PeerDocument(Frozen):
    """A peer: whether it is here, and what became of its work."""

    owner: str = Field(description="Public key")
    peer_id: str = Field(description="libp2p peer id")
    name: str = Field(description="What its volunteer calls it; empty: nothing. A name proves nothing")
    credit: CreditDocument = Field(description="How much of the run's computing was its own")
    node: NodeStatus | None = Field(description="Its newest record; null: it is not online, or not shown")
    samples: int = Field(description="Samples of its accepted results that were not rolled back")
    accepted: int = Field(description="Its accepted results that were not rolled back")
    void: int = Field(description="Its accepted results that were rolled back")
    invalid: int = Field(description="Its results that were found invalid")
    last_accepted: float | None = Field(description="Time of its last acceptance; null: none")
    quarantined: str | None = Field(description="Why it is quarantined; null: it is not")
    banned: str | None = Field(default=None, description="Why the owner has banned it; null: it has not")


class PeerHistoryDocument(PeerDocument):
    """A peer with the last of its results: what counted, what did not, and why."""

    points: tuple[AcceptedPoint, ...] = Field(description="The last accepted results, oldest first")
    refused: tuple[RefusedPoint, ...] = Field(description="The last results that were refused for good, oldest first")
    superseded: tuple[SupersededPoint, ...] = Field(description="The last results that came second, oldest first")
    audits: tuple[AuditPoint, ...] = Field(description="The last audits of its results, oldest first")


class PeersPage(Frozen):
    """Peers, those with most accepted samples first."""

    total: int = Field(description="Peers in all, after the filter")
    peers: tuple[PeerDocument, ...] = Field(description="Those from `offset` on")


class CheckpointsPage(Frozen):
    """Accepted results, newest first."""

    checkpoints: tuple[AcceptedPoint, ...] = Field(description="The results")
    next: int | None = Field(description="`before` of the next page; null: there is none")


class EventLine(_Point):
    """One event of the ledger."""

    kind: str = Field(description="Kind of event")
    text: str = Field(description="What happened, in words")
    data: dict[str, Any] = Field(description="The event itself")


class EventsPage(Frozen):
    """Events in the order of the ledger."""

    events: tuple[EventLine, ...] = Field(description="The events after the cursor, oldest first")
    cursor: int = Field(description="`after` of the next page")
    head: int = Field(description="Number of events in the ledger")


class MixtureFile(Frozen):
    """One file of the mixture."""

    path: str = Field(description="Its path in the mixture's folder")
    digest: str = Field(description="Digest of its blob (Lutetia's: over size and table of chunk hashes)")
    size: int = Field(description="Size in bytes")
    url: str = Field(description="Where to download it, relative to the server's root")


class MixtureAnswer(Frozen):
    """One mixture, by default the current one: its files, which HTTP alone can fetch, and its signed description."""

    digest: str = Field(description="Digest of the description")
    files: tuple[MixtureFile, ...] = Field(description="Its files, beside mixture.json")
    document: dict[str, Any] = Field(description="Contents of mixture.json: the description and the coordinator's signature")
    kept: bool = Field(description="Whether all its files are still kept here")
    history: tuple[MixturePoint, ...] = Field(description="The last mixtures that were stitched, oldest first")


class LossSeries(Frozen):
    """The learning curve of one shard: parallel lists, oldest first. Void results are left out."""

    shard: int = Field(description="Index of the shard")
    name: str = Field(description="Name of its cluster")
    events: tuple[int, ...] = Field(description="Numbers of the events")
    times: tuple[float, ...] = Field(description="Unix seconds")
    samples: tuple[int, ...] = Field(description="Samples of the shard trained so far")
    losses: tuple[float, ...] = Field(description="Held-out losses")


class ThroughputBin(Frozen):
    """Accepted work of one hour."""

    time: float = Field(description="Beginning of the hour, in Unix seconds")
    samples: int = Field(description="Samples accepted in it")
    results: int = Field(description="Results accepted in it")


class SeriesDocument(Frozen):
    """All curves of the run."""

    losses: tuple[LossSeries, ...] = Field(description="Held-out loss of each shard")
    routers: tuple[RouterPoint, ...] = Field(description="Routers, oldest first")
    throughput: tuple[ThroughputBin, ...] = Field(description="Accepted work by the hour; hours without any are left out")
