"""What FFmpeg's library passes over in Matroska and WebM: edges that a player is to cut off each picture.

EBML (RFC 8794): an element is a number that names it, a number for its size, and its content. Matroska (RFC 9559) nests
Segment ▸ Tracks ▸ TrackEntry ▸ Video ▸ PixelCropTop, Bottom, Left, Right.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import BinaryIO

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT, _TRACKS, _ENTRY, _VIDEO = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
_CROPS = (b"\x54\xbb", b"\x54\xaa", b"\x54\xcc", b"\x54\xdd")
_CLUSTER = b"\x1f\x43\xb6\x75"
_MOST_TRACKS_BYTES = 1 << 20
_MOST_ELEMENTS = 256  # before the tracks


def is_cropped(file: BinaryIO) -> bool:
    """Whether a video track of the file asks for edges to be cut off. False for what is no Matroska, or is damaged."""
    if file.read(4) != _EBML:
        return False
    file.seek(0)
    tracks = _tracks(file)
    entries = [content for name, content in _elements(tracks) if name == _ENTRY]
    videos = [content for entry in entries for name, content in _elements(entry) if name == _VIDEO]
    return any(name in _CROPS and int.from_bytes(content, "big") for video in videos for name, content in _elements(video))


def _tracks(file: BinaryIO) -> bytes:
    """The content of the element Tracks; empty if it does not come before the pictures."""
    for _ in range(_MOST_ELEMENTS):
        name, size = _name(file), _size(file)
        if not name or name == _CLUSTER:
            return b""
        if name == _TRACKS:
            return file.read(min(size, _MOST_TRACKS_BYTES))
        if name != _SEGMENT:
            file.seek(size, 1)
    return b""


def _elements(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    file = BytesIO(content)
    while name := _name(file):
        yield name, file.read(_size(file))


def _name(file: BinaryIO) -> bytes:
    first = file.read(1)
    return first + file.read(_length(first) - 1) if first and first[0] >> 4 else b""


def _size(file: BinaryIO) -> int:
    first = file.read(1)
    if not first or not first[0]:
        return 0
    length = _length(first)
    return int.from_bytes(bytes([first[0] & (0xFF >> length)]) + file.read(length - 1), "big")


def _length(first: bytes) -> int:
    """How many bytes a number takes: one more than its first byte has leading zeros."""
    return 9 - first[0].bit_length()
