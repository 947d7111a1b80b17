"""Latents: an autoencoder turns frames into latents, which the experts learn to denoise, and back.

A reference is `pixels` (the frames themselves), `builtin:demo` (the small autoencoder in the package), or a folder or hub id of a
diffusers autoencoder: per frame (AutoencoderTiny, AutoencoderKL) or of videos (`VIDEO`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lutetia.models.networks.model_ref import ModelRef, fingerprint, hub_errors, parse_ref, read_config
from lutetia.models.networks.video_autoencoders import ltx_ratios
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import ConfigError

BUILTIN_LATENTS = ("builtin:demo", "pixels")
PER_FRAME = ("AutoencoderTiny", "AutoencoderKL")
VIDEO = (
    "AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX", "AutoencoderKLMochi",
)  # fmt: skip
_MIX_FRAMES = ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo")
_FRAMES_AT_ONCE = 64


class Latents(ABC):
    """Frames uint8 [N, F, H, W, 3] to latents float32 [N, C, f, h, w] and back. Weights are loaded on first use.

    After `normalise`, latents are (raw - mean) / std, otherwise raw.
    """

    def __init__(self, ref: str, device: str = "cpu") -> None:
        self.ref, self.device = ref, device
        self._frames_at_once = _FRAMES_AT_ONCE
        self._mean: Tensor | None = None
        self._std: Tensor | None = None

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> Latents:
        """Use latents (raw - mean) / std from now on, with one value per channel; empty sequences: raw. Returns self."""
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(tuple(mean), device=self.device).view(shape) if len(mean) else None
        self._std = torch.tensor(tuple(std), device=self.device).view(shape) if len(std) else None
        return self

    @torch.no_grad()
    def encode(self, frames: NDArray[np.uint8] | Tensor) -> Tensor:
        """Frames uint8 [N, F, H, W, 3] to latents on the CPU. Raises ConfigError if the autoencoder does not take this shape."""
        clips = torch.as_tensor(frames)
        self.shape_of(clips.shape[1], clips.shape[2], clips.shape[3])
        return self.encode_pictures(clips.to(self.device).movedim(-1, 1).float() / 127.5 - 1).cpu()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, F, H, W] in -1..1 on the autoencoder's device to latents there, in float32."""
        raw = self._encode(pictures).float()
        if self._mean is not None and self._std is not None:
            raw = (raw - self._mean) / self._std
        return raw

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Latents [N, C, f, h, w], as from `encode`, to frames uint8 [N, F, H, W, 3]."""
        pictures = self.decode_pictures(latents)
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()

    @torch.no_grad()
    def decode_pictures(self, latents: Tensor) -> Tensor:
        """The same frames unrounded, as diffusers' VideoProcessor takes them: float32 [N, 3, F, H, W] in about -1..1."""
        raw = latents.to(self.device).float()
        if self._mean is not None and self._std is not None:
            raw = raw * self._std + self._mean
        return self._decode(raw).float()

    @abstractmethod
    def shape_of(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape (C, f, h, w) of the latents of one clip. Raises ConfigError if the autoencoder does not take this size."""

    @property
    def fingerprint(self) -> str:
        """A string that changes with the autoencoder: a part of the keys of the cache."""
        return self.ref

    @property
    def shipped_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) per channel that the models of this autoencoder were trained with; None if it ships none."""
        return None

    @property
    def begins_with_picture(self) -> bool:
        """Whether the first latent frame of a clip is that of its first picture alone, so that a picture can begin a clip."""
        return True

    @property
    def module(self) -> nn.Module | None:
        """The diffusers autoencoder, for the `vae` folder of a pipeline; None for pixels."""
        return None

    def tile(self) -> None:
        """Decode with less memory from now on: frame by frame, large pictures in tiles, whose seams get slightly other pixels."""
        self._frames_at_once = 1

    @abstractmethod
    def _encode(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, F, H, W] in -1..1 to raw latents."""

    @abstractmethod
    def _decode(self, raw: Tensor) -> Tensor:
        """Raw latents to pictures [N, 3, F, H, W] in about -1..1."""


def load_latents(ref: str, spec: LatentSpec | None = None, *, device: str = "cpu", hub: bool = True) -> Latents:
    """Load the autoencoder that `ref` names.

    Args:
        ref: pixels, builtin:demo, a folder or a hub id.
        spec: normalise the latents by its statistics; None: raw latents.
        device: cpu, mps, cuda, cuda:N, xpu or xpu:N.
        hub: whether a hub id may be downloaded; otherwise only what was downloaded before is used.

    Raises ConfigError if there is no such autoencoder, or if its class is not supported.
    """
    if ref == "pixels":
        latents: Latents = PixelLatents(ref, device)
    elif ref == "builtin:demo":
        latents = AutoencoderLatents(ref, ModelRef(ref, str(demo_autoencoder())), device)
    elif ref.startswith("builtin:"):
        raise ConfigError(f"there are no latents {ref!r}; use {', '.join(BUILTIN_LATENTS)}, a folder or owner/name")
    else:
        latents = AutoencoderLatents(ref, parse_ref(ref, "latents", BUILTIN_LATENTS, hub), device)
    if spec is not None:
        latents.normalise(spec.mean, spec.std)
    return latents


def component_latents(module: Any, spec: LatentSpec, *, device: str = "cpu") -> Latents:
    """Latents by an autoencoder of diffusers that is loaded already, in its own dtype, with the statistics of `spec`."""
    return AutoencoderLatents("vae", ModelRef("vae", "vae"), device, module).normalise(spec.mean, spec.std)


def demo_autoencoder() -> Path:
    """The folder of the autoencoder in the package."""
    return Path(__file__).parents[1] / "weights" / "demo_autoencoder"


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Suppress warnings of `logger`: diffusers warns of unknown config entries, such as the statistics of the latents."""
    chosen = logging.getLogger(logger)
    before = chosen.level
    chosen.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chosen.setLevel(before)


class PixelLatents(Latents):
    """No autoencoder: three channels in -1..1."""

    def shape_of(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return 3, frames, height, width

    def _encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def _decode(self, raw: Tensor) -> Tensor:
        return raw


class AutoencoderLatents(Latents):
    """A diffusers autoencoder: `module`, or the one that `model` refers to."""

    def __init__(self, ref: str, model: ModelRef, device: str = "cpu", module: Any = None) -> None:
        super().__init__(ref, device)
        self._model = model
        self._video_lock = threading.Lock()
        self._config = read_config("latents", model) if module is None else dict(module.config)
        self.class_name = str(self._config.get("_class_name")) if module is None else type(module).__name__
        if module is not None:
            vars(self).update(module=module)
        if self.class_name not in PER_FRAME + VIDEO:
            known = ", ".join(PER_FRAME + VIDEO)
            raise ConfigError(f"latents {ref!r} are of class {self.class_name}, which is not supported; use one of {known}")

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return fingerprint(self._model)

    @cached_property
    def module(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        import diffusers

        with hub_errors("latents", self._model), _quiet("diffusers.configuration_utils"):
            model = getattr(diffusers, self.class_name).from_pretrained(
                self._model.location, use_safetensors=True, low_cpu_mem_usage=False, **self._model.options
            )
        return model.float().eval().requires_grad_(False).to(self.device)

    @property
    def shipped_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """From its config; of LTX, from its weights. Autoencoders of single pictures ship none, unless their config says so."""
        mean, std, scale = self._config.get("latents_mean"), self._config.get("latents_std"), 1.0
        if self.class_name == "AutoencoderKLLTXVideo":
            mean, std = self.module.latents_mean.tolist(), self.module.latents_std.tolist()
        if self.class_name in VIDEO:
            scale = float(self._config.get("scaling_factor") or 1.0)
            if not mean or not std:
                mean, std = [0.0] * self._channels(), [1.0] * self._channels()
        return (tuple(mean), tuple(value / scale for value in std)) if mean and std else None

    @property
    def begins_with_picture(self) -> bool:
        """Those of CogVideoX and HunyuanVideo normalise over all frames."""
        if self.class_name == "AutoencoderKLLTXVideo":
            return bool(self._config.get("encoder_causal", True))
        return self.class_name not in _MIX_FRAMES

    def shape_of(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        space, time = self._factors()
        if height % space or width % space:
            raise ConfigError(
                f"latents {self.ref!r} need height and width in multiples of {space}, not {height}×{width}; change the clip size"
            )
        if (frames - 1) % time:
            near = max(1, round((frames - 1) / time)) * time + 1
            raise ConfigError(f"latents {self.ref!r} need {time}n+1 frames, not {frames}; use {near} frames")
        return self._channels(), (frames - 1) // time + 1, height // space, width // space

    def tile(self) -> None:
        super().tile()
        if self.class_name != "AutoencoderTiny":  # its tiling fails on pictures smaller than a tile
            self.module.enable_tiling()

    def _factors(self) -> tuple[int, int]:
        """Pixels (of a side) and frames per latent."""
        config = self._config
        match self.class_name:
            case "AutoencoderTiny":
                return 2 ** (len(config.get("encoder_block_out_channels", "4444")) - 1), 1
            case "AutoencoderKL":
                return 2 ** (len(config.get("block_out_channels", "1")) - 1), 1
            case "AutoencoderKLWan":
                stages = config.get("temperal_downsample", [False, True, True])  # diffusers spells it so
                patch = config.get("patch_size") or 1
                return 2 ** len(stages) * patch, 2 ** sum(stages)
            case "AutoencoderKLLTXVideo":
                return ltx_ratios(config)
            case "AutoencoderKLCogVideoX":
                return 2 ** (len(config.get("block_out_channels", "8888")) - 1), config.get("temporal_compression_ratio", 4)
            case "AutoencoderKLMochi":
                return math.prod(config.get("spatial_expansions", (2, 2, 2))), math.prod(
                    config.get("temporal_expansions", (1, 2, 3))
                )
            case _:
                return config.get("spatial_compression_ratio", 8), config.get("temporal_compression_ratio", 4)

    def _channels(self) -> int:
        return int(self._config.get("z_dim" if self.class_name == "AutoencoderKLWan" else "latent_channels", 16))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def _encode(self, pictures: Tensor) -> Tensor:
        pictures = pictures.to(self._dtype)
        if self.class_name in VIDEO:
            with self._video_lock:  # the module stores features of the previous frames
                return torch.cat([self.module.encode(clip).latent_dist.mode() for clip in pictures.split(1)])
        count, frames = len(pictures), pictures.transpose(1, 2).flatten(0, 1)
        parts = [self.module.encode(part) for part in frames.split(self._frames_at_once)]
        raw = torch.cat([part.latents if self.class_name == "AutoencoderTiny" else part.latent_dist.mode() for part in parts])
        return raw.unflatten(0, (count, -1)).transpose(1, 2)

    def _decode(self, raw: Tensor) -> Tensor:
        raw = raw.to(self._dtype)
        if self.class_name in VIDEO:
            with self._video_lock:
                return torch.cat([self.module.decode(clip, **self._decoder_time(raw)).sample for clip in raw.split(1)])
        count, latents = len(raw), raw.transpose(1, 2).flatten(0, 1)
        pictures = torch.cat([self.module.decode(part).sample for part in latents.split(self._frames_at_once)])
        return pictures.unflatten(0, (count, -1)).transpose(1, 2)

    def _decoder_time(self, raw: Tensor) -> dict[str, Tensor]:
        """LTX from 0.9.1 on tells its decoder how noisy the latents are: not at all, as its pipeline does by default."""
        return {"temb": raw.new_zeros(1)} if self._config.get("timestep_conditioning") else {}
