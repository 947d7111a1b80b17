"""Chooses the device and precision to train with, each with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lutetia.system.errors import HardwareError

Precision = Literal["float32", "bfloat16"]


class DeviceMissing(HardwareError):
    """The device that the volunteer chose is not in this machine, or its driver does not run."""


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """`capability`: (major, minor) of its streaming multiprocessors."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Accelerators:
    """What torch can use besides the CPU; `cuda` by device number."""

    cuda: tuple[CudaDevice, ...] = ()
    mps: bool = False

    @classmethod
    def seen(cls) -> Accelerators:
        """As torch reports them."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [CudaDevice(torch.cuda.get_device_name(n), torch.cuda.get_device_capability(n)) for n in range(count)]
        return cls(tuple(devices), torch.backends.mps.is_available())


def choose_device(wanted: str, seen: Accelerators) -> tuple[str, str]:
    """(device, reason) for `auto`, `cpu`, `mps`, `cuda` or `cuda:N`. Raises DeviceMissing."""
    if wanted == "auto":
        if seen.cuda:
            return "cuda:0", f"cuda:0: {seen.cuda[0].name}"
        return ("mps", "mps: Apple GPU") if seen.mps else ("cpu", "cpu: no accelerator that torch can use")
    if wanted.startswith("cuda"):
        number = int(wanted.partition(":")[2] or 0)
        if number >= len(seen.cuda):
            raise DeviceMissing(
                f"device {wanted} is set, but torch sees {len(seen.cuda)} CUDA devices; check the driver, or use cpu"
            )
        return f"cuda:{number}", f"cuda:{number}: as set"
    if wanted == "mps" and not seen.mps:
        raise DeviceMissing("device mps is set, but torch sees no Apple GPU; use cpu")
    return wanted, f"{wanted}: as set"


def choose_precision(device: str, wanted: str, seen: Accelerators) -> tuple[Precision, str]:
    """(dtype of the forward pass, reason); `device` as `choose_device` gave it."""
    if wanted == "float32":
        return "float32", "float32: as set"
    if wanted == "bfloat16":
        return "bfloat16", "bfloat16: as set"
    if device.startswith("cuda"):
        major, minor = seen.cuda[int(device.partition(":")[2])].capability
        capability = f"CUDA SM {major}{minor}"
        if major >= 8:
            return "bfloat16", f"bfloat16: {capability}"
        return "float32", f"float32: {capability} has no bfloat16"
    return "float32", f"float32: {'CPU' if device == 'cpu' else device}"
