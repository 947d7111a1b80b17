"""Metrics on pixels: optical flow, LPIPS, EfficientNet; the degradations; the ladder that judges metrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.motion import MotionExtractor, motion
from lutetia.models.metrics.stats.frechet import frechet_of_rows
from lutetia.models.metrics.validation import sensitivity as rungs
from lutetia.models.metrics.validation.degradations import frozen, noisy, shuffled_captions, shuffled_frames
from lutetia.models.metrics.validation.sensitivity import Measure, against, ladder, per_clip
from lutetia.models.networks.assets import EFFICIENTNET_FILE, LPIPS_FILE
from lutetia.models.networks.efficientnet import EfficientNetExtractor
from lutetia.models.networks.lpips import Lpips
from lutetia.system.errors import ConfigError, DataError, IntegrityError


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


def test_flow_stays_small_where_a_figure_moves_on_plain_ground() -> None:
    clip = torch.full((1, 8, 64, 64, 3), 30, dtype=torch.uint8)
    clip += (3 * torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))).to(torch.uint8)  # as generated clips have it
    for time in range(8):
        clip[0, time, 20:44, 8 + 4 * time : 24 + 4 * time] = torch.tensor([200, 90, 40], dtype=torch.uint8)
    found = MotionExtractor()(clip)
    assert 0.1 < float(found["speed"]) < 2
    assert float(found["field"].abs().max()) < 8


def test_flow_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lutetia\[metrics\]'"):
        MotionExtractor()


def test_degradations_do_what_they_say(squares: Callable[..., ClipSet]) -> None:
    clips = squares(12)
    assert torch.equal(noisy(clips, 10, 1).frames, noisy(clips, 10, 1).frames)
    apart = (noisy(clips, 10, 1).frames.float() - clips.frames.float()).std()
    assert 6 < apart < 10  # dark pixels are cut off at 0
    mixed = shuffled_frames(clips, 0)
    assert not any(torch.equal(a, b) for a, b in zip(mixed.frames, clips.frames, strict=True))
    assert torch.equal(mixed.frames.float().mean(dim=1), clips.frames.float().mean(dim=1))
    still = frozen(clips).frames
    assert torch.equal(still[:, 5], clips.frames[:, 0])
    swapped = shuffled_captions(clips, 0)
    assert sorted(swapped.captions) == sorted(clips.captions)
    assert all(a != b for a, b in zip(swapped.captions, clips.captions, strict=True))


def test_clip_sets_refuse_what_they_are_not() -> None:
    with pytest.raises(DataError, match=r"uint8 \[N, F, H, W, 3\], not torch.float32"):
        ClipSet(torch.zeros(1, 2, 4, 4, 3), ("a",))
    with pytest.raises(DataError, match=r"2 clips have 1 captions"):
        ClipSet(torch.zeros(2, 2, 4, 4, 3, dtype=torch.uint8), ("a",))


def test_the_ladder_finds_what_each_metric_notices(squares: Callable[..., ClipSet]) -> None:
    def looks(clips: ClipSet) -> np.ndarray:
        return (
            F.avg_pool2d(clips.frames.float().mean(-1).flatten(0, 1)[:, None], 8)
            .unflatten(0, clips.frames.shape[:2])
            .flatten(1)
            .numpy()
        )

    def moves(clips: ClipSet) -> np.ndarray:
        return (clips.frames[:, 1:].float() - clips.frames[:, :-1].float()).abs().mean(dim=(1, 2, 3, 4)).numpy()

    def says(clips: ClipSet) -> np.ndarray:
        red = clips.frames[..., 0].float().amax(dim=(1, 2, 3)) > 180
        blue = clips.frames[..., 2].float().amax(dim=(1, 2, 3)) > 180
        named = np.array(
            [["red" in caption or "white" in caption, "blue" in caption or "white" in caption] for caption in clips.captions]
        )
        return (np.stack([red, blue], 1) == named).mean(axis=1)

    reference, real = squares(24, seed=1), squares(24, seed=2)
    measures = [
        Measure("looks", against(looks(reference), looks, frechet_of_rows), "lower", (rungs.REAL, rungs.STRONG), 24),
        Measure("moves", per_clip(moves), "lower", (rungs.REAL, rungs.SHUFFLED)),
        Measure("says", per_clip(says), "higher", (rungs.REAL, rungs.CAPTIONS)),
    ]
    table = ladder(real, measures, resamples=30)
    looked, moved, said = table.rows
    assert table.unnoticed == (rungs.FROZEN,)  # a still clip has less motion than a real one, not more: nobody here minds
    assert rungs.CAPTIONS not in looked.notices + moved.notices
    assert rungs.SHUFFLED in moved.notices
    assert rungs.CAPTIONS in said.notices
    assert looked.in_order
    assert moved.in_order
    assert said.in_order
    assert not moved.whole_ladder
    assert said.figures[rungs.REAL].value == 1
    text = table.markdown()
    assert "Faults that no metric notices: frozen first frame." in text
    assert "| says ↑ |" in text
    blind = ladder(real, measures[:1], rungs=(rungs.REAL, rungs.CAPTIONS), resamples=10)
    assert blind.unnoticed == (rungs.CAPTIONS,)


def test_lpips_grows_with_the_fault(asset_or_skip: Callable[[str], Path], squares: Callable[..., ClipSet]) -> None:
    network = Lpips.load(asset_or_skip(LPIPS_FILE))
    clips = squares(2, size=64)
    mild, strong = (noisy(clips, sigma, 0).frames[:, 0].permute(0, 3, 1, 2) / 127.5 - 1 for sigma in (10, 40))
    pictures = clips.frames[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    assert network(pictures, pictures).abs().max() < 1e-6
    assert (network(pictures, mild) < network(pictures, strong)).all()
    with pytest.raises(DataError, match=r"pictures of one shape"):
        network(pictures, pictures[:1])
    with pytest.raises(IntegrityError, match=r"not LPIPS's: conv0.weight"):
        Lpips({})


def test_efficientnet_recognises_nothing_in_grey_but_answers_steadily(asset_or_skip: Callable[[str], Path]) -> None:
    extractor = EfficientNetExtractor(asset_or_skip(EFFICIENTNET_FILE), frames=2)
    still = torch.full((1, 10, 32, 32, 3), 90, dtype=torch.uint8)
    features = extractor(still)
    assert features["mean"].shape == (1, 1280)
    assert features["deviation"].abs().max() < 1e-5
    assert features["mean"].min() >= 0
    assert features["mean"].max() <= 6  # ReLU6
