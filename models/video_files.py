"""Writing clips as GIF and MP4 files, and the pixels they need: one place for the command line, galleries and rule-made clips.

Imports PIL, PyAV and numpy only inside its functions, so that the command line starts without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutetia.system.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Frames = NDArray[np.uint8]  # [frames, height, width, 3]

PALETTE_SAMPLES = 4  # frames that a shared palette is chosen from
NEARLY_LOSSLESS: dict[str, object] = {"crf": "8", "preset": "ultrafast", "threads": "1"}
FOR_VIEWING: dict[str, object] = {"crf": "16", "preset": "veryfast", "threads": "2"}


def to_uint8(frames: Any) -> NDArray[np.uint8]:
    """Frames of values in 0…1, as the pipeline's `output_type="np"` gives them, as bytes 0…255, rounded to nearest."""
    return (frames * 255).round().astype("uint8")


def write_gif(pictures: Sequence[Image.Image], path: Path, fps: float, *, shared_palette: bool = True) -> None:
    """Write an endless GIF, whole or not at all.

    Args:
        pictures: the frames, all of one size.
        path: the file to replace.
        fps: frames per second; a frame lasts whole milliseconds.
        shared_palette: one palette of 255 colours for all frames, so that colours do not flicker. Otherwise one per frame.
    """
    frames = _with_one_palette(pictures) if shared_palette else list(pictures)
    options = {"optimize": False} if shared_palette else {}
    with atomic_path(path) as part:
        frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, **options)


def write_mp4(pictures: Sequence[Image.Image], path: Path, fps: float, seconds: float = 0.0) -> None:
    """Write H.264 that every player shows (4:2:0 colour, so both sides must be even), whole or not at all.

    Args:
        pictures: the frames, all of one size.
        path: the file to replace.
        fps: frames per second.
        seconds: the clip is repeated up to about this length; it is written once at least.
    """
    import av

    repeats = max(1, round(seconds * fps / len(pictures)))
    frames = (av.VideoFrame.from_image(picture) for picture in list(pictures) * repeats)
    with atomic_path(path) as part:
        _encode(part, frames, pictures[0].size, Fraction(fps).limit_denominator(1000), "yuv420p", FOR_VIEWING)


def write_training_mp4(video: Frames, path: Path, fps: int) -> None:
    """Write nearly lossless H.264 (4:4:4 colour, so small coloured shapes keep their colour); `video` [F, H, W, 3]."""
    import av

    frames = (av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in video)
    _encode(path, frames, (video.shape[2], video.shape[1]), Fraction(fps), "yuv444p", NEARLY_LOSSLESS)


def _encode(path: Path, frames: Any, size: tuple[int, int], rate: Fraction, colour: str, options: dict[str, object]) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, colour
        stream.options = options
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _with_one_palette(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures in the colours of a palette that fits some of them, evenly spread."""
    from PIL import Image

    count, (width, height) = min(PALETTE_SAMPLES, len(pictures)), pictures[0].size
    strip = Image.new("RGB", (width, height * count))
    for slot in range(count):
        strip.paste(pictures[slot * len(pictures) // count], (0, slot * height))
    palette = strip.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return [picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
