"""What the parts of a simulated run see of each other, so that no two files import each other.

`SimulatedWorld`, `SimulatedNode` and `SimulatedCoordinator` implement `World`, `Node` and `Coordinator`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lutetia.coordinator.acceptance import messages as j
from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.events import Event as LedgerEvent
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting
from lutetia.coordinator.lending.loans import LentCheck
from lutetia.node.machine import messages as m
from lutetia.node.machine.state import MachineState, NodeRules
from lutetia.protocol.rpc.check_request import CheckReport
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, RecordLimits
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.simulation.config import SimulatedMachine, SimulationConfig
from lutetia.simulation.costs import Costs
from lutetia.simulation.event_queue import EventQueue
from lutetia.simulation.network.blobs import SimulatedBlobs
from lutetia.simulation.network.dht import SimulatedDht, SimulatedRecord, SimulatedReplica
from lutetia.simulation.network.held_out import HeldOutModel
from lutetia.simulation.network.links import Links
from lutetia.simulation.network.membership import SharedMembership
from lutetia.simulation.rules_under_test import RulesUnderTest


class TraceSink(Protocol):
    """Records what happens, to explain a violation."""

    def machine(self, peer: Node, event: m.Event, before: str, actions: Sequence[m.Action]) -> None: ...
    def read(self, peer: Node, shards: Sequence[int]) -> None: ...
    def judged(self, coordinator: Coordinator, stimulus: j.Stimulus, actions: Sequence[j.Action]) -> None: ...
    def record_read(self, coordinator: Coordinator, stored: SimulatedRecord) -> None: ...
    def step(self, step: Any) -> None: ...


class InvariantChecks(Protocol):
    """The invariants, checked after every event."""

    checks: Counter[str]
    heads: list[int]
    accepted: dict[tuple[int, int], str]
    rolled_back: int

    def after_peer(self, peer: Node) -> None: ...
    def after_judge(self, coordinator: Coordinator, actions: Sequence[Any]) -> None: ...
    def after_restart(self, coordinator: Coordinator) -> None: ...
    def after_loss(self, parcels: Sequence[str]) -> None: ...
    def after_status(self, coordinator: Coordinator, document: SwarmStatus) -> None: ...
    def claimed(self, shard: int, expires: float, *, released: bool) -> None: ...
    def budget_changed(self) -> None: ...
    def trained(self, peer: Node, record: CheckpointRecord, weights: str, uninterrupted: str) -> None: ...


class Trainer(Protocol):
    """A node's training and what it has on disk."""

    exiting: bool
    speed: float

    @property
    def training(self) -> Any: ...
    @property
    def disks(self) -> dict[int, Any]: ...
    @property
    def rate(self) -> float: ...
    def pending(self, shard: int, epoch: int, checkpoint: str | None) -> tuple[m.OwnCheckpoint, ...]: ...
    def kept(self, shard: int, digest: str) -> CheckpointRecord | None: ...


class NodeRecords(Protocol):
    """A node's records in the DHT."""

    acceptances: dict[int, Any]
    limits: RecordLimits

    def record_due(self, digest: str, again_after: float) -> bool: ...
    def publish(self, record: Any, key: str, ttl: float) -> float: ...
    def sealed(self, record: Any, expires: float) -> bytes: ...
    def renew_node(self) -> None: ...


class ManifestHolder(Protocol):
    """A peer that serves a version of the manifest."""

    live: LiveManifest


class NodeManifest(ManifestHolder, Protocol):
    def receive(self, other: LiveManifest) -> None: ...


class Node(SimulatedReplica, Protocol):
    """One volunteer's node, or a further device of it. `boot` counts its starts."""

    rules: NodeRules
    state: MachineState
    running: bool
    frozen: bool
    disk_full: bool
    device_ok: bool
    skew: float
    boot: int
    joins: int
    holds: int | None
    eligible_since: float | None

    @property
    def host(self) -> Node: ...
    @property
    def devices(self) -> Sequence[Node]: ...
    @property
    def world(self) -> World: ...
    @property
    def machine(self) -> SimulatedMachine: ...
    @property
    def network(self) -> NodeRecords: ...
    @property
    def trainer(self) -> Trainer: ...
    @property
    def manifest_updates(self) -> NodeManifest: ...
    def soon(self, kind: Callable[..., m.Event], *arguments: Any) -> None: ...
    def feed(self, boot: int, kind: Callable[..., m.Event], *arguments: Any) -> None: ...


class Lender(Protocol):
    """Lends checks to nodes."""

    records: dict[str, tuple[CheckpointRecord, AcceptanceRecord | None]]

    def lend(self, asking: Node) -> LentCheck | None: ...
    def receive(self, report: CheckReport) -> None: ...


class Coordinator(SimulatedReplica, Protocol):
    """One coordinator process on one disk."""

    identity: Identity
    ledger: list[LedgerEvent]
    rules: JudgeRules
    state: JudgeState
    view: LiveView
    running: bool
    serving: bool

    @property
    def world(self) -> World: ...
    @property
    def served_manifest(self) -> ManifestHolder: ...
    def follow_folder(self) -> None: ...
    def offered(self, record: CheckpointRecord, sealed: bytes = b"", life: float = 0.0) -> OfferReply: ...

    boot: int

    @property
    def lender(self) -> Lender: ...
    def note(self, entry: LedgerEvent) -> None: ...
    def lend(self, asking: Node) -> j.LendAudit: ...
    def receive_report(self, auditor: Node, checkpoint: str, finding: AuditFinding) -> None: ...


class World(Protocol):
    """Everything of one simulated run."""

    config: SimulationConfig
    decide: RulesUnderTest
    queue: EventQueue
    signed: SignedManifest
    first_version: int
    costs: Costs
    links: Links
    dht: SimulatedDht
    blobs: SimulatedBlobs
    held_out: HeldOutModel | None

    @property
    def manifest(self) -> Manifest: ...
    @property
    def quarantining(self) -> bool: ...
    @property
    def trace(self) -> TraceSink | None: ...
    @property
    def invariants(self) -> InvariantChecks: ...
    @property
    def directory(self) -> dict[str, tuple[Any, Sighting]]: ...
    @property
    def nodes(self) -> Sequence[Node]: ...
    @property
    def coordinators(self) -> Sequence[Coordinator]: ...
    def membership(self, reader: Any) -> SharedMembership: ...
    def can_join(self, newcomer: Any) -> bool: ...
