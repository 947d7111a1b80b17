"""When a node may train: windows of local time like `22:00-07:00`, `mon-fri 18:30-08:00` or `sat-sun`.

Outside these windows the node is paused as by `lutetia pause`: it offers complete checkpoints, releases its shard and keeps its
copies.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo

from lutetia.node.machine.messages import HoursChanged

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = 24 * 60
_WEEK = 7 * _DAY
_LONGEST_SLEEP = 30.0
"""Seconds after which the clock is read again: it may have been set, or the machine may have slept."""
_NAMES = "|".join(DAYS)
_WINDOW = re.compile(
    rf"(?:(?P<first>{_NAMES})(?:-(?P<last>{_NAMES}))?)?\s*"
    r"(?:(?P<from>[01]?\d|2[0-4]):(?P<from_minute>[0-5]\d)\s*-\s*(?P<to>[01]?\d|2[0-4]):(?P<to_minute>[0-5]\d))?"
)


@dataclass(frozen=True)
class WeeklyHours:
    """Windows [begin, end) in minutes since Monday 00:00, sorted and disjoint."""

    windows: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> WeeklyHours:
        """Parse windows separated by commas. A window past midnight belongs to the day on which it begins. Raises ValueError."""
        return cls(_merged([window for part in text.split(",") for window in _windows(part.strip().lower())]))

    def closed_until(self, now: float, zone: tzinfo | None = None) -> float | None:
        """When the node may train again, in Unix seconds; None: now. `zone`: time zone; None: the machine's."""
        local = datetime.fromtimestamp(now, zone)
        minute = local.weekday() * _DAY + local.hour * 60 + local.minute
        if any(begin <= minute < end for begin, end in self.windows):
            return None
        ahead = min((begin - minute) % _WEEK for begin, _ in self.windows)
        return (local.replace(second=0, microsecond=0) + timedelta(minutes=ahead)).timestamp()


def _windows(part: str) -> list[tuple[int, int]]:
    """The windows of one part of the text, split at the end of the week."""
    match = _WINDOW.fullmatch(part)
    if not part or not match:
        raise ValueError(f"cannot read the hours {part!r}; write them like 22:00-07:00, mon-fri 18:30-08:00 or sat-sun")
    first, last = DAYS.index(match["first"] or "mon"), DAYS.index(match["last"] or match["first"] or "sun")
    begin, end = 0, _DAY
    if match["from"]:
        begin, end = (int(match[name]) * 60 + int(match[f"{name}_minute"]) for name in ("from", "to"))
        if begin == end or begin >= _DAY or end > _DAY:
            raise ValueError(f"the hours {part!r} begin and end at the same time or past midnight; write them like 22:00-07:00")
    length = (end - begin) % _DAY or _DAY
    days = range(first, last + 1 if first <= last else last + 8)
    return [wrapped for day in days for wrapped in _wrapped((day % 7) * _DAY + begin, length)]


def _wrapped(begin: int, length: int) -> list[tuple[int, int]]:
    end = begin + length
    return [(begin, end)] if end <= _WEEK else [(begin, _WEEK), (0, end - _WEEK)]


def _merged(windows: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(windows):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return tuple(merged)


async def follow_schedule(hours: WeeklyHours, feed: Callable[[HoursChanged], None]) -> None:
    """Feed HoursChanged when a window begins or ends, and at the start if none is open, until cancelled."""
    known: float | None = None
    while True:
        now = time.time()
        opening = hours.closed_until(now)
        if opening != known:
            feed(HoursChanged(now, opening))
            known = opening
        await asyncio.sleep(min(_LONGEST_SLEEP, 60 - now % 60))
