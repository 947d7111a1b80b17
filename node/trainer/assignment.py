"""What a trainer process is to train, and the exit codes by which it says why it ended. Imports no torch: both sides use it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lutetia.models.device import Precision
from lutetia.models.training.kernels.choice import PLAIN_KERNELS, Kernels
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.node.machine.messages import Exit
from lutetia.node.trainer.checkpoint_folder import LocalState
from lutetia.protocol.claims import slot_of
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Digest

EXIT_CODES: dict[Exit, int] = {
    "stopped": 0, "crash": 70, "bad-shard": 12, "hardware": 20, "disk-full": 21, "out-of-memory": 22, "bad-state": 50,
}  # fmt: skip
PROGRESS_SECONDS = 0.25
LOCAL_BYTES_PER_DAY = 300 * 10**9
"""A common SSD of 1 TB is rated for 600 TB in five years, 330 GB a day."""


class Assignment(Frozen):
    """What to train, from which state, and how."""

    manifest: Path = Field(description="The signed manifest")
    shard: int = Field(description="Index of the shard")
    lane: int = Field(default=0, description="Lane of the shard that is trained")
    data: Path = Field(description="The shard's training data")
    folder: Path = Field(description="Where checkpoints and local states are written")
    epoch: int = Field(description="Parent epoch")
    parent: Digest | None = Field(description="Parent checkpoint; None at epoch 0")
    weights: Path | None = Field(default=None, description="Weights of the parent; None at epoch 0 without a warm start")
    state: Path | None = Field(default=None, description="Training state of the parent; None at epoch 0")
    local: LocalState | None = Field(default=None, description="A state within the epoch to resume from")
    until: int = Field(description="Epochs whose parent is below this number may be trained")
    base: dict[str, Path] | None = Field(default=None, description="Files of the base that the expert adapts, by name")
    device: str = Field(default="cpu", description="cpu, mps, cuda:N or xpu:N")
    precision: Precision = Field(default="float32", description="Data type of the forward pass")
    micro_batch: int | None = Field(default=None, description="Clips per forward pass; None: the whole batch")
    memory: MemoryOptions = Field(default=PLAIN, description="What is done to need less memory")
    kernels: Kernels = Field(default=PLAIN_KERNELS, description="Attention kernel, and whether blocks are compiled")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")
    duty: float = Field(default=1.0, gt=0, le=1, description="Duty cycle: share of time that training may use")
    losses: str | None = Field(default=None, description="Where losses are exported, as in the setting; None: nowhere")
    clips_every: int = Field(default=0, ge=0, description="Epochs from one export of sampled clips to the next; 0: none")
    save_every: float = Field(default=30.0, gt=0, description="Fewest seconds between local states")
    local_bytes_per_day: int = Field(default=LOCAL_BYTES_PER_DAY, gt=0, description="Bytes of local states written in a day")

    @property
    def slot(self) -> int:
        return slot_of(self.shard, self.lane)
