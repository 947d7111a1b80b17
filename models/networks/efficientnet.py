"""EfficientNet-lite0 (ImageNet): features of single frames, independent of I3D, CLIP and the text encoders.

The lite variants have ReLU6 and no squeeze-and-excitation. Convolutions pad like TensorFlow's "SAME"; batch normalisation has
epsilon 1e-3. The tensors have the names of `efficientnet_lite_pytorch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutetia.models.networks.assets import EFFICIENTNET_FILE, asset, file_digest, load_tensors
from lutetia.models.networks.clip import spread
from lutetia.models.networks.i3d import same_padding
from lutetia.system.errors import IntegrityError

INPUT_SIZE = 224
EPSILON = 1e-3
# (repeats, stride of the first block) of each stage; kernel sizes and widths follow from the weights
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))


class _Unit(nn.Module):
    """Convolution with the normalisation folded in, followed by ReLU6 if `active`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], conv: str, norm: str, stride: int = 1, active: bool = True) -> None:
        super().__init__()
        weight, gain, beta, mean, variance = (
            _take(tensors, name).double()
            for name in (f"{conv}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")))
        )
        scale = gain * torch.rsqrt(variance + EPSILON)
        self.register_buffer("weight", (weight * scale.view(-1, 1, 1, 1)).float().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", (beta - mean * scale).float())
        self.stride, self.active = stride, active

    def forward(self, x: Tensor) -> Tensor:
        window, stride = self.weight.shape[2], self.stride
        padded = F.pad(x, same_padding(tuple(x.shape[2:]), (window, window), (stride, stride))) if window > 1 else x
        groups = x.shape[1] // self.weight.shape[1]
        y = F.conv2d(padded, self.weight, self.bias, stride, groups=groups)
        return F.relu6(y) if self.active else y


class _Block(nn.Module):
    """Expand, depthwise, project; the input is added if the shapes match."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, stride: int) -> None:
        super().__init__()
        units = [_Unit(tensors, f"{name}._depthwise_conv", f"{name}._bn1", stride)]
        if f"{name}._expand_conv.weight" in tensors:
            units.insert(0, _Unit(tensors, f"{name}._expand_conv", f"{name}._bn0"))
        self.units = nn.Sequential(*units, _Unit(tensors, f"{name}._project_conv", f"{name}._bn2", active=False))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.units(x)
        return x + y if self.stride == 1 and x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Frames [N, 3, 224, 224], scaled by (x - 127) / 128, to features [N, 1280]; `classify` gives ImageNet logits [N, 1000]."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        strides = [stride if repeat == 0 else 1 for repeats, stride in STAGES for repeat in range(repeats)]
        blocks = [_Block(tensors, f"_blocks.{number}", stride) for number, stride in enumerate(strides)]
        self.trunk = nn.Sequential(_Unit(tensors, "_conv_stem", "_bn0", stride=2), *blocks, _Unit(tensors, "_conv_head", "_bn1"))
        self.head = nn.Linear(1280, 1000)
        self.head.load_state_dict({"weight": _take(tensors, "_fc.weight"), "bias": _take(tensors, "_fc.bias")})
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self(x))


class EfficientNetExtractor:
    """Clips to mean and standard deviation of the features of evenly spaced frames."""

    def __init__(self, path: Path | None = None, device: str = "cpu", frames: int = 8, batch: int = 16) -> None:
        """Load the weights.

        Args:
            path: a file in the layout of the asset; None: the asset.
            device: cpu, cuda or cuda:N.
            frames: evenly spaced frames of each clip that are used.
            batch: frames per forward pass.

        Raises DataError or IntegrityError.
        """
        weights = asset(EFFICIENTNET_FILE, path)
        self.tag = f"efficientnet-lite0-mean-deviation/{frames}/{file_digest(weights)}"
        self.network = EfficientNetLite0(load_tensors(weights)).to(device)
        self.device, self.frames, self.batch = device, frames, batch

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """uint8 [N, F, H, W, 3] to {"mean": [N, 1280], "deviation": [N, 1280]}, float32 on the CPU."""
        chosen = clips[:, spread(clips.shape[1], self.frames)]
        flat = chosen.flatten(0, 1)
        features = torch.cat([self.network(preprocess(part.to(self.device))).cpu() for part in flat.split(self.batch)])
        rows = features.unflatten(0, chosen.shape[:2])
        return {"mean": rows.mean(dim=1), "deviation": rows.std(dim=1, unbiased=False)}


def preprocess(frames: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to [N, 3, 224, 224], bilinear, (x - 127) / 128."""
    pictures = frames.permute(0, 3, 1, 2).float()
    resized = F.interpolate(pictures, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False, antialias=True)
    return (resized - 127) / 128


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise IntegrityError(f"these are not the weights of EfficientNet-lite0: {name} is missing; use {EFFICIENTNET_FILE}")
    return tensors[name]
