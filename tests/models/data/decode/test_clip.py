"""Decoding: one rule of time and space for every container, and refusals of unusable clips."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from lutetia.models.data.decode import clip as clips_module
from lutetia.models.data.decode.clip import decode_clip, hash_file
from lutetia.models.data.decode.cut import ClipRefused
from lutetia.models.data.decode.shape import ClipShape
from tests.models.data.clip_files import frame_numbers, look, numbered, write_video

SUFFIXES = [".mp4", ".mov", ".webm", ".gif", ".webp"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_container_gives_its_frames_in_order(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", numbered(8))
    frames = decode_clip(path, ClipShape(frames=8, fps=8, height=32, width=32))
    assert (frames.shape, frames.dtype) == ((8, 32, 32, 3), np.uint8)
    assert frame_numbers(frames) == list(range(8))


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ({"frames": 4, "fps": 8, "start": "start"}, [0, 1, 2, 3]),
        ({"frames": 4, "fps": 8, "start": "middle"}, [10, 11, 12, 13]),
        ({"frames": 4, "fps": 4, "start": "start"}, [1, 3, 5, 7]),
        ({"frames": 6, "fps": 16, "start": "start"}, [0, 0, 1, 1, 2, 2]),
        ({"frames": 4, "fps": 8, "start": "whole"}, [3, 9, 15, 21]),
        ({"frames": 24, "fps": 8, "start": "middle"}, list(range(24))),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_time_is_resampled_by_the_documented_rule(
    tmp_path: Path, suffix: str, shape: dict[str, object], shown: list[int]
) -> None:
    path = write_video(tmp_path / f"clip{suffix}", numbered(24))
    frames = decode_clip(path, ClipShape.model_validate({"height": 16, "width": 16, **shape}))
    assert frame_numbers(frames) == shown


def test_short_clip_is_refused_or_looped(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered(5))
    with pytest.raises(ClipRefused, match=r"clip.mp4 is too short: 0.62 s instead of 1.00 s \(8 frames at 8 fps\)"):
        decode_clip(path, ClipShape(frames=8, fps=8))
    with pytest.raises(ClipRefused, match="too short: 5 frames instead of 8"):
        decode_clip(path, ClipShape(frames=8, start="whole"))
    for start in ("middle", "whole"):
        shape = ClipShape(frames=8, fps=8, height=16, width=16, short="loop", start=start)
        assert frame_numbers(decode_clip(path, shape)) == [0, 1, 2, 3, 4, 0, 1, 2]


def test_half_a_missing_frame_is_tolerated(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered(8), fps=8.2)
    assert frame_numbers(decode_clip(path, ClipShape(frames=8, fps=8, height=16, width=16))) == list(range(8))


def test_seek_in_a_long_clip_equals_decoding_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (160, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    shape = ClipShape(frames=8, fps=8, height=32, width=32)
    for suffix, options in ((".mp4", {"g": "12", "bf": "2"}), (".webm", {"g": "12"})):
        path = write_video(tmp_path / f"clip{suffix}", video, options=options)
        monkeypatch.setattr(clips_module, "_SEEK_BEYOND", 5)
        sought = decode_clip(path, shape)
        monkeypatch.setattr(clips_module, "_SEEK_BEYOND", 1000)
        assert (sought == decode_clip(path, shape)).all()
        assert np.abs(sought.astype(int) - video[76:84]).mean() < 25


def test_centre_is_cut_out_of_wide_and_tall_clips(tmp_path: Path) -> None:
    video = np.zeros((8, 32, 96, 3), np.uint8)
    video[:, :, :32], video[:, :, 32:64], video[:, :, 64:] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    for turned, name in ((video, "wide"), (video.swapaxes(1, 2), "tall")):
        frames = decode_clip(write_video(tmp_path / f"{name}.mp4", turned), ClipShape(height=16, width=16))
        assert np.abs(frames.mean((0, 1, 2)) - (0, 200, 0)).max() < 12


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mp4", "libvpx-vp9")])
def test_non_square_pixels_are_applied(tmp_path: Path, suffix: str, codec: str) -> None:
    """Pixels are twice as wide as high, so the middle half is cut out. The codec stores that, or only the container."""
    video = np.zeros((8, 16, 16, 3), np.uint8)
    video[:, :, 4:12] = 220
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert decode_clip(path, ClipShape(height=16, width=16)).mean() > 190


def test_rotation_tag_is_applied(tmp_path: Path) -> None:
    video = np.zeros((8, 32, 32, 3), np.uint8)
    video[:, :16] = 220  # bright above
    path = write_video(tmp_path / "clip.mp4", video)
    data = path.read_bytes()
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)  # a quarter clockwise, as phones write
    at = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(data[:at] + quarter + data[at + len(quarter) :])
    frames = decode_clip(path, ClipShape(height=32, width=32))
    assert frames[:, :, 18:].mean() > 180
    assert frames[:, :, :14].mean() < 40


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    pictures = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(8)]
    for index, picture in enumerate(pictures):
        picture.paste((0, 0, 200, 255), (0, 0, 8, 8 + index % 2))
    for suffix in (".gif", ".webp"):
        pictures[0].save(tmp_path / f"clip{suffix}", save_all=True, append_images=pictures[1:], duration=125, disposal=2)
        frames = decode_clip(tmp_path / f"clip{suffix}", ClipShape(height=16, width=16))
        assert frames[:, 12:, 12:].min() > 240
        assert np.abs(frames[:, 2:6, 2:6].mean((0, 1, 2)) - (0, 0, 200)).max() < 16


def test_files_that_are_not_videos_are_refused_by_name(tmp_path: Path) -> None:
    shape = ClipShape(frames=8, fps=8)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "noise.gif").write_bytes(b"GIF89a" + bytes(50))
    (tmp_path / "noise.webp").write_bytes(b"RIFFxxxxWEBP")
    (tmp_path / "picture.mp4").write_bytes(b"\x89PNG\r\n")
    for name in ("noise.mp4", "noise.gif", "noise.webp", "picture.mp4"):
        with pytest.raises(ClipRefused, match=f"^{name} .*; remove it or encode it again"):
            decode_clip(tmp_path / name, shape)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ClipRefused, match="empty.mp4 is an empty file"):
        hash_file(tmp_path / "empty.mp4")
    with pytest.raises(ClipRefused, match=r"gone.mp4 cannot be read \(No such file"):
        hash_file(tmp_path / "gone.mp4")


def test_truncated_clip_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write_video(tmp_path / "clip.webm", rng.integers(0, 255, (24, 64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ClipRefused, match="clip.webm"):
        decode_clip(path, ClipShape(frames=24, fps=8))
    whole = write_video(tmp_path / "clip.mp4", rng.integers(0, 255, (24, 64, 64, 3), np.uint8))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ClipRefused, match="clip.mp4"):
        decode_clip(whole, ClipShape(frames=24, fps=8))


def test_clip_of_zero_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        container.start_encoding()
    with pytest.raises(ClipRefused, match=r"clip.mp4 (has zero length|has no video stream|cannot be decoded)"):
        decode_clip(path, ClipShape())
    Image.new("RGB", (16, 16)).save(tmp_path / "still.webp")
    with pytest.raises(ClipRefused, match="still.webp is a still picture, too short for 8 frames"):
        decode_clip(tmp_path / "still.webp", ClipShape())


def test_audio_only_file_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipRefused, match="clip.mp4 has no video stream"):
        decode_clip(tmp_path / "clip.mp4", ClipShape())


def test_playlist_named_mp4_opens_no_other_file(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.mp4", numbered(8))
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(ClipRefused, match="list.mp4 cannot be decoded"):
        decode_clip(tmp_path / "list.mp4", ClipShape())


def test_decoded_motion_matches_the_video(tmp_path: Path) -> None:
    video = look("ball", 3)
    frames = decode_clip(write_video(tmp_path / "ball.mp4", video), ClipShape(height=32, width=32))
    assert np.abs(frames.astype(int) - video).mean() < 3
