"""A small made-up run for the pure tests: manifest, peers, records, and a driver for the judge."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import SizeLimits, Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import key_of
from lutetia.coordinator.acceptance.messages import (
    Action,
    Answer,
    Audited,
    CheckDone,
    FetchDone,
    Offered,
    StartAudit,
    StartCheck,
    StartFetch,
    Stimulus,
    Write,
)
from lutetia.coordinator.acceptance.state_machine import judge
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.events import Event, Outcome, RunCreated
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy, Manifest, ShardSpec, Timing
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.records import CheckpointRecord

START = 1_800_000_000.0
OWNER, COORDINATOR = Identity.derived("owner"), Identity.derived("coordinator")


def blob(text: str, size: int = 100) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(text.encode()).hexdigest(), size=size)


def make_manifest(shards: int = 2, epochs: int = 3, **changes: object) -> Manifest:
    latent = LatentSpec(
        channels=2, frames=2, height=4, width=4, vae="pixels", pixel_frames=2, pixel_height=4, pixel_width=4,
        text_encoder="builtin:words", text_tokens=4, text_width=8, pooled_width=8,
    )  # fmt: skip
    fields: dict[str, object] = {
        "name": "tiny",
        "owner": OWNER.public_key, "coordinators": (COORDINATOR.public_key,), "created": START, "expires": START + 1e6,
        "latent": latent, "expert": ExpertSpec(config={}), "optimisation": Optimisation(batch=2), "checkpoint_samples": 4,
        "audit": AuditPolicy(whole_epoch=0.0), "samples_per_shard": 4 * epochs, "timing": Timing(heartbeat=2.0, tenure=60.0),
        "shards": tuple(
            ShardSpec(
                index=i, name=f"shard {i}", train=blob(f"train{i}"), holdout=blob(f"holdout{i}"), clips=4, holdout_clips=2,
                prior=1 / shards,
            )
            for i in range(shards)
        ),
    }  # fmt: skip
    return Manifest(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def make_record(
    manifest: Manifest,
    peer: Identity,
    shard: int = 0,
    epoch: int = 1,
    parent: str | None = None,
    text: str = "",
    **changes: object,
) -> CheckpointRecord:
    name = f"{peer.public_key}{shard}{epoch}{text}"
    fields: dict[str, object] = {
        "run": manifest.run_id, "owner": peer.public_key, "issued": START, "shard": shard, "epoch": epoch, "parent": parent,
        "weights": blob("w" + name), "state": blob("s" + name), "trace": blob("t" + name),
        "samples": epoch * manifest.checkpoint_samples,
        "loss": 0.5, "peer_id": peer.peer_id,
    }  # fmt: skip
    return CheckpointRecord(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def first_event(manifest: Manifest, time: float = START) -> RunCreated:
    return RunCreated(
        time=time, run=manifest.run_id, name=manifest.name, owner=manifest.owner, coordinator=manifest.coordinators[0],
        shards=len(manifest.shards), epochs=manifest.epochs,
    )  # fmt: skip


@dataclass
class JudgeDriver:
    """A judge with its state, driven step by step; keeps every event and action."""

    manifest: Manifest
    rules: JudgeRules
    state: JudgeState
    events: list[Event] = field(default_factory=list)
    checks: list[StartCheck] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    audits: list[StartAudit] = field(default_factory=list)
    fetches: list[StartFetch] = field(default_factory=list)
    now: float = START
    arrives: bool = True
    """Whether the blobs of each candidate arrive at once; if not, the test sends `FetchDone`."""

    def send(self, stimulus: Stimulus) -> tuple[Action, ...]:
        actions = self._send(stimulus)
        while self.arrives and (fetched := [a for a in actions if isinstance(a, StartFetch) and self._on_its_way(a.record)]):
            actions = (*actions, *self.arrived(fetched[0].record))
        return actions

    def arrived(self, record: CheckpointRecord, failed: str = "") -> tuple[Action, ...]:
        """The fetch of `record` ends: all of it is here, or it `failed`."""
        verdict = Verdict("inconclusive" if failed else "valid", "transfer", failed)
        return self._send(FetchDone(record, verdict, self.now))

    def _on_its_way(self, record: CheckpointRecord) -> bool:
        return key_of(record) in self.state.fetching

    def _send(self, stimulus: Stimulus) -> tuple[Action, ...]:
        self.state, actions = judge(self.rules, self.state, stimulus)
        self.fetches += [action for action in actions if isinstance(action, StartFetch)]
        self.events += [action.event for action in actions if isinstance(action, Write)]
        self.checks += [action for action in actions if isinstance(action, StartCheck)]
        self.audits += [action for action in actions if isinstance(action, StartAudit)]
        self.actions += actions
        return actions

    def offer(self, record: CheckpointRecord, via: str = "offer", origin: str = "") -> OfferReply:
        actions = self.send(Offered(record, self.now, via, origin))  # pyright: ignore[reportArgumentType]
        return next(action.reply for action in actions if isinstance(action, Answer))

    def verdict(self, record: CheckpointRecord, loss: float = 0.4) -> tuple[Action, ...]:
        """The checks find `record` valid."""
        parent = self.state.run.shards[record.shard].acceptance
        before = parent.holdout_loss if parent else 0.5
        return self.send(CheckDone(record, Verdict("valid", "holdout", "", loss, before), self.now))

    def refuse(self, record: CheckpointRecord, text: str = "tensor x is not finite") -> None:
        """Offer `record`; the checks find it invalid."""
        assert self.offer(record).verdict == "queued"
        self.send(CheckDone(record, Verdict("invalid", "numbers", text), self.now))

    def finish_audit(self, outcome: Outcome, checkpoint: str | None = None) -> tuple[Action, ...]:
        """The last audit asked for (or that of `checkpoint`) ends with `outcome`."""
        asked = checkpoint or self.audits[-1].audit.checkpoint
        return self.send(Audited(asked, AuditFinding(outcome=outcome, text="step 2: 0.7 and 0.9"), self.now, 1.5))

    def accept(self, peer: Identity, shard: int = 0, **changes: object) -> CheckpointRecord:
        """`peer`'s result for the next epoch of `shard` is accepted."""
        ledger = self.state.run.shards[shard]
        record = make_record(self.manifest, peer, shard, ledger.epoch + 1, ledger.accepted, **changes)  # pyright: ignore[reportArgumentType]
        assert self.offer(record).verdict == "queued"
        self.verdict(record)
        assert self.state.run.shards[shard].accepted == record.digest
        return record

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    hears, refused, audited = send, refuse, finish_audit  # to be renamed in tests/coordinator/runtime


def drive_judge(
    shards: int = 2, epochs: int = 3, limits: bool = True, rules: dict[str, object] | None = None, **changes: object
) -> JudgeDriver:
    """A driver. Where the lottery draws no whole epochs (the default), no author counts as a newcomer, unless `rules` say so."""
    manifest = make_manifest(shards, epochs, **changes)
    newcomers = {} if manifest.audit.whole_epoch else {"newcomer_epochs": 0}
    made = JudgeRules(manifest, COORDINATOR.public_key, b"secret", **{**newcomers, **(rules or {})})  # pyright: ignore[reportArgumentType]
    created = first_event(manifest)
    state = JudgeState(apply(RunState(), created), limits=limits_of(shards) if limits else None)
    return JudgeDriver(manifest, made, state, [created])


def limits_of(shards: int) -> dict[int, SizeLimits]:
    return {index: SizeLimits(1000, 1000, 1000) for index in range(shards)}


PEERS = [Identity.derived(f"peer{index}") for index in range(6)]
