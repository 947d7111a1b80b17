"""Checks that a file is what the manifest says a checkpoint must be, before any tensor of another peer is used.

Cheapest first: size of the header, names, shapes, dtypes, then (reading one tensor at a time) finite numbers and norm bounds.
Only safetensors is read: the format holds nothing that could be executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lutetia.models.experts.families import Schema, build_meta, weight_schema
from lutetia.models.experts.trained import trained_parameters
from lutetia.models.tensor_files import DTYPES, MAX_HEADER_BYTES, NotTensors, TensorFile
from lutetia.models.training.optimisers import hidden_matrices
from lutetia.models.training.states.compact import CODES, MOMENTUM, PARAMETER, SCALE, SECOND, open_state
from lutetia.models.training.states.eight_bit import LEAST_EXPONENT, blocks
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import CheckpointForm
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.system.errors import IntegrityError

Reason = Literal["missing", "extra", "shape", "dtype", "non-finite", "norm", "header"]

MAX_ROOT_MEAN_SQUARE = 100.0  # trained weights lie around 0.01 to 1
MAX_TRACE = 1 << 20  # losses


class CheckpointMisfit(IntegrityError):
    """A checkpoint file does not fit the manifest. `reason` is the kind of misfit; the text names file and tensor."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


def check_weights(path: Path, spec: ExpertSpec, form: CheckpointForm | None = "float32") -> None:
    """Raises CheckpointMisfit unless `path` holds exactly the expert's weights, finite and of bounded norm.

    `form`: of the checkpoint. None: either, for weights that were checked when they arrived, or given to begin with.
    """
    header = _read_header(path)
    schema = published_schema(spec, form or "float32")
    compact = published_schema(spec, "compact")
    if form is None and header.keys() == schema.keys() and any(header[name].get("dtype") == "BF16" for name in compact):
        schema = compact
    _check(path, schema, {})


def published_schema(spec: ExpertSpec, form: CheckpointForm) -> Schema:
    """Name, shape and dtype of every tensor of a checkpoint's weights file."""
    schema = weight_schema(spec)
    if form == "compact":
        schema |= {name: (schema[name][0], torch.bfloat16) for name in _trained_names(canonical(spec))}
    return schema


@lru_cache(maxsize=64)
def _trained_names(expert: bytes) -> tuple[str, ...]:
    return tuple(trained_parameters(build_meta(ExpertSpec.model_validate_json(expert))))


def check_state(
    path: Path, spec: ExpertSpec, optimisation: Optimisation, form: CheckpointForm = "float32", weights: Path | None = None
) -> None:
    """Raises CheckpointMisfit unless `path` holds a training state that this expert and optimiser can resume from.

    `weights`: the checked file that a compact state belongs to.
    """
    required, optional = state_schema(spec, optimisation, form)
    _check(path, required, optional, plain=form == "float32")
    if form == "compact":
        _check_scales(path)
        with open_state(path, weights, form) as state:
            for name in state:
                _check_numbers(path, name, state[name])


def _check_scales(path: Path) -> None:
    """Refuse exponents that no writer gives: below the least, a reader that counts from it would take one from the other end."""
    with TensorFile(path) as file:
        for name in file:
            if name.startswith(SCALE) and file[name].numel() and int(file[name].min()) < LEAST_EXPONENT:
                raise CheckpointMisfit("norm", f"{name} of {path.name} has exponents below {LEAST_EXPONENT}; refused")


def state_schema(spec: ExpertSpec, optimisation: Optimisation, form: CheckpointForm = "float32") -> tuple[Schema, Schema]:
    """The tensors that a training state must hold (parameters) and may hold (moments, EMA, a loss trace of any length).

    A compact one must hold its moments, too.
    """
    required, optional = _plain_schema(spec, optimisation)
    if form == "float32":
        return required, optional
    packed: Schema = {}
    for name, (shape, _) in (required | optional).items():
        if name.startswith((PARAMETER, SECOND, MOMENTUM)):
            packed[CODES + name] = shape, torch.int8 if name.startswith(PARAMETER) else torch.float8_e4m3fn
            packed[SCALE + name] = (blocks(math.prod(shape)),), torch.int8
    return packed, {"trace": optional["trace"]}


