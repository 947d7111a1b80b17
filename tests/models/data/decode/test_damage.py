"""Damage: a picture that cannot be decoded, and what is built on it, is missing, and never a smear."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lutetia.models.data.decode.clip import decode_clip, scan
from lutetia.models.data.decode.cut import ClipRefused
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.decode.timeline import Track
from tests.models.data.clip_files import encode, textured

COPIES = 20
CODECS = {
    "h264.mp4": ("libx264", "yuv420p", {"g": "24", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "7"}),
    "vp8.webm": ("libvpx", "yuv420p", {"b": "1M", "deadline": "realtime", "cpu-used": "5"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=24"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "0"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"b": "2M"}),
}


@pytest.mark.parametrize("name", CODECS)
def test_damaged_copies_are_refused_or_unharmed(tmp_path: Path, name: str) -> None:
    """One to eight flipped bits in the middle. Decoded as FFmpeg does by default, most of these copies are smeared."""
    codec, pixel_format, options = CODECS[name]
    path, shape = tmp_path / name, ClipShape(frames=8, fps=8, height=144, width=192, start="start")
    encode(path, textured(24, 144, 192), codec, pixel_format, options, fps=24)
    sound, clean = path.read_bytes(), decode_clip(path, shape).astype(int)
    draw, smeared, refused = random.Random(7), 0, 0
    for _ in range(COPIES):
        damaged = bytearray(sound)
        for _ in range(draw.choice((1, 3, 8))):
            damaged[draw.randrange(len(sound) // 8, len(sound) * 7 // 8)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            smeared += np.abs(decode_clip(path, shape) - clean).mean((1, 2, 3)).max() > 4
        except ClipRefused:
            refused += 1
    assert refused >= COPIES // 3
    assert smeared <= (COPIES * 3 // 10 if name == "hevc.mp4" else COPIES // 5), "without checksums some damage is not seen"


def test_what_is_behind_a_packet_decides_nothing_in_a_sound_file(tmp_path: Path) -> None:
    """Damage that FFmpeg does not mark makes decoders of HEVC read on; units of other kinds and several slices do not."""
    parameters = "log-level=none:keyint=8:slices=3:hash=1:aud=1:bframes=3"
    for name, pixel_format in (("a.mp4", "yuv420p"), ("b.ts", "yuv420p"), ("c.mkv", "yuv420p10le")):
        options = {"x265-params": parameters}
        path = encode(tmp_path / name, textured(24, 144, 192), "libx265", pixel_format, options, fps=24)
        frames = decode_clip(path, ClipShape(frames=24, fps=24, height=144, width=192, start="start"))
        assert np.abs(frames.astype(int) - textured(24, 144, 192)).mean() < 8


def test_damage_outside_the_clip_does_not_matter(tmp_path: Path) -> None:
    shape = ClipShape(frames=8, fps=8, height=32, width=32, start="start")
    path = encode(tmp_path / "clip.mp4", textured(64, 32, 32), "libx264", "yuv420p", {"g": "16"}, fps=8)
    clean = decode_clip(path, shape)
    with av.open(str(path)) as container:
        late = [packet for packet in container.demux(video=0) if packet.size and (packet.pts or 0) * packet.time_base > 4]
        offset, size = late[0].pos or 0, late[0].size
    data = bytearray(path.read_bytes())
    data[offset + size // 2 : offset + size] = bytes(size - size // 2)
    path.write_bytes(data)
    assert (decode_clip(path, shape) == clean).all()
    with pytest.raises(ClipRefused, match=r"clip.mp4 is damaged or truncated: its picture at \d"):
        decode_clip(path, shape.model_copy(update={"frames": 60}))


@pytest.mark.parametrize("parameters", ["keyint=infinite:intra-refresh=1", "keyint=24:open-gop=1:bframes=3", "keyint=infinite"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
def test_clip_in_the_middle_equals_decoding_all(tmp_path: Path, parameters: str, pixel_format: str) -> None:
    """Decoding that begins in the middle must not show what is built on pictures before it."""
    video = textured(120, 48, 64)
    path = encode(tmp_path / "clip.mp4", video, "libx264", pixel_format, {"x264-params": parameters}, fps=8)
    frames = decode_clip(path, ClipShape(frames=8, fps=8, height=48, width=64))
    assert np.abs(frames.astype(int) - video[56:64]).mean() < 8


@pytest.mark.parametrize(("pixel_format", "can_seek"), [("yuv420p", True), ("yuv444p", False)])
def test_444_is_decoded_from_its_first_packet(tmp_path: Path, pixel_format: str, can_seek: bool) -> None:
    """Only the first packet names the encoder, and 4:4:4 of an old one is green where that is not known."""
    path = encode(tmp_path / "clip.mp4", textured(8, 48, 64), "libx264", pixel_format, {}, fps=8)
    assert scan(path).can_seek is can_seek


def test_avi_with_reordered_pictures_keeps_their_order(tmp_path: Path) -> None:
    """AVI has no times of showing: those that FFmpeg guesses are wrong where pictures are reordered."""
    video = textured(120, 48, 64)
    path = encode(tmp_path / "clip.avi", video, "libx264", "yuv420p", {"bf": "3"}, fps=8)
    frames = decode_clip(path, ClipShape(frames=8, fps=8, height=48, width=64))
    assert np.abs(frames.astype(int) - video[56:64]).mean() < 8


def track(text: str, stamps: list[int]) -> Track:
    """`K` is a packet that can be decoded alone, `p` one that cannot."""
    return Track(Fraction(1), stamps, [letter == "K" for letter in text], Fraction(100), Fraction(1), True)


@pytest.mark.parametrize(
    ("damaged", "spoilt"),
    [
        (0, {0, 3, 1, 2, 5, 4}),  # up to the next key, and 4 and 5, which are shown before that key
        (1, {3, 1, 2, 5, 4}),
        (7, {9, 8}),
        (9, {12}),
    ],
)
def test_damage_spoils_what_is_built_on_it(damaged: int, spoilt: set[int]) -> None:
    order = track("KpppKppppK", [0, 3, 1, 2, 6, 5, 4, 9, 8, 12])
    assert order.spoilt_by(damaged) == spoilt


def test_picture_before_a_gap_does_not_stand_in_for_lost_ones() -> None:
    order = track("Kppppp", [0, 1, 2, 3, 4, 5])
    assert not order.is_missing(Fraction(3), 3, set())
    assert not order.is_missing(Fraction(3), 2, set()), "a packet may hold the second field of a picture"
    assert order.is_missing(Fraction(3), 1, set())
    assert order.is_missing(Fraction(3), 2, {3})
    assert order.is_missing(Fraction(3), 3, {3})
