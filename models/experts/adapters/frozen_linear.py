"""A linear layer whose weight is never trained, kept in the data type that the manifest names and multiplied in the input's.

The weight's data type is part of the function: everybody computes with the numbers that it can represent. In which precision the
product is computed is each machine's choice, as for every expert; so a base kept in bfloat16 can be trained in float32.

    float32     the weight itself
    bfloat16    rounded
    fp8         float8 e4m3, times one float32 per row that maps the row's largest entry to the largest such number (448)
    nf4         4-bit normal floats in blocks of 64 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes

Each way of unpacking is a fixed function of the stored numbers in float32, so all devices unpack the same weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lutetia.protocol.schema.model.adapter import BaseDtype
from lutetia.system.errors import ConfigError

_LARGEST_E4M3 = 448.0
_BLOCK = 64


class FrozenLinear(nn.Linear):
    """Takes the place of an `nn.Linear`: (inputs `[..., in]`) -> `[..., out]` in their data type, or that of autocast.

    Args:
        weight: `[out, in]`; may be dropped afterwards.
        bias: `[out]`, or None.
        dtype: how the weight is kept.

    Raises ConfigError for nf4 without bitsandbytes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: BaseDtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.stored_as: BaseDtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name, tensor in _PACK[dtype](weight).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight `[out, in]` in float32, unpacked at each call."""
        return self.unpacked(torch.float32)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out, in]` in `dtype`; not a copy where it is kept so."""
        packed = dict(self.named_buffers(recurse=False))
        return _UNPACK[self.stored_as](packed, (self.out_features, self.in_features)).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        return _FrozenProduct.apply(input, self)  # pyright: ignore[reportReturnType]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Follow a move to a device, but keep the data types, which `Module.to(dtype)` would change."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # pyright: ignore[reportArgumentType]
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b, whose backward pass unpacks W again, so that no unpacked copy of the base waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return functional.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


Packed = dict[str, Tensor]


def _pack_fp8(weight: Tensor) -> Packed:
    weight = weight.float()
    scale = (weight.abs().amax(1, keepdim=True) / _LARGEST_E4M3).clamp_min(torch.finfo(torch.float32).tiny)
    return {"stored": (weight / scale).to(torch.float8_e4m3fn), "scale": scale}


def _pack_nf4(weight: Tensor) -> Packed:
    stored, state = _bitsandbytes().quantize_4bit(weight.float(), quant_type="nf4", blocksize=_BLOCK)
    return {"stored": stored, "scale": state.absmax, "code": state.code}


def _unpack_nf4(packed: Packed, shape: tuple[int, int]) -> Tensor:
    functions = _bitsandbytes()
    state = functions.QuantState(
        absmax=packed["scale"], shape=torch.Size(shape), code=packed["code"], blocksize=_BLOCK, quant_type="nf4",
        dtype=torch.float32,
    )  # fmt: skip
    return functions.dequantize_4bit(packed["stored"], state)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "the run's base is kept in nf4, which needs bitsandbytes; install it: pip install 'lutetia[quantised]'"
        ) from error
    return functions


_PACK: dict[BaseDtype, Callable[[Tensor], Packed]] = {
    "float32": lambda weight: {"stored": weight.float()},
    "bfloat16": lambda weight: {"stored": weight.to(torch.bfloat16)},
    "fp8": _pack_fp8,
    "nf4": _pack_nf4,
}
_UNPACK: dict[BaseDtype, Callable[[Packed, tuple[int, int]], Tensor]] = {
    "float32": lambda packed, shape: packed["stored"],
    "bfloat16": lambda packed, shape: packed["stored"],
    "fp8": lambda packed, shape: packed["stored"].float() * packed["scale"],
    "nf4": _unpack_nf4,
}
