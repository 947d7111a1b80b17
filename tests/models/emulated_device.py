"""A device of CPU memory whose tensors refuse to mix with the CPU's, as a graphics card's do: `emulated:0`.

It computes on the CPU, so numbers and gradients are right, and it finds what a machine without a card cannot: a forgotten
`.to(device)`, a generator or a constant on the wrong device, `.numpy()` of a tensor that is not in main memory.

It is a tensor subclass whose `device` is torch's private-use backend, and a dispatch mode that sees every operation below
autograd. Torch registers such a backend once per process, for good; it calls itself available only inside `emulated_device`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "emulated"
DEVICE = f"{NAME}:0"
_MOVES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
"""Operations whose arguments may lie on both sides."""
_INDEXES = ("aten::index", "aten::_index_put_impl")
"""Operations that take indices in main memory: CUDA's do, too."""
_available = False


class DeviceMismatchError(RuntimeError):
    """One operation got tensors of two devices."""


class OnDevice(torch.Tensor):
    """A tensor on the emulated device; `memory` is the CPU tensor that holds its numbers."""

    memory: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType] (as torch documents)

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            layout=memory.layout, device=torch.device(DEVICE),
        )  # fmt: skip
        made.memory = memory
        return made

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Carry out one operation on the CPU tensors behind its arguments; refuse a mixture of both sides."""
    name, leaves = func._schema.name, tree_leaves((args, dict(kwargs)))
    here = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    _refuse_mixture(name, leaves, here, asked)
    on_device = bool(here) if asked is None else asked.type == NAME
    if name == "aten::copy_":
        on_device = isinstance(args[0], OnDevice)
    changed: dict[str, Any] = {"device": torch.device("cpu")} if asked is not None else {}
    if "pin_memory" in kwargs:
        changed["pin_memory"] = False
    known = {id(tensor.memory): tensor for tensor in here}  # what an operation in place gives back
    out = func(*tree_map(_memory, args), **tree_map(_memory, {**kwargs, **changed}))

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice) or not on_device:
            return value
        return known.get(id(value)) if id(value) in known else OnDevice(value)

    return tree_map(wrapped, out)


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, OnDevice) else value


def _refuse_mixture(name: str, leaves: list[Any], here: list[OnDevice], asked: torch.device | None) -> None:
    elsewhere = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice) and leaf.dim()]
    if here and elsewhere and name not in _MOVES and not name.startswith(_INDEXES):
        shapes = [list(tensor.shape) for tensor in here], [list(tensor.shape) for tensor in elsewhere]
        raise DeviceMismatchError(f"{name}: {shapes[0]} on {DEVICE}, {shapes[1]} on the CPU")
    drawn = any(isinstance(leaf, torch.Generator) and leaf.device.type == "cpu" for leaf in leaves)
    if drawn and (here or (asked is not None and asked.type == NAME)):
        raise DeviceMismatchError(f"{name}: a generator of the CPU for a tensor on {DEVICE}")


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks of a backend's Python module."""

    def is_available(self) -> bool:
        return _available

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Random numbers of the emulated device come from the CPU's generator."""

    def manual_seed(self, seed: int) -> None:
        """See `set_rng_state`."""

    def _lazy_init(self) -> None:
        """Nothing to start."""


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _available


@cache
def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend(), _Hook())


def _from_data(tensor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor`, which does not pass its device through the dispatcher."""

    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        made = tensor(data, *args, **options)
        return made if device is None else made.to(device)

    return made


@contextlib.contextmanager
def emulated_device() -> Iterator[str]:
    """Inside, `emulated:0` is a device of this process. Yields its name."""
    global _available
    _register()
    tensor, as_list, swaps = torch.tensor, torch.Tensor.tolist, torch.__future__.get_swap_module_params_on_conversion()
    torch.tensor = _from_data(tensor)
    torch.Tensor.tolist = lambda self: as_list(_memory(self))  # pyright: ignore[reportAttributeAccessIssue]
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter's data cannot change into another tensor type
    _available = True
    try:
        with _Mode(), torch.autograd.set_multithreading_enabled(False):  # the mode is one of this thread
            yield DEVICE
    finally:
        _available = False
        torch.tensor, torch.Tensor.tolist = tensor, as_list  # pyright: ignore[reportAttributeAccessIssue]
        torch.__future__.set_swap_module_params_on_conversion(swaps)
