"""How much moves: the mean length of dense optical flow, in pixels per frame at the clips' own size. It has no better direction.

Farneback's flow from OpenCV (extra `metrics`, about 11 ms per 16-frame clip of 64 px on one core), or scikit-image's iterative
Lucas-Kanade where OpenCV is absent (20 times slower). Both find a uniform shift of 0.5 to 4 px within 1 %, but figures of one
must not be compared with figures of the other on real clips: the method stands in every report.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...system.errors import ConfigError
from .bootstrap import Figure, mean

Method = Literal["farneback", "ilk"]
_LUMA = torch.tensor([0.299, 0.587, 0.114])
logger = logging.getLogger("lutetia.models.metrics.motion")


def choose_method() -> Method:
    """The best method whose library is installed. Raises ConfigError when there is none."""
    if importlib.util.find_spec("cv2"):
        return "farneback"
    if importlib.util.find_spec("skimage"):
        logger.info("optical flow by scikit-image (iterative Lucas-Kanade): OpenCV is not installed, which is 20 times faster")
        return "ilk"
    raise ConfigError("no library for optical flow is installed; run: pip install 'lutetia[metrics]'")


class MotionExtractor:
    """Clips to statistics of their flow, for the cache of features."""

    def __init__(self, method: Method | None = None) -> None:
        self.method: Method = method or choose_method()
        self.tag = f"flow-{self.method}-1"

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """uint8 [N, F, H, W, 3] to {"speed": [N, 1]}, the mean flow length over pixels and pairs of frames."""
        return {"speed": torch.tensor([[self._speed(clip)] for clip in clips], dtype=torch.float32)}

    def _speed(self, clip: Tensor) -> float:
        grey = (clip.float() @ _LUMA).round().to(torch.uint8).numpy()
        pairs = zip(grey, grey[1:], strict=False)
        return float(np.mean([np.linalg.norm(flow(a, b, self.method), axis=-1).mean() for a, b in pairs]))


def flow(first: NDArray[np.uint8], second: NDArray[np.uint8], method: Method) -> NDArray[np.float32]:
    """Dense flow [H, W, 2] between two grey pictures uint8 [H, W]."""
    if method == "ilk":
        from skimage.registration import optical_flow_ilk

        return np.moveaxis(optical_flow_ilk(first / 255.0, second / 255.0, radius=5), 0, -1).astype(np.float32)
    cv2: Any = importlib.import_module("cv2")
    return cv2.calcOpticalFlowFarneback(
        first, second, None, pyr_scale=0.5, levels=3, winsize=11, iterations=3, poly_n=5, poly_sigma=1.1, flags=0
    )


def motion(speeds: Tensor, seeds: tuple[int, ...] = ()) -> Figure:
    """The mean over clips of `MotionExtractor`'s speed, px per frame."""
    return mean(speeds.flatten().numpy(), seeds=seeds)
