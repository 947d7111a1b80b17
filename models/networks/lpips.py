"""LPIPS v0.1 with AlexNet (Zhang et al. 2018): the perceptual distance of two pictures, for instance before and after an
autoencoder, or of two clips of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutetia.models.networks.assets import LPIPS_FILE, asset, load_tensors
from lutetia.system.errors import DataError, IntegrityError

# stride, padding, max-pool before: AlexNet's five convolutions
_LAYERS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Pictures in [-1, 1], [N, 3, H, W] twice, H and W >= 64 or so, to distances [N]."""

    shift: Tensor
    scale: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        missing = next(
            (n for k in range(5) for n in (f"conv{k}.weight", f"conv{k}.bias", f"lin{k}.weight") if n not in tensors), None
        )
        if missing:
            raise IntegrityError(f"these weights are not LPIPS's: {missing} is missing; use {LPIPS_FILE}")
        self.tensors = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(value, False) for name, value in tensors.items()})
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, path: Path | None = None) -> Lpips:
        """The asset's weights, or those of `path`. Raises DataError or IntegrityError."""
        return cls(load_tensors(asset(LPIPS_FILE, path)))

    @torch.inference_mode()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if first.shape != second.shape:
            raise DataError(f"LPIPS compares pictures of one shape, not {list(first.shape)} and {list(second.shape)}; resize one")
        total = torch.zeros(len(first), device=first.device)
        for layer, (a, b) in enumerate(zip(self._features(first), self._features(second), strict=True)):
            apart = (_normalised(a) - _normalised(b)) ** 2
            total += F.conv2d(apart, self.tensors[f"lin{layer}_weight"]).mean(dim=(1, 2, 3))
        return total

    def _features(self, pictures: Tensor) -> list[Tensor]:
        x, found = (pictures - self.shift) / self.scale, []
        for layer, (stride, padding, pool) in enumerate(_LAYERS):
            x = F.max_pool2d(x, 3, 2) if pool else x
            weight, bias = self.tensors[f"conv{layer}_weight"], self.tensors[f"conv{layer}_bias"]
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            found.append(x)
        return found


def _normalised(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)
