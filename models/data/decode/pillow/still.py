"""Still pictures (PNG, JPEG, WebP or GIF of one frame) as clips of one frame, by Pillow.

The size is read from the header and bounded before anything is decoded. The EXIF orientation is applied, transparent pixels
become white, and the picture is scaled and cut as videos are. Colours are taken as they are stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lutetia.models.data.decode.cut import MAX_PIXELS, ClipLook, ClipRefused, Cut, Frames
from lutetia.models.data.decode.picture import on_white
from lutetia.models.data.decode.pillow.webp import box_of
from lutetia.models.data.ingest.webdataset import TarMember

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

_FORMATS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP", b"GIF8": "GIF"}
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag of the orientation, and those of its values that swap rows and columns."""


def is_still(path: Path | TarMember) -> bool:
    """Whether the content is one picture, whatever the name. Raises OSError or ValueError."""
    if _format(path) is None:
        return False
    with _opened(path) as image:
        return image.format in ("JPEG", "MPO") or not getattr(image, "is_animated", False)


def still_look(path: Path | TarMember) -> ClipLook:
    """Size as it is shown. Raises ClipRefused, OSError or ValueError."""
    with _opened(path) as image:
        _bound(path.name, image)
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        return ClipLook(height, width, 0.0, 1)


def still_pictures(path: Path | TarMember, cut: Cut) -> list[Frames]:
    """The clip as F pictures uint8 [H, W, 3]: the one, or the same again where `short` is `loop`.

    Raises ClipRefused, OSError, ValueError or SyntaxError.
    """
    if cut.frames > 1 and cut.short == "refuse":
        raise ClipRefused(
            f"{path.name} is a still picture, too short for {cut.frames} frames; add a bucket of one frame, or set short to loop"
        )
    with _opened(path) as image:
        _bound(path.name, image)
        return [_scaled(image, cut)] * cut.frames


def _scaled(image: ImageFile, cut: Cut) -> Frames:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(_eight_bits(image))
    box = box_of(upright.height, upright.width, cut)
    scaling = Image.Resampling.BOX if box[3] - box[1] > cut.height else Image.Resampling.BICUBIC
    return on_white(np.asarray(upright.convert("RGBA").resize((cut.width, cut.height), scaling, box)))


def _eight_bits(image: ImageFile) -> Image.Image:
    """Pictures of 16 bits of grey, which Pillow would cut at white, as 8 bits."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    grey = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    grey.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    return grey


def _bound(name: str, image: ImageFile) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ClipRefused(f"{name} has {image.width}×{image.height} pixels, at most {MAX_PIXELS} can be read; scale it down")


def _format(path: Path | TarMember) -> str | None:
    with path.open("rb") as file:
        head = file.read(12)
    found = next((name for start, name in _FORMATS.items() if head.startswith(start)), None)
    return None if found == "WEBP" and head[8:] != b"WEBP" else found


@contextlib.contextmanager
def _opened(path: Path | TarMember) -> Iterator[ImageFile]:
    """The picture with its header read. Only the decoder of the format that the content begins with is tried."""
    from PIL import Image, UnidentifiedImageError

    found = _format(path)
    with path.open("rb") as file:
        try:
            image = Image.open(file, formats=[found or "PNG"])
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError("it is not a picture, or an enormous one") from error
        with image:
            yield image
