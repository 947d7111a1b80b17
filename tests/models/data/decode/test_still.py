"""Still pictures are clips of one frame: upright, on white, bounded before they are decoded; buckets go by the shown size."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from lutetia.models.data.decode.clip import decode_clip, look_at
from lutetia.models.data.decode.cut import MAX_PIXELS, ClipLook, ClipRefused
from lutetia.models.data.decode.pool import DecoderPool
from lutetia.models.data.decode.shape import ClipShape, choose_bucket
from lutetia.models.data.ingest.listing import read_listing
from tests.models.data.clip_files import WORDS, look, write_video

STILL = ClipShape(frames=1, height=32, width=32)
HALVES = np.zeros((16, 16, 3), np.uint8)
HALVES[:8] = (220, 20, 20)
HALVES[8:] = (20, 20, 220)
"""Red above blue."""


def save(path: Path, picture: np.ndarray = HALVES, **options: Any) -> Path:
    Image.fromarray(picture).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.jpg", {"quality": 95}), ("a.webp", {"lossless": True}), ("a.gif", {}), ("wrong.mp4", {"format": "png"})],
)
def test_every_format_gives_its_picture(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = save(tmp_path / name, **options)
    assert look_at(path) == ClipLook(16, 16, 0.0, 1)
    frames = decode_clip(path, STILL)
    assert frames.shape == (1, 32, 32, 3)
    assert np.abs(frames[0, 4, 16].astype(int) - (220, 20, 20)).max() <= 12
    assert np.abs(frames[0, 27, 16].astype(int) - (20, 20, 220)).max() <= 12


def test_longer_clip_of_a_picture_is_refused_or_repeats_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    with pytest.raises(ClipRefused, match="add a bucket of one frame"):
        decode_clip(path, ClipShape(frames=8))
    frames = decode_clip(path, ClipShape(frames=8, short="loop"))
    assert len(frames) == 8
    assert (frames == frames[0]).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_is_heard(tmp_path: Path, name: str) -> None:
    """6: the left of what is stored is shown on top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.concatenate([HALVES.swapaxes(0, 1), HALVES.swapaxes(0, 1)[:, -8:]], axis=1)
    path = save(tmp_path / name, wide, exif=exif)
    assert look_at(path) == ClipLook(24, 16, 0.0, 1)
    red = decode_clip(path, ClipShape(frames=1, height=24, width=16))[0, 2, 8]
    assert red[0] > 180 > 80 > red[2]


def test_transparency_becomes_white_and_deep_grey_stays_grey(tmp_path: Path) -> None:
    clear = np.zeros((16, 16, 4), np.uint8)
    assert (decode_clip(save(tmp_path / "a.png", clear), STILL) == 255).all()
    assert (decode_clip(save(tmp_path / "b.png", np.full((16, 16), 128 << 8, np.uint16)), STILL) == 128).all()


def header_of(width: int, height: int) -> bytes:
    """A PNG of this size as its header says, without pictures worth the name."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header_of(8192, MAX_PIXELS // 8192 + 1), "scale it down"),
        (header_of(60_000, 60_000), "enormous"),
        (header_of(64, 64), "cannot be decoded"),
        (b"\xff\xd8\xff\xe0" + bytes(64), "cannot be decoded"),
        (b"GIF89a" + bytes(8), "cannot be decoded"),
        (b"RIFF\x10\x00\x00\x00WEBP", "cannot be decoded"),
    ],
)
def test_hostile_picture_is_refused_in_one_sentence_and_the_pool_lives(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "bad.png").write_bytes(data)
    save(tmp_path / "good.png")
    with DecoderPool(1) as pool:
        with pytest.raises(ClipRefused, match=words) as caught:
            pool.decode(tmp_path / "bad.png", STILL)
        assert "\n" not in str(caught.value)
        assert pool.decode(tmp_path / "good.png", STILL).shape == (1, 32, 32, 3)


def test_animated_files_of_the_same_formats_stay_videos(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in look("ball", 1)]
    for name in ("a.webp", "a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=125)
        assert look_at(tmp_path / name).frames == len(frames), name


def test_rotated_video_goes_into_the_bucket_of_its_shown_size(tmp_path: Path) -> None:
    """As phones write it: wide pictures and a quarter turn in the container."""
    path = write_video(tmp_path / "a.mp4", np.repeat(np.repeat(look("ball", 1), 2, axis=2), 1, axis=1))
    assert (look_at(path).height, look_at(path).width) == (32, 64)
    data = path.read_bytes()
    unit, turned = (struct.pack(">9i", *values) for values in (
        (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), (0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)
    ))  # fmt: skip
    place = data.index(b"tkhd")
    assert data.index(unit, place) < place + 96
    at = data.index(unit, place)
    path.write_bytes(data[:at] + turned + data[at + len(unit) :])
    shown = look_at(path)
    assert (shown.height, shown.width) == (64, 32)
    wide, tall = (ClipShape(frames=8, height=h, width=w) for h, w in ((32, 64), (64, 32)))
    assert choose_bucket(shown, (wide, tall)) == 1
    assert av.open(str(path)).streams.video[0].codec_context.width == 64


def test_pictures_with_captions_are_listed_and_thumbnails_are_not(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", look("ball", 1))
    save(tmp_path / "clip.jpg")
    save(tmp_path / "photo.jpg")
    save(tmp_path / "bare.png")
    for name in ("clip", "photo"):
        (tmp_path / f"{name}.txt").write_text(WORDS["ball"])
    listing = read_listing(tmp_path)
    assert [clip.name for clip in listing.clips] == ["clip.mp4", "photo.jpg"]
    assert listing.bad == []
    assert sorted(each.name for each in listing.unused) == ["bare.png", "clip.jpg"]
