"""Shards in one file, byte for byte as release 0.1 wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors.torch import save

from lutetia.models.data.parts.single_file import ShardMetadata
from lutetia.models.data.shards import ShardData
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.latent_spec import LatentSpec


def write_old_shard(
    path: Path, data: ShardData, latent: LatentSpec, name: str = "", split: Literal["train", "holdout", "test"] = "train",
    sources: tuple[str, ...] = (),
) -> None:  # fmt: skip
    metadata = ShardMetadata(
        latent=latent, name=name, split=split, captions=tuple(data.captions), kinds=tuple(data.kinds), sources=sources
    )
    tensors = {key: getattr(data, key).half().contiguous() for key in ("latents", "tokens", "pooled")}
    path.write_bytes(save(tensors, metadata={"lutetia": canonical(metadata).decode()}))
