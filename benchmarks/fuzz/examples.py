"""Valid documents of every kind, small and made by the project's own writers: the seeds of the corpora."""

from __future__ import annotations

from functools import cache
from typing import Any

from lutetia.coordinator.ledger import events
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.models.mixing.description import ExpertEntry, MixtureDocument, SignedMixture
from lutetia.models.mixing.layout import COMPONENTS, PIPELINE, WEIGHTS
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.rpc.introduction import Hello
from lutetia.protocol.schema import records
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec, SignedManifest, Timing
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.ticket import Ticket

OWNER, COORDINATOR, PEER = (Identity.derived(name) for name in ("owner", "coordinator", "peer"))
NOW = 1_800_000_000.0
ADDRESS = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER.peer_id}"
WAN = {
    "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip
LATENT = LatentSpec(
    channels=4, frames=4, height=8, width=8, vae="pixels", pixel_frames=4, pixel_height=8, pixel_width=8,
    text_encoder="builtin:words", text_tokens=5, text_width=16, pooled_width=8,
)  # fmt: skip


def blob(text: str = "") -> BlobRef:
    return ChunkTable.of_bytes(text.encode()).ref


@cache
def manifest() -> Manifest:
    shards = tuple(
        ShardSpec(index=k, name=f"shard {k}", train=blob("t"), holdout=blob("h"), clips=10, holdout_clips=6, prior=0.5)
        for k in range(2)
    )
    return Manifest(
        name="a run", owner=OWNER.public_key, coordinators=(COORDINATOR.public_key,), created=NOW, expires=NOW + 1e6,
        latent=LATENT, expert=ExpertSpec(config=WAN), shards=shards, samples_per_shard=48, checkpoint_samples=24,
        optimisation=Optimisation(batch=4), timing=Timing(heartbeat=2.0, tenure=60.0),
    )  # fmt: skip


@cache
def all_records() -> tuple[records.Record, ...]:
    common: dict[str, Any] = {"run": manifest().run_id, "owner": PEER.public_key, "issued": NOW}
    place: dict[str, Any] = {"peer_id": PEER.peer_id, "addresses": (ADDRESS,)}
    result: dict[str, Any] = {"shard": 1, "epoch": 1, "parent": None, "weights": blob("w"), "state": blob("s"), "samples": 24}
    hardware = records.Hardware(device="cpu", memory_bytes=1 << 30, cores=2)
    return (
        records.NodeRecord(**common, **place, hardware=hardware, samples_per_second=1.5, software="0.1", state="idle"),
        records.ClaimRecord(**common, shard=1, epoch=0, samples=0, state="training"),
        checkpoint(),
        records.ProviderRecord(**common, **place, blob="4" * 64),
        records.AcceptanceRecord(
            **{**common, "owner": COORDINATOR.public_key}, **result, checkpoint=checkpoint().digest, author=PEER.public_key,
            tenure_until=NOW + 60, holdout_loss=0.4,
        ),
    )  # fmt: skip


@cache
def checkpoint() -> records.CheckpointRecord:
    return records.CheckpointRecord(
        run=manifest().run_id, owner=PEER.public_key, issued=NOW, shard=1, epoch=1, parent=None, weights=blob("w"),
        state=blob("s"), trace=blob("t"), samples=24, loss=0.5, peer_id=PEER.peer_id, addresses=(ADDRESS,),
    )  # fmt: skip


def sealed(record: records.Record) -> bytes:
    return records.seal(record, COORDINATOR if record.kind == "acceptance" else PEER, NOW + 5)


@cache
def all_events() -> tuple[events.Event, ...]:
    """The events of a run, in order."""
    found, run, acceptance = checkpoint(), manifest(), all_records()[-1]
    assert isinstance(acceptance, records.AcceptanceRecord)
    verdict: dict[str, Any] = {"time": NOW, "shard": 1, "epoch": 1, "owner": PEER.public_key, "checkpoint": found.digest}
    return (
        events.RunCreated(
            time=NOW, run=run.run_id, name=run.name, owner=run.owner, coordinator=run.coordinators[0], shards=2, epochs=2
        ),
        events.ManifestPublished(time=NOW, version=1, digest=run.run_id, expires=run.expires),
        events.CoordinatorStarted(time=NOW, software="lutetia 0.1"),
        events.ResultSeen(time=NOW, record=found, via="offer"),
        events.ResultRefused(**verdict, verdict="inconclusive", check="transfer", text="its blobs are away", again_at=NOW + 5),
        events.BaselineMeasured(time=NOW, shard=1, loss=0.5),
        events.CheckpointAccepted(time=NOW, acceptance=acceptance, parent_loss=0.5),
        events.AuditDue(**verdict, streak=0),
        events.AuditDone(**verdict, outcome="valid"),
        events.ResultSuperseded(**{**verdict, "epoch": 2}, by=found.digest),
        events.ResetRecovered(time=NOW, shard=0, term=1),
        events.QuarantineRecovered(time=NOW, owner=OWNER.public_key),
        events.RouterTrained(time=NOW, epochs=(0, 1), router=blob("r"), accuracy=0.9, accuracy_by_time=(0.9,) * 10),
        events.MixtureStitched(time=NOW, epochs=(0, 1), terms=(1, 0), mixture="7" * 64),
        events.RunFinished(time=NOW, mixture="7" * 64),
        events.CoordinatorStopped(time=NOW),
    )


def run_state() -> RunState:
    state = RunState()
    for event in all_events():
        state = apply(state, event)
    return state


def status_document() -> bytes:
    node, claim, *_ = all_records()
    assert isinstance(node, records.NodeRecord)
    assert isinstance(claim, records.ClaimRecord)
    live = LiveView([Sighting(node, NOW + 5, NOW)], [Sighting(claim, NOW + 5, NOW)])
    return canonical(status(run_state(), manifest(), live, NOW, software="0.1"))


def hello() -> Hello:
    return Hello(run=manifest().run_id, protocol=1, software="0.1", clock=NOW, manifest_version=1)


def ticket() -> Ticket:
    return Ticket(run=manifest().run_id, owner=OWNER.public_key, addresses=(ADDRESS, ADDRESS.replace("4001", "4002")))


def signed_manifest() -> bytes:
    return SignedManifest.sign(manifest(), OWNER).to_bytes()


def signed_mixture() -> bytes:
    run = manifest()
    entry = ExpertEntry(
        name="shard 0", folder="expert_000", class_name=run.expert.class_name, prediction="velocity", noise_schedule="linear",
        prior=0.5, epoch=1, samples=24, checkpoint="5" * 64,
    )  # fmt: skip
    names = ("expert_000/config.json", f"expert_000/{WEIGHTS}", "transformer/config.json", "scheduler/scheduler_config.json")
    files = {
        **{name: blob(name) for name in names},
        "model_index.json": blob("i"),
        "pipeline.py": ChunkTable.of_bytes(PIPELINE).ref,
    }
    document = MixtureDocument(
        name=run.name, run=run.run_id, manifest=run.run_id, manifest_version=1, latent=run.latent, sampling=run.sampling,
        experts=(entry,), files=files,
    )  # fmt: skip
    return canonical(SignedMixture.sign(document, COORDINATOR.sign))


def mixture_index() -> bytes:
    return canonical({**{name: list(known[0]) for name, known in COMPONENTS.items()}, "latent": LATENT.model_dump(mode="json")})
