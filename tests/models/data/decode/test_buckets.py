"""The bucket of a clip: the nearest aspect ratio among those that it is long enough for."""

from __future__ import annotations

import pytest

from lutetia.models.data.decode.cut import ClipLook
from lutetia.models.data.decode.shape import ClipShape, choose_bucket

SQUARE, WIDE, TALL = (ClipShape(frames=16, height=h, width=w) for h, w in ((64, 64), (48, 96), (96, 48)))
SHORT, STILL = ClipShape(frames=8, height=64, width=64), ClipShape(frames=1, height=64, width=64, short="loop")
LARGE = ClipShape(frames=16, height=128, width=128)
SHAPES = (SQUARE, WIDE, TALL, SHORT, STILL, LARGE)


@pytest.mark.parametrize(
    ("height", "width", "seconds", "shape"),
    [
        (100, 100, 5.0, SQUARE),
        (100, 101, 5.0, SQUARE),
        (256, 256, 5.0, LARGE),
        (360, 640, 5.0, WIDE),
        (640, 360, 5.0, TALL),
        (640, 360, 1.0, SHORT),
        (100, 100, 1.5, SHORT),
        (100, 100, 0.1, STILL),
        (32, 32, 5.0, SQUARE),
    ],
)
def test_bucket_of_a_clip(height: int, width: int, seconds: float, shape: ClipShape) -> None:
    look = ClipLook(height, width, seconds, max(1, round(24 * seconds)))
    assert SHAPES[choose_bucket(look, SHAPES)] == shape


def test_clip_that_is_too_short_for_all_goes_to_the_shortest() -> None:
    assert choose_bucket(ClipLook(64, 64, 0.2, 5), (SQUARE, SHORT)) == 1


def test_whole_clips_need_as_many_frames_as_the_bucket() -> None:
    whole = [shape.model_copy(update={"start": "whole"}) for shape in (SQUARE, SHORT)]
    assert choose_bucket(ClipLook(64, 64, 60.0, 10), whole) == 1
    assert choose_bucket(ClipLook(64, 64, 0.5, 16), whole) == 0
