"""The one place that opens media files for reading. A file is data: nothing in its name or content makes FFmpeg open another.

FFmpeg reads names as addresses: `concat:a.mp4` is another file, `http:/host/a.mp4` a request. A playlist, whatever its name, is a
list of addresses. So a name is passed as an absolute path behind `file:`, no other protocol is allowed, and only containers that
hold their own pictures are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from av.codec import CodecContext
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from lutetia.models.data.decode.cut import MAX_PIXELS, ClipRefused
from lutetia.models.data.decode.matroska import is_cropped
from lutetia.models.data.ingest.webdataset import TarMember

CONTAINERS = (
    "apng", "asf", "avi", "dv", "flv", "gif", "ivf", "matroska", "webm", "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "mpeg",
    "mpegts", "mxf", "nut", "ogg", "rm", "yuv4mpegpipe",
)  # fmt: skip
"""Demuxers of FFmpeg that open no second file. The content of a file chooses among them, not its suffix."""

_BETTER = {"vp9": "libvpx-vp9"}  # FFmpeg's own decoder notices far less damage
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these drop transparency
_DOLBY_VISION_ALONE = ("dvh1", "dvhe", "dav1", "dva1", "dvav")
"""Of MP4: the picture means nothing to other decoders. Pictures that do are called hvc1, hev1, av01 or avc1."""
_STRICT = {
    "err_detect": "crccheck+bitstream+buffer+explode",  # a fault is an error: by default its effect on the picture is hidden
    "max_pixels": str(MAX_PIXELS),
}
_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file", **_STRICT}


@dataclass(frozen=True)
class Media:
    """An open video.

    Attributes:
        container: of the file.
        stream: the video track that a player shows.
        decoder: of that track, with one thread: several clips are decoded in parallel.
    """

    container: InputContainer
    stream: VideoStream
    decoder: VideoCodecContext


@contextlib.contextmanager
def open_media(path: Path | TarMember) -> Iterator[Media]:
    """Open a video file, or a member of an archive, for reading.

    Raises ClipRefused if it has no video or its pictures are too large, FFmpegError or OSError if it cannot be read.
    """
    with path.open("rb") as file:
        if is_cropped(file):
            raise ClipRefused(f"{path.name} asks for its edges to be cut off (PixelCrop), which is not done here; encode it cut")
    with contextlib.ExitStack() as stack:
        source = f"file:{os.path.abspath(path)}" if isinstance(path, Path) else stack.enter_context(path.open())
        container = stack.enter_context(av.open(source, "r", options=_OPTIONS, metadata_errors="ignore"))
        stream = _shown(container.streams.video)
        if stream is None:
            raise ClipRefused(f"{path.name} has no video stream; remove it or encode it again")
        context = stream.codec_context
        if context is not None and context.codec_tag in _DOLBY_VISION_ALONE:
            raise ClipRefused(
                f"{path.name} is Dolby Vision of a profile whose colours only its own decoders know (5); convert it to HDR10, "
                "HLG or standard range"
            )
        if context is None or not context.width or not context.height or context.width * context.height > MAX_PIXELS:
            size = f"{context.width}×{context.height} pixels" if context is not None and context.width else "an unknown size"
            raise ClipRefused(f"{path.name} has pictures of {size}, at most {MAX_PIXELS} pixels can be read; scale it down")
        yield Media(container, stream, _decoder(stream, context))


def _shown(streams: tuple[VideoStream, ...]) -> VideoStream | None:
    """The first default track, or else the first. Cover pictures and thumbnails are no tracks."""
    no_track = Disposition.attached_pic | Disposition.timed_thumbnails
    tracks = [stream for stream in streams if not stream.disposition & no_track]
    marked = [stream for stream in tracks if stream.disposition & Disposition.default]
    return next(iter(marked or tracks), None)


def _decoder(stream: VideoStream, context: VideoCodecContext) -> VideoCodecContext:
    has_alpha = ("alpha_mode", "1") in ((name.lower(), value) for name, value in stream.metadata.items())
    has_bytes = context.format is not None and all(component.bits == 8 for component in context.format.components)
    better = (_WITH_ALPHA if has_alpha else _BETTER).get(context.name) if has_bytes else None  # libvpx reads 8 bits only
    decoder = context
    if better is not None:
        made = CodecContext.create(better, "r")
        assert isinstance(made, VideoCodecContext)
        decoder = made
        for name in ("color_range", "color_primaries", "color_trc", "colorspace"):  # what the container says of them
            setattr(decoder, name, getattr(context, name))
    decoder.thread_count = 1
    decoder.options = dict(_STRICT)
    return decoder
