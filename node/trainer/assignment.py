"""What a trainer child is told when it starts, and how it says why it ended. Shared by both sides; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from lutetia.node.machine.messages import Exit
from lutetia.node.trainer.checkpoint_folder import LocalState
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Digest

EXIT_CODES: dict[Exit, int] = {
    "stopped": 0, "crash": 70, "bad-shard": 12, "hardware": 20, "disk-full": 21, "out-of-memory": 22, "bad-state": 50,
}  # fmt: skip
PROGRESS_SECONDS = 0.25


class Assignment(Frozen):
    """Train `shard` on top of epochs below `until`, from where `epoch`, `parent` and the given files say.

    `weights` and `state` are those of the checkpoint `parent` (None at epoch 0, but for `weights` of a warm start); `local` is a
    state inside that epoch. Checkpoints and local states are written to `folder`.
    """

    manifest: Path
    shard: int
    data: Path
    folder: Path
    epoch: int
    parent: Digest | None
    weights: Path | None = None
    state: Path | None = None
    local: LocalState | None = None
    until: int
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int | None = None
    threads: int | None = None
    duty: float = Field(default=1.0, gt=0, le=1)
    save_every: float = Field(default=30.0, gt=0)