def _plain_schema(spec: ExpertSpec, optimisation: Optimisation) -> tuple[Schema, Schema]:
    required, optional = _state_forms(canonical(spec), optimisation.optimizer == "muon")
    return dict(required), dict(optional)


@lru_cache(maxsize=64)
def _state_forms(expert: bytes, muon: bool) -> tuple[Schema, Schema]:
    model = build_meta(ExpertSpec.model_validate_json(expert))
    matrices = hidden_matrices(model) if muon else set()
    required: Schema = {}
    optional: Schema = {"trace": ((-1,), torch.float32)}
    for name, parameter in trained_parameters(model).items():
        form = tuple(parameter.shape), parameter.dtype
        required[f"param.{name}"] = optional[f"ema.{name}"] = form
        moments = ("muon.momentum_buffer",) if name in matrices else ("adamw.exp_avg", "adamw.exp_avg_sq")
        optional |= {f"{moment}.{name}": form for moment in moments}
    return required, optional


def _check(path: Path, required: Schema, optional: Schema, *, plain: bool = True) -> None:
    """`plain`: whether the file's numbers are those that are meant, so that their norms can be checked."""
    header = _read_header(path)
    _check_names(path, header, required, optional)
    expected = required | optional
    for name, entry in header.items():
        _check_form(path, name, entry, *expected[name])
    _check_values(path, header if plain else ())


def _read_header(path: Path) -> dict[str, Any]:
    """The tensor entries of a safetensors header. Read here, not by safetensors, so that a hostile size allocates nothing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointMisfit("header", f"{path.name} has a header of {length} bytes in a file of {size}; refused")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointMisfit("header", f"the header of {path.name} is not JSON; refused") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise CheckpointMisfit("header", f"the header of {path.name} does not describe tensors; refused")
    header.pop("__metadata__", None)
    return header


def _check_names(path: Path, header: Mapping[str, Any], required: Schema, optional: Schema) -> None:
    missing = sorted(required.keys() - header.keys())
    if missing:
        raise CheckpointMisfit("missing", f"{path.name} lacks {len(missing)} tensors, among them {missing[0]}; refused")
    extra = sorted(header.keys() - required.keys() - optional.keys())
    if extra:
        raise CheckpointMisfit("extra", f"{path.name} holds {len(extra)} tensors too many, among them {extra[0][:80]}; refused")


def _check_form(path: Path, name: str, entry: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = entry.get("shape")
    if shape == (-1,):
        fits = isinstance(given, list) and len(given) == 1 and isinstance(given[0], int) and 0 <= given[0] <= MAX_TRACE
    else:
        fits = given == list(shape)
    if not fits:
        raise CheckpointMisfit("shape", f"{name} of {path.name} has shape {str(given)[:80]} instead of {list(shape)}; refused")
    if entry.get("dtype") != DTYPES[dtype]:
        raise CheckpointMisfit("dtype", f"{name} of {path.name} is {entry.get('dtype')} instead of {DTYPES[dtype]}; refused")


def _check_values(path: Path, header: Iterable[str]) -> None:
    """Finite numbers and bounded norms, one tensor in memory at a time; a norm is finite only if all its numbers are."""
    try:
        with TensorFile(path) as file:
            for name in header:
                _check_numbers(path, name, file[name])
    except NotTensors as error:
        raise CheckpointMisfit("header", f"{path.name} is not a whole safetensors file ({error}); refused") from error


def _check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
    if not math.isfinite(norm):
        raise CheckpointMisfit("non-finite", f"{name} of {path.name} holds NaN or infinity; refused")
    if norm > MAX_ROOT_MEAN_SQUARE * math.sqrt(tensor.numel()):
        size = norm / math.sqrt(tensor.numel())
        raise CheckpointMisfit(
            "norm", f"{name} of {path.name} has root mean square {size:.3g}, above {MAX_ROOT_MEAN_SQUARE}; refused"
        )
