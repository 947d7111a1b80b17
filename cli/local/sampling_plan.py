"""With which device, data type and memory a mixture is sampled: what the user set, else what machine and mixture allow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lutetia.models.device import AUTO_DEVICE, Precision, PrecisionChoice
from lutetia.system.errors import UsageError

if TYPE_CHECKING:
    from lutetia.models.mixing.description import MixtureDocument
    from lutetia.protocol.schema.model.latent_spec import LatentSpec

SHARE_OF_FREE_MEMORY = 0.5
"""What experts may take; the rest is for activations and the autoencoder."""
LATENT_PIXELS_AT_ONCE = 32768
"""Clips are sampled together while they have no more latent pixels than this: about one clip of 480p and 81 frames."""
MOST_AT_ONCE = 8
LARGEST_UNTILED = 512 * 512
"""Pixels of a frame above which the autoencoder decodes in tiles."""


@dataclass(frozen=True)
class SamplingPlan:
    """`experts_in_memory` None: all. `tiling`: whether the autoencoder decodes in tiles. `reason`: why, for people."""

    device: str
    dtype: Precision
    experts_in_memory: int | None
    tiling: bool
    reason: str = ""


def bucket_of(latent: LatentSpec, size: str | None, frames: int | None) -> LatentSpec:
    """The bucket of a mixture that `--size` (width x height in pixels) and `--frames` ask for; what is None fits any.

    Raises UsageError with the list of buckets when none agrees.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", size or "", re.IGNORECASE)
    if size is not None and match is None:
        raise UsageError(f"{size[:40]} is no size; write width and height in pixels, for instance 832x480")
    asked = (int(match[1]), int(match[2])) if match else None
    for bucket in latent.of_buckets:
        if asked in (None, (bucket.pixel_width, bucket.pixel_height)) and frames in (None, bucket.pixel_frames):
            return bucket
    known = ", ".join(f"{each.pixel_width}x{each.pixel_height} with {each.pixel_frames} frames" for each in latent.of_buckets)
    wanted = " ".join([*([f"--size {size}"] if size else []), *([f"--frames {frames}"] if frames else [])])
    raise UsageError(f"the run trained on no clips of {wanted}; it has {known}")


def plan_sampling(
    document: MixtureDocument,
    *,
    device: str = "auto",
    dtype: PrecisionChoice = "auto",
    experts_in_memory: int | None = None,
    tiling: bool | None = None,
) -> SamplingPlan:
    """The plan for this machine. What is `auto` or None is chosen here.

    Raises:
        UsageError: `device` is no name of a device.
        HardwareError: this machine lacks it.
    """
    from lutetia.node.trainer.devices import Accelerators, choose_device, choose_precision

    if not re.fullmatch(AUTO_DEVICE, device):
        raise UsageError(f"there is no device {device!r}; use auto, cpu, mps, cuda, cuda:N, xpu or xpu:N")
    seen = Accelerators.seen()
    place, why_place = choose_device(device, seen)
    precision, why_precision = choose_precision(place, dtype, seen)
    reasons = [f"device {why_place}", f"dtype {why_precision.replace(' with a scaled loss', '')}"]
    if experts_in_memory is None:
        experts_in_memory, why = experts_that_fit(expert_sizes(document, precision), free_memory(place) - base_bytes(document))
        reasons.append(why)
    if tiling is None:
        tiling = document.latent.pixel_height * document.latent.pixel_width > LARGEST_UNTILED
    if tiling:
        reasons.append("decoding in tiles")
    return SamplingPlan(place, precision, experts_in_memory, tiling, "; ".join(reasons))


def expert_sizes(document: MixtureDocument, precision: Precision) -> list[int]:
    """Bytes of each expert of the mixture in memory. Its files are in float32."""
    folders = [expert.folder for expert in document.experts if expert.folder]
    stored = [sum(ref.size for name, ref in document.files.items() if name.startswith(f"{folder}/")) for folder in folders]
    return [size if precision == "float32" else size // 2 for size in stored]


def base_bytes(document: MixtureDocument) -> int:
    """Bytes that the base of a mixture of adapters takes, at most: those of its files."""
    adapter = document.network and document.network.adapter
    return adapter.base.size if adapter else 0


def experts_that_fit(sizes: list[int], free: int) -> tuple[int | None, str]:
    """(most experts to hold in `free` bytes of memory, reason); None: all of them. At least one."""
    room, count = free * SHARE_OF_FREE_MEMORY, 0
    for size in sorted(sizes, reverse=True):
        room -= size
        if room < 0:
            break
        count += 1
    if count == len(sizes):
        return None, f"all {count} experts in memory"
    return max(1, count), f"{max(1, count)} of {len(sizes)} experts in memory: {free / 1e9:.1f} GB are free"


def free_memory(device: str) -> int:
    """Bytes that are free on the device now."""
    import psutil
    import torch

    kind = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.partition(":")[0])
    return psutil.virtual_memory().available if kind is None else kind.mem_get_info(torch.device(device))[0]


def clips_at_once(latent: LatentSpec) -> int:
    """How many clips are sampled together by default."""
    return max(1, min(MOST_AT_ONCE, LATENT_PIXELS_AT_ONCE // (latent.frames * latent.height * latent.width)))
