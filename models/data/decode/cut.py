"""What decoding needs and gives, without a model of settings: the processes that decode import as little as they can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lutetia.system.errors import DataError

Frames = NDArray[np.uint8]  # [F, H, W, 3]
MAX_PIXELS = 1 << 25
"""The most pixels of a picture: 7680×4320 fits."""


class ClipRefused(DataError):
    """A clip cannot be used. The text starts with its name."""


class Cut(Protocol):
    """How a video is cut in time and space: `ClipShape`, which describes the fields, or `PlainCut`."""

    @property
    def frames(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def start(self) -> Literal["middle", "start", "whole"]: ...
    @property
    def short(self) -> Literal["refuse", "loop"]: ...


@dataclass(frozen=True)
class ClipLook:
    """What a file says of its clip: height and width in px, duration in seconds, number of frames."""

    height: int
    width: int
    seconds: float
    frames: int


@dataclass(frozen=True)
class PlainCut:
    """A `Cut` without validation, as it reaches a decoder process."""

    frames: int
    fps: float
    height: int
    width: int
    start: Literal["middle", "start", "whole"]
    short: Literal["refuse", "loop"]
