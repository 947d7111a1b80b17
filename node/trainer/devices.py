"""Chooses the device and precision to train with, each with a reason."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from lutetia.models.device import Precision
from lutetia.system.errors import HardwareError


class DeviceMissing(HardwareError):
    """The device that the volunteer chose is not in this machine, or its driver does not run."""


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A card that torch reaches through its CUDA interface: of NVIDIA, or of AMD by ROCm.

    `capability`: (major, minor) of its streaming multiprocessors. `refused`: why this torch cannot compute on it; empty: it can.
    """

    name: str
    capability: tuple[int, int]
    refused: str = ""


@dataclass(frozen=True, slots=True)
class XpuDevice:
    """A card of Intel."""

    name: str
    bfloat16: bool = True


@dataclass(frozen=True, slots=True)
class Accelerators:
    """What torch can use besides the CPU; `cuda` and `xpu` by device number."""

    cuda: tuple[CudaDevice, ...] = ()
    mps: bool = False
    xpu: tuple[XpuDevice, ...] = ()

    @classmethod
    def seen(cls) -> Accelerators:
        """As torch reports them."""
        import torch

        cuda, xpu = [], []
        if torch.cuda.is_available():
            built_for = torch.cuda.get_arch_list()
            for number in range(torch.cuda.device_count()):
                capability = torch.cuda.get_device_capability(number)
                cuda.append(CudaDevice(torch.cuda.get_device_name(number), capability, missing_code(capability, built_for)))
        if torch.xpu.is_available():
            names = [torch.xpu.get_device_name(number) for number in range(torch.xpu.device_count())]
            xpu = [XpuDevice(name, torch.xpu.is_bf16_supported()) for name in names]
        return cls(tuple(cuda), torch.backends.mps.is_available(), tuple(xpu))


def missing_code(capability: tuple[int, int], built_for: Sequence[str]) -> str:
    """Why a build of torch has no machine code for a card of this capability; empty if it has, or if that is not known.

    Args:
        capability: (major, minor) of the card.
        built_for: `torch.cuda.get_arch_list()`: `sm_80` is code for 8.0 and later cards of the same major version, `compute_90`
            is compiled for any later card when it is first used. ROCm builds name their cards in other words.
    """
    words = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", word) for word in built_for]
    known = [(match[1], (int(match[2]), int(match[3]))) for match in words if match]
    if not known or any(version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in known):
        return ""
    oldest, newest = min(version for _, version in known), max(version for _, version in known)
    has = (
        f"SM {capability[0]}{capability[1]}, but this torch has code for SM {oldest[0]}{oldest[1]} to {newest[0]}{newest[1]} only"
    )
    return f"{has}; install a torch for this card"


def choose_device(wanted: str, seen: Accelerators) -> tuple[str, str]:
    """(device, reason) for `auto`, `cpu`, `mps`, `cuda`, `cuda:N`, `xpu` or `xpu:N`. `auto`: the first. Raises DeviceMissing."""
    if wanted == "auto":
        return all_devices(seen)[0]
    kind, _, number = wanted.partition(":")
    if kind in ("cuda", "xpu"):
        cards = seen.cuda if kind == "cuda" else seen.xpu
        if int(number or 0) >= len(cards):
            raise DeviceMissing(
                f"device {wanted} is set, but torch sees {len(cards)} {kind.upper()} devices; check the driver, or use cpu"
            )
        card = cards[int(number or 0)]
        if isinstance(card, CudaDevice) and card.refused:
            raise DeviceMissing(f"device {wanted} is set, but {card.name} has {card.refused}, or use cpu")
        return f"{kind}:{int(number or 0)}", f"{kind}:{int(number or 0)}: as set"
    if wanted == "mps" and not seen.mps:
        raise DeviceMissing("device mps is set, but torch sees no Apple GPU; use cpu")
    return wanted, f"{wanted}: as set"


def all_devices(seen: Accelerators) -> list[tuple[str, str]]:
    """(device, reason) of every device that is worth training on: all cards that torch can compute on, else the CPU."""
    cards = [(f"cuda:{number}", f"cuda:{number}: {card.name}") for number, card in enumerate(seen.cuda) if not card.refused]
    cards += [(f"xpu:{number}", f"xpu:{number}: {card.name}") for number, card in enumerate(seen.xpu)]
    if seen.mps and not cards:
        cards.append(("mps", "mps: Apple GPU"))
    if cards:
        return cards
    refused = f"{seen.cuda[0].name} has {seen.cuda[0].refused}" if seen.cuda else "no accelerator that torch can use"
    return [("cpu", f"cpu: {refused}")]


def choose_precision(device: str, wanted: str, seen: Accelerators) -> tuple[Precision, str]:
    """(dtype of the forward pass, reason); `device` as `choose_device` gave it."""
    kind, _, number = device.partition(":")
    match wanted:
        case "float32" | "bfloat16" | "float16":
            return wanted, f"{wanted}: as set"
        case _ if kind == "cuda":
            return _cuda_precision(*seen.cuda[int(number)].capability)
        case _ if kind == "xpu":
            if seen.xpu[int(number)].bfloat16:
                return "bfloat16", f"bfloat16: {seen.xpu[int(number)].name}"
            return "float32", f"float32: {seen.xpu[int(number)].name} has no bfloat16"
    return "float32", f"float32: {'CPU' if device == 'cpu' else device}"


def _cuda_precision(major: int, minor: int) -> tuple[Precision, str]:
    """bfloat16 came with SM 80. SM 70 and later multiply float16 in tensor cores, SM 61 at 1/64 of the rate of float32."""
    capability = f"CUDA SM {major}{minor}"
    if major >= 8:
        return "bfloat16", f"bfloat16: {capability}"
    if major == 7:
        return "float16", f"float16 with a scaled loss: {capability} has no bfloat16"
    return "float32", f"float32: {capability} has neither bfloat16 nor fast float16"


def use_device(device: str, most: int | None) -> None:
    """Work on `device` from now on, and take at most `most` bytes of it; None: all that is free.

    Another card's memory is not touched by what torch sets up. On the CPU the bytes are what this process allocates from now on
    (Linux). A device that is missing or fails is reported by whoever uses it.
    """
    import torch

    kind = device.partition(":")[0]
    with contextlib.suppress(RuntimeError, AssertionError):
        if kind in ("cuda", "xpu"):
            backend = torch.cuda if kind == "cuda" else torch.xpu
            if not backend.is_available():  # a torch without CUDA lacks even what sets the device
                return
            backend.set_device(device)
            if most is not None and hasattr(backend, "set_per_process_memory_fraction"):
                total = backend.get_device_properties(torch.device(device)).total_memory
                backend.set_per_process_memory_fraction(min(1.0, most / total), torch.device(device))
        elif kind == "mps" and most is not None:
            torch.mps.set_per_process_memory_fraction(min(1.0, most / torch.mps.recommended_max_memory()))
        elif kind == "cpu" and most is not None:
            _limit_process(most)


def _limit_process(most: int) -> None:
    """Let this process allocate `most` more bytes; beyond that torch reports that memory is short."""
    if sys.platform.startswith("linux"):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = psutil.Process().memory_info().data + most
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
