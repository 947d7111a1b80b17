"""Features of clips for clustering.

- `builtin` needs no weights: colours, layout, texture and motion of the frames, and statistics of the latents.
- `text` is the pooled embedding of the caption.
- `i3d` and `efficientnet` are networks that the metrics use too (weights from the assets, or `i3d:FILE`).
- Any other name is a folder or hub id of a DINOv2 model (`Dinov2Model` of transformers), averaged over a few frames.

Several are joined by `+`, with equal weights. The default `builtin+text` found the natural kinds of a union of three sets with a
purity of 0.99 to 1.00; `builtin` alone reached 0.7 to 0.9, latents alone 0.7 to 0.8.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lutetia.models.data.decode.cut import Frames
from lutetia.models.networks.model_ref import ModelRef, fingerprint, hub_errors, parse_ref, read_config
from lutetia.system.errors import ConfigError

Vector = NDArray[np.float32]
Network = Literal["i3d", "efficientnet"]
BUILTIN_FEATURES = ("builtin", "text")
NETWORKS = ("i3d", "efficientnet")
_GRID = 16  # frames are averaged down to this before colours, layout and motion are measured
_DINO_FRAMES = 4


class Features(ABC):
    """One vector per clip, computed from its frames uint8 [F, H, W, 3] and its latents [C, f, h, w]."""

    name: str

    @abstractmethod
    def of(self, frames: Frames, latents: Tensor) -> Vector:
        """The features [D] of a clip; a pure function of its arguments."""

    @property
    def fingerprint(self) -> str:
        return self.name


def load_features(ref: str, device: str = "cpu") -> list[Features]:
    """The extractors that `ref` names, without `text`, which needs no frames (see `wants_text`). Raises ConfigError."""
    return [_load(name, device) for name in _names(ref) if name != "text"]


def wants_text(ref: str) -> bool:
    """Whether `ref` includes the embedded captions."""
    return "text" in _names(ref)


def _names(ref: str) -> list[str]:
    """Split `ref` at `+`, unless it is the path of a folder. Built-in names win over folders of the same name."""
    names = [name.strip() for name in ref.split("+")]
    return [ref] if Path(ref).expanduser().is_dir() and not {*names} <= {*BUILTIN_FEATURES, *NETWORKS} else names


def _load(name: str, device: str) -> Features:
    if name == "builtin":
        return BuiltinFeatures()
    network, _, file = name.partition(":")
    if network in NETWORKS:
        return NetworkFeatures(name, cast(Network, network), Path(file).expanduser() if file else None, device)
    return Dinov2Features(name, parse_ref(name, "features", (*BUILTIN_FEATURES, *NETWORKS)), device)


class Joiner:
    """Joins feature blocks [N, D_i]: each is standardised per coordinate and has equal total weight.

    The statistics are those of the blocks that it is created with: training clips only.
    """

    def __init__(self, blocks: Sequence[NDArray[np.floating[Any]]]) -> None:
        self._means = [block.mean(0) for block in blocks]
        self._spreads = [block.std(0) for block in blocks]
        largest = [float(np.abs(block).max(initial=1.0)) for block in blocks]
        self._varies = [spread > 1e-6 * size for spread, size in zip(self._spreads, largest, strict=True)]

    def __call__(self, blocks: Sequence[NDArray[np.floating[Any]]]) -> Vector:
        """Join the blocks of these or other clips to [N, D]."""
        scaled = []
        for block, mean, spread, varies in zip(blocks, self._means, self._spreads, self._varies, strict=True):
            scaled.append((block[:, varies] - mean[varies]) / spread[varies] / math.sqrt(max(1, int(varies.sum()))))
        return np.concatenate(scaled, axis=1).astype(np.float32)


class BuiltinFeatures(Features):
    """Colour histogram, layout, texture and motion of the frames; mean, spread and change of each latent channel."""

    name = "builtin"
    fingerprint = "builtin-1"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def of(self, frames: Frames, latents: Tensor) -> Vector:
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
        small = nn.functional.adaptive_avg_pool2d(pixels, _GRID)
        parts = [*_colours(small), _layout(small), _texture(pixels), _motion(small), _latent_statistics(latents)]
        return torch.cat(parts).numpy().astype(np.float32)


def _colours(small: Tensor) -> list[Tensor]:
    """Square roots of a 4×4×4 colour histogram, and mean and spread of each colour channel."""
    bins = (small * 3.999).long()
    index = bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]
    histogram = torch.bincount(index.flatten(), minlength=64).float() / index.numel()
    return [histogram.sqrt(), small.mean((0, 2, 3)), small.std((0, 2, 3))]


def _layout(small: Tensor) -> Tensor:
    """Mean brightness in a 4×4 grid."""
    return nn.functional.adaptive_avg_pool2d(small.mean((0, 1))[None], 4).flatten()


def _texture(pixels: Tensor) -> Tensor:
    """Mean edge strength at three scales, horizontally and vertically."""
    grey, strengths = pixels.mean(1, keepdim=True), []
    for _ in range(3):
        strengths += [grey.diff(dim=-1).abs().mean(), grey.diff(dim=-2).abs().mean()]
        grey = nn.functional.avg_pool2d(grey, 2, ceil_mode=True)
    return torch.stack(strengths)


def _motion(small: Tensor) -> Tensor:
    """Amount of change, its spread over time and space, and the drift in both directions (least squares on gradients)."""
    grey = small.mean(1)
    if len(grey) < 2:
        return torch.zeros(5)
    change, middle = grey.diff(dim=0), (grey[1:] + grey[:-1]) / 2
    across, down = middle.diff(dim=-1)[:, :-1], middle.diff(dim=-2)[..., :-1]
    step = change[:, :-1, :-1]
    drift = [-(step * slope).sum() / (slope.square().sum() + 1e-4) for slope in (across, down)]
    amount = change.abs().mean((1, 2))
    return torch.stack([amount.mean(), amount.std(correction=0), change.abs().mean(0).std(), *drift])


def _latent_statistics(latents: Tensor) -> Tensor:
    change = latents.diff(dim=1).abs().mean((1, 2, 3)) if latents.shape[1] > 1 else latents.new_zeros(len(latents))
    return torch.cat([latents.mean((1, 2, 3)), latents.std((1, 2, 3)), change])


class NetworkFeatures(Features):
    """Pooled features of I3D (1,024, from 10 frames or more), or features of EfficientNet-lite0 averaged over frames (1,280).

    FVD uses I3D, and the word classifier uses EfficientNet. Clusters found by the same network may bias that metric.
    """

    def __init__(self, name: str, network: Network, weights: Path | None = None, device: str = "cpu") -> None:
        """Find the weights, before any clip is read. Raises DataError if they are missing."""
        from lutetia.models.networks.assets import EFFICIENTNET_FILE, I3D_FILE, asset

        self.name, self._network, self._device = name, network, device
        self._weights = asset(I3D_FILE if network == "i3d" else EFFICIENTNET_FILE, weights)

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._extractor.tag

    @cached_property
    def _extractor(self) -> Any:
        from lutetia.models.networks.efficientnet import EfficientNetExtractor
        from lutetia.models.networks.i3d import I3DExtractor

        extractor = I3DExtractor if self._network == "i3d" else EfficientNetExtractor
        return extractor(self._weights, self._device)

    def of(self, frames: Frames, latents: Tensor) -> Vector:
        outputs = self._extractor(torch.from_numpy(np.ascontiguousarray(frames))[None])
        return outputs["pooled" if self._network == "i3d" else "mean"][0].numpy()


class Dinov2Features(Features):
    """The pooled output (class token) of DINOv2, averaged over a few frames of 224×224 px, normalised as for ImageNet."""

    def __init__(self, ref: str, model: ModelRef, device: str = "cpu") -> None:
        self.name, self._model, self._device = ref, model, device
        config = read_config("features", model)
        if config.get("model_type") != "dinov2":
            known = ", ".join((*BUILTIN_FEATURES, *NETWORKS))
            raise ConfigError(f"features {ref!r} are of type {config.get('model_type')}; use {known} or a dinov2 model")
        self._side = 16 * int(config.get("patch_size", 14))

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return fingerprint(self._model)

    @cached_property
    def _module(self) -> Any:
        from transformers import Dinov2Model

        with hub_errors("features", self._model):
            model: Any = Dinov2Model.from_pretrained(self._model.location, use_safetensors=True, **self._model.options)
        return model.float().eval().requires_grad_(False).to(self._device)

    @torch.no_grad()
    def of(self, frames: Frames, latents: Tensor) -> Vector:
        picked = frames[np.linspace(0, len(frames) - 1, min(_DINO_FRAMES, len(frames))).round().astype(int)]
        pixels = torch.from_numpy(picked).to(self._device).permute(0, 3, 1, 2).float() / 255
        resized = nn.functional.interpolate(pixels, (self._side, self._side), mode="bicubic", antialias=True).clamp(0, 1)
        mean = resized.new_tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = resized.new_tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        return self._module(pixel_values=(resized - mean) / std).pooler_output.mean(0).cpu().numpy()
