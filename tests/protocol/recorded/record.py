"""`python -m tests.protocol.recorded.record RELEASE`: writes one message of every kind, as this version of the code makes it.

Run it once when a release is made, and keep the folder as it is from then on: `test_recorded.py` replays it against later code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lutetia.coordinator.ledger import events
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.models.mixing.description import ExpertEntry, MixtureDocument, SignedMixture
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.rpc.accepted_checkpoints import AcceptedDocument, AcceptedEntry
from lutetia.protocol.rpc.audit_request import AuditAnswer, AuditJob, AuditReport, AuditRequest, sign_report
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply
from lutetia.protocol.rpc.introduction import Hello
from lutetia.protocol.schema import records as r
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.ledger_head import SignedHead
from lutetia.protocol.schema.manifest import AuditPolicy, HardwareNeeds, Manifest, ShardSpec, SignedManifest, Timing
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation, SamplingSpec
from lutetia.protocol.schema.ticket import Ticket
from tests.protocol.recorded.wire_documents import fields_by_document

OWNER, COORDINATOR, PEER, OTHER = (Identity.derived(f"recorded {name}") for name in ("owner", "coordinator", "peer", "other"))
NOW = 1_780_000_000.0
EXPIRES = NOW + 50.0
_CONFIG = {
    "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 32, "eps": 1e-6, "cross_attn_norm": True,
    "added_kv_proj_dim": None, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip


def _blob(text: str) -> BlobRef:
    return ChunkTable.of_bytes(text.encode()).ref


def _manifest() -> Manifest:
    latent = LatentSpec(
        channels=4, frames=4, height=8, width=8, vae="pixels", pixel_frames=4, pixel_height=8, pixel_width=8,
        text_encoder="builtin:words", text_tokens=5, text_width=16, pooled_width=8, mean=(0.0, 0.5, -0.25, 1e-3),
        std=(1.0, 2.0, 0.5, 0.75),
    )  # fmt: skip
    other = ExpertSpec(config=_CONFIG, prediction="epsilon", noise_schedule="vp_cosine", init=_blob("init"))
    shards = tuple(
        ShardSpec(
            index=k, name=f"shard {k}", train=_blob(f"train {k}"), holdout=_blob(f"holdout {k}"), clips=40, holdout_clips=6,
            prior=0.5, expert=other if k else None,
        )
        for k in range(2)
    )  # fmt: skip
    return Manifest(
        name="a recorded run", owner=OWNER.public_key, coordinators=(COORDINATOR.public_key,), created=NOW, expires=NOW + 1e7,
        latent=latent, expert=ExpertSpec(config=_CONFIG), shards=shards, samples_per_shard=96, checkpoint_samples=24,
        optimisation=Optimisation(batch=4, optimizer="muon"), timing=Timing(heartbeat=20.0, tenure=600.0),
        audit=AuditPolicy(streak=5), hardware=HardwareNeeds(memory_bytes=1 << 30), allowlist=(PEER.public_key,),
        sampling=SamplingSpec(prompts=("a red square", "ein blaues Dreieck über grün")),
    )  # fmt: skip


def _records(run: str) -> dict[str, r.Record]:
    by_peer: dict[str, Any] = {"run": run, "owner": PEER.public_key, "issued": NOW}
    by_coordinator = {**by_peer, "owner": COORDINATOR.public_key}
    place: dict[str, Any] = {"peer_id": PEER.peer_id, "addresses": (f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER.peer_id}",)}
    result: dict[str, Any] = {"shard": 1, "epoch": 1, "parent": None, "weights": _blob("w"), "state": _blob("s"), "samples": 24}
    hardware = r.Hardware(device="cuda", name="NVIDIA GeForce RTX 4090", memory_bytes=24 << 30, cores=16)
    checkpoint = r.CheckpointRecord(
        **by_peer, **place, **result, trace=_blob("t"), loss=0.5,
        made=r.TrainedWith(device="cuda", precision="bfloat16", micro_batch=2, software="0.1.0"),
    )  # fmt: skip
    return {
        "node": r.NodeRecord(
            **by_peer, **place, hardware=hardware, samples_per_second=1.5, software="0.1.0", state="training", shard=1,
            operator=OTHER.public_key,
        ),
        "claim": r.ClaimRecord(**by_peer, shard=1, epoch=0, samples=12, state="training"),
        "checkpoint": checkpoint,
        "provider": r.ProviderRecord(**by_peer, **place, blob=_blob("w").digest),
        "acceptance": r.AcceptanceRecord(
            **by_coordinator, **result, checkpoint=checkpoint.digest, author=PEER.public_key, tenure_until=NOW + 600,
            holdout_loss=0.4,
        ),
        "reset": r.ResetRecord(**by_coordinator, shard=0, term=1),
        "quarantine": r.QuarantineRecord(**by_coordinator, peers=(OTHER.public_key,)),
    }  # fmt: skip


def _sealed(record: r.Record) -> dict[str, Any]:
    identity = COORDINATOR if record.kind in r.COORDINATORS_ONLY else PEER
    return {"key": record.key(), "owner": record.owner, "expires": EXPIRES, "sealed": r.seal(record, identity, EXPIRES).decode()}


def _digest(record: r.Record) -> str:
    assert isinstance(record, r.CheckpointRecord)
    return record.digest


def _events(run: Manifest, records: dict[str, r.Record]) -> Iterable[events.Event]:
    """Every kind of event, in an order in which they can follow each other."""
    found, acceptance = records["checkpoint"], records["acceptance"]
    assert isinstance(found, r.CheckpointRecord)
    assert isinstance(acceptance, r.AcceptanceRecord)
    verdict: dict[str, Any] = {"shard": 1, "epoch": 1, "owner": PEER.public_key, "checkpoint": found.digest}
    recovered = acceptance.model_copy(update={"shard": 0, "checkpoint": "6" * 64})
    costs = (events.CheckCost(check="transfer", outcome="inconclusive", seconds=1.5, size=1 << 20),)
    again = {**verdict, "owner": OTHER.public_key, "epoch": 2}
    made = (
        events.RunCreated(
            time=NOW, run=run.run_id, name=run.name, owner=run.owner, coordinator=run.coordinators[0], shards=2, epochs=4
        ),
        events.ManifestPublished(time=NOW, version=1, digest=run.run_id, expires=run.expires),
        events.CoordinatorStarted(time=NOW, software="lutetia 0.1.0"),
        events.ResultSeen(time=NOW, record=found, via="offer"),
        events.ResultRefused(
            time=NOW, **verdict, verdict="inconclusive", check="transfer", text="no peer has it", again_at=NOW + 5, costs=costs
        ),
        events.BaselineMeasured(time=NOW, shard=1, loss=0.5),
        events.CheckpointAccepted(
            time=NOW, acceptance=acceptance, parent_loss=0.5, build="0.1.0 WanTransformer3DModel", costs=costs
        ),
        events.AuditDue(time=NOW, **verdict, streak=0),
        events.AuditReported(time=NOW, **verdict, by=OTHER.public_key, outcome="valid", text="step 1", seconds=2.0),
        events.AuditDone(time=NOW, **verdict, outcome="valid", text="step 1: it published 0.5", seconds=3.0),
        events.ResultRefused(time=NOW, **again, verdict="invalid", check="holdout", text="its held-out loss 0.9 is worse"),
        events.ResultSuperseded(time=NOW, **{**again, "owner": OWNER.public_key}, by=found.digest),
        events.PeerQuarantined(time=NOW, **again, text="step 3: it published 0.5, the replay gave 0.7"),
        events.PeerPardoned(time=NOW, owner=OTHER.public_key),
        events.QuarantineRecovered(time=NOW, owner=OTHER.public_key),
        events.AcceptanceRecovered(time=NOW, acceptance=recovered),
        events.LineageRolledBack(time=NOW, shard=1, epoch=0, term=1, dropped=1, checkpoint=found.digest),
        events.ResetRecovered(time=NOW, shard=0, term=1),
        events.RouterTrained(time=NOW, epochs=(0, 0), router=_blob("r"), accuracy=0.9, accuracy_by_time=(0.9,) * 10),
        events.MixtureStitched(time=NOW, epochs=(0, 0), terms=(1, 1), mixture="7" * 64),
        events.RunFinished(time=NOW, mixture="7" * 64),
        events.CoordinatorStopped(time=NOW),
    )
    return made


def _status(run: Manifest, records: dict[str, r.Record], all_events: Iterable[events.Event]) -> bytes:
    state = RunState()
    for event in all_events:
        state = apply(state, event)
    node, claim = records["node"], records["claim"]
    assert isinstance(node, r.NodeRecord)
    assert isinstance(claim, r.ClaimRecord)
    live = LiveView([Sighting(node, EXPIRES, NOW)], [Sighting(claim, EXPIRES, NOW)], copies={"6" * 64: 2})
    head = SignedHead.sign(run.run_id, state.events, "8" * 64, NOW, COORDINATOR)
    return canonical(status(state, run, live, NOW, software="0.1.0").model_copy(update={"ledger": head}))


def _messages(run: Manifest, records: dict[str, r.Record]) -> dict[str, bytes]:
    offer = _sealed(records["checkpoint"])
    found, given = records["checkpoint"], _sealed(records["acceptance"])
    assert isinstance(found, r.CheckpointRecord)
    job = AuditJob(
        checkpoint=found.digest, shard=1, epoch=1, epochs=4, steps=6, precision="bfloat16", end_weights=found.weights,
        end_state=found.state, until=NOW + 600,
    )  # fmt: skip
    report = AuditReport(
        run=run.run_id, owner=OTHER.public_key, checkpoint=found.digest, losses=(0.5, None, 0.25), drift=0.01,
        made=r.TrainedWith(software="0.1.0"), seconds=2.5,
    )  # fmt: skip
    holder = f"/dns4/example.org/tcp/4001/p2p/{PEER.peer_id}"
    entry = AcceptedEntry(sealed=given["sealed"], expires=EXPIRES, holders=(holder,))
    replies = {
        f"reply-{verdict}": canonical(OfferReply(verdict=verdict, text="a reason", retry_after=5.0))
        for verdict in ("queued", "busy", "accepted", "superseded")
    }
    return {
        "hello": canonical(Hello(run=run.run_id, protocol=1, software="0.1.0", clock=NOW, manifest_version=1)),
        "offer": canonical(Offer(sealed=offer["sealed"], expires=EXPIRES)),
        **replies,
        "reply-invalid": canonical(OfferReply(verdict="invalid", check="holdout", text="its held-out loss is worse")),
        "reply-inconclusive": canonical(OfferReply(verdict="inconclusive", check="transfer", text="no peer has it")),
        "audit-wanted": canonical(AuditRequest(owner=OTHER.public_key)),
        "audit-report": canonical(sign_report(report, OTHER)),
        "audit-job": canonical(AuditAnswer(job=job)),
        "audit-none": canonical(AuditAnswer(retry_after=60.0, text="ask later")),
        "accepted": canonical(AcceptedDocument(entries=(entry,))),
        "ledger-head": canonical(SignedHead.sign(run.run_id, 22, "8" * 64, NOW, COORDINATOR)),
    }


def _mixture(run: Manifest) -> bytes:
    entry = ExpertEntry(
        name="shard 0", folder="expert_000", class_name=run.expert.class_name, prediction="velocity", noise_schedule="linear",
        prior=0.5, epoch=1, samples=24, checkpoint="5" * 64,
    )  # fmt: skip
    document = MixtureDocument(
        name=run.name, run=run.run_id, manifest=run.run_id, manifest_version=1, latent=run.latent, sampling=run.sampling,
        experts=(entry, entry.model_copy(update={"name": "shard 1", "folder": None, "epoch": 0, "samples": 0})),
        files={"expert_000/config.json": _blob("c"), "model_index.json": _blob("i")},
    )  # fmt: skip
    return canonical(SignedMixture.sign(document, COORDINATOR.sign))


def main(folder: Path) -> None:
    """Write all messages of this version into the new `folder`."""
    run = _manifest()
    second = Manifest(**{**run.model_dump(), "version": 2, "run": run.run_id, "samples_per_shard": 120})
    records, all_events = _records(run.run_id), list(_events(run, _records(run.run_id)))
    ticket = Ticket(run=run.run_id, owner=OWNER.public_key, addresses=(f"/ip4/203.0.113.5/tcp/41000/p2p/{COORDINATOR.peer_id}",))
    sealed = {kind: _sealed(record) for kind, record in records.items()}
    messages = {name: data.decode() for name, data in _messages(run, records).items()}
    folder.mkdir(exist_ok=True)
    files = {
        "records.json": json.dumps(sealed, indent=1, ensure_ascii=False).encode(),
        "messages.json": json.dumps(messages, indent=1, ensure_ascii=False).encode(),
        "ledger.jsonl": b"\n".join(canonical(event) for event in all_events),
        "manifest-1.json": SignedManifest.sign(run, OWNER).to_bytes(),
        "manifest-2.json": SignedManifest.sign(second, OWNER).to_bytes(),
        "status.json": _status(run, records, all_events),
        "mixture.json": _mixture(run),
        "ticket.txt": ticket.encode().encode(),
        "fields.json": json.dumps(fields_by_document(), indent=1).encode(),
        "names.json": canonical({"run": run.run_id, "result": _digest(records["checkpoint"])}),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data + b"\n")


if __name__ == "__main__":
    main(Path(__file__).parent / sys.argv[1])
