"""A run of two tiny experts on disk: signed manifest and shards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lutetia.models.data.description import files_of
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.data.shards import ShardData
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder
from lutetia.node.trainer.messages import StartTraining
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec, SignedManifest, Timing
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.system.process import Child
from tests.models.data.old_format import write_old_shard

OWNER = Identity.derived("owner of tiny runs")
COORDINATOR = Identity.derived("coordinator of tiny runs")
LATENT = LatentSpec(
    channels=4, frames=2, height=4, width=4, vae="pixels", pixel_frames=2, pixel_height=4, pixel_width=4,
    text_encoder="builtin:words", text_tokens=3, text_width=16, pooled_width=16,
)  # fmt: skip
PART_BYTES = 1500
"""Three parts of a shard: three clips take 1.3 KB."""
EXPERT = ExpertSpec(
    config={
        "patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
    }
)  # fmt: skip


def tiny_shard(index: int, clips: int = 8) -> ShardData:
    draw = torch.Generator().manual_seed(index)
    return ShardData(
        latents=torch.randn(clips, *LATENT.shape, generator=draw) * 0.3 + index,
        tokens=torch.randn(clips, LATENT.text_tokens, LATENT.text_width, generator=draw),
        pooled=torch.randn(clips, LATENT.pooled_width, generator=draw),
        captions=[f"clip {number}" for number in range(clips)],
        kinds=["tiny"] * clips,
    )


@dataclass(frozen=True)
class TinyRun:
    folder: Path
    manifest: Manifest

    @property
    def manifest_file(self) -> Path:
        return self.folder / "manifest.json"

    def data(self, shard: int) -> Path:
        return self.folder / f"{shard}.train.safetensors"

    def data_refs(self, shard: int) -> list[BlobRef]:
        """The shard's index and parts, or its one file."""
        return [ref for _, ref in self._files(shard)]

    def add_data(self, shard: int, store: BlobStore) -> BlobRef:
        """Put the shard's files into `store`; returns the index."""
        for path, _ in self._files(shard):
            store.add_file(path)
        return self.manifest.shards[shard].train

    def _files(self, shard: int) -> list[tuple[Path, BlobRef]]:
        path, spec = self.data(shard), self.manifest.shards[shard]
        return [(path, spec.train)] if spec.data_bytes is None else list(files_of(path, spec.train))

    def work(self, name: str, slot: int = 0) -> CheckpointFolder:
        return CheckpointFolder(self.folder / name, self.manifest.run_id, slot)

    def assignment(self, work: CheckpointFolder, **fields: Any) -> Assignment:
        values: dict[str, Any] = {
            "manifest": self.manifest_file, "shard": work.shard, "lane": work.lane,
            "data": self.data(work.shard), "folder": work.path, "epoch": 0, "parent": None,
            "until": self.manifest.epochs, "threads": 1,
        }  # fmt: skip
        return Assignment(**{**values, **fields})


def raise_budget(run: TinyRun, epochs: int) -> TinyRun:
    """The run after an upgrade by its owner; the new manifest replaces the old file."""
    manifest = run.manifest
    new = next_version(manifest, {"samples_per_shard": epochs * manifest.checkpoint_samples}, manifest.created + 60)
    run.manifest_file.write_bytes(SignedManifest.sign(new, OWNER).to_bytes())
    return TinyRun(run.folder, new)


def make_run(
    folder: Path, *, epochs: int = 2, steps: int = 10, batch: int = 4, heartbeat: float = 1.0,
    schedule: Literal["constant", "cosine"] = "cosine", clips: int = 8, old: bool = False, experts: int = 2, **fields: Any,
) -> TinyRun:  # fmt: skip
    """Write a run to `folder`. `old`: its shards are in one file each, as release 0.1 made them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    splits: tuple[Literal["train", "holdout"], ...] = ("train", "holdout")
    for index in range(experts):
        refs: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for split in splits:
            path = folder / f"{index}.{split}.safetensors"
            if old:
                write_old_shard(path, tiny_shard(index, clips), LATENT, f"kind {index}", split)
                refs[split] = ChunkTable.of_file(path).ref
                continue
            written = write_shard(path, tiny_shard(index, clips), LATENT, name=f"kind {index}", split=split, size=PART_BYTES)
            refs[split] = written.blob
            sizes[split] = written.bytes
        refs["data_bytes"] = sizes.get("train")
        shards.append(ShardSpec(index=index, name=f"kind {index}", clips=clips, holdout_clips=clips, prior=1 / experts, **refs))
    now = time.time()
    manifest = Manifest(
        name="tiny", owner=OWNER.public_key, coordinators=(COORDINATOR.public_key,), created=now - 10, expires=now + 86_400,
        latent=LATENT, expert=fields.pop("expert", EXPERT), shards=tuple(shards), samples_per_shard=epochs * steps * batch,
        checkpoint_samples=steps * batch, optimisation=Optimisation(batch=batch, warmup_steps=2, schedule=schedule),
        timing=Timing(heartbeat=heartbeat), **fields,
    )  # fmt: skip
    run = TinyRun(folder, manifest)
    run.manifest_file.write_bytes(SignedManifest.sign(manifest, OWNER).to_bytes())
    return run


@contextlib.asynccontextmanager
async def trainer_process(assignment: Assignment) -> AsyncIterator[Child]:
    """A trainer process with this assignment; it is killed at the end of the block."""
    child = await Child.start("lutetia.node.trainer", environment={"OMP_NUM_THREADS": "1"})
    try:
        await child.send(StartTraining(assignment=assignment).to_wire())
        yield child
    finally:
        await child.kill()


async def next_message(child: Child, say: str, **fields: Any) -> dict[str, Any]:
    """The next report `say` with these field values. Raises AssertionError when the process ends first."""
    async for message in child.messages():
        if message["say"] == say and all(message.get(name) == value for name, value in fields.items()):
            return message
    raise AssertionError(f"the trainer ended without a report {say}")
