"""GIF and MP4 files, read back; and the rounding of pixels."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from lutetia.models.video_files import to_uint8, write_gif, write_mp4, write_training_mp4

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


@pytest.fixture
def pictures() -> list[Image.Image]:
    """One plain picture per colour, 32 wide and 16 high."""
    return [Image.new("RGB", (32, 16), colour) for colour in COLOURS]


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_to_uint8_rounds_like_diffusers() -> None:
    frames = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    frames[0, 0, 0] = (0.0, 0.5, 1.0)
    expected = [np.asarray(picture) for picture in VaeImageProcessor.numpy_to_pil(frames)]
    assert np.array_equal(to_uint8(frames), np.stack(expected))


@pytest.mark.parametrize("shared_palette", [True, False])
def test_gif_holds_every_frame_endlessly(tmp_path: Path, pictures: list[Image.Image], shared_palette: bool) -> None:
    write_gif(pictures, tmp_path / "clip.gif", fps=8, shared_palette=shared_palette)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.info["loop"], image.info["duration"]) == (0, 120)  # of 125 ms; a GIF counts hundredths of a second
        for number, colour in enumerate(COLOURS):
            image.seek(number)
            assert np.abs(np.asarray(image.convert("RGB"), int) - colour).max() < 12
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]


def test_mp4_is_written_once_or_repeated(tmp_path: Path, pictures: list[Image.Image]) -> None:
    write_mp4(pictures, tmp_path / "once.mp4", fps=8)
    write_mp4(pictures, tmp_path / "repeated.mp4", fps=8, seconds=1.0)
    once, repeated = read(tmp_path / "once.mp4"), read(tmp_path / "repeated.mp4")
    assert (once.shape, len(repeated)) == ((3, 16, 32, 3), 9)
    assert np.abs(once.astype(int)[:, 8, 16] - COLOURS).max() < 12


def test_training_mp4_keeps_the_colour_of_single_pixels(tmp_path: Path) -> None:
    video = np.zeros((3, 16, 32, 3), np.uint8)
    video[:, 5, 7] = (240, 30, 30)
    write_training_mp4(video, tmp_path / "clip.mp4", fps=6)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(6)
    assert np.abs(read(tmp_path / "clip.mp4").astype(int) - video).max() < 40
