"""Decode clips to uint8 frames [F, H, W, 3] by one rule.

Time: frame i is what a player shows at `start + (i + ½)/fps`, i = 0 … F−1. The window of F/fps seconds is in the middle of the
video (`middle`), at its beginning (`start`), or is the whole video, resampled to F frames (`whole`). A video that is shorter than
the window by more than half a frame is refused, or repeated from its beginning if `short` is `loop`.
Space: the video is scaled so that it just covers the frame, and the centre is cut out. Rotation tags and non-square pixels are
applied; transparent pixels become white.
"""

from __future__ import annotations

import contextlib
import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeVar, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError
from pydantic import Field

from lutetia.models.data.ingest.webdataset import TarMember
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Count, Positive
from lutetia.system.errors import DataError

Frames = NDArray[np.uint8]  # [F, H, W, 3]
Item = TypeVar("Item")
Result = TypeVar("Result")

# the suffix determines the container: a playlist named .mp4 must not make FFmpeg open other files or addresses
_CONTAINERS = {".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska", ".gif": "gif"}
_SEEK_BEYOND = 5  # seconds; before that, decoding from the start is as fast, and always exact
_AREA = 0x20 | 0x40000 | 0x80000  # swscale: area averaging, accurate rounding, bit-exact
_BICUBIC = 0x4 | 0x40000 | 0x80000
MAX_PIXELS = 1 << 26


class ClipShape(Frozen):
    """How videos are cut in time and space."""

    frames: Count = Field(default=8, description="frames of a clip")
    fps: Positive = Field(default=8.0, description="frames per second of a clip")
    height: Count = Field(default=64, description="height of a clip, px")
    width: Count = Field(default=64, description="width of a clip, px")
    start: Literal["middle", "start", "whole"] = Field(
        default="middle", description="part of a video that becomes the clip; whole: all of it, at another frame rate"
    )
    short: Literal["refuse", "loop"] = Field(
        default="refuse", description="videos that are too short are refused, or repeated from their beginning"
    )


class ClipRefused(DataError):
    """A clip cannot be used. The text starts with its name."""


