"""The next epoch of a shard from what its lanes trained: a function of the files alone, so that anybody can recompute its digest.

With n_i the samples of lane i, and every sum taken in the order of the lanes in float64, which holds n_i x_i exactly:

| tensor | rule |
|---|---|
| parameters, averages (EMA) | p + r (m - p) with m = sum n_i x_i / sum n_i, the parent's p, r = `team.outer_rate`; m if r = 1 |
| moments of the optimiser | sum n_i x_i / sum n_i; a lane without one counts as zero |
| losses of the trace | at each step the mean over the lanes that took it |
| what is never trained | as in the first lane |

Products and sums are separate roundings of single numbers, so machine and number of threads change no bit. A lane merged alone
keeps every number that it had. The rule is the outer step of DiLoCo (2311.08105, algorithm 1) with the mean in place of
Nesterov's momentum; there each worker keeps its own moments, here they are averaged: another node may train the lane next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lutetia.models.tensor_files import TensorFile, write_tensors
from lutetia.models.training.replay import read_trace
from lutetia.models.training.states.compact import PARAMETER, WEIGHTS, open_state, packed_state
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import IntegrityError

FILES = ("weights", "state", "trace")
Source = Callable[[], Tensor]


@dataclass(frozen=True)
class LaneFiles:
    """The published files of one lane's result."""

    lane: int
    samples: int
    """Samples that the lane trained: its weight in the mean."""
    weights: Path
    state: Path
    trace: Path


@dataclass(frozen=True)
class MergedFiles:
    """The blobs of a merged epoch, which lie as `weights`, `state` and `trace` in one folder, and its mean training loss."""

    weights: BlobRef
    state: BlobRef
    trace: BlobRef
    loss: float


