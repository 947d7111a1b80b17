"""Opening media: names are no addresses, the content decides the container, and the track that a player shows is read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from lutetia.models.data.decode.clip import decode_clip
from lutetia.models.data.decode.cut import ClipRefused
from lutetia.models.data.decode.media import open_media
from lutetia.models.data.decode.shape import ClipShape
from tests.models.data.clip_files import encode, frame_numbers, numbered, textured, write_tracks, write_video

SHAPE = ClipShape(height=32, width=32)


@pytest.mark.parametrize(
    "name", ["concat:other.mp4", "12:30:00.mp4", "http:/127.0.0.1:9/x.mp4", "subfile,,start,0,end,0,,:other.mp4"]
)
def test_name_like_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / "other.mp4", 255 - numbered(8))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(write_video(tmp_path / "mine.mp4", numbered(8)), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert frame_numbers(decode_clip(Path(".") / name, SHAPE)) == list(range(8))


@pytest.mark.parametrize(
    "text",
    ["ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"],
)
@pytest.mark.parametrize("suffix", [".mp4", ".ffconcat", ".m3u8", ""])
def test_list_of_addresses_is_refused(tmp_path: Path, text: str, suffix: str) -> None:
    write_video(tmp_path / "other.mp4", numbered(8))
    path = tmp_path / f"list{suffix}"
    path.write_text(text)
    with pytest.raises(ClipRefused, match="cannot be decoded"):
        decode_clip(path, SHAPE)


@pytest.mark.parametrize("suffix", [".webm", ".mov", ".gif", ".webp"])
def test_content_decides_the_container(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", numbered(8)).rename(tmp_path / "clip.mp4")
    assert frame_numbers(decode_clip(path, SHAPE)) == list(range(8))


def test_title_that_is_not_utf8_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    write_tracks(path, [numbered(8)], title="XXXXXXXX")
    path.write_bytes(path.read_bytes().replace(b"XXXXXXXX", b"caf\xe9\xff\xfe\x80 "))
    assert frame_numbers(decode_clip(path, SHAPE)) == list(range(8))


@pytest.mark.parametrize(("default", "shown"), [(0, 0), (1, 1), (2, 2)])
def test_default_track_is_read(tmp_path: Path, default: int, shown: int) -> None:
    clips = [np.full((8, 32, 32, 3), 50 * (i + 1), np.uint8) for i in range(3)]
    path = write_tracks(tmp_path / "clip.mkv", clips, {default: Disposition.default})
    assert abs(decode_clip(path, SHAPE).mean() - 50 * (shown + 1)) < 2


def test_cover_picture_is_no_track(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        cover: Any = out.add_stream("mjpeg", rate=8)
        cover.width = cover.height = 96
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        video: Any = out.add_stream("libx264", rate=8)
        video.width = video.height = 32
        video.pix_fmt = "yuv444p"
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((96, 96, 3), 255, np.uint8), format="rgb24")))
        for picture in numbered(8):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode())
    with av.open(str(path)) as made:
        assert Disposition.attached_pic in [stream.disposition for stream in made.streams.video]
    assert frame_numbers(decode_clip(path, SHAPE)) == list(range(8))


def test_edit_list_of_mp4_cuts_the_beginning(tmp_path: Path) -> None:
    video, path = numbered(24), tmp_path / "cut.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8, options={"bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in video]
        for packet in [packet for frame in [*frames, None] for packet in stream.encode(frame)]:
            ticks = 6 * int(1 / (8 * packet.time_base))  # times before zero are cut by an edit list
            packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            container.mux(packet)
    assert frame_numbers(decode_clip(path, ClipShape(frames=8, fps=8, height=32, width=32, start="start"))) == list(range(6, 14))


@pytest.mark.parametrize("pixels", [0, 8])
def test_edges_that_matroska_cuts_off_are_refused_by_name(tmp_path: Path, pixels: int) -> None:
    """The element of the display's unit is made one for the pixels to cut off at the left."""
    path = encode(tmp_path / "x.mkv", textured(8, 48, 64), "libx264", "yuv420p", {}, fps=8)
    data = path.read_bytes()
    assert data.count(b"\x54\xb2\x81\x04") == 1
    path.write_bytes(data.replace(b"\x54\xb2\x81\x04", b"\x54\xcc\x81" + bytes([pixels])))
    if not pixels:
        assert len(decode_clip(path, SHAPE)) == SHAPE.frames
        return
    with pytest.raises(ClipRefused, match=r"x.mkv asks for its edges to be cut off \(PixelCrop\)"):
        decode_clip(path, SHAPE)


def test_dolby_vision_that_others_cannot_show_is_refused_by_name(tmp_path: Path) -> None:
    path = encode(tmp_path / "x.mp4", textured(8, 48, 64), "libx265", "yuv420p", {"x265-params": "log-level=none"}, fps=8)
    data = path.read_bytes()
    assert data.count(b"hev1") == 1
    path.write_bytes(data.replace(b"hev1", b"dvhe"))
    with pytest.raises(ClipRefused, match="x.mp4 is Dolby Vision of a profile .* convert it to HDR10"):
        decode_clip(path, ClipShape(height=32, width=32))


def test_enormous_pictures_are_refused_before_decoding(tmp_path: Path) -> None:
    """A few hundred bytes say that a picture has 1.6 thousand million pixels."""
    path = write_video(tmp_path / "clip.gif", numbered(8))
    data = bytearray(path.read_bytes())
    data[6:10] = b"\x40\x9c\x40\x9c"  # 40,000 × 40,000
    path.write_bytes(data)
    with pytest.raises(ClipRefused, match="clip.gif (has pictures of|cannot be decoded)"):
        decode_clip(path, SHAPE)


def test_own_modules_are_not_taken_from_the_folder_of_clips(tmp_path: Path) -> None:
    """Decoder processes are started in the folder of the user, where a file may be called like a library."""
    (tmp_path / "av.py").write_text("raise SystemExit('code of a stranger')")
    write_video(tmp_path / "clip.mp4", numbered(8))
    code = (
        "from pathlib import Path; from lutetia.models.data.decode.pool import DecoderPool;"
        "from lutetia.models.data.decode.cut import PlainCut\n"
        "with DecoderPool() as pool: print(pool.decode(Path('clip.mp4'), PlainCut(8, 8.0, 32, 32, 'middle', 'refuse')).shape)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("(8, 32, 32, 3)", "")


def test_media_has_one_thread(tmp_path: Path) -> None:
    with open_media(write_video(tmp_path / "clip.webm", numbered(8))) as media:
        assert (media.decoder.name, media.decoder.thread_count) == ("libvpx-vp9", 1)
