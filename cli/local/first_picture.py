"""The picture that clips begin with, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.system.errors import UsageError, disk_reason

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 100_000_000


def read_picture(file: Path, width: int, height: int) -> Image.Image:
    """The picture in `file`, turned upright, its middle cut to the shape of the clips and resized to `width` x `height` pixels.

    Raises UsageError if it is no picture, or has more than 100 million pixels.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise UsageError(f"{file} has {opened.width}x{opened.height} pixels, more than {MOST_PIXELS}; make it smaller")
            return ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except OSError as error:
        raise UsageError(f"cannot read {file} as a picture: {disk_reason(error)}; give a PNG or JPEG file") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"cannot read {file} as a picture: {error}; give a PNG or JPEG file") from error
