"""The trainer child's answer to `replay`: somebody else's steps, from files that the daemon has fetched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

from lutetia.models.data.shards import load_shard
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay, under_budget
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.system.errors import LutetiaError


class ReplayQuestion(Frozen):
    """Replay `steps` steps after `epoch`; with `end_weights` and `end_state` all of them."""

    manifest: Path
    shard: int
    epoch: int
    epochs: int
    steps: int
    data: Path
    weights: Path | None = None
    state: Path | None = None
    end_weights: Path | None = None
    end_state: Path | None = None
    precision: Literal["float32", "bfloat16"]
    device: str
    micro_batch: int | None = None
    threads: int | None = None


def replayed(question: dict[str, Any]) -> dict[str, Any]:
    """The message that goes back."""
    ask = ReplayQuestion.model_validate(question)
    if ask.threads:
        torch.set_num_threads(ask.threads)
    end = ReplayEnd(ask.end_weights, ask.end_state) if ask.end_weights and ask.end_state else None
    try:
        manifest = under_budget(SignedManifest.model_validate_json(ask.manifest.read_bytes()).manifest, ask.epochs)
        found = replay(
            manifest, ask.shard, load_shard(ask.data, manifest.latent), ReplayParent(ask.epoch, ask.weights, ask.state),
            ask.steps,
            end=end, device=ask.device, precision=ask.precision, micro_batch=ask.micro_batch,
        )  # fmt: skip
    except (LutetiaError, RuntimeError, MemoryError) as error:
        return {"say": "failed", "text": " ".join(str(error).split())[:500]}
    losses = [loss if math.isfinite(loss) else None for loss in found.losses]
    return {"say": "replayed", "losses": losses, "drift": found.drift, "made": found.made.model_dump()}
