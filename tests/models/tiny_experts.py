"""Tiny runs for tests: manifests, shards and one small config per supported expert class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.runs import FAMILIES, TINY
from lutetia.models.data.shards import ShardData
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.records import AcceptanceRecord

LATENT = TINY

CONFIGS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 32,
    },
    "HunyuanVideoTransformer3DModel": FAMILIES["HunyuanVideoTransformer3DModel"],
    "LTXVideoTransformer3DModel": FAMILIES["LTXVideoTransformer3DModel"],
    "CogVideoXTransformer3DModel": FAMILIES["CogVideoXTransformer3DModel"],
    "MochiTransformer3DModel": {
        "patch_size": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "pooled_projection_dim": 16,
        "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 5,
    },
    "SkyReelsV2Transformer3DModel": {
        "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 32,
    },
    "ChronoEditTransformer3DModel": {
        "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 32,
    },
    "AllegroTransformer3DModel": {
        "patch_size": 4, "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
        "num_layers": 1, "cross_attention_dim": 48, "sample_height": 8, "sample_width": 8, "sample_frames": 4,
        "caption_channels": 16,
    },
    "CosmosTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1,
        "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 8, "max_size": [4, 8, 8], "patch_size": [1, 2, 2],
        "concat_padding_mask": False,
    },
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 4,
        "sample_width": 8, "sample_height": 8, "num_layers": 1, "mmdit_layers": 1, "time_embed_dim": 16, "text_embed_dim": 16,
    },
    "LatteTransformer3DModel": {
        "sample_size": 8, "num_layers": 1, "patch_size": 4, "attention_head_dim": 12, "num_attention_heads": 2,
        "caption_channels": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 24, "attention_bias": True,
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 4,
        "activation_fn": "gelu-approximate",
    },
    "SanaVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
        "sample_size": 8, "patch_size": [1, 4, 4], "rope_max_seq_len": 32,
    },
}  # fmt: skip

WAN = ExpertSpec(config=CONFIGS["WanTransformer3DModel"])
OWNER = Identity.derived("owner of toy runs")


def tiny_manifest(
    shards: int = 2, expert: ExpertSpec = WAN, experts: dict[int, ExpertSpec] | None = None, **fields: Any
) -> Manifest:
    """A run of `shards` shards. `fields` override the manifest's fields; an `optimisation` dictionary is merged."""
    blob = BlobRef(digest="0" * 64, size=1)
    optimisation = {"batch": 4, "learning_rate": 1e-3, "warmup_steps": 2, **fields.pop("optimisation", {})}
    specs = tuple(
        ShardSpec(
            index=k, name=f"shard {k}", train=blob, holdout=blob, clips=10, holdout_clips=6, prior=1 / shards,
            expert=(experts or {}).get(k),
        )
        for k in range(shards)
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": "toy", "owner": OWNER.public_key, "coordinators": (OWNER.public_key,), "created": 1.0, "expires": 2.0,
        "latent": LATENT, "expert": expert, "shards": specs, "samples_per_shard": 48, "checkpoint_samples": 24,
    }  # fmt: skip
    return Manifest(**{**values, "optimisation": Optimisation(**optimisation), **fields})


def tiny_data(clips: int = 10, seed: int = 0, latent: LatentSpec = LATENT, offset: float = 0.0) -> ShardData:
    """Random clips whose latents and texts have mean `offset`, so that shards of different offsets can be distinguished."""
    generator = torch.Generator().manual_seed(seed)
    return ShardData(
        latents=torch.randn(clips, *latent.shape, generator=generator) * 0.5 + offset,
        tokens=torch.randn(clips, latent.text_tokens, latent.text_width, generator=generator) + offset,
        pooled=torch.randn(clips, latent.pooled_width, generator=generator) * 0.3 + offset,
        captions=[f"clip {clip}" for clip in range(clips)],
        kinds=["toy"] * clips,
    )


def accept(manifest: Manifest, shard: int, weights: Path) -> AcceptanceRecord:
    """The acceptance of a first epoch with these weights."""
    ref = ChunkTable.of_file(weights).ref
    return AcceptanceRecord(
        run=manifest.run_id, owner=OWNER.public_key, issued=1.0, shard=shard, epoch=1, checkpoint="1" * 64, parent=None,
        weights=ref, state=ref, samples=24, author=OWNER.public_key, tenure_until=2.0, holdout_loss=1.0,
    )  # fmt: skip
