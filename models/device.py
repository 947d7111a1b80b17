"""The types of the settings that name a device and a precision, and what depends on the kind of device. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

if TYPE_CHECKING:
    import torch

Device = Annotated[str, Field(pattern=r"^(cpu|mps|(cuda|xpu)(:\d+)?)$", description="cpu, mps, cuda, cuda:N, xpu or xpu:N")]
AUTO_DEVICE = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"
"""Pattern of a setting that also takes `auto`."""

Precision = Literal["float32", "bfloat16", "float16"]
"""Data type of a forward pass in training; weights and moments stay in float32. float16 is trained with a scaled loss."""

PrecisionChoice = Literal["auto", "float32", "bfloat16", "float16"]


def free_cached_memory(device: str) -> None:
    """Give memory that torch keeps for later tensors back to the device; `device` in torch's words."""
    import torch

    kind = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}.get(device.partition(":")[0])
    if kind is not None:
        kind.empty_cache()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products of bfloat16 are worth while there: not on a CPU, and not on NVIDIA's cards before SM 80."""
    import torch

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return device.type != "cpu"
