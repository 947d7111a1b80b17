"""Small valid documents for the protocol's tests."""

from __future__ import annotations

from typing import Any

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
    CheckpointRecord,
    ClaimRecord,
    Hardware,
    NodeRecord,
    ProviderRecord,
    Record,
)

OWNER = Identity.derived("the run's owner")
COORDINATOR = Identity.derived("a coordinator")
PEER = Identity.derived("a volunteer")
STRANGER = Identity.derived("a stranger")
NOW = 1_800_000_000.0
RUN = "ab" * 32


def blob(letter: str = "0", size: int = 1) -> BlobRef:
    return BlobRef(digest=letter * 64, size=size)


def manifest(count: int = 2, **changes: Any) -> Manifest:
    latent = LatentSpec(
        channels=4, frames=2, height=4, width=4, vae="pixels", pixel_frames=2, pixel_height=4, pixel_width=4,
        text_encoder="builtin:words", text_tokens=4, text_width=8, pooled_width=8,
    )  # fmt: skip
    specs = tuple(
        ShardSpec(index=k, name=f"shard {k}", train=blob(), holdout=blob(), clips=10, holdout_clips=4, prior=1 / count)
        for k in range(count)
    )
    fields: dict[str, Any] = {
        "name": "a run", "owner": OWNER.public_key, "coordinators": (COORDINATOR.public_key,), "created": NOW,
        "expires": NOW + 3600, "latent": latent, "expert": ExpertSpec(config={}), "shards": specs, "samples_per_shard": 16,
        "checkpoint_samples": 8, "optimisation": Optimisation(batch=4),
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def records(author: Identity = PEER, run: str = RUN) -> dict[str, Record]:
    """One record of each kind, the acceptance by the coordinator."""
    address = (f"/ip4/127.0.0.1/tcp/4001/p2p/{author.peer_id}",)
    common: dict[str, Any] = {"run": run, "owner": author.public_key, "issued": NOW}
    place: dict[str, Any] = {"peer_id": author.peer_id, "addresses": address}
    offered: dict[str, Any] = {"shard": 3, "epoch": 1, "parent": None, "weights": blob("1"), "state": blob("2"), "samples": 8}
    return {
        "node": NodeRecord(
            **common, **place, hardware=Hardware(device="cpu", memory_bytes=1, cores=2), samples_per_second=1.5, software="0.1",
            state="idle",
        ),
        "claim": ClaimRecord(**common, shard=3, epoch=0, samples=0, state="training"),
        "checkpoint": CheckpointRecord(**common, **place, **offered, trace=blob("3"), loss=0.5),
        "provider": ProviderRecord(**common, **place, blob="4" * 64),
        "acceptance": AcceptanceRecord(
            **{**common, "owner": COORDINATOR.public_key}, **offered, checkpoint="5" * 64, author=author.public_key,
            tenure_until=NOW + 60, holdout_loss=0.4,
        ),
    }  # fmt: skip
