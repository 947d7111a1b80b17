"""Which bucket a clip goes to: by its shape, then by its length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lutetia.models.data.decode.cut import ClipLook, Cut

_SIMILAR = 0.02
"""Difference of the logarithms of two aspect ratios that counts as none."""


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
