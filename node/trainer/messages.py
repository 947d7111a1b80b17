"""Messages between the node's supervisor and its trainer process: one JSON object a line, in both directions.

The supervisor sends `ToTrainer`, told apart by the field `do`. The trainer process sends `FromTrainer`, told apart by `say`.
Both ends ignore messages of an unknown kind and unknown fields: an update may replace the package under a running daemon.
Imports no torch: the supervisor uses it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from lutetia.models.device import Precision
from lutetia.models.training.kernels.choice import PLAIN_KERNELS, Kernels
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.node.machine.messages import Exit
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.checking.questions import (
    CheckFindings,
    CheckQuestion,
    GalleryQuestion,
    MixtureFindings,
    MixtureQuestion,
    RouterFindings,
    RouterQuestion,
)
from lutetia.node.trainer.checkpoint_folder import KeptCheckpoint
from lutetia.node.trainer.probe import ProbeQuestion, ProbeResult
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.records import TrainedWith
from lutetia.system.process import Message


class ReplayQuestion(Frozen):
    """An epoch to replay, from files that the supervisor has fetched. With `end_weights` and `end_state` it is compared too."""

    manifest: Path = Field(description="The signed manifest")
    shard: int = Field(description="Index of the shard")
    lane: int = Field(default=0, description="Lane that the author trained")
    epoch: int = Field(description="Parent epoch: the replay starts after it")
    epochs: int = Field(description="Epoch budget under which the epoch was trained")
    steps: int = Field(description="Training steps to replay")
    data: Path = Field(description="The shard's training data")
    weights: Path | None = Field(default=None, description="Weights of the parent; None at epoch 0 without a warm start")
    state: Path | None = Field(default=None, description="Training state of the parent; None at epoch 0")
    base: dict[str, Path] | None = Field(default=None, description="Files of the base that the expert adapts, by name")
    end_weights: Path | None = Field(default=None, description="Weights of the checkpoint under audit")
    end_state: Path | None = Field(default=None, description="Training state of the checkpoint under audit")
    precision: Precision = Field(description="Data type of the forward pass")
    memory: MemoryOptions = Field(default=PLAIN, description="What is done to need less memory, in the author's forms")
    kernels: Kernels = Field(default=PLAIN_KERNELS, description="The author's, if this node's probe chose the same; else plain")
    device: str = Field(description="cpu, mps, cuda:N or xpu:N")
    micro_batch: int | None = Field(default=None, description="Clips per forward pass; None: the whole batch")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")
    doubt: tuple[float, float, bool] | None = Field(
        default=None, description="Drifts between which the epoch's own noise is measured, and whether in the other precision"
    )


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)

    def to_wire(self) -> Message:
        return self.model_dump(mode="json")


# --- to the trainer process -------------------------------------------------------------------------------------------------


class RunProbe(_Message):
    """Probe the hardware; answered by ProbeFinished or RequestFailed."""

    do: Literal["probe"] = "probe"
    question: ProbeQuestion


class ListDevices(_Message):
    """Name the devices of this machine that are worth training on; answered by DevicesListed or RequestFailed."""

    do: Literal["devices"] = "devices"


class RunReplay(_Message):
    """Replay an epoch; answered by ReplayFinished or RequestFailed."""

    do: Literal["replay"] = "replay"
    question: ReplayQuestion


class RunCheck(_Message):
    """Inspect and score a result; answered by CheckFinished or RequestFailed."""

    do: Literal["check"] = "check"
    question: CheckQuestion


class RunRouter(_Message):
    """Train or measure a router; answered by RouterFinished or RequestFailed."""

    do: Literal["router"] = "router"
    question: RouterQuestion


class ScoreMixture(_Message):
    """Score a mixture on held-out clips; answered by MixtureScored or RequestFailed."""

    do: Literal["mixture"] = "mixture"
    question: MixtureQuestion


class SampleMixture(_Message):
    """Sample the run's prompts from a mixture; answered by GalleryWritten or RequestFailed."""

    do: Literal["gallery"] = "gallery"
    question: GalleryQuestion


class StartTraining(_Message):
    """Train; a process does this once, after any probes and replays."""

    do: Literal["start"] = "start"
    assignment: Assignment


class AllowTraining(_Message):
    """Epochs whose parent is below `until` may be trained from now on."""

    do: Literal["allow"] = "allow"
    until: int


