"""I3D (Carreira & Zisserman 2017, RGB, Kinetics-400): FVD is defined on its logits (Unterthiner et al. 2018).

The layers are those of DeepMind's `kinetics-i3d` under their TensorFlow names, with TensorFlow's "SAME" padding: the output has
ceil(input / stride) entries, and the larger half of an odd padding goes behind. Max-pooling pads with minus infinity. Batch
normalisation has no scale and epsilon 1e-3, and is folded into the convolutions here. The last pooling is 2x7x7 "VALID".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutetia.models.metrics.settings import Precision
from lutetia.models.networks.assets import I3D_FILE, asset, file_digest, load_tensors
from lutetia.system.errors import DataError, IntegrityError

INPUT_SIZE = 224
MIN_FRAMES = 10  # as in other FVD code: ceil(frames / 8) steps reach the last pooling, which needs two
EPSILON = 1e-3
_MIXED_3 = ("Mixed_3b", "Mixed_3c")
_MIXED_4 = ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f")
_MIXED_5 = ("Mixed_5b", "Mixed_5c")


class Embedding(NamedTuple):
    """`logits` [N, 400], averaged over time: what FVD compares. `pooled` [N, 1024]: the layer before, averaged over time."""

    logits: Tensor
    pooled: Tensor


def same_padding(size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """TensorFlow's "SAME" padding in the order of `torch.nn.functional.pad` (last axis first, before then after)."""
    pads: list[int] = []
    for length, window, step in zip(reversed(size), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-length // step) - 1) * step + window - length, 0)
        pads += [total // 2, total - total // 2]
    return pads


def max_pool_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """`tf.nn.max_pool3d(..., padding="SAME")` of [N, C, T, H, W]."""
    padded = F.pad(x, same_padding(tuple(x.shape[2:]), kernel, stride), value=float("-inf"))
    return F.max_pool3d(padded, kernel, stride)


class Unit(nn.Module):
    """Convolution, batch normalisation and ReLU; the normalisation is folded into weight and bias."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scope: str, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        weight = _take(tensors, f"{scope}/w").double()
        scale = torch.rsqrt(_take(tensors, f"{scope}/var").double() + EPSILON)
        bias = _take(tensors, f"{scope}/beta").double() - _take(tensors, f"{scope}/mean").double() * scale
        self.register_buffer("weight", (weight * scale.view(-1, 1, 1, 1, 1)).float())
        self.register_buffer("bias", bias.float())
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        kernel = tuple(self.weight.shape[2:])
        padded = F.pad(x, same_padding(tuple(x.shape[2:]), kernel, self.stride)) if max(kernel) > 1 else x
        return F.relu(F.conv3d(padded, self.weight, self.bias, self.stride))


class Mixed(nn.Module):
    """An Inception block: 1x1, 1x1 then 3x3, 1x1 then 3x3 again, and max-pool then 1x1, side by side."""

    def __init__(self, tensors: Mapping[str, Tensor], scope: str) -> None:
        super().__init__()
        # the original checkpoint names this convolution 0a in this block only, and 0b in all others
        second = "Conv3d_0a_3x3" if scope == "Mixed_5b" else "Conv3d_0b_3x3"
        self.branch_0 = Unit(tensors, f"{scope}/Branch_0/Conv3d_0a_1x1")
        self.branch_1 = nn.Sequential(*(Unit(tensors, f"{scope}/Branch_1/{n}") for n in ("Conv3d_0a_1x1", "Conv3d_0b_3x3")))
        self.branch_2 = nn.Sequential(*(Unit(tensors, f"{scope}/Branch_2/{n}") for n in ("Conv3d_0a_1x1", second)))
        self.branch_3 = Unit(tensors, f"{scope}/Branch_3/Conv3d_0b_1x1")

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(pooled)], dim=1)


class I3D(nn.Module):
    """The whole network, for inference: [N, 3, T, 224, 224] in [-1, 1], T >= 10, to an `Embedding`."""

    logits_weight: Tensor
    logits_bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.conv_1a = Unit(tensors, "Conv3d_1a_7x7", (2, 2, 2))
        self.conv_2b = Unit(tensors, "Conv3d_2b_1x1")
        self.conv_2c = Unit(tensors, "Conv3d_2c_3x3")
        self.mixed_3 = nn.Sequential(*(Mixed(tensors, name) for name in _MIXED_3))
        self.mixed_4 = nn.Sequential(*(Mixed(tensors, name) for name in _MIXED_4))
        self.mixed_5 = nn.Sequential(*(Mixed(tensors, name) for name in _MIXED_5))
        self.register_buffer("logits_weight", _take(tensors, "Logits/Conv3d_0c_1x1/w"))
        self.register_buffer("logits_bias", _take(tensors, "Logits/Conv3d_0c_1x1/b"))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Embedding:
        if x.shape[2] < MIN_FRAMES:
            raise DataError(f"a clip of {x.shape[2]} frames is too short for I3D, which needs {MIN_FRAMES}; make longer clips")
        x = max_pool_same(self.conv_1a(x), (1, 3, 3), (1, 2, 2))
        x = max_pool_same(self.conv_2c(self.conv_2b(x)), (1, 3, 3), (1, 2, 2))
        x = max_pool_same(self.mixed_3(x), (3, 3, 3), (2, 2, 2))
        x = max_pool_same(self.mixed_4(x), (2, 2, 2), (2, 2, 2))
        x = F.avg_pool3d(self.mixed_5(x), (2, 7, 7), (1, 1, 1))
        logits = F.conv3d(x, self.logits_weight, self.logits_bias)
        return Embedding(logits.mean(dim=(2, 3, 4)), x.mean(dim=(2, 3, 4)))


def preprocess(clips: Tensor) -> Tensor:
    """uint8 [N, F, H, W, 3] to [N, 3, F, 224, 224] in [-1, 1], bilinear with half-pixel centres and no antialiasing.

    StyleGAN-V and later torch implementations do the same; the first implementation used the corner-aligned grid of TensorFlow 1.
    """
    count, frames, height, width, _ = clips.shape
    flat = clips.reshape(count * frames, height, width, 3).permute(0, 3, 1, 2).float()
    if (height, width) != (INPUT_SIZE, INPUT_SIZE):
        flat = F.interpolate(flat, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
    return (flat / 127.5 - 1).reshape(count, frames, 3, INPUT_SIZE, INPUT_SIZE).transpose(1, 2)


class I3DExtractor:
    """Clips to I3D embeddings. `tag` names network, weights and preprocessing, for the cache of features."""

    def __init__(self, path: Path | None = None, device: str = "cpu", batch: int = 4, precision: Precision = "float32") -> None:
        """Load the weights.

        Args:
            path: a file in the layout of the asset; None: the asset.
            device: cpu, cuda or cuda:N.
            batch: clips per forward pass.
            precision: bfloat16 takes a third of the time on processors that multiply it (AMX). Its features differ and have
                their own tag; its figures agree with those of float32 to about a per cent only.

        Raises DataError or IntegrityError.
        """
        weights = asset(I3D_FILE, path)
        exact = precision == "float32"
        self.tag = f"i3d-logits-pooled/half-pixel-{INPUT_SIZE}/{file_digest(weights)}" + ("" if exact else f"/{precision}")
        self.precision: Precision = precision
        # channels last takes 0.8 s instead of 1.4 s per clip of 16 frames on one core, and agrees to 1e-5
        self.network = I3D(load_tensors(weights)).to(device=device)
        for unit in (module for module in self.network.modules() if isinstance(module, Unit)):
            unit.weight = unit.weight.contiguous(memory_format=torch.channels_last_3d)
        self.device, self.batch = device, batch

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """uint8 [N, F, H, W, 3] to {"logits": [N, 400], "pooled": [N, 1024]}, float32 on the CPU.

        Raises DataError for clips of fewer than 10 frames.
        """
        chunks = (preprocess(chunk.to(self.device)) for chunk in clips.split(self.batch))
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16"):
            parts = [self.network(chunk.contiguous(memory_format=torch.channels_last_3d)) for chunk in chunks]
        return {name: torch.cat([getattr(part, name).float().cpu() for part in parts]) for name in Embedding._fields}


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise IntegrityError(f"these are not the weights of I3D: {name} is missing; use {I3D_FILE} or a file of the same layout")
    return tensors[name]
