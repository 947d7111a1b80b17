"""What a trainer remembers: the snapshot in memory, the weights file that is published, the state file that resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from lutetia.models.tensor_files import read_document, write_tensors
from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_state, check_weights
from lutetia.protocol.schema.manifest import Manifest

Precision = Literal["float32", "bfloat16"]
_PLACE = ("run", "shard", "epoch", "step", "samples", "micro_batch", "precision", "device")
_NUMBERS = ("shard", "epoch", "step", "samples", "micro_batch")


@dataclass
class Snapshot:
    """Everything that determines the next step, on the CPU, detached from the trainer, which goes on meanwhile.

    `epoch` and `step` say where the next step belongs (an ended epoch e is epoch e+1, step 0); `samples` are the shard's so far.
    `trace` are the losses of the epoch that was being trained or has just ended, `device` the kind on which it was trained:
    "other" when on more than one, "" where a file of an earlier version does not say.
    """

    run: str
    shard: int
    epoch: int
    step: int
    samples: int
    micro_batch: int
    precision: Precision
    parameters: dict[str, Tensor]
    ema: dict[str, Tensor]
    buffers: dict[str, Tensor]
    moments: dict[str, Tensor]
    device: str = "cpu"
    trace: list[float] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is published and sampled: the EMA under the names of the expert's own class."""
        return {**self.buffers, **self.ema}


def write_weights(snapshot: Snapshot, path: Path) -> None:
    """The EMA, as diffusers' `diffusion_pytorch_model.safetensors` holds it. Equal weights, equal bytes. Raises DiskError."""
    write_tensors(path, snapshot.weights)


def write_state(snapshot: Snapshot, path: Path, *, ema: bool = True) -> None:
    """Parameters, moments, counters, loss trace and (unless the weights file travels along) the EMA. Raises DiskError."""
    tensors = {f"param.{name}": tensor for name, tensor in snapshot.parameters.items()} | snapshot.moments
    if ema:
        tensors |= {f"ema.{name}": tensor for name, tensor in snapshot.ema.items()}
    tensors["trace"] = torch.tensor(snapshot.trace, dtype=torch.float32)
    write_tensors(path, tensors, {"format": 1, **{name: getattr(snapshot, name) for name in _PLACE}})


def read_weights(path: Path, manifest: Manifest, shard: int) -> dict[str, Tensor]:
    """The checked weights of a shard's expert. Raises CheckpointRefused."""
    check_weights(path, manifest.expert_of(shard))
    return _read_tensors(path)


def read_state(path: Path, manifest: Manifest, shard: int) -> Snapshot:
    """The checked state of a shard's trainer; `ema` is empty where it travels as a weights file.

    Raises CheckpointRefused: does not fit the expert, or is of another run or shard.
    """
    check_state(path, manifest.expert_of(shard), manifest.optimisation)
    place = read_place(path, manifest, shard)
    tensors = _read_tensors(path)
    return Snapshot(
        **place,
        parameters=_under("param.", tensors),
        ema=_under("ema.", tensors),
        buffers={},
        moments={name: tensor for name, tensor in tensors.items() if name.startswith(("adamw.", "muon."))},
        trace=tensors["trace"].tolist() if "trace" in tensors else [],
    )


def read_place(path: Path, manifest: Manifest, shard: int) -> dict[str, Any]:
    """Where in the run a state file belongs and how it was made: the fields of `Snapshot` that are no tensors.

    Raises CheckpointRefused: of another run or shard, or it says what no trainer writes.
    """
    with safe_open(path, framework="pt") as file:
        try:
            said = read_document(file.metadata())
            numbers = {name: int(said[name]) for name in _NUMBERS}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointMisfit("header", f"the state {path.name} does not say where it belongs; refused") from error
    steps, batch = manifest.steps_per_epoch, manifest.optimisation.batch
    if (said.get("run"), numbers["shard"]) != (manifest.run_id, shard):
        raise CheckpointMisfit("header", f"the state {path.name} is not of shard {shard} of this run; fetch the right one")
    fits = 0 <= numbers["step"] < steps and numbers["epoch"] >= 0 and numbers["micro_batch"] >= 1
    if not fits or numbers["samples"] != (numbers["epoch"] * steps + numbers["step"]) * batch:
        raise CheckpointMisfit("header", f"the state {path.name} names a place that this run does not have; refused")
    precision = "bfloat16" if said.get("precision") == "bfloat16" else "float32"
    return {"run": manifest.run_id, **numbers, "precision": precision, "device": str(said.get("device", ""))}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
