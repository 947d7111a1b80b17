"""Replay of another node's training: the same steps from the same parent, so that its published losses can be compared.

A replay needs the shard's data and the parent's blobs. From the author it needs only its trace and, for a whole epoch, its end.
`coordinator.acceptance.audit_comparison` compares the two, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lutetia.models.data.shards import ClipReader
from lutetia.models.device import Precision
from lutetia.models.experts.adapters.base_model import Base
from lutetia.models.tensor_files import TensorFile
from lutetia.models.training.checkpoint_checks import CheckpointMisfit
from lutetia.models.training.checkpoint_io import Snapshot
from lutetia.models.training.kernels.choice import PLAIN_KERNELS, Kernels
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.moment_distance import moment_distance
from lutetia.models.training.states.compact import open_state
from lutetia.models.training.trainer import ExpertTrainer, TrainingDiverged
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import TrainedWith
from lutetia.system.errors import IntegrityError

Lookup = Callable[[str], Tensor]
Part = Literal["parameters", "averages", "moments"]


@dataclass(frozen=True)
class ReplayParent:
    """The start of the audited epoch: the files of accepted `epoch`; at epoch 0 none, or the weights of a warm start."""

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
    """Outcome of a replay."""

    losses: tuple[float, ...]
    """One per step; they end early, with a NaN, if training diverged."""
    drift: float | None
    """Distance of the author's end from the replayed one (`drift`); None if no end was given."""
    made: TrainedWith
    """Device, precision and micro-batch of the replay."""
    noise: float | None = None
    """Distance between the ends of this and a second replay with other arithmetic, in the unit of `drift`; None: not measured."""
    farthest: Part | None = None
    """The part of the end that `drift` was measured on."""


@dataclass(frozen=True)
class ReplayDoubt:
    """When to measure the epoch's own noise by a second replay: if the drift is above `near` and at most `far`."""

    near: float
    far: float
    coarse: bool
    """Replay in the other precision (bfloat16 for float32 or the reverse), whose rounding is coarser than any device's. Otherwise
    with micro-batches of one sample, which only changes the order of sums."""


def replay(
    manifest: Manifest,
    shard: int,
    data: ClipReader,
    parent: ReplayParent,
    steps: int,
    *,
    end: ReplayEnd | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    micro_batch: int | None = None,
    doubt: ReplayDoubt | None = None,
    base: Base | None = None,
    memory: MemoryOptions = PLAIN,
    progress: Callable[[int, int], None] = lambda done, steps: None,
    lane: int = 0,
    kernels: Kernels = PLAIN_KERNELS,
) -> Replay:
    """Train again from `parent`.

    Args:
        manifest: the run, with the budget that the author had.
        shard: the audited shard.
        data: its clips.
        parent: where the epoch starts.
        steps: how many steps to replay.
        end: the author's end of the epoch. With it the whole epoch is replayed and the ends are compared.
        device: where to train.
        precision: of the forward pass.
        micro_batch: rows per forward pass. None: the whole batch.
        doubt: when to measure the noise by a second replay.
        base: the files of the base that the expert adapts, if it does.
        memory: what to do to need less of it. The forms of moments and weights are those of the author.
        progress: called with (steps done, steps).
        lane: the lane that the author trained.
        kernels: how attention is computed and whether blocks are compiled.

    Raises:
        CheckpointMisfit, IntegrityError: the parent's files do not fit.
        DataError, ConfigError: the shard's data or expert do not fit.
    """
    trainer = ExpertTrainer(
        manifest, shard, data, device=device, precision=precision, micro_batch=micro_batch, base=base, memory=memory,
        lane=lane, kernels=kernels,
    )  # fmt: skip
    trainer.restore(parent.epoch, parent.weights, parent.state)
    whole = manifest.lane_steps(lane)
    steps = whole if end else min(steps, whole)
    start = raw_parameters(trainer) if end else {}
    losses: list[float] = []
    try:
        for done in range(steps):
            losses.append(trainer.step())
            progress(done + 1, steps)
    except TrainingDiverged:
        losses.append(math.nan)
    made = made_with(trainer.device.type, trainer.precision, trainer.micro_batch, memory=trainer.memory, kernels=trainer.kernels)
    if end is None or len(losses) < steps or not math.isfinite(losses[-1]):
        return Replay(tuple(losses), None, made)
    apart, noise = end_distances(trainer, start, end), None
    farthest = max(apart, key=lambda part: apart[part])
    distance = apart[farthest]
    if doubt and doubt.near < distance <= doubt.far and (other := _other_arithmetic(trainer, doubt.coarse)):
        noise = _noise(trainer, start, other, parent)
    return Replay(tuple(losses), distance, made, noise, farthest)


def _other_arithmetic(trainer: ExpertTrainer, coarse: bool) -> ExpertTrainer | None:
    """A trainer whose sums round differently. None if there is none: micro-batches of one cannot be split further."""
    precision: Precision = trainer.precision
    if coarse:
        precision = "bfloat16" if precision == "float32" else "float32"
    elif trainer.micro_batch == 1:
        return None
    return ExpertTrainer(
        trainer.manifest, trainer.shard, trainer.data, device=trainer.device, precision=precision,
        micro_batch=trainer.micro_batch if coarse else 1, base=trainer.base,
        memory=_other_memory(trainer.memory, precision), lane=trainer.lane,
    )  # fmt: skip


