"""What a file says of its picture is heard: transparency, HDR, interlacing, mirroring, and the shape of its pixels."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.filter import Graph

from lutetia.models.data.decode.clip import decode_clip
from lutetia.models.data.decode.cut import ClipRefused
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.decode.tone_mapping import HLG, PQ, to_standard_range
from tests.models.data.clip_files import encode, textured, write_video

SHAPE = ClipShape(height=32, width=32)
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [128, 128, 128], [10, 10, 10]])


def hdr(colours: np.ndarray, transfer: int) -> np.ndarray:
    """The signal uint16 [N, 3] in BT.2020 for `colours` of standard range, white at 100 cd/m², as FFmpeg's zscale makes it."""
    signal = colours / 255
    light = np.where(signal < 0.081, signal / 4.5, ((signal + 0.099) / 1.099) ** (1 / 0.45))
    light = light @ np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]).T
    if transfer == PQ:
        root = (light / 100) ** 0.1593017578125
        coded = ((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** 78.84375
    else:
        scene = light * 0.1 ** (1 / 1.2)
        coded = np.where(
            scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(12 * np.maximum(scene, 0.03) - 0.28466892) + 0.55991073
        )
    return np.round(coded * 65535).astype(np.uint16)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_file_has_the_colours_of_standard_range(tmp_path: Path, transfer: int) -> None:
    path = tmp_path / "clip.mkv"
    coded = hdr(COLOURS, transfer)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("ffv1", rate=8)
        stream.height = stream.width = 36
        stream.pix_fmt = "gbrp10le"
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, 9
        picture = np.repeat(np.repeat(coded[:, None], 6, 0), 36, 1)
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb48le").reformat(format="gbrp10le")
            frame.color_trc, frame.color_primaries = transfer, 9
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    frames = decode_clip(path, ClipShape(height=36, width=36))
    assert np.abs(frames[0, 3::6, 18].astype(int) - COLOURS).max() <= 12


def test_brightness_of_hdr_is_compressed_in_order() -> None:
    """Grey of 100, 203, 400, 1,000 and 4,000 cd/m²: brighter stays brighter up to white, and nothing overflows."""
    levels = hdr(np.full((1, 3), 255), PQ)[0, 0] + np.array([0, 4700, 9100, 15500, 25000])
    grey = to_standard_range(np.repeat(levels[:, None, None], 3, 2).clip(0, 65535).astype(np.uint16), PQ, 9)[:, 0, 0].astype(int)
    assert grey[0] > 225
    assert (np.diff(grey) >= 0).all()
    assert grey[-1] == 255


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_of_webm_becomes_white(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "clip.webm"
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[:] = (200, 30, 30, 255)
    picture[:, :16, 3] = 0
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=8)
        stream.height = stream.width = 32
        stream.pix_fmt, stream.options = "yuva420p", {"auto-alt-ref": "0", "deadline": "realtime", "b": "1M"}
        stream.metadata["alpha_mode"] = "1"
        for _ in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="yuva420p")))
        out.mux(stream.encode())
    frames = decode_clip(path, SHAPE)
    assert frames[:, :, :14].min() > 245
    assert np.abs(frames[:, :, 18:].mean((0, 1, 2)) - (200, 30, 30)).max() < 8


def test_interlaced_pictures_are_deinterlaced_as_ffmpeg_does(tmp_path: Path) -> None:
    """A bar moves between the two fields of a picture, which makes a comb of its edges."""
    video = np.zeros((12, 64, 64, 3), np.uint8)
    for index in range(24):
        video[index // 2, index % 2 :: 2, 2 * index : 2 * index + 12] = 220
    path = encode(tmp_path / "clip.mkv", video, "libx264", "yuv420p", {"x264-params": "tff=1:bframes=0", "crf": "10"}, fps=8)
    frames = decode_clip(path, ClipShape(frames=8, fps=8, height=64, width=64, start="start"))
    assert _comb(frames) < _comb(video[:8]) / 4
    expected = []
    with av.open(str(path)) as container:
        graph = Graph()
        source = graph.add_buffer(template=container.streams.video[0])
        graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")).configure()
        for frame in container.decode(video=0):
            graph.push(frame)
            with_delay = graph.vpull() if frame.pts else None
            expected += [with_delay.to_ndarray(format="rgb24")] if with_delay else []
    assert np.abs(np.stack(expected[:8]).astype(int) - frames).mean() < 2


def _comb(frames: np.ndarray) -> float:
    """How much neighbouring rows differ."""
    return float(np.abs(np.diff(frames.astype(int), axis=1)).mean())


ORIENTATIONS = {
    "turned right": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "turned left": ((0, -1, 1, 0), lambda picture: np.rot90(picture, 1)),
    "upside down": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "mirrored": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "mirrored and turned": ((0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_picture_is_turned_and_mirrored_as_its_matrix_says(tmp_path: Path, name: str) -> None:
    (a, b, c, d), turned = ORIENTATIONS[name]
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :16], picture[:16, 16:], picture[16:, :16] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    path = write_video(tmp_path / "clip.mp4", np.repeat(picture[None], 8, 0))
    data, one = path.read_bytes(), 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(data[:at] + struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30) + data[at + 36 :])
    assert np.abs(decode_clip(path, SHAPE)[0].astype(int) - turned(picture)).mean() < 8


@pytest.mark.parametrize("aspect", [(1, 60_000), (60_000, 1), (1000, 3)])
def test_absurd_shape_of_pixels_is_refused(tmp_path: Path, aspect: tuple[int, int]) -> None:
    path = encode(tmp_path / "clip.mp4", textured(8, 32, 32), "libx264", "yuv420p", {}, fps=8, aspect=Fraction(2))
    data = path.read_bytes()
    at = data.index(b"pasp") + 4
    path.write_bytes(data[:at] + struct.pack(">2I", *aspect) + data[at + 8 :])
    with pytest.raises(ClipRefused, match=r"clip.mp4 says that its pixels are .* times as wide as high"):
        decode_clip(path, SHAPE)


def test_long_strip_is_cut_before_it_is_scaled(tmp_path: Path) -> None:
    """16 × 8,192 pixels, scaled to cover a clip of 256 × 256, would have 33 million."""
    video = np.zeros((8, 16, 8192, 3), np.uint8)
    video[:, :, 4096 - 8 : 4096 + 8] = 200
    for name, clip in (("wide.mkv", video), ("high.mkv", video.swapaxes(1, 2))):
        frames = decode_clip(encode(tmp_path / name, clip, "ffv1", "bgr0", {}, fps=8), ClipShape(height=256, width=256))
        assert frames.mean() > 190