def merge_lanes(
    manifest: Manifest,
    shard: int,
    epoch: int,
    lanes: Sequence[LaneFiles],
    folder: Path,
    *,
    parent: tuple[Path, Path] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> MergedFiles:
    """Write epoch `epoch` of a shard into `folder`, merged from results that have passed their checks; one tensor at a time.

    Args:
        manifest: the run, which has a team.
        shard: index of the shard.
        epoch: the epoch that it will be, 1 for the first.
        lanes: what is merged; their order does not matter.
        folder: an empty folder on the disk where the epoch is kept.
        parent: weights and state of the accepted parent; needed where `team.outer_rate` is not 1.
        progress: called after every tensor.

    Raises:
        IntegrityError: there is no lane, one is named twice, or the parent is needed and missing.
        NotTensors, DiskError: a file cannot be read or written.
    """
    lanes = sorted(lanes, key=lambda part: part.lane)
    if not lanes or len({part.lane for part in lanes}) < len(lanes):
        raise IntegrityError(f"lanes {[part.lane for part in lanes]} of shard {shard} cannot be merged: each is needed once")
    rate = manifest.team.outer_rate if manifest.team else 1.0
    if rate == 1:
        parent = None
    elif parent is None:
        raise IntegrityError(f"epoch {epoch} of shard {shard} is merged at outer rate {rate}, for which its parent is needed")
    trace = _mean_trace([read_trace(part.trace) for part in lanes])
    with ExitStack() as files:
        merged = _Merge(manifest, lanes, rate, parent, files, progress)
        merged.write_weights(folder / "weights")
        merged.write_state(folder / "state", _document(manifest, shard, epoch), trace)
    write_tensors(folder / "trace", {"trace": trace})
    refs = {name: ChunkTable.of_file(folder / name).ref for name in FILES}
    return MergedFiles(**refs, loss=float(trace.double().mean()))


class _Merge:
    """Lanes whose files are open. Each tensor is merged when it is written."""

    def __init__(
        self, manifest: Manifest, lanes: Sequence[LaneFiles], rate: float, parent: tuple[Path, Path] | None,
        files: ExitStack, progress: Callable[[], None],
    ) -> None:  # fmt: skip
        form = manifest.checkpoints
        self._counts, self._rate, self._progress = [part.samples for part in lanes], rate, progress
        self._weights = [files.enter_context(TensorFile(part.weights)) for part in lanes]
        self._states = [files.enter_context(open_state(part.state, part.weights, form)) for part in lanes]
        self._old_weights = files.enter_context(TensorFile(parent[0])) if parent else None
        self._old_state = files.enter_context(open_state(parent[1], parent[0], form)) if parent else None
        trained = {name.removeprefix(PARAMETER) for name in self._states[0] if name.startswith(PARAMETER)}
        self._sources = {name: self._weight(name, name in trained) for name in self._weights[0]}
        moments = sorted({name for state in self._states for name in state if "." in name and not name.startswith(PARAMETER)})
        self._parameters = {name: self._parameter(name) for name in sorted(trained)}
        self._moments = {name: self._moment(name) for name in moments if not name.startswith("ema.")}
        self._packed: dict[str, Tensor] = {}
        self._makes: dict[int, Source] = {}
        if form == "compact":
            averages = {name: self._sources[name]().bfloat16() for name in sorted(trained)}
            self._packed, self._makes = packed_state(self._parameters, averages, self._moments)

    def write_weights(self, path: Path) -> None:
        packed = {name.removeprefix(WEIGHTS): tensor for name, tensor in self._packed.items() if name.startswith(WEIGHTS)}
        plain = {name: (make, self._weights[0].placeholder(name)) for name, make in self._sources.items() if name not in packed}
        self._write(path, plain, packed, None)

    def write_state(self, path: Path, document: Mapping[str, object], trace: Tensor) -> None:
        packed = {name: tensor for name, tensor in self._packed.items() if not name.startswith(WEIGHTS)}
        makes = {} if packed else {f"{PARAMETER}{name}": make for name, make in self._parameters.items()} | self._moments
        plain = {name: (make, self._like(name)) for name, make in makes.items()}
        self._write(path, plain | {"trace": (lambda: trace, trace.to("meta"))}, packed, document)

    def _write(
        self, path: Path, plain: Mapping[str, tuple[Source, Tensor]], packed: Mapping[str, Tensor],
        document: Mapping[str, object] | None,
    ) -> None:  # fmt: skip
        """`plain`: what makes each tensor, and a placeholder of its shape; `packed`: placeholders of the compact form."""
        makes = self._makes | {id(placeholder): make for make, placeholder in plain.values()}
        tensors = {name: placeholder for name, (_, placeholder) in plain.items()} | dict(packed)

        @contextmanager
        def reading(placeholder: Tensor) -> Iterator[Tensor]:
            yield makes[id(placeholder)]()
            self._progress()

        write_tensors(path, tensors, document, reading)

    def _like(self, name: str) -> Tensor:
        """A placeholder of a tensor of the plain state, which some lane has."""
        file = next(state for state in self._states if name in state)
        assert isinstance(file, TensorFile)
        return file.placeholder(name)

    def _weight(self, name: str, trained: bool) -> Source:
        """A published weight: an average, or a tensor that is never trained."""
        if not trained:
            return lambda: self._weights[0][name]
        return lambda: self._stepped((file[name] for file in self._weights), self._old_weights, name)

    def _parameter(self, name: str) -> Source:
        key = f"{PARAMETER}{name}"
        return lambda: self._stepped((state[key] for state in self._states), self._old_state, key)

    def _moment(self, name: str) -> Source:
        def make() -> Tensor:
            like = next(state[name] for state in self._states if name in state)
            return self._mean(state[name] if name in state else torch.zeros_like(like) for state in self._states)

        return make

    def _stepped(self, values: Iterable[Tensor], old: Mapping[str, Tensor] | None, name: str) -> Tensor:
        merged, dtype = self._sum(values)
        merged /= sum(self._counts)
        if old is not None:
            before = old[name].double()
            merged = before + (merged - before) * self._rate
        return merged.to(dtype)

    def _mean(self, values: Iterable[Tensor]) -> Tensor:
        total, dtype = self._sum(values)
        return (total / sum(self._counts)).to(dtype)

    def _sum(self, values: Iterable[Tensor]) -> tuple[Tensor, torch.dtype]:
        """(sum of count times value in float64, the values' type). One lane's tensor is in memory at a time, however many lanes.

        Multiplication and addition are separate calls, since one that fuses them rounds once.
        """
        total, dtype = torch.zeros(()), torch.float32
        for number, (count, value) in enumerate(zip(self._counts, values, strict=True)):
            if number == 0:
                total, dtype = torch.zeros(value.shape, dtype=torch.float64), value.dtype
            total += value.double() * count
        return total, dtype


def _mean_trace(traces: Sequence[Sequence[float]]) -> Tensor:
    """The mean loss of each step over the lanes that took it, float32."""
    steps = range(max(map(len, traces)))
    taken = [[trace[step] for trace in traces if step < len(trace)] for step in steps]
    return torch.tensor([sum(losses) / len(losses) for losses in taken], dtype=torch.float32)


def _document(manifest: Manifest, shard: int, epoch: int) -> dict[str, object]:
    """The header's document of a state at the start of an epoch, as a trainer writes it."""
    return {
        "format": 1, "run": manifest.run_id, "shard": shard, "epoch": epoch, "step": 0,
        "samples": epoch * manifest.checkpoint_samples, "micro_batch": manifest.optimisation.batch,
        "precision": "float32", "device": "",
    }  # fmt: skip