def hash_file(path: Path | TarMember) -> str:
    """SHA-256 (hex) of the bytes of the file. Raises ClipRefused if it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if file.tell() == 0:
                raise ClipRefused(f"{path.name} is an empty file; remove it or copy it again")
    except OSError as error:
        raise ClipRefused(f"{path.name} cannot be read ({error.strerror}); check the file and its permissions") from error
    return digest


def decode_clip(path: Path | TarMember, shape: ClipShape) -> Frames:
    """The clip as uint8 [F, H, W, 3]. Raises ClipRefused if it cannot be decoded, is empty or too short."""
    try:
        pictures = _webp_pictures(path, shape) if path.suffix.lower() == ".webp" else _video_pictures(path, shape)
    except (FFmpegError, UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0].rstrip(".")
        raise ClipRefused(f"{path.name} cannot be decoded ({reason}); remove it or encode it again") from error
    return np.stack(pictures)


def in_pool(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[tuple[Item, Result | ClipRefused]]:
    """Yield (item, result or refusal) in the order of `items`, computed by `workers` threads a few items ahead.

    Threads are enough: FFmpeg, hashing and torch release the interpreter lock.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="clips") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 4 * workers:
                    yield _outcome(*waiting.popleft())
            while waiting:
                yield _outcome(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()


def _outcome(item: Item, future: Future[Result]) -> tuple[Item, Result | ClipRefused]:
    try:
        return item, future.result()
    except ClipRefused as refusal:
        return item, refusal


@dataclass(frozen=True)
class _Timeline:
    """When each picture of a video appears, in seconds from its beginning, and its duration in seconds; exact."""

    times: list[Fraction]
    duration: Fraction

    @property
    def frame(self) -> Fraction:
        return self.duration / len(self.times)


def _targets(name: str, timeline: _Timeline, shape: ClipShape) -> list[Fraction]:
    """The F moments to show, in seconds from the beginning. Raises ClipRefused if the video is too short."""
    duration = timeline.duration
    if not timeline.times or duration <= 0:
        raise ClipRefused(f"{name} has zero length; remove it or encode it again")
    if shape.start == "whole":
        step, begin, short = duration / shape.frames, Fraction(0), len(timeline.times) < shape.frames
        actual, wanted = f"{len(timeline.times)} frames", f"{shape.frames}"
    else:
        step = 1 / Fraction(shape.fps).limit_denominator(1 << 16)
        window = step * shape.frames
        begin = max((duration - window) / 2, Fraction(0)) if shape.start == "middle" else Fraction(0)
        short = duration + timeline.frame / 2 < window
        actual, wanted = f"{float(duration):.2f} s", f"{float(window):.2f} s ({shape.frames} frames at {shape.fps:g} fps)"
    if short and shape.short == "refuse":
        raise ClipRefused(f"{name} is too short: {actual} instead of {wanted}; remove it, use fewer frames, or set short to loop")
    moments = [begin + step * i + step / 2 for i in range(shape.frames)]
    if shape.start == "whole" and short:
        moments = [timeline.frame * i + timeline.frame / 2 for i in range(shape.frames)]
    return [moment % duration if short else min(moment, duration) for moment in moments]


@dataclass(frozen=True)
class _Track:
    """A video stream, as described by its packets. `first` and `last` are timestamps in ticks of `base` seconds."""

    container: str
    base: Fraction
    first: int
    last: int
    timeline: _Timeline
    aspect: Fraction = Fraction(1)  # width of a pixel over its height


def _video_pictures(path: Path | TarMember, shape: ClipShape) -> list[Frames]:
    track = _scan(path)
    moments = _targets(path.name, track.timeline, shape)
    ticks = [track.first + moment / track.base for moment in moments]
    wanted = sorted(set(ticks))
    far = wanted[0] - track.first > _SEEK_BEYOND / track.base
    shown = _pick(path, track, wanted, shape, seek=True) if far else {}
    if len(shown) < len(wanted):  # no seek was needed, or the index of the file is wrong
        shown = _pick(path, track, wanted, shape, seek=False)
    if len(shown) < len(wanted):
        raise ClipRefused(f"{path.name} is truncated: its last frames cannot be decoded; remove it or encode it again")
    return [shown[tick] for tick in ticks]


@contextlib.contextmanager
def _opened(path: Path | TarMember, name: str) -> Iterator[InputContainer]:
    """Open a video. FFmpeg opens plain files itself, which is faster than through Python."""
    with contextlib.ExitStack() as stack:
        source = str(path) if isinstance(path, Path) else stack.enter_context(path.open())
        yield stack.enter_context(av.open(source, "r", format=name))


def _scan(path: Path | TarMember) -> _Track:
    """Read the timestamps of all packets, without decoding them."""
    name = _CONTAINERS.get(path.suffix.lower())
    if name is None:
        raise ClipRefused(f"{path.name} is not a supported video; use mp4, webm, gif, mov or webp")
    with _opened(path, name) as container:
        if not container.streams.video:
            raise ClipRefused(f"{path.name} has no video stream; remove it or encode it again")
        stream = container.streams.video[0]
        base = stream.time_base or Fraction(1, 1000)
        usual = 1 / (stream.average_rate * base) if stream.average_rate else Fraction(1)
        aspect = stream.sample_aspect_ratio or Fraction(1)  # of the container, or else of the codec
        ticks: list[int] = []
        end = Fraction(0)
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size and stamp is not None and not packet.is_discard:
                ticks.append(stamp)
                end = max(end, stamp + Fraction(packet.duration or usual))
    if not ticks:
        return _Track(name, base, 0, 0, _Timeline([], Fraction(0)))
    ticks.sort()
    timeline = _Timeline([(tick - ticks[0]) * base for tick in ticks], (end - ticks[0]) * base)
    return _Track(name, base, ticks[0], ticks[-1], timeline, aspect)


def _pick(path: Path | TarMember, track: _Track, wanted: list[Fraction], shape: ClipShape, seek: bool) -> dict[Fraction, Frames]:
    """The picture at each of the `wanted` ticks (ascending). Ticks that cannot be decoded are missing from the result."""
    shown: dict[Fraction, Frames] = {}
    queue, current = deque(wanted), None
    with _opened(path, track.container) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # several clips are decoded in parallel
        if seek:
            container.seek(int(wanted[0]), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is None or frame.is_corrupt:
                continue
            if current is None and seek and frame.pts > queue[0]:
                return {}
            while current is not None and queue and frame.pts > queue[0]:
                shown[queue.popleft()] = _picture(path.name, current, track.aspect, shape)
            current = frame
            if not queue:
                return shown
        tolerance = 2 * track.timeline.frame / track.base
        if current is not None and current.pts is not None and current.pts + tolerance >= track.last:
            shown.update({tick: _picture(path.name, current, track.aspect, shape) for tick in queue})
    return shown


def _picture(name: str, frame: VideoFrame, aspect: Fraction, shape: ClipShape) -> Frames:
    """The picture rotated upright, with square pixels, on white, scaled and cut to `shape`: uint8 [H, W, 3]."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ClipRefused(f"{name} has frames of {frame.width}×{frame.height} pixels, too large; scale it down")
    turns = round((frame.rotation or 0) / 90) % 4
    height, width = (shape.width, shape.height) if turns % 2 else (shape.height, shape.width)
    rows, columns = _scaled(frame.height, float(frame.width * aspect), height, width)
    scaling = _AREA if rows < frame.height else _BICUBIC
    clear = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    scaled = cast(
        Frames, frame.reformat(columns, rows, "rgba" if clear else "rgb24", interpolation=scaling, threads=1).to_ndarray()
    )
    return np.ascontiguousarray(np.rot90(_cut(_on_white(scaled) if clear else scaled, height, width), turns))


def _scaled(rows: float, columns: float, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the scaled picture, which just covers height × width."""
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def _cut(picture: Frames, height: int, width: int) -> Frames:
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def _on_white(picture: Frames) -> Frames:
    opacity = picture[..., 3:].astype(np.uint16)
    return ((picture[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _webp_pictures(path: Path | TarMember, shape: ClipShape) -> list[Frames]:
    """Decode animated WebP by Pillow: the decoder of FFmpeg supports still pictures only."""
    with path.open("rb") as file, Image.open(file, formats=["WEBP"]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ClipRefused(f"{path.name} has frames of {image.width}×{image.height} pixels, too large; scale it down")
        rows, columns = _scaled(image.height, image.width, shape.height, shape.width)
        times, pictures, now = [], [], Fraction(0)
        for picture in ImageSequence.Iterator(image):
            scaled = picture.convert("RGBA").resize(
                (columns, rows), Image.Resampling.BOX if rows < image.height else Image.Resampling.BICUBIC
            )
            pictures.append(_cut(_on_white(np.asarray(scaled)), shape.height, shape.width))
            times.append(now)
            now += Fraction(int(picture.info.get("duration") or 0), 1000)
    moments = _targets(path.name, _Timeline(times, now), shape)
    return [pictures[bisect_right(times, moment) - 1] for moment in moments]
