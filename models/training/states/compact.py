"""The compact form of a published checkpoint: 4.03 bytes for a number that AdamW trains, where the plain form has 16.

| part | plain | compact |
|---|---|---|
| average, which is published as weights | float32 | bfloat16 |
| trained number | float32 | its difference from the average, in 255 steps of a power of two per block of 256 |
| AdamW's first moment | float32 | none: it begins at zero in every epoch and is itself again after ten steps |
| AdamW's second moment | float32 | its root as float8 e4m3, with a power of two per block |
| Muon's momentum | float32 | float8 e4m3, with a power of two per block |

At the end of an epoch the trainer rounds its own state to what it publishes (`Optimiser.settle`). So whoever goes on, the author
or a successor that fetched the files, has the same numbers, and an audit replays them. The difference is taken from the rounded
average, so it takes up what that lost: a trained number is off by 1/255 of its block's largest difference, whatever its size.

In the state file a tensor NAME of the plain form is two: `codes.NAME` and `scale.NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lutetia.models.tensor_files import TensorFile
from lutetia.models.training.states.eight_bit import Packed, blocks, pack_float, pack_root, pack_steps, unpack, unpack_root
from lutetia.protocol.schema.manifest import CheckpointForm

CODES, SCALE, WEIGHTS = "codes.", "scale.", "weights."
PARAMETER, FIRST, SECOND, MOMENTUM = "param.", "adamw.exp_avg.", "adamw.exp_avg_sq.", "muon.momentum_buffer."

Source = Callable[[], Tensor]


def pack(name: str, values: Tensor, average: Tensor | None = None) -> Packed:
    """A tensor of the plain state file in its compact form. `average`: of a trained number, in bfloat16 or rounded to it."""
    if average is not None:
        return pack_steps(values - average.to(values.device, torch.float32))
    return (pack_root if name.startswith(SECOND) else pack_float)(values)


def unpacked(name: str, packed: Packed, average: Tensor | None = None) -> Tensor:
    """The inverse of `pack`."""
    if average is not None:
        return average.to(packed.codes.device, torch.float32) + unpack(packed)
    return (unpack_root if name.startswith(SECOND) else unpack)(packed)


def packed_state(
    parameters: Mapping[str, Source], averages: Mapping[str, Tensor], moments: Mapping[str, Source]
) -> tuple[dict[str, Tensor], dict[int, Source]]:
    """The tensors of both published files as placeholders, and what makes the values of each.

    Args:
        parameters: by name, what gives the trained numbers in float32.
        averages: by the same names.
        moments: by the names of the plain state file.

    Returns:
        Placeholders by name, those of the weights file under `weights.`; and by `id` of the placeholder what makes its values.
    """
    tensors: dict[str, Tensor] = {}
    sources: dict[int, Source] = {}

    def add(name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, make: Source) -> None:
        tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        sources[id(tensors[name])] = make

    for name, average in averages.items():
        add(WEIGHTS + name, average.shape, torch.bfloat16, lambda a=average: a.bfloat16())
    whole = {PARAMETER + name: (make, averages[name]) for name, make in parameters.items()}
    kept = {name: (make, None) for name, make in moments.items() if not name.startswith(FIRST)}
    shapes = {name: averages[_bare(name)].shape for name in (*whole, *kept)}
    for name, (make, average) in (whole | kept).items():
        dtype = torch.int8 if average is not None else torch.float8_e4m3fn
        add(CODES + name, shapes[name], dtype, lambda n=name, m=make, a=average: pack(n, m(), a).codes)
        size = (blocks(shapes[name].numel()),)
        add(SCALE + name, size, torch.int8, lambda n=name, m=make, a=average: pack(n, m(), a).exponents)
    return tensors, sources


def _bare(name: str) -> str:
    return next(name.removeprefix(kind) for kind in (PARAMETER, FIRST, SECOND, MOMENTUM) if name.startswith(kind))


class CompactState(Mapping[str, Tensor]):
    """A compact state file under the names of the plain form. Each tensor is read and unpacked when it is asked for."""

    def __init__(self, state: TensorFile, weights: Mapping[str, Tensor]) -> None:
        self._state, self._weights = state, weights

    def __iter__(self) -> Iterator[str]:
        for name in self._state:
            if name.startswith(CODES):
                yield name.removeprefix(CODES)
            elif not name.startswith(SCALE):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (CODES + name in self._state or (name == "trace" and name in self._state))

    def __getitem__(self, name: str) -> Tensor:
        if CODES + name not in self._state:
            return self._state[name]
        average = self._weights[name.removeprefix(PARAMETER)] if name.startswith(PARAMETER) else None
        return unpacked(name, Packed(self._state[CODES + name], self._state[SCALE + name]), average)


@contextmanager
def open_state(path: Path, weights: Path | None, form: CheckpointForm) -> Iterator[Mapping[str, Tensor]]:
    """A published training state under the names of the plain form, in either form.

    Args:
        path: the state file.
        weights: the weights file beside it, from which the compact form takes the averages.
        form: of both.

    Raises NotTensors or OSError.
    """
    with ExitStack() as files:
        state = files.enter_context(TensorFile(path))
        if form == "float32":
            yield state
        else:
            assert weights is not None, "a compact state is read with its weights"
            yield CompactState(state, files.enter_context(TensorFile(weights)))
