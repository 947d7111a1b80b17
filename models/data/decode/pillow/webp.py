"""Animated WebP, by Pillow: the decoder of FFmpeg supports still pictures only."""

from __future__ import annotations

import struct
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from lutetia.models.data.decode.cut import MAX_PIXELS, ClipLook, ClipRefused, Cut, Frames
from lutetia.models.data.decode.picture import on_white
from lutetia.models.data.decode.timeline import Timeline, moments
from lutetia.models.data.ingest.webdataset import TarMember

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_MOST_WORK = 1 << 33  # pixels to decode up to the end of the clip; a hundred million take about a second


def is_webp(path: Path | TarMember) -> bool:
    """Whether the content is WebP, whatever the name. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def webp_pictures(path: Path | TarMember, cut: Cut) -> list[Frames]:
    """The clip as F pictures uint8 [H, W, 3]. Only as much as it needs is decoded.

    Raises ClipRefused, OSError, ValueError or SyntaxError.
    """
    from PIL import Image, UnidentifiedImageError

    with path.open("rb") as file:
        lengths = _lengths(file)
        file.seek(0)
        try:
            image = Image.open(file, formats=["WEBP"])
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError("it is not a picture, or an enormous one") from error
        with image:
            pixels, count = image.width * image.height, getattr(image, "n_frames", 1)
            if pixels > MAX_PIXELS:
                raise ClipRefused(f"{path.name} has pictures of {image.width}×{image.height} pixels, too large; scale it down")
            lengths = [*lengths, *[0] * (count - len(lengths))][:count]
            times = [Fraction(begin, 1000) for begin in _running(lengths)]
            chosen = moments(path.name, Timeline(times, Fraction(sum(lengths), 1000)), cut)
            shown = [bisect_right(times, moment) - 1 for moment in chosen]
            if pixels * (max(shown) + 1) > _MOST_WORK:
                raise ClipRefused(
                    f"{path.name} has {max(shown) + 1} pictures of {image.width}×{image.height} pixels to decode; scale it down"
                )
            return _decoded(image, shown, cut)


def webp_look(path: Path | TarMember) -> ClipLook:
    """Size and duration from the headers. Raises OSError or ValueError."""
    from PIL import Image, UnidentifiedImageError

    with path.open("rb") as file:
        lengths = _lengths(file)
        file.seek(0)
        try:
            with Image.open(file, formats=["WEBP"]) as image:
                return ClipLook(image.height, image.width, sum(lengths) / 1000, len(lengths))
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError("it is not a picture, or an enormous one") from error


def _decoded(image: ImageFile, shown: list[int], cut: Cut) -> list[Frames]:
    from PIL import Image

    box = box_of(image.height, image.width, cut)
    scaling = Image.Resampling.BOX if box[3] - box[1] > cut.height else Image.Resampling.BICUBIC
    found: dict[int, Frames] = {}
    for number in range(max(shown) + 1):
        image.seek(number)
        if number in shown:
            scaled = image.convert("RGBA").resize((cut.width, cut.height), scaling, box)
            found[number] = on_white(np.asarray(scaled))
    return [found[number] for number in shown]


def box_of(rows: int, columns: int, cut: Cut) -> tuple[float, float, float, float]:
    """The middle of the picture that the clip shows: left, top, right, bottom."""
    scale = max(cut.height / rows, cut.width / columns)
    width, height = cut.width / scale, cut.height / scale
    return (columns - width) / 2, (rows - height) / 2, (columns + width) / 2, (rows + height) / 2


def _running(lengths: list[int]) -> list[int]:
    """When each picture begins."""
    sums, now = [], 0
    for length in lengths:
        sums.append(now)
        now += length
    return sums


def _lengths(file: BinaryIO) -> list[int]:
    """How long each picture is shown, in milliseconds, from the headers of its chunks (`ANMF`)."""
    lengths, at = [], 12
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return lengths
        size = struct.unpack("<I", head[4:])[0]
        if head[:4] == b"ANMF":
            lengths.append(int.from_bytes(file.read(15)[12:15], "little"))
        at += 8 + size + size % 2
