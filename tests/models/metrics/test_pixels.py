"""Metrics on pixels: optical flow, EfficientNet, and the sets of clips that they take."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.motion import MotionExtractor, motion
from lutetia.models.networks.assets import EFFICIENTNET_FILE
from lutetia.models.networks.efficientnet import EfficientNetExtractor
from lutetia.system.errors import ConfigError, DataError


def gliding(speed: float, size: int = 48) -> torch.Tensor:
    """A smooth texture that moves right by `speed` px per frame, uint8 [1, 8, size, size, 3]."""
    y, x = np.mgrid[:size, :size]
    frames = [128 + 50 * np.sin((x - speed * t) / 4) * np.cos(y / 5) + 50 * np.sin((x - speed * t + 2 * y) / 7) for t in range(8)]
    return torch.from_numpy(np.stack(frames).round().astype(np.uint8))[None, ..., None].expand(-1, -1, -1, -1, 3)


def test_flow_measures_pixels_per_frame() -> None:
    extractor = MotionExtractor()
    speeds = [float(extractor(gliding(speed))["speed"]) for speed in (0.0, 0.5, 2.0)]
    assert speeds == pytest.approx([0, 0.5, 2], rel=0.1, abs=0.02)
    assert motion(torch.tensor([[1.0], [2.0], [3.0]])).value == 2


def test_flow_stays_small_on_a_plain_background() -> None:
    clip = torch.full((1, 8, 64, 64, 3), 30, dtype=torch.uint8)
    clip += (3 * torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))).to(
        torch.uint8
    )  # noise, as in generated clips
    for time in range(8):
        clip[0, time, 20:44, 8 + 4 * time : 24 + 4 * time] = torch.tensor([200, 90, 40], dtype=torch.uint8)
    motion_of_clip = MotionExtractor()(clip)
    assert 0.1 < float(motion_of_clip["speed"]) < 2
    assert float(motion_of_clip["field"].abs().max()) < 8


def test_flow_without_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lutetia\[study\]'"):
        MotionExtractor()


def test_clip_set_refuses_other_shapes() -> None:
    with pytest.raises(DataError, match=r"uint8 \[N, F, H, W, 3\], not torch.float32"):
        ClipSet(torch.zeros(1, 2, 4, 4, 3), ("a",))
    with pytest.raises(DataError, match=r"2 clips have 1 captions"):
        ClipSet(torch.zeros(2, 2, 4, 4, 3, dtype=torch.uint8), ("a",))


def test_efficientnet_features_of_a_still_grey_clip(asset_or_skip: Callable[[str], Path]) -> None:
    extractor = EfficientNetExtractor(asset_or_skip(EFFICIENTNET_FILE), frames=2)
    still = torch.full((1, 10, 32, 32, 3), 90, dtype=torch.uint8)
    features = extractor(still)
    assert features["mean"].shape == (1, 1280)
    assert features["deviation"].abs().max() < 1e-5
    assert features["mean"].min() >= 0
    assert features["mean"].max() <= 6  # ReLU6
