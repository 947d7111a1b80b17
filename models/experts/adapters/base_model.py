"""The base under an adapter, read tensor by tensor from its files: at most one tensor more than what is kept is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lutetia.models.experts.adapters.frozen_linear import FrozenLinear
from lutetia.protocol.schema.model.adapter import BaseDtype
from lutetia.system.errors import ConfigError
from lutetia.system.process import give_back_free_memory

BaseFiles = Mapping[str, Path]
"""The base's weights files on this machine by the names that the manifest gives them. Their digests have been compared."""
Base = BaseFiles | Literal["random"]
"""`random`: numbers of the right shapes, to measure what a machine can do before it has the base."""


def build_base(construct: Callable[[], nn.Module], base: Base, dtype: BaseDtype) -> nn.Module:
    """The base model on the CPU, frozen. Linear layers of its blocks are kept in `dtype`, all else in float32.

    Raises ConfigError when the files do not hold exactly the network's weights, or a package for the data type is missing.
    """
    with init_empty_weights(include_buffers=False):
        model = construct()
    model.requires_grad_(False)
    missing = set(model.state_dict())
    for name, tensor in _random(model) if base == "random" else _tensors(base):
        if name not in missing:
            raise ConfigError(f"the base holds {name[:80]!r} twice, or its network has none; use the base that the run names")
        missing.remove(name)
        _put(model, name, tensor, dtype)
    if missing:
        raise ConfigError(
            f"the base lacks {len(missing)} tensors of the network, among them {min(missing)}; use the base that the run names"
        )
    give_back_free_memory()
    return model


def _tensors(files: BaseFiles) -> Iterator[tuple[str, Tensor]]:
    for name, path in sorted(files.items()):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dictionary)
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read {name} of the base at {path}: {error}; fetch it again") from error


def _random(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in list(model.state_dict().items()):
        yield name, torch.randn(tensor.shape, generator=generator) * 0.02 if tensor.ndim > 1 else torch.ones(tensor.shape)


def _put(model: nn.Module, name: str, tensor: Tensor, dtype: BaseDtype) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if (wanted := tuple(model.get_parameter(name).shape if leaf in owner._parameters else model.get_buffer(name).shape)) != (
        given := tuple(tensor.shape)
    ):
        raise ConfigError(f"{name} of the base has shape {list(given)}, not {list(wanted)}; use the base that the run names")
    if leaf in owner._buffers:
        owner._buffers[leaf] = _apart(tensor, dtype)
    elif leaf == "weight" and isinstance(owner, nn.Linear) and "blocks." in name and dtype != "float32":
        parent, _, own = owner_name.rpartition(".")
        setattr(model.get_submodule(parent), own, FrozenLinear(tensor, owner.bias, dtype))
    else:
        owner._parameters[leaf] = nn.Parameter(_apart(tensor, dtype), requires_grad=False)


def _apart(tensor: Tensor, dtype: BaseDtype) -> Tensor:
    """The tensor in float32. Where most of the file is kept in another form, a copy: a view keeps the whole file in memory."""
    return tensor.float() if dtype == "float32" else tensor.to(torch.float32, copy=True)
