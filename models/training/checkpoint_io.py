"""A trainer's state: the snapshot in memory, the weights file that is published, the state file to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from lutetia.models.device import Precision
from lutetia.models.tensor_files import TensorFile, read_document, write_tensors
from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_state, check_weights
from lutetia.models.training.kernels.choice import PLAIN_KERNELS, Kernels, read_kernels
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.states.compact import WEIGHTS
from lutetia.protocol.schema.manifest import CheckpointForm, Manifest

_PLACE = ("run", "shard", "epoch", "step", "samples", "micro_batch", "precision", "device")
_NUMBERS = ("shard", "epoch", "step", "samples", "micro_batch")


@dataclass
class Snapshot:
    """Everything that determines the next step, copied to the CPU, so that the trainer can continue meanwhile."""

    run: str
    """The run's id."""
    shard: int
    epoch: int
    """The epoch of the next step: after the last step of epoch e, this is e + 1."""
    step: int
    """The next step in that epoch; 0 after the last step of an epoch."""
    samples: int
    """Samples that the shard's expert has been trained on."""
    micro_batch: int
    """Rows per forward pass."""
    precision: Precision
    parameters: dict[str, Tensor]
    ema: dict[str, Tensor]
    """Moving averages of the parameters; empty in a state whose weights file travels with it."""
    buffers: dict[str, Tensor]
    moments: dict[str, Tensor]
    """The optimiser's, named like `adamw.exp_avg.<parameter>`."""
    device: str = "cpu"
    """Kind of device the epoch was trained on: "other" if on more than one, "" if a file of an earlier version has no entry."""
    trace: list[float] = field(default_factory=list)
    """Losses of the epoch that is being trained or has just ended."""
    memory: MemoryOptions = PLAIN
    """In which forms the state was kept."""
    kernels: Kernels = PLAIN_KERNELS
    """How steps were computed."""
    packed: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of the published files in the compact form (`packed_state`); empty in a run with the plain form."""
    sources: Mapping[int, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    """By `id`: makes the values of a tensor above that is a placeholder, because it is kept in another form than float32."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that are published and sampled: the EMA under the names of the expert's own class."""
        return {**self.buffers, **self.ema}

    @contextmanager
    def reading(self, tensor: Tensor) -> Iterator[Tensor]:
        """Gives the values of one of its tensors while they are read."""
        yield self.values(tensor)

    def values(self, tensor: Tensor) -> Tensor:
        """The values of one of its tensors."""
        make = self.sources.get(id(tensor))
        return tensor.detach() if make is None else make()

    def rewind(self) -> bool:
        """Whether it can be read once more from its first tensor on, after a write has failed."""
        return True

    def release(self) -> None:
        """It is read, or no longer wanted."""


def write_weights(snapshot: Snapshot, path: Path) -> None:
    """Write the EMA in the form of diffusers' `diffusion_pytorch_model.safetensors`, with equal bytes for equal weights.

    Raises DiskError.
    """
    packed = {name.removeprefix(WEIGHTS): tensor for name, tensor in snapshot.packed.items() if name.startswith(WEIGHTS)}
    write_tensors(path, snapshot.weights | packed, reading=snapshot.reading)


def write_state(snapshot: Snapshot, path: Path, *, ema: bool = True) -> None:
    """Write parameters, moments, counters, loss trace and, unless the weights file travels with it, the EMA. Raises DiskError."""
    tensors = {f"param.{name}": tensor for name, tensor in snapshot.parameters.items()} | snapshot.moments
    if snapshot.packed and not ema:
        tensors = {name: tensor for name, tensor in snapshot.packed.items() if not name.startswith(WEIGHTS)}
    if ema:
        tensors |= {f"ema.{name}": tensor for name, tensor in snapshot.ema.items()}
    tensors["trace"] = torch.tensor(snapshot.trace, dtype=torch.float32)
    document = {"format": 1, **{name: getattr(snapshot, name) for name in _PLACE}}
    if not snapshot.memory.exact:
        document["forms"] = [snapshot.memory.moments, snapshot.memory.weights]
    if snapshot.kernels != PLAIN_KERNELS:
        document["kernels"] = snapshot.kernels.word
    write_tensors(path, tensors, document, reading=snapshot.reading)


def read_weights(path: Path, manifest: Manifest, shard: int) -> dict[str, Tensor]:
    """The weights of a shard's expert, checked, in the form that they have. Raises CheckpointMisfit."""
    check_weights(path, manifest.expert_of(shard), None if manifest.checkpoints == "compact" else "float32")
    with TensorFile(path) as file:
        return dict(file)


def check_resumable(
    path: Path, manifest: Manifest, shard: int, form: CheckpointForm = "float32", weights: Path | None = None
) -> dict[str, Any]:
    """Check a training state, reading one tensor at a time; returns its place (`read_place`).

    `form`: a local state has the plain one in every run. `weights`: the checked file that a compact state belongs to.

    Raises CheckpointMisfit if it does not fit the expert or is of another run or shard.
    """
    check_state(path, manifest.expert_of(shard), manifest.optimisation, form, weights)
    return read_place(path, manifest, shard)


def read_place(path: Path, manifest: Manifest, shard: int) -> dict[str, Any]:
    """A state file's place in the run and how it was made: the fields of `Snapshot` that are not tensors.

    Raises CheckpointMisfit if it is of another run or shard, or holds entries that no trainer writes.
    """
    with safe_open(path, framework="pt") as file:
        try:
            header = read_document(file.metadata())
            numbers = {name: int(header[name]) for name in _NUMBERS}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointMisfit("header", f"the state {path.name} does not say where it belongs; refused") from error
    steps, batch = manifest.steps_per_epoch, manifest.optimisation.batch
    if (header.get("run"), numbers["shard"]) != (manifest.run_id, shard):
        raise CheckpointMisfit("header", f"the state {path.name} is not of shard {shard} of this run; fetch the right one")
    fits = 0 <= numbers["step"] < steps and numbers["epoch"] >= 0 and numbers["micro_batch"] >= 1
    if not fits or numbers["samples"] != (numbers["epoch"] * steps + numbers["step"]) * batch:
        raise CheckpointMisfit("header", f"the state {path.name} names a place that this run does not have; refused")
    named = header.get("precision")
    precision = named if named in get_args(Precision) else "float32"
    given = header.get("forms")
    forms = tuple(map(str, given)) if isinstance(given, list) else (PLAIN.moments, PLAIN.weights)
    device = str(header.get("device", ""))
    kernels = read_kernels(header.get("kernels"))
    return {
        "run": manifest.run_id, **numbers, "precision": precision, "device": device, "forms": forms, "kernels": kernels,
    }  # fmt: skip
