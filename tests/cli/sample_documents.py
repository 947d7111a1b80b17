"""Hand-made documents for tests of output."""

from __future__ import annotations

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.status import NodeStatus, RouterStatus, ShardState, ShardStatus, SwarmStatus

NOW = 1_800_000_000.0
PEERS = tuple(Identity.derived(f"sample peer {index}") for index in range(3))
DIGEST = "a3" * 32
NAMES = ("digits", "shapes", "cameras")


def shard(index: int, epoch: int, state: ShardState, owner: str | None = None) -> ShardStatus:
    return ShardStatus(
        shard=index,
        name=NAMES[index],
        epoch=epoch,
        epochs=6,
        samples=epoch * 1600,
        samples_budget=9600,
        state=state,
        owner=owner,
        claim_expires=NOW + 12 if owner else None,
        holdout_loss=0.3 / (epoch + 1) if epoch else None,
        checkpoint=DIGEST if epoch else None,
        last_accepted=NOW - 23 if epoch else None,
        due=NOW + 30,
    )


def node(index: int) -> NodeStatus:
    peer = PEERS[index]
    return NodeStatus(
        owner=peer.public_key,
        peer_id=peer.peer_id,
        state="training",
        health="working",
        device="cpu",
        samples_per_second=31.4,
        shard=index,
        accepted=3,
        rejected=0,
        last_accepted=NOW - 4,
        last_seen=NOW - 1,
    )


def status(*shards: ShardStatus) -> SwarmStatus:
    owners = [peer.public_key for peer in PEERS]
    return SwarmStatus(
        run="b4" * 32,
        name="sample run",
        manifest_version=1,
        time=NOW - 2,
        coordinator=owners[0],
        software="0.1.0",
        shards=shards or (shard(0, 3, "training", owners[0]), shard(1, 6, "done", owners[1]), shard(2, 1, "unclaimed")),
        nodes=tuple(node(index) for index in range(3)),
        accepted=10,
        rejected=1,
        events=99,
        mixture=DIGEST,
        router=RouterStatus(
            accuracy=0.957, accuracy_by_time=tuple(0.99 - 0.05 * k for k in range(10)), trained_at=NOW - 3, epochs=(3, 6, 1)
        ),
    )


def manifest() -> Manifest:
    blob, owner = BlobRef(digest="1" * 64, size=1_234_567), PEERS[0].public_key
    latent = LatentSpec(
        channels=8,
        frames=8,
        height=8,
        width=8,
        vae="builtin:demo",
        pixel_frames=8,
        pixel_height=64,
        pixel_width=64,
        text_encoder="builtin:words",
        text_tokens=12,
        text_width=64,
        pooled_width=64,
    )
    shards = tuple(
        ShardSpec(index=index, name=name, train=blob, holdout=blob, clips=500, holdout_clips=40, prior=prior)
        for index, (name, prior) in enumerate(zip(NAMES, (0.45, 0.3, 0.25), strict=True))
    )
    return Manifest(
        name="sample run",
        owner=owner,
        version=1,
        created=NOW,
        expires=NOW + 1e6,
        coordinators=(owner,),
        expert=ExpertSpec(config={}),
        latent=latent,
        shards=shards,
        samples_per_shard=9600,
        checkpoint_samples=1600,
    )
