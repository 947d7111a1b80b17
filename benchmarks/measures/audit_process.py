"""A process of `benchmarks.measures.audit`: trains the parent epoch if there is none, and replays the next one.

Its one argument and its output are JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measures.audit import BATCH, STEPS
from lutetia.coordinator.settings import small_expert
from lutetia.models.data.shards import ShardData
from lutetia.models.training.checkpoint_io import Snapshot, write_state, write_weights
from lutetia.models.training.replay import ReplayEnd, ReplayParent, drift, raw_parameters
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

CLIPS = 64
EXPERT_SIZE = {"num_layers": 3, "num_attention_heads": 3, "ffn_dim": 288}
LATENT = LatentSpec(
    channels=4, frames=4, height=8, width=8, vae="pixels", pixel_frames=4, pixel_height=8, pixel_width=8,
    text_encoder="builtin:words", text_tokens=8, text_width=32, pooled_width=32,
)  # fmt: skip

EXPERT = ExpertSpec(config={**small_expert(LATENT).config, **EXPERT_SIZE})


def manifest(optimizer: str) -> Manifest:
    blob, owner = BlobRef(digest="0" * 64, size=1), Identity.derived("owner of the audit benchmark").public_key
    shard = ShardSpec(index=0, name="shard 0", train=blob, holdout=blob, clips=CLIPS, holdout_clips=1, prior=1.0)
    return Manifest(
        name="audit", owner=owner, coordinators=(owner,), created=1.0, expires=2.0, latent=LATENT, expert=EXPERT,
        shards=(shard,), checkpoint_samples=STEPS * BATCH, samples_per_shard=4 * STEPS * BATCH,
        optimisation=Optimisation(optimizer=optimizer, batch=BATCH),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def data() -> ShardData:
    """Smooth random clips, which can be learnt."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(CLIPS, *LATENT.shape, generator=draw)
    smooth = torch.nn.functional.avg_pool3d(noise, 3, 1, 1) * 4
    text = torch.randn(CLIPS, LATENT.text_tokens, LATENT.text_width, generator=draw)
    return ShardData(smooth, text, text.mean(1), [""] * CLIPS, [""] * CLIPS)


def parent(folder: Path, run: Manifest) -> ReplayParent:
    base = ReplayParent(1, folder / "parent.weights", folder / "parent.state")
    if not (folder / "parent.state").exists():
        trainer = ExpertTrainer(run, 0, data())
        for _ in range(STEPS):
            trainer.step()
        _write(trainer.snapshot(), folder, "parent")
    return base


def replayed(folder: Path, run: Manifest, base: ReplayParent, ask: dict[str, Any]) -> dict[str, Any]:
    """One replay; its end is kept, because other replays are compared with it."""
    torch.set_num_threads(ask.get("threads", 1))
    how = {name: ask[name] for name in ("device", "precision", "micro_batch") if name in ask}
    trainer = ExpertTrainer(run, 0, data(), **how)
    trainer.restore(1, base.weights, base.state)
    start = raw_parameters(trainer)
    if ask.get("frozen"):
        return cheated(folder, trainer, start, ask)
    for _ in range(STEPS):
        trainer.step()
    _write(trainer.snapshot(), folder, ask["name"])
    return {"losses": trainer.trace, "drift": drift(trainer, start, _end(folder, ask["base"]))}


def cheated(folder: Path, trainer: ExpertTrainer, start: dict[str, Any], ask: dict[str, Any]) -> dict[str, Any]:
    """Losses without updates, and the parent's weights plus a little noise as the end; the drift is that of an honest replay."""
    losses = []
    for step in range(STEPS):
        losses.append(trainer._accumulate(trainer._batches.take(1, step)).item())
        trainer.model.zero_grad()
    draw = torch.Generator().manual_seed(2)
    snapshot = trainer.snapshot()
    for tensors in (snapshot.parameters, snapshot.ema):
        for tensor in tensors.values():
            tensor += ask.get("noise", 0.0) * torch.randn(tensor.shape, generator=draw)
    _write(snapshot, folder, "cheat")
    for _ in range(STEPS):
        trainer.step()
    return {"losses": losses, "drift": drift(trainer, start, _end(folder, "cheat"))}


def _write(snapshot: Snapshot, folder: Path, name: str) -> None:
    write_weights(snapshot, folder / f"{name}.weights")
    write_state(snapshot, folder / f"{name}.state", ema=False)


def _end(folder: Path, name: str) -> ReplayEnd:
    return ReplayEnd(folder / f"{name}.weights", folder / f"{name}.state")


def main() -> None:
    ask = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    run, folder = manifest(ask["optimizer"]), Path(ask["folder"])
    base = parent(folder, run)
    print(json.dumps([replayed(folder, run, base, variant) for variant in ask["variants"]]))


if __name__ == "__main__":
    main()
