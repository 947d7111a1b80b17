"""Damage that FFmpeg does not mark in VP8 and HEVC: a decoder that reads on behind the end of a packet.

The entropy coders of both need every bit before the end and none behind it. After a damaged bit the decoder loses its place, and
often asks for more than the packet holds: it is given zeros, and the smear counts as a picture. So a second decoder gets the same
packets with other bytes behind their ends. A picture that is not the same in both is built on bytes that nobody encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from av.codec import CodecContext
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

CODECS = ("vp8", "libvpx", "hevc")
"""Decoders that do not mark it themselves; those of H.264, AV1 and MPEG-4 do."""
_BEHIND = bytes(range(1, 129))  # without the start codes of HEVC
_START_CODE = re.compile(rb"(\x00\x00\x01)")
_SLICES = range(32)  # types of NAL units that hold pictures


class OverrunCheck:
    """Decodes the packets of `decoder` once more, with bytes behind them."""

    def __init__(self, decoder: VideoCodecContext) -> None:
        twin = CodecContext.create(decoder.name, "r")
        assert isinstance(twin, VideoCodecContext)
        twin.extradata, twin.thread_count, twin.options = decoder.extradata, 1, dict(decoder.options)
        self._twin = twin
        self._is_hevc, record = decoder.name == "hevc", bytes(decoder.extradata or b"")
        # the configuration record of MP4 and Matroska; in other containers start codes separate the units
        self._size_bytes = (record[21] & 3) + 1 if len(record) > 22 and record[0] == 1 else 0

    def unsound(self, packet: Packet, frames: Sequence[VideoFrame]) -> list[VideoFrame]:
        """Those of `frames`, which the decoder gave for `packet`, that depend on bytes behind the packet."""
        if packet.size:
            longer = Packet(self._longer(bytes(packet)))
            longer.pts, longer.dts, longer.time_base = packet.pts, packet.dts, packet.time_base
            for side in packet.iter_sidedata():  # transparency of WebM
                longer.set_sidedata(side)
        else:
            longer = None
        try:
            others = {frame.pts: frame for frame in self._twin.decode(longer)}
        except FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            others = {}
        return [frame for frame in frames if frame.pts not in others or not _equal(frame, others[frame.pts])]

    def _longer(self, data: bytes) -> bytes:
        if not self._is_hevc:
            return data + _BEHIND
        return _with_sizes(data, self._size_bytes) if self._size_bytes else _with_start_codes(data)


def _with_start_codes(data: bytes) -> bytes:
    return b"".join(part if number % 2 else _longer_unit(part) for number, part in enumerate(_START_CODE.split(data)))


def _longer_unit(unit: bytes) -> bytes:
    """The unit with bytes behind it, if it holds a part of a picture."""
    return unit + _BEHIND if unit and unit[0] >> 1 & 63 in _SLICES else unit


def _with_sizes(data: bytes, size_bytes: int) -> bytes:
    parts: list[bytes] = []
    for unit in _units(data, size_bytes):
        longer = _longer_unit(unit)
        parts += [len(longer).to_bytes(size_bytes, "big"), longer]
    return b"".join(parts)


def _units(data: bytes, size_bytes: int) -> Iterator[bytes]:
    place = 0
    while place + size_bytes <= len(data):
        begin = place + size_bytes
        place = begin + int.from_bytes(data[place:begin], "big")
        yield data[begin:place]


def _equal(one: VideoFrame, other: VideoFrame) -> bool:
    if (one.width, one.height, one.format.name) != (other.width, other.height, other.format.name):
        return False
    return all((a == b).all() for a, b in zip(_planes(one), _planes(other), strict=True))


def _planes(frame: VideoFrame) -> Iterator[np.ndarray]:
    """The bytes of each plane, without what fills up its lines."""
    size = (frame.format.components[0].bits + 7) // 8
    for plane in frame.planes:
        buffer: Any = plane
        yield np.frombuffer(buffer, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width * size]
