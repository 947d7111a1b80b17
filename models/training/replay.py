"""Replay of somebody's training: the same steps from the same parent, so that its published losses can be compared.

Who replays needs the shard's data and the parent's blobs, and nothing of the author but its trace (and, for a whole epoch, its
end). The comparison is `coordinator.acceptance.audit_comparison`, which needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lutetia.models.data.shards import ShardData
from lutetia.models.training.checkpoint_checks import CheckpointMisfit
from lutetia.models.training.checkpoint_io import Precision, Snapshot
from lutetia.models.training.trainer import ExpertTrainer, TrainingDiverged
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import TrainedWith
from lutetia.system.errors import IntegrityError

Lookup = Callable[[str], Tensor]


@dataclass(frozen=True)
class ReplayParent:
    """Where the audited epoch begins: the files of accepted `epoch`; at epoch 0 nothing, or the weights of a warm start."""

    epoch: int
    weights: Path | None = None
    state: Path | None = None


@dataclass(frozen=True)
class ReplayEnd:
    """The author's published end of the epoch."""

    weights: Path
    state: Path


@dataclass(frozen=True)
class Replay:
    """What came out. `drift`: how far the author's end lies from the replayed one, in lengths of the replayed way.

    It is None where no end was given. `made`: with what it was replayed. Losses end early, with a NaN, where training diverged.
    `noise`: how far, in the same lengths, the replayed end lies from that of a second replay with other arithmetic.
    """

    losses: tuple[float, ...]
    drift: float | None
    made: TrainedWith
    noise: float | None = None


@dataclass(frozen=True)
class ReplayDoubt:
    """Where the drift falls between `near` and `far`, measure the epoch's own noise by a second replay.

    `coarse`: by the other precision (bfloat16 for float32 or the reverse), whose rounding is coarser than any device's; else by
    micro-batches of one sample, which changes the order of sums only.
    """

    near: float
    far: float
    coarse: bool


def replay(
    manifest: Manifest,
    shard: int,
    data: ShardData,
    parent: ReplayParent,
    steps: int,
    *,
    end: ReplayEnd | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    micro_batch: int | None = None,
    doubt: ReplayDoubt | None = None,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Replay:
    """Train the first `steps` steps after `parent`; with `end` the whole epoch, whose outcome is compared too.

    With `doubt` an end that is neither near nor far costs a second replay, which measures the noise.

    Raises CheckpointRefused or IntegrityError for files that do not fit, DataError or ConfigError for a shard that does not.
    """
    trainer = ExpertTrainer(manifest, shard, data, device=device, precision=precision, micro_batch=micro_batch)
    trainer.restore(parent.epoch, parent.weights, parent.state)
    steps = manifest.steps_per_epoch if end else min(steps, manifest.steps_per_epoch)
    start = raw_parameters(trainer) if end else {}
    losses: list[float] = []
    try:
        for done in range(steps):
            losses.append(trainer.step())
            progress(done + 1, steps)
    except TrainingDiverged:
        losses.append(math.nan)
    made = made_with(trainer.device.type, trainer.precision, trainer.micro_batch)
    if end is None or len(losses) < steps or not math.isfinite(losses[-1]):
        return Replay(tuple(losses), None, made)
    apart, noise = drift(trainer, start, end), None
    if doubt and doubt.near < apart <= doubt.far and (other := _other_arithmetic(trainer, doubt.coarse)):
        noise = _noise(trainer, start, other, parent)
    return Replay(tuple(losses), apart, made, noise)


def _other_arithmetic(trainer: ExpertTrainer, coarse: bool) -> ExpertTrainer | None:
    """The same training, rounded otherwise; None where there is no such way: a batch of one cannot be split."""
    precision: Precision = trainer.precision
    if coarse:
        precision = "float32" if precision == "bfloat16" else "bfloat16"
    elif trainer.micro_batch == 1:
        return None
    return ExpertTrainer(
        trainer.manifest, trainer.shard, trainer.data, device=trainer.device, precision=precision,
        micro_batch=trainer.micro_batch if coarse else 1,
    )  # fmt: skip


def _noise(trainer: ExpertTrainer, start: Mapping[str, Tensor], other: ExpertTrainer, parent: ReplayParent) -> float | None:
    """How far the ends of both lie apart, over the length of the way; None where the second diverges."""
    other.restore(parent.epoch, parent.weights, parent.state)
    try:
        for _ in range(trainer.manifest.steps_per_epoch):
            other.step()
    except TrainingDiverged:
        return None
    end = other.snapshot()
    return _apart(trainer.snapshot(), start, end.parameters.__getitem__, end.ema.__getitem__)


def under_budget(manifest: Manifest, epochs: int) -> Manifest:
    """The same run with a budget of `epochs`, as an earlier version of its manifest had it."""
    samples = epochs * manifest.checkpoint_samples
    return manifest.model_copy(update={"run": manifest.run_id, "samples_per_shard": samples})


def made_with(device: str, precision: Precision, micro_batch: int, software: str = "") -> TrainedWith:
    """The words for it that peers exchange."""
    kind = device if device in ("cpu", "cuda", "mps") else "other"
    return TrainedWith(device=kind, precision=precision, micro_batch=micro_batch, software=software)


def raw_parameters(trainer: ExpertTrainer) -> dict[str, Tensor]:
    """A copy of the parameters that are trained (not of their averages)."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trainer.model.named_parameters()}


def drift(trainer: ExpertTrainer, start: Mapping[str, Tensor], end: ReplayEnd) -> float:
    """The larger of the parameters' and the averages' distance from the author's, over the length of the replayed way."""
    with safe_open(end.state, framework="pt") as state, safe_open(end.weights, framework="pt") as weights:
        return _apart(trainer.snapshot(), start, lambda name: state.get_tensor(f"param.{name}"), weights.get_tensor)


def _apart(ours: Snapshot, start: Mapping[str, Tensor], parameters: Lookup, averages: Lookup) -> float:
    """The larger distance of our parameters and of our averages from others', over the length of our way from `start`."""
    way = _distance(ours.parameters, lambda name: start[name])
    if way == 0:
        raise IntegrityError("the replayed epoch moved no weight; its learning rate is zero and there is nothing to audit")
    return max(_distance(ours.parameters, parameters), _distance(ours.ema, averages)) / way


def _distance(ours: Mapping[str, Tensor], theirs: Lookup) -> float:
    total = sum(torch.dist(tensor.double(), theirs(name).double()).item() ** 2 for name, tensor in ours.items())
    return math.sqrt(total)


def read_trace(path: Path) -> tuple[float, ...]:
    """The losses that an author published. Raises CheckpointRefused unless they are one row of finite float32 numbers."""
    try:
        with safe_open(path, framework="pt") as file:
            trace = file.get_tensor("trace") if list(file.keys()) == ["trace"] else None
    except SafetensorError as error:
        raise CheckpointMisfit("header", f"the trace {path.name} is no safetensors file ({error}); refused") from error
    if trace is None or trace.ndim != 1 or trace.dtype != torch.float32:
        raise CheckpointMisfit("shape", f"the trace {path.name} is not one row of float32 losses; refused")
    if not bool(torch.isfinite(trace).all()):
        raise CheckpointMisfit("non-finite", f"the trace {path.name} holds NaN or infinity; refused")
    return tuple(trace.tolist())
