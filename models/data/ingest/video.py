"""Decode the user's clips to uint8 frames [F, H, W, 3] by one documented rule.

Time: frame i is what a player shows at `start + (i + ½)/fps`, i = 0 … F−1. The window of F/fps seconds lies in the clip's
middle (`middle`), at its beginning (`start`), or is the whole clip, stretched to F frames whatever its own rate (`whole`).
A clip shorter than the window by more than half a frame is refused, or repeated from its beginning where `short` is `loop`.
Space: the shorter side is scaled to fit, then the centre is cut out; rotation tags and non-square pixels are obeyed,
transparent pixels become white.
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

from lutetia.models.data.ingest.webdataset import TarMember
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Count, Positive
from lutetia.system.errors import DataError

Frames = NDArray[np.uint8]  # [F, H, W, 3]
Item = TypeVar("Item")
Result = TypeVar("Result")

# The container is fixed by the suffix: a playlist that calls itself .mp4 must not make the reader open other files or addresses.
_CONTAINERS = {".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska", ".gif": "gif"}
_SEEK_BEYOND = 5  # seconds; before that, decoding from the start is as quick and never lands wrong
_AREA = 0x20 | 0x40000 | 0x80000  # swscale: area averaging, accurate rounding, bit-exact
_BICUBIC = 0x4 | 0x40000 | 0x80000
MAX_PIXELS = 1 << 26


class ClipShape(Frozen):
    """What every clip becomes."""

    frames: Count = 8
    fps: Positive = 8.0
    height: Count = 64
    width: Count = 64
    start: Literal["middle", "start", "whole"] = "middle"
    short: Literal["refuse", "loop"] = "refuse"


class ClipRefused(DataError):
    """A clip that cannot be used; the text is one sentence that starts with its name."""


def hash_file(path: Path | TarMember) -> str:
    """SHA-256 (hex) of the file's bytes. Raises ClipRefused when it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if file.tell() == 0:
                raise ClipRefused(f"{path.name} is an empty file; remove it or copy it again")
    except OSError as error:
        raise ClipRefused(f"{path.name} cannot be read ({error.strerror}); check the file and its permissions") from error
    return digest


def decode_clip(path: Path | TarMember, shape: ClipShape) -> Frames:
    """The clip as uint8 [F, H, W, 3]. Raises ClipRefused: undecodable, zero-length or too short."""
    try:
        pictures = _webp_pictures(path, shape) if path.suffix.lower() == ".webp" else _video_pictures(path, shape)
    except (FFmpegError, UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0].rstrip(".")
        raise ClipRefused(f"{path.name} cannot be decoded ({reason}); remove it or encode it again") from error
    return np.stack(pictures)


def in_pool(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[tuple[Item, Result | ClipRefused]]:
    """(item, result or refusal) in the order of `items`, computed by `workers` threads, a few items ahead of the reader.

    Threads suffice: FFmpeg, hashing and torch let go of the interpreter while they work.
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
    """When a clip's pictures appear, in seconds from its beginning (exact), and how long it lasts."""

    times: list[Fraction]
    duration: Fraction

    @property
    def frame(self) -> Fraction:
        return self.duration / len(self.times)


def _targets(name: str, timeline: _Timeline, shape: ClipShape) -> list[Fraction]:
    """The moments to show, each within the clip. Raises ClipRefused when it is too short."""
    duration = timeline.duration
    if not timeline.times or duration <= 0:
        raise ClipRefused(f"{name} has zero length; remove it or encode it again")
    if shape.start == "whole":
        step, begin, short = duration / shape.frames, Fraction(0), len(timeline.times) < shape.frames
        has, wants = f"{len(timeline.times)} frames", f"{shape.frames}"
    else:
        step = 1 / Fraction(shape.fps).limit_denominator(1 << 16)
        window = step * shape.frames
        begin = max((duration - window) / 2, Fraction(0)) if shape.start == "middle" else Fraction(0)
        short = duration + timeline.frame / 2 < window
        has, wants = f"{float(duration):.2f} s", f"{float(window):.2f} s ({shape.frames} frames at {shape.fps:g} fps)"
    if short and shape.short == "refuse":
        raise ClipRefused(
            f"{name} is too short: {has} instead of {wants}; remove it, ask for fewer frames or set short clips to loop"
        )
    moments = [begin + step * i + step / 2 for i in range(shape.frames)]
    if shape.start == "whole" and short:
        moments = [timeline.frame * i + timeline.frame / 2 for i in range(shape.frames)]
    return [moment % duration if short else min(moment, duration) for moment in moments]


@dataclass(frozen=True)
class _Track:
    """A video stream as its packets describe it. `first` and `last` are timestamps in ticks of `base` seconds."""

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
    if len(shown) < len(wanted):  # near, or the file's index was wrong
        shown = _pick(path, track, wanted, shape, seek=False)
    if len(shown) < len(wanted):
        raise ClipRefused(f"{path.name} breaks off: its last frames cannot be decoded; remove it or encode it again")
    return [shown[tick] for tick in ticks]


@contextlib.contextmanager
def _opened(path: Path | TarMember, name: str) -> Iterator[InputContainer]:
    """FFmpeg opens files by itself, quicker than through Python."""
    with contextlib.ExitStack() as stack:
        source = str(path) if isinstance(path, Path) else stack.enter_context(path.open())
        yield stack.enter_context(av.open(source, "r", format=name))


def _scan(path: Path | TarMember) -> _Track:
    """Read the timestamps of all packets without decoding them."""
    name = _CONTAINERS.get(path.suffix.lower())
    if name is None:
        raise ClipRefused(f"{path.name} is no video that can be read here; use mp4, webm, gif, mov or webp")
    with _opened(path, name) as container:
        if not container.streams.video:
            raise ClipRefused(f"{path.name} holds no video stream; remove it or encode it again")
        stream = container.streams.video[0]
        base = stream.time_base or Fraction(1, 1000)
        usual = 1 / (stream.average_rate * base) if stream.average_rate else Fraction(1)
        aspect = stream.sample_aspect_ratio or Fraction(1)  # the container's word, else the codec's
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
    """What is on screen at each of the `wanted` ticks (ascending); those that cannot be decoded are missing."""
    shown: dict[Fraction, Frames] = {}
    queue, current = deque(wanted), None
    with _opened(path, track.container) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # clips are decoded side by side
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
    """Upright, square pixels, scaled and cut to `shape`, on white: uint8 [H, W, 3]."""
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
    """Rows and columns after scaling so that the picture just covers height × width."""
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def _cut(picture: Frames, height: int, width: int) -> Frames:
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def _on_white(picture: Frames) -> Frames:
    opacity = picture[..., 3:].astype(np.uint16)
    return ((picture[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _webp_pictures(path: Path | TarMember, shape: ClipShape) -> list[Frames]:
    """Animated WebP by Pillow, since FFmpeg's decoder knows still pictures only."""
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
