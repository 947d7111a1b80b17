"""The settings that say how videos are cut in time and space, and which of several shapes a clip gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lutetia.models.data.decode.cut import ClipLook, Cut
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Count, Positive

_SIMILAR = 0.02
"""Difference of the logarithms of two aspect ratios that counts as none."""


class ClipShape(Frozen):
    """How videos are cut in time and space."""

    frames: Count = Field(default=8, description="frames of a clip")
    fps: Positive = Field(default=8.0, description="frames per second of a clip")
    height: Count = Field(default=64, description="height of a clip, px")
    width: Count = Field(default=64, description="width of a clip, px")
    start: Literal["middle", "start", "whole"] = Field(
        default="middle", description="part of a video that becomes the clip; whole: all of it, at another frame rate"
    )
    short: Literal["refuse", "loop"] = Field(
        default="refuse", description="videos that are too short are refused, or repeated from their beginning"
    )


def choose_bucket(look: ClipLook, shapes: Sequence[Cut]) -> int:
    """The number of the bucket for a clip.

    Of the buckets that are not longer than the clip: the nearest aspect ratio, then the most frames, then the most pixels that
    need no enlarging. A clip that is shorter than all goes to the shortest, whose rule for short clips decides.

    Args:
        look: what the file says of the clip.
        shapes: of the buckets.
    """
    fitting = [number for number, shape in enumerate(shapes) if _is_long_enough(look, shape)]
    if not fitting:
        fewest = min(shape.frames for shape in shapes)
        fitting = [number for number, shape in enumerate(shapes) if shape.frames == fewest]

    def rank(number: int) -> tuple[int, int, bool, int]:
        shape = shapes[number]
        apart = abs(math.log(shape.width / shape.height * look.height / look.width))
        enlarged = shape.height > look.height or shape.width > look.width
        pixels = shape.height * shape.width
        return round(apart / _SIMILAR), -shape.frames, enlarged, pixels if enlarged else -pixels

    return min(fitting, key=rank)


def _is_long_enough(look: ClipLook, shape: Cut) -> bool:
    if shape.frames == 1:
        return True
    if shape.start == "whole":
        return look.frames >= shape.frames
    return look.seconds + look.seconds / max(1, look.frames) / 2 >= shape.frames / shape.fps
