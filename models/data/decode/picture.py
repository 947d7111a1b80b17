"""One decoded picture as the video means it: upright, square pixels, on white, in standard range, scaled and cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, cast

import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame

from lutetia.models.data.decode.cut import ClipRefused, Cut, Frames
from lutetia.models.data.decode.tone_mapping import HLG, PQ, to_standard_range

_AREA = 0x20 | 0x40000 | 0x80000  # swscale: area averaging, accurate rounding, bit-exact
_BICUBIC = 0x4 | 0x40000 | 0x80000
_MOST_ASPECT = 32  # of a pixel; real ones are below 3
_CROP_BEYOND = 4  # times the area that is kept: then it costs less to cut before scaling


def picture_of(name: str, frame: VideoFrame, aspect: Fraction, cut: Cut) -> Frames:
    """The picture rotated upright, with square pixels, on white, scaled and cut to `cut`: uint8 [H, W, 3].

    Args:
        name: of the file, for refusals.
        frame: as decoded.
        aspect: width of a pixel over its height.
        cut: the size wanted.
    """
    if not 1 / _MOST_ASPECT <= aspect <= _MOST_ASPECT:
        raise ClipRefused(f"{name} says that its pixels are {float(aspect):.3g} times as wide as high; encode it again")
    turned, flip_x, flip_y = _orientation(frame)
    height, width = (cut.width, cut.height) if turned else (cut.height, cut.width)
    frame = _cropped(frame, float(aspect), height, width)
    rows, columns = covering(frame.height, float(frame.width * aspect), height, width)
    scaling = _AREA if rows < frame.height else _BICUBIC
    picture = centre(_pixels(frame, rows, columns, scaling), height, width)
    picture = picture.swapaxes(0, 1) if turned else picture
    return np.ascontiguousarray(picture[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _pixels(frame: VideoFrame, rows: int, columns: int, scaling: int) -> Frames:
    """The picture scaled to uint8 [rows, columns, 3] in standard range, on white."""

    def scaled(pixel_format: str) -> Any:
        return frame.reformat(columns, rows, pixel_format, interpolation=scaling, threads=1).to_ndarray()

    if frame.color_trc in (PQ, HLG):
        return to_standard_range(scaled("rgb48le"), int(frame.color_trc), int(frame.color_primaries))
    is_clear = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    return on_white(scaled("rgba")) if is_clear else cast(Frames, scaled("rgb24"))


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """How to turn the picture upright: swap rows and columns, then mirror left-right, then top-bottom."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(int)
    if abs(a) >= abs(b):
        return False, bool(a < 0), bool(d < 0)
    return True, bool(c < 0), bool(b < 0)


def is_turned(frame: VideoFrame) -> bool:
    """Whether rows and columns are swapped when the picture is shown."""
    return _orientation(frame)[0]


def _cropped(frame: VideoFrame, aspect: float, height: int, width: int) -> VideoFrame:
    """The middle of a picture that is far wider or higher than the cut, or the picture itself."""
    share = width / height / aspect * frame.height / frame.width  # of the columns that are kept
    if 1 / _CROP_BEYOND <= share <= _CROP_BEYOND:
        return frame
    columns = min(frame.width, max(1, round(frame.width * share)))
    rows = min(frame.height, max(1, round(frame.height / share)))
    return next(iter(filtered([frame], "crop", f"{columns}:{rows}")))


def filtered(frames: Iterable[VideoFrame], name: str, options: str) -> Iterator[VideoFrame]:
    """Yield one frame for each of `frames` (equal in size and format), passed through a filter of FFmpeg."""
    graph, given = None, []
    for frame in frames:
        graph = graph or _graph(frame, name, options)
        given.append((frame.pts, frame.time_base))
        graph.push(frame)
        yield from _ready(graph, given)
    if graph is not None:
        graph.push(None)
        yield from _ready(graph, given)


def _graph(frame: VideoFrame, name: str, options: str) -> Graph:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add(name, options), graph.add("buffersink")).configure()
    return graph


def _ready(graph: Graph, given: list[tuple[int | None, Fraction | None]]) -> Iterator[VideoFrame]:
    """Pull the frames that are ready, with the times of those that went in."""
    while True:
        try:
            frame = graph.vpull()
        except (BlockingIOError, EOFError):
            return
        frame.pts, time_base = given.pop(0)
        if time_base is not None:
            frame.time_base = time_base
        yield frame


def covering(rows: float, columns: float, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the scaled picture, which just covers height × width."""
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def centre(picture: Frames, height: int, width: int) -> Frames:
    """The middle of a picture [rows, columns, 3]."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def on_white(picture: Frames) -> Frames:
    """A picture [rows, columns, 4] with opacity, laid on white: [rows, columns, 3]."""
    opacity = picture[..., 3:].astype(np.uint16)
    return ((picture[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
