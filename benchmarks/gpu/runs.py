"""Manifests, experts and clips of the GPU benchmark: random numbers in real shapes."""

from __future__ import annotations

from typing import Any

import torch

from lutetia.models.data.shards import ShardData
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

OWNER = Identity.derived("owner of the GPU benchmark")
NO_BLOB = BlobRef(digest="0" * 64, size=1)
TINY = LatentSpec(
    channels=4, frames=4, height=8, width=8, vae="pixels", pixel_frames=4, pixel_height=8, pixel_width=8,
    text_encoder="builtin:words", text_tokens=5, text_width=16, pooled_width=8,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    },
    "HunyuanVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 4, "patch_size_t": 1, "guidance_embeds": True,
        "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": [4, 6, 6],
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 64, "out_channels": 64, "patch_size": 4, "patch_size_t": 1, "num_attention_heads": 2,
        "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": 1, "caption_channels": 16,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
        "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 4, "patch_size": 4,
        "temporal_compression_ratio": 1, "max_text_seq_length": 5,
    },
}  # fmt: skip
"""One small expert of each kind of architecture."""
AUDITED = ExpertSpec(
    config={
        "patch_size": [1, 2, 2], "num_attention_heads": 3, "attention_head_dim": 48, "in_channels": 22, "out_channels": 4,
        "text_dim": 16, "freq_dim": 128, "ffn_dim": 288, "num_layers": 3, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 128,
    }
)  # fmt: skip
"""The expert whose replays docs/explanation/audits.md compares."""


def manifest_of(
    expert: ExpertSpec,
    latent: LatentSpec = TINY,
    *,
    shards: int = 1,
    clips: int = 64,
    batch: int = 4,
    steps: int = 32,
    epochs: int = 4,
    **optimisation: Any,
) -> Manifest:
    """A run of `epochs` epochs of `steps` steps."""
    specs = tuple(
        ShardSpec(index=k, name=f"shard {k}", train=NO_BLOB, holdout=NO_BLOB, clips=clips, holdout_clips=4, prior=1 / shards)
        for k in range(shards)
    )
    return Manifest(
        name="gpu", owner=OWNER.public_key, coordinators=(OWNER.public_key,), created=1.0, expires=4e9, latent=latent,
        expert=expert, shards=specs, samples_per_shard=epochs * steps * batch, checkpoint_samples=steps * batch,
        optimisation=Optimisation(batch=batch, **optimisation),
    )  # fmt: skip


def clips_of(latent: LatentSpec = TINY, count: int = 64, seed: int = 1) -> ShardData:
    """Smooth random latents, so that a few steps lower the loss."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *latent.shape, generator=draw)
    return ShardData(
        torch.nn.functional.avg_pool3d(noise, 3, 1, 1) * 4,
        torch.randn(count, latent.text_tokens, latent.text_width, generator=draw),
        torch.randn(count, latent.pooled_width, generator=draw),
        [""] * count,
        [""] * count,
    )


def wan(small: bool, text_width: int = 4096) -> ExpertSpec:
    """Wan 2.1's transformer of 1.3 billion parameters, or a toy of its kind."""
    sizes = (2, 16, 64, 2) if small else (12, 128, 8960, 30)
    heads, width, hidden, layers = sizes
    return ExpertSpec(
        config={
            "patch_size": [1, 2, 2], "num_attention_heads": heads, "attention_head_dim": width, "in_channels": 16,
            "out_channels": 16, "text_dim": text_width, "freq_dim": 256, "ffn_dim": hidden, "num_layers": layers,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
        }
    )  # fmt: skip


def wan_latent(frames: int, height: int, width: int, tokens: int, text_width: int = 4096) -> LatentSpec:
    """Latents of Wan 2.1's autoencoder: `frames`, `height`, `width` are those of the latent."""
    return LatentSpec(
        channels=16, frames=frames, height=height, width=width, vae="pixels", pixel_frames=4 * frames - 3,
        pixel_height=8 * height, pixel_width=8 * width, text_encoder="builtin:words", text_tokens=tokens, text_width=text_width,
        pooled_width=64,
    )  # fmt: skip
