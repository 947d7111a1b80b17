"""When each picture of a video is shown, which pictures a clip needs, and which a fault spoils. Pure: nothing is decoded here."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from lutetia.models.data.decode.cut import ClipRefused, Cut


@dataclass(frozen=True)
class Timeline:
    """When each picture of a video appears, in seconds from its beginning, and its duration in seconds; exact."""

    times: Sequence[Fraction]
    duration: Fraction

    @property
    def frame(self) -> Fraction:
        return self.duration / len(self.times)


@dataclass(frozen=True)
class Track:
    """A video track, as described by its packets.

    Attributes:
        base: seconds of a tick.
        stamps: ticks at which the pictures of the packets appear, in the order of decoding.
        keys: whether each packet can be decoded without those before it.
        end: tick at which the last picture ends.
        aspect: width of a pixel over its height.
        is_timed: whether every packet says when its picture appears; otherwise pictures are counted.
        can_seek: whether decoding may begin at a key; otherwise only the first packet says how to read the others.
    """

    base: Fraction
    stamps: Sequence[int]
    keys: Sequence[bool]
    end: Fraction
    aspect: Fraction
    is_timed: bool
    can_seek: bool = True

    @cached_property
    def shown(self) -> list[int]:
        """The ticks in the order of showing."""
        return sorted(self.stamps)

    @cached_property
    def places(self) -> dict[int, int]:
        """Tick of a packet → its number in the order of decoding."""
        return {stamp: number for number, stamp in reversed(list(enumerate(self.stamps)))}

    @property
    def timeline(self) -> Timeline:
        first = self.shown[0] if self.stamps else 0
        return Timeline([(tick - first) * self.base for tick in self.shown], (self.end - first) * self.base)

    def spoilt_by(self, damaged: int) -> set[int]:
        """The ticks of the packet number `damaged` and of all that may be built on it.

        Those are the packets up to the next key, and those after it that are shown before it.
        """
        key = next((number for number in range(damaged + 1, len(self.keys)) if self.keys[number]), len(self.keys))
        spoilt = set(self.stamps[damaged:key])
        for number in range(key + 1, len(self.stamps)):
            if self.keys[number]:
                break
            if self.stamps[number] < self.stamps[key]:
                spoilt.add(self.stamps[number])
        return spoilt

    def is_missing(self, tick: Fraction, shown: int, spoilt: Collection[int]) -> bool:
        """Whether the picture of the tick `shown` stands in at `tick` for one that could not be decoded.

        One packet in between may have had no picture of its own, as the second field of an interlaced picture.
        """
        between = self.shown[bisect_right(self.shown, shown) : bisect_right(self.shown, tick)]
        return shown in spoilt or len(between) > 1 or any(stamp in spoilt for stamp in between)


def moments(name: str, timeline: Timeline, cut: Cut) -> list[Fraction]:
    """The F moments to show, in seconds from the beginning. Raises ClipRefused if the video is too short."""
    duration = timeline.duration
    if not timeline.times or duration <= 0:
        raise ClipRefused(f"{name} has zero length; remove it or encode it again")
    if cut.start == "whole":
        step, begin, short = duration / cut.frames, Fraction(0), len(timeline.times) < cut.frames
        actual, wanted = f"{len(timeline.times)} frames", f"{cut.frames}"
    else:
        step = 1 / Fraction(cut.fps).limit_denominator(1 << 16)
        window = step * cut.frames
        begin = max((duration - window) / 2, Fraction(0)) if cut.start == "middle" else Fraction(0)
        short = duration + timeline.frame / 2 < window
        actual, wanted = f"{float(duration):.2f} s", f"{float(window):.2f} s ({cut.frames} frames at {cut.fps:g} fps)"
    if short and cut.short == "refuse":
        raise ClipRefused(f"{name} is too short: {actual} instead of {wanted}; remove it, use fewer frames, or set short to loop")
    chosen = [begin + step * i + step / 2 for i in range(cut.frames)]
    if cut.start == "whole" and short:
        chosen = [timeline.frame * i + timeline.frame / 2 for i in range(cut.frames)]
    return [moment % duration if short else min(moment, duration) for moment in chosen]
