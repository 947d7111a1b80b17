"""Built data of a few squares, written by the project's own writers, as `data build` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from lutetia.models.data.cluster.report import ClusterReport
from lutetia.models.data.description import DATA_FILE, DataDescription, DataShard
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.data.shard_writer import data_file
from lutetia.models.data.shards import ShardData
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.latent_spec import LatentSpec

WORDS = ("red square goes left", "blue square goes right", "green square grows", "white square blinks")
TOKENS = 4


def latent_spec() -> LatentSpec:
    encoder = load_text_encoder("builtin:words", TOKENS)
    return LatentSpec(
        channels=3, frames=2, height=8, width=8, vae="pixels", pixel_frames=2, pixel_height=8, pixel_width=8, fps=4.0,
        text_encoder="builtin:words", text_tokens=TOKENS, text_width=encoder.width, pooled_width=encoder.pooled_width,
    )  # fmt: skip


def clips(shard: int, count: int, seed: int = 0) -> ShardData:
    """`count` clips whose colour is that of the shard, rounded to half precision, as a shard file holds them.

    Unrounded clips are other data: losses differ by 1e-5, and sometimes a replay does not reproduce the end.
    """
    draw = torch.Generator().manual_seed(1000 * shard + seed)
    latents = 0.1 * torch.randn(count, 3, 2, 8, 8, generator=draw) - 0.5
    latents[:, shard % 3, :, 2:6, 2:6] += 1.5
    captions = [WORDS[shard % len(WORDS)]] * count
    tokens, pooled = load_text_encoder("builtin:words", TOKENS).encode(captions)
    latents, tokens, pooled = (tensor.half().float() for tensor in (latents, tokens, pooled))
    return ShardData(latents, tokens, pooled, captions, [f"kind {shard}"] * count)


def build_tiny(folder: Path, shards: int = 2, train: int = 6, holdout: int = 4) -> Path:
    """Make a folder of built data for `create_run`."""
    latent, entries = latent_spec(), []
    (folder / "shards").mkdir(parents=True)
    for index in range(shards):
        files = {}
        splits: tuple[tuple[Literal["train", "holdout"], int], ...] = (("train", train), ("holdout", holdout))
        for split, count in splits:
            path = f"shards/{index:03d}.{split}.safetensors"
            data = clips(index, count, len(split))
            written = write_shard(folder / path, data, latent, name=f"kind {index}", split=split, size=3000)  # two clips a part
            files[split] = data_file(path, written)
        entries.append(DataShard(index=index, name=f"kind {index}", **files, prior=1 / shards))
    report = ClusterReport(clusters=(), silhouette=0.0, largest_uncapped=1 / shards)
    description = DataDescription(latent=latent, shards=tuple(entries), clustering=report)
    (folder / DATA_FILE).write_bytes(canonical(description))
    return folder
