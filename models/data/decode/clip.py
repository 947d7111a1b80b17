"""Decode clips to uint8 frames [F, H, W, 3] by one rule.

Time: frame i is what a player shows at `start + (i + ½)/fps`, i = 0 … F−1. The window of F/fps seconds is in the middle of the
video (`middle`), at its beginning (`start`), or is the whole video, resampled to F frames (`whole`). A video that is shorter than
the window by more than half a frame is refused, or repeated from its beginning if `short` is `loop`.
Space: the video is scaled so that it just covers the frame, and the centre is cut out. Rotation, mirroring and non-square pixels
are applied; transparent pixels become white; HDR becomes standard range; interlaced pictures are deinterlaced.
Faults: a picture that cannot be decoded, or is built on one, is missing. A video that lacks a picture of the clip is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame

from lutetia.models.data.decode.cut import ClipLook, ClipRefused, Cut, Frames
from lutetia.models.data.decode.media import Media, open_media
from lutetia.models.data.decode.overrun import CODECS, OverrunCheck
from lutetia.models.data.decode.picture import filtered, is_turned, picture_of
from lutetia.models.data.decode.pillow.still import is_still, still_look, still_pictures
from lutetia.models.data.decode.pillow.webp import is_webp, webp_look, webp_pictures
from lutetia.models.data.decode.timeline import Track, moments
from lutetia.models.data.ingest.webdataset import TarMember

_SEEK_BEYOND = 5  # seconds; before that, decoding from the start is as fast, and always exact
_FIRST_PACKETS = 64  # among which the first picture is, if the video can be decoded at all
_LOOK_AHEAD = 4  # pictures after the last one wanted: a picture may be built on one that is shown later


def hash_file(path: Path | TarMember) -> str:
    """SHA-256 (hex) of the bytes of the file. Raises ClipRefused if it cannot be read or is empty."""
    try:
        if isinstance(path, Path) and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer for ever
            raise ClipRefused(f"{path.name} is no regular file; remove it")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if file.tell() == 0:
                raise ClipRefused(f"{path.name} is an empty file; remove it or copy it again")
    except OSError as error:
        raise ClipRefused(f"{path.name} cannot be read ({error.strerror}); check the file and its permissions") from error
    return digest


def decode_clip(path: Path | TarMember, cut: Cut) -> Frames:
    """The clip as uint8 [F, H, W, 3]. Raises ClipRefused if it cannot be decoded, is damaged, empty or too short."""
    try:
        if is_still(path):
            pictures = still_pictures(path, cut)
        else:
            pictures = webp_pictures(path, cut) if is_webp(path) else _video_pictures(path, cut)
    except (FFmpegError, OSError, ValueError, SyntaxError, MemoryError) as error:
        lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
        raise ClipRefused(f"{path.name} cannot be decoded ({lines[0].rstrip('.')}); remove it or encode it again") from error
    return np.stack(pictures)


def _video_pictures(path: Path | TarMember, cut: Cut) -> list[Frames]:
    track = scan(path)
    chosen = moments(path.name, track.timeline, cut)
    ticks = [track.shown[0] + moment / track.base for moment in chosen]
    wanted = sorted(set(ticks))
    search = _Search(path, track, cut, wanted)
    far = wanted[0] - track.shown[0] > _SEEK_BEYOND / track.base
    found = search.run(seek=True) if far and track.is_timed and track.can_seek else {}
    if len(found) < len(wanted):  # no seek was needed, or what lies between keys cannot be decoded alone
        found = search.run(seek=False)
    if search.is_disordered:  # AVI with B-frames: its packets bear no times of showing, and those that FFmpeg guesses are wrong
        found = _Search(path, replace(track, is_timed=False), cut, wanted).run(seek=False)
    lost = [tick for tick in wanted if tick not in found]
    if lost:
        at = float((lost[0] - track.shown[0]) * track.base)
        raise ClipRefused(
            f"{path.name} is damaged or truncated: its picture at {at:.2f} s cannot be decoded; remove it or encode it again"
        )
    return [found[tick] for tick in ticks]


def scan(path: Path | TarMember) -> Track:
    """Read the timestamps of all packets, without decoding them. Raises as `open_media`."""
    stamps: list[int] = []
    keys: list[bool] = []
    is_timed, end = True, Fraction(0)
    with open_media(path) as media:
        stream = media.stream
        base = stream.time_base or Fraction(1, 1000)
        usual = 1 / (stream.average_rate * base) if stream.average_rate else Fraction(1)
        aspect = stream.sample_aspect_ratio or Fraction(1)  # of the container, or else of the codec
        for packet in media.container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size and stamp is not None and not packet.is_discard:
                is_timed = is_timed and packet.pts is not None
                stamps.append(stamp)
                keys.append(packet.is_keyframe)
                end = max(end, stamp + Fraction(packet.duration or usual))
        # 4:4:4 of old x264 is decoded in another way, which FFmpeg knows from a note in the first packet
        can_seek = not (stream.codec_context.name == "h264" and "4:4:4" in str(stream.codec_context.profile))
    return Track(base, stamps, keys, end, aspect, is_timed, can_seek)


def look_at(path: Path | TarMember) -> ClipLook:
    """Size as it is shown, duration and frame rate of a clip; at most one picture is decoded. Raises ClipRefused."""
    try:
        if is_still(path):
            return still_look(path)
        if is_webp(path):
            return webp_look(path)
        track = scan(path)
        height, width = _shown_size(path, track)
    except (FFmpegError, OSError, ValueError, SyntaxError, MemoryError) as error:
        lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
        raise ClipRefused(f"{path.name} cannot be read ({lines[0].rstrip('.')}); remove it or encode it again") from error
    return ClipLook(height, width, float(track.timeline.duration), len(track.stamps))


def _shown_size(path: Path | TarMember, track: Track) -> tuple[int, int]:
    """Height and width with square pixels, upright: a phone writes a wide picture, and how to turn it."""
    with open_media(path) as media:
        context = media.stream.codec_context
        height, width, turned = context.height, round(context.width * track.aspect), False
        for packet in itertools.islice(media.container.demux(media.stream), _FIRST_PACKETS):
            try:
                frames = media.decoder.decode(packet)
            except FFmpegError:
                continue  # a damaged picture is found when the clip is decoded
            if frames:
                turned = is_turned(frames[0])
                break
    return (width, height) if turned else (height, max(1, width))


class _Search:
    """The search for the pictures at the ticks `wanted` (ascending) of one file.

    `is_disordered` says after a run that pictures came in another order than their times say.
    """

    def __init__(self, path: Path | TarMember, track: Track, cut: Cut, wanted: list[Fraction]) -> None:
        self._path, self._track, self._cut, self._wanted = path, track, cut, wanted
        self._spoilt: set[int] = set()
        self.is_disordered = False

    def run(self, seek: bool) -> dict[Fraction, Frames]:
        """The sound pictures. Ticks whose picture cannot be decoded are missing from the result."""
        self._spoilt.clear()
        chosen: dict[Fraction, tuple[int, Frames]] = {}
        queue, ahead = list(reversed(self._wanted)), 0
        current, picture = None, None
        with open_media(self._path) as media:
            if seek:
                media.container.seek(int(self._wanted[0]), stream=media.stream, backward=True)
            for frame in _deinterlaced(self._frames(media, seek)):
                if frame.pts is None:
                    continue
                if current is not None and frame.pts < (current.pts or 0):
                    self.is_disordered = True
                    return {}
                while current is not None and queue and frame.pts > queue[-1]:
                    picture = picture if picture is not None else self._picture(current)
                    chosen[queue.pop()] = (current.pts or 0, picture)
                current, picture = frame, None
                ahead += not queue
                if ahead > _LOOK_AHEAD:
                    break
            while queue and current is not None:
                chosen[queue.pop()] = (current.pts or 0, self._picture(current))
        return {
            tick: found for tick, (shown, found) in chosen.items()
            if shown <= tick and not self._track.is_missing(tick, shown, self._spoilt)
        }  # fmt: skip

    def _picture(self, frame: VideoFrame) -> Frames:
        return picture_of(self._path.name, frame, self._track.aspect, self._cut)

    def _frames(self, media: Media, has_sought: bool) -> Iterator[VideoFrame]:
        """Decode, and note which pictures a fault spoils."""
        track, count, waits_for_key = self._track, 0, has_sought
        overrun = OverrunCheck(media.decoder) if media.decoder.name in CODECS else None
        for packet in media.container.demux(media.stream):
            number = track.places.get(packet.pts if packet.pts is not None else packet.dts or 0)
            if waits_for_key and packet.is_keyframe and number is not None:
                waits_for_key = False
                self._spoil(number - 1)  # with all that was not decoded and is shown after this key
            try:
                frames = media.decoder.decode(packet)
            except FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                self._spoil(number if track.is_timed else min(count, len(track.stamps) - 1))
                frames = []
            unsound = overrun.unsound(packet, frames) if overrun else []
            if packet.is_corrupt:
                self._spoil(number)
            for frame in frames:
                if not track.is_timed:
                    frame.pts = track.shown[count] if count < len(track.shown) else None
                count += 1
                if (frame.is_corrupt or frame in unsound) and frame.pts is not None:
                    self._spoil(track.places.get(frame.pts))
                yield frame

    def _spoil(self, number: int | None) -> None:
        if number is not None and number >= 0:
            self._spoilt |= self._track.spoilt_by(number)


def _deinterlaced(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """The same frames; from the first interlaced one on, interlaced frames are deinterlaced (bwdif, frames at the same rate)."""
    for frame in frames:
        if frame.interlaced_frame:
            yield from filtered(_chained(frame, frames), "bwdif", "mode=send_frame:deint=interlaced")
            return
        yield frame


def _chained(first: VideoFrame, others: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    yield first
    yield from others
