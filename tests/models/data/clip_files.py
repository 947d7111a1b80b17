"""Small real video files of three clearly different looks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

CODECS = {
    ".mp4": ("libx264", "yuv444p"), ".mov": ("libx264", "yuv420p"), ".webm": ("libvpx-vp9", "yuv420p"), ".gif": ("gif", "rgb8"),
}  # fmt: skip
OPTIONS = {"libx264": {"crf": "8", "preset": "ultrafast"}, "libvpx-vp9": {"crf": "20", "b": "0", "deadline": "realtime"}}


def numbered(frames: int, height: int = 32, width: int = 32) -> np.ndarray:
    """A grey clip whose frame i has brightness 10 * (i + 1), so that its brightness identifies a frame."""
    return np.stack([np.full((height, width, 3), 10 * (i + 1) % 256, np.uint8) for i in range(frames)])


def frame_numbers(frames: np.ndarray) -> list[int]:
    """The numbers of these frames of `numbered`."""
    return [round(float(frame.mean()) / 10) - 1 for frame in frames]


def write_video(path: Path, video: np.ndarray, fps: float = 8, options: Mapping[str, str] | None = None) -> Path:
    """Write uint8 [F, H, W, 3]; the suffix chooses container and codec."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webp":
        first, *others = [Image.fromarray(frame) for frame in video]
        first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), lossless=True)
        return path
    codec, pixel_format = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], pixel_format
        stream.options = {**OPTIONS.get(codec, {}), **(options or {})}
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


def textured(frames: int, height: int, width: int) -> np.ndarray:
    """A picture full of detail, through which the view moves by two columns and one row a frame."""
    rows, columns = height + frames, width + 2 * frames
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    rng, picture = np.random.default_rng(0), np.zeros((rows, columns, 3), np.float32)
    for _ in range(12):
        down, right, phase = rng.uniform(-0.35, 0.35, 2).tolist() + [rng.uniform(0, 6)]
        picture += np.sin(down * y + right * x + phase)[..., None] * rng.uniform(0.3, 1, 3)
    picture = ((picture - picture.min()) / (picture.max() - picture.min()) * 255).astype(np.uint8)
    return np.stack([picture[i : i + height, 2 * i : 2 * i + width] for i in range(frames)])


def encode(
    path: Path, video: np.ndarray, codec: str, pixel_format: str, options: Mapping[str, str], *, fps: int,
    aspect: Fraction | None = None,
) -> Path:  # fmt: skip
    """Write uint8 [F, H, W, 3] by a codec of FFmpeg; the suffix chooses the container, `aspect` the shape of a pixel."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.options = *video.shape[1:3], pixel_format, dict(options)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


def write_tracks(
    path: Path, videos: Sequence[np.ndarray], dispositions: Mapping[int, Any] | None = None, title: str = ""
) -> Path:
    """Write several lossless video tracks of 8 frames/s into one file, with their dispositions and a title."""
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        streams: list[Any] = [container.add_stream("ffv1", rate=8) for _ in videos]
        for number, (stream, video) in enumerate(zip(streams, videos, strict=True)):
            stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "bgr0"
            stream.disposition = (dispositions or {}).get(number, 0)
        for stream, video in zip(streams, videos, strict=True):
            for picture in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode())
    return path


def look(kind: str, seed: int, frames: int = 8, size: int = 32) -> np.ndarray:
    """`ball`: a red ball on a dark background; `bars`: green stripes that move down on white; `noise`: blue flicker."""
    rng = np.random.default_rng([seed, len(kind)])
    y, x = np.mgrid[0:size, 0:size]
    video = np.zeros((frames, size, size, 3), np.uint8)
    offset, other = rng.integers(4, size - 4, 2)
    for index in range(frames):
        if kind == "ball":
            video[index] = (15, 15, 25)
            video[index][(x - (offset + 2 * index) % size) ** 2 + (y - other) ** 2 < 30] = (230, 40, 40)
        elif kind == "bars":
            video[index] = np.where((((y + index + offset) // 4) % 2 == 0)[..., None], (40, 200, 60), (250, 250, 245))
        else:
            video[index] = rng.integers(0, 60, (size, size, 3)) + np.array([20, 40, 180])
    video[:, :4, :4] = rng.integers(0, 256, 3)  # every clip is different
    return video


WORDS = {"ball": "a red ball rolls", "bars": "green stripes slide down", "noise": "blue static flickers"}


def make_folder(folder: Path, counts: Mapping[str, int], test: Iterable[int] = (), frames: int = 8) -> Path:
    """Make a folder of mp4 clips of the three looks with `metadata.jsonl`; the clip numbers in `test` are test clips."""
    held, rows, number = set(test), [], 0
    for kind, count in counts.items():
        for _ in range(count):
            name = f"{kind}-{number:03d}.mp4"
            write_video(folder / name, look(kind, number, frames))
            rows.append({"file_name": name, "caption": WORDS[kind], "kind": kind, "split": "test" if number in held else "train"})
            number += 1
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
