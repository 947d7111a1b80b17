"""Small clips that are quick to judge, and the skip of tests whose weights are not on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lutetia.models.metrics.clips import ClipSet
from lutetia.models.networks.assets import assets_folder

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "white": (240, 240, 240)}
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@pytest.fixture(scope="session")
def squares() -> Callable[..., ClipSet]:
    """`squares(count, seed, frames, size)`: a coloured square that glides over a dark ground, with a caption that says so."""

    def make(count: int, seed: int = 0, frames: int = 10, size: int = 32) -> ClipSet:
        generator = torch.Generator().manual_seed(seed)
        pictures = torch.randint(0, 40, (count, 1, size, size, 3), generator=generator).expand(-1, frames, -1, -1, -1).clone()
        captions = []
        for clip in pictures:
            colour, way = (sorted(options)[int(torch.randint(4, (), generator=generator))] for options in (COLOURS, WAYS))
            top, left = (int(v) for v in torch.randint(frames, size - frames - 8, (2,), generator=generator))
            for number, frame in enumerate(clip):
                y, x = top + number * WAYS[way][0], left + number * WAYS[way][1]
                frame[y : y + 8, x : x + 8] = torch.tensor(COLOURS[colour])
            captions.append(f"a {colour} square moving {way}")
        return ClipSet(pictures.to(torch.uint8), tuple(captions), ("squares",) * count)

    return make


@pytest.fixture(scope="session")
def asset_or_skip() -> Callable[[str], Path]:
    """The path of an asset; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = assets_folder() / name
        if not path.exists():
            pytest.skip(f"needs {path} (set LUTETIA_ASSETS)")
        return path

    return find