class SetDutyCycle(_Message):
    """Train for `share` of the time from now on."""

    do: Literal["duty"] = "duty"
    share: float


class DataArrived(_Message):
    """A part of the data was stored: a trainer that waits for one looks again."""

    do: Literal["data"] = "data"


class StopTraining(_Message):
    """End; write a local state first if `save`. `stay`: then wait for further orders, as before the training."""

    do: Literal["stop"] = "stop"
    save: bool
    stay: bool = False


ToTrainer = (
    ListDevices | RunProbe | RunReplay | RunCheck | RunRouter | ScoreMixture | SampleMixture | StartTraining | AllowTraining
    | SetDutyCycle | DataArrived | StopTraining
)  # fmt: skip


# --- from the trainer process -----------------------------------------------------------------------------------------------


class DevicesListed(_Message):
    """`devices`: their names in torch's words, at least one; `reasons`: why each, for the log."""

    say: Literal["devices"] = "devices"
    devices: tuple[str, ...]
    reasons: tuple[str, ...]


class ProbeFinished(_Message):
    say: Literal["finding"] = "finding"
    finding: ProbeResult


class ReplayFinished(_Message):
    """`losses`: one per step, None where it was no finite number. `drift`: see `models.training.replay.Replay`."""

    say: Literal["replayed"] = "replayed"
    losses: tuple[float | None, ...]
    drift: float | None
    made: TrainedWith
    noise: float | None = None


class CheckFinished(_Message):
    say: Literal["checked"] = "checked"
    findings: CheckFindings


class MixtureScored(_Message):
    say: Literal["scored"] = "scored"
    findings: MixtureFindings


class GalleryWritten(_Message):
    """The clips lie in the file that the question names."""

    say: Literal["gallery"] = "gallery"


class RouterFinished(_Message):
    say: Literal["routed"] = "routed"
    findings: RouterFindings


class RequestFailed(_Message):
    """The probe, replay or check could not be done. `device_missing`: the device that the settings name is not there."""

    say: Literal["failed"] = "failed"
    text: str
    device_missing: bool = False


class TrainerReady(_Message):
    """Everything is loaded; training starts at this epoch and step."""

    say: Literal["ready"] = "ready"
    epoch: int
    step: int
    device: str


class ProgressReport(_Message):
    """Sent at most four times a second. `waiting`: for AllowTraining. `rate` in samples per second, `samples` of the shard."""

    say: Literal["progress"] = "progress"
    epoch: int
    step: int
    steps: int
    samples: int
    loss: float | None = None
    rate: float = 0.0
    waiting: bool = False


class WaitingForPart(_Message):
    """Training waits for this part of the data; repeated while it waits."""

    say: Literal["waiting"] = "waiting"
    part: int


class LocalStateSaved(_Message):
    say: Literal["saved"] = "saved"
    epoch: int
    step: int


class CheckpointWritten(_Message):
    say: Literal["checkpoint"] = "checkpoint"
    kept: KeptCheckpoint


class DiskReport(_Message):
    """The disk became full, or has space again."""

    say: Literal["disk"] = "disk"
    full: bool
    text: str = ""


class ExitReport(_Message):
    """The last message; the exit code repeats `reason` (`assignment.EXIT_CODES`)."""

    say: Literal["exit"] = "exit"
    reason: Exit
    text: str


FromTrainer = (
    DevicesListed | ProbeFinished | ReplayFinished | CheckFinished | RouterFinished | MixtureScored | GalleryWritten
    | RequestFailed | TrainerReady | ProgressReport | WaitingForPart | LocalStateSaved | CheckpointWritten | DiskReport
    | ExitReport
)  # fmt: skip


_ORDERS: dict[str, type[ToTrainer]] = {kind.model_fields["do"].default: kind for kind in get_args(ToTrainer)}
_REPORTS: dict[str, type[FromTrainer]] = {kind.model_fields["say"].default: kind for kind in get_args(FromTrainer)}


def parse_order(message: Message) -> ToTrainer | None:
    """None for an unknown kind. Raises ValueError when a field is missing or wrong."""
    kind = _ORDERS.get(str(message.get("do")))
    return kind.model_validate(message) if kind else None


def parse_report(message: Message) -> FromTrainer | None:
    """None for an unknown kind. Raises ValueError when a field is missing or wrong."""
    kind = _REPORTS.get(str(message.get("say")))
    return kind.model_validate(message) if kind else None
