"""A process of `benchmarks.measures.shards`: writes the shard, trains on it or trains a router on it, and prints JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measures.shards import BYTES
from lutetia.models.data.parts.order import parts_used
from lutetia.models.data.parts.part_file import Text
from lutetia.models.data.parts.reader import PartedShard, open_shard
from lutetia.models.data.parts.writer import ShardWriter, part_bytes
from lutetia.models.data.shards import ClipReader, ShardData
from lutetia.models.mixing.router_training import train_router
from lutetia.models.training.batches import Batches
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

BATCH, STEPS, READ = 16, 3, 150
WORDS = 60
"""Tokens of a caption; room is for 512."""
LATENT = LatentSpec(
    channels=16, frames=9, height=32, width=32, vae="Wan2.1", pixel_frames=33, pixel_height=256, pixel_width=256,
    text_encoder="UMT5", text_tokens=512, text_width=4096, pooled_width=768,
)  # fmt: skip
EXPERT = ExpertSpec(
    config={
        "patch_size": [1, 4, 4], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
        "text_dim": 4096, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 64,
    }
)  # fmt: skip
LATENT_BYTES, TEXT_BYTES = 2 * math.prod(LATENT.shape), 2 * (WORDS * LATENT.text_width + LATENT.pooled_width)
CLIPS = BYTES // (LATENT_BYTES + TEXT_BYTES)


def manifest(shards: int) -> Manifest:
    blob, owner = BlobRef(digest="0" * 64, size=1), Identity.derived("owner of the shards benchmark").public_key
    specs = tuple(
        ShardSpec(index=n, name=f"shard {n}", train=blob, holdout=blob, clips=CLIPS, holdout_clips=1, prior=1 / shards)
        for n in range(shards)
    )
    return Manifest(
        name="shards", owner=owner, coordinators=(owner,), created=1.0, expires=2.0, latent=LATENT, expert=EXPERT, shards=specs,
        checkpoint_samples=100 * BATCH, samples_per_shard=1000 * BATCH, optimisation=Optimisation(batch=BATCH),
    )  # fmt: skip


def write(path: Path) -> dict[str, Any]:
    """Clips of noise, each with a caption of its own. The noise repeats with a shift, because drawing it takes minutes."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(math.prod(LATENT.shape) + CLIPS, generator=draw).half()
    tokens = torch.randn(WORDS * LATENT.text_width + CLIPS, generator=draw).half()
    writer = ShardWriter(path, LATENT, "shard", "train", part_bytes(BYTES))
    for clip in range(CLIPS):
        text = tokens[clip : clip + WORDS * LATENT.text_width].view(WORDS, -1).contiguous()
        shifted = latents[clip : clip + math.prod(LATENT.shape)].view(LATENT.shape)
        writer.add(shifted, Text(f"clip {clip}", text, tokens[clip : clip + LATENT.pooled_width].contiguous()))
    found = writer.finish()
    padded = CLIPS * (LATENT_BYTES + 2 * (LATENT.text_tokens * LATENT.text_width + LATENT.pooled_width))
    parts = len(list(path.with_suffix("").iterdir()))
    return {
        "bytes": found.bytes, "real": CLIPS * (LATENT_BYTES + TEXT_BYTES), "padded": padded, "parts": parts, "clips": CLIPS,
    }  # fmt: skip


def train(path: Path) -> dict[str, Any]:
    run = manifest(1)
    shard = open_shard(path, LATENT)
    assert isinstance(shard, PartedShard)
    used = parts_used(run, 0, shard.index, 0, BATCH)
    first = path.stat().st_size + sum(shard.index.parts[number].blob.size for number in used)
    few = ShardData(torch.randn(8, *LATENT.shape), torch.randn(8, 512, 4096), torch.randn(8, 768), [""] * 8, [""] * 8)
    model = _memory("VmRSS") - few.tokens.numel() * 4 / 2**20
    ExpertTrainer(run.model_copy(update={"optimisation": Optimisation(batch=8)}), 0, few, micro_batch=1).step()
    small = _memory("VmHWM")
    del few
    batches, milliseconds = Batches(run, 0, shard), []
    for step in range(READ):
        began = time.perf_counter()
        batches.at(step // 100, step % 100)
        milliseconds.append(1000 * (time.perf_counter() - began))
    trainer = ExpertTrainer(run, 0, shard, micro_batch=1)
    for _ in range(STEPS):
        trainer.step()
    return {
        "first": first, "batch": BATCH, "model": model, "small": small, "peak": _memory("VmHWM"), "read": READ, "steps": STEPS,
        "milliseconds": milliseconds,
    }  # fmt: skip


def router(path: Path) -> dict[str, Any]:
    run = manifest(2)
    shards: list[ClipReader] = [open_shard(path, LATENT) for _ in run.shards]
    base = _memory("VmRSS")
    train_router(run, shards, seed=0, steps=20)
    return {"base": base, "peak": _memory("VmHWM")}


def _memory(name: str) -> float:
    """Memory of this process, MiB: VmRSS now or VmHWM at its peak, pages of mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def main() -> None:
    what, folder = sys.argv[1:]
    print(json.dumps({"write": write, "train": train, "router": router}[what](Path(folder) / "000.train.safetensors")))


if __name__ == "__main__":
    main()