def _other_memory(memory: MemoryOptions, precision: Precision) -> MemoryOptions:
    """Weights in bfloat16 need that precision."""
    return memory if precision == "bfloat16" else memory.model_copy(update={"weights": "float32"})


def _noise(trainer: ExpertTrainer, start: Mapping[str, Tensor], other: ExpertTrainer, parent: ReplayParent) -> float | None:
    """Distance between the ends of both trainers, over the distance that the first moved. None if the second diverges."""
    other.restore(parent.epoch, parent.weights, parent.state)
    try:
        for _ in range(trainer.manifest.lane_steps(trainer.lane)):
            other.step()
    except TrainingDiverged:
        return None
    end = other.snapshot()
    found = end.parameters.__getitem__, end.weights.__getitem__, end.moments.get
    apart = _distances(trainer.snapshot(), start, *found, trainer.device)
    return max(apart.values())


def under_budget(manifest: Manifest, epochs: int) -> Manifest:
    """The same run with a budget of `epochs` epochs, as an earlier version of its manifest had."""
    samples = epochs * manifest.checkpoint_samples
    return manifest.model_copy(update={"run": manifest.run_id, "samples_per_shard": samples})


def made_with(
    device: str,
    precision: Precision,
    micro_batch: int,
    software: str = "",
    memory: MemoryOptions = PLAIN,
    kernels: Kernels = PLAIN_KERNELS,
) -> TrainedWith:
    """Device, precision, micro-batch and software in the form that peers exchange. Rare devices count as "other".

    float16 counts as bfloat16, which rounds eight times as coarsely, and on a CPU as another kind of device: no auditor uses it.
    """
    kind = device if device in ("cpu", "cuda", "mps") else "other"
    if precision == "float16":
        kind, precision = "other" if kind == "cpu" else kind, "bfloat16"
    return TrainedWith(
        device=kind,
        precision=precision,
        micro_batch=micro_batch,
        software=software,
        moments=memory.moments,
        weights=memory.weights,
        kernels=kernels.word,
    )


def raw_parameters(trainer: ExpertTrainer) -> dict[str, Tensor]:
    """A copy of the parameters that are being trained (not of their averages), on the CPU."""
    return {name: values.to("cpu", copy=True) for name, values in trainer.parameters().items()}


def drift(trainer: ExpertTrainer, start: Mapping[str, Tensor], end: ReplayEnd) -> float:
    """The largest of the distances of the author's end from the replayed one."""
    return max(end_distances(trainer, start, end).values())


def end_distances(trainer: ExpertTrainer, start: Mapping[str, Tensor], end: ReplayEnd) -> dict[Part, float]:
    """How far the author's end is from the replayed one, for each part of it.

    Parameters and averages (with what is published beside them and never trained, such as positions): their distance over the
    distance that the replay moved from `start`. Moments: `moment_distance`.
    """
    with open_state(end.state, end.weights, trainer.manifest.checkpoints) as state, TensorFile(end.weights) as weights:
        return _distances(
            trainer.snapshot(), start, lambda name: state[f"param.{name}"], weights.__getitem__,
            state.get, trainer.device,
        )  # fmt: skip


def _distances(
    replayed: Snapshot,
    start: Mapping[str, Tensor],
    parameters: Lookup,
    averages: Lookup,
    moments: Callable[[str], Tensor | None],
    device: torch.device,
) -> dict[Part, float]:
    """How far another end is from the replayed one."""
    moved = _distance(replayed.parameters, lambda name: start[name])
    if moved == 0:
        raise IntegrityError("the replayed epoch moved no weight; its learning rate is zero and there is nothing to audit")
    return {
        "parameters": _distance(replayed.parameters, parameters) / moved,
        "averages": _distance(replayed.weights, averages) / moved,
        "moments": moment_distance(replayed.moments, moments, device),
    }


def _distance(tensors: Mapping[str, Tensor], other: Lookup) -> float:
    total = sum(torch.dist(tensor.double(), other(name).double()).item() ** 2 for name, tensor in tensors.items())
    return math.sqrt(total)


def read_trace(path: Path) -> tuple[float, ...]:
    """The losses that an author published. Raises CheckpointMisfit unless they are one row of finite float32 numbers."""
    try:
        with safe_open(path, framework="pt") as file:
            trace = file.get_tensor("trace") if list(file.keys()) == ["trace"] else None
    except SafetensorError as error:
        raise CheckpointMisfit("header", f"the trace {path.name} is not a safetensors file ({error}); refused") from error
    if trace is None or trace.ndim != 1 or trace.dtype != torch.float32:
        raise CheckpointMisfit("shape", f"the trace {path.name} is not one row of float32 losses; refused")
    if not bool(torch.isfinite(trace).all()):
        raise CheckpointMisfit("non-finite", f"the trace {path.name} holds NaN or infinity; refused")
    return tuple(trace.tolist())
