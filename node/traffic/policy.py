"""What the volunteer's cap on bytes allows: training first, then copies, audits and other peers. Pure.

A result is uploaded whole or not begun. So the bytes of every result that is being trained or waits for its verdict are promised:
nothing else may take them. An epoch begins only where what is left covers those promises and one more result of each device.
What training cannot use up by the end of the day goes to copies, audits, lent checks and other peers that fetch blobs.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from dataclasses import dataclass

SETUP = 1.1
"""Factor on the bytes of a result for what goes with it: headers, and chunks that are asked for twice."""


@dataclass(frozen=True)
class ByteCaps:
    """Most bytes that a node may send and receive together in a local day and in a calendar month; None: no cap."""

    day: int | None = None
    month: int | None = None


@dataclass(frozen=True)
class Period:
    """The day and month that bytes are counted for, like 2026-11-30, and when each ends in Unix seconds."""

    day: str
    day_ends: float
    month_ends: float

    @property
    def month(self) -> str:
        return self.day[:7]


def period_at(now: float) -> Period:
    """The local day and month of `now` (Unix seconds)."""
    today = datetime.datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
    first = (today.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)
    return Period(today.date().isoformat(), (today + datetime.timedelta(days=1)).timestamp(), first.timestamp())


@dataclass(frozen=True)
class DeviceBytes:
    """What training on one device still takes. Sizes in bytes.

    Attributes:
        result: of one result, weights and state.
        begun: results that are being trained or wait for their verdicts.
        data: of the training data that an epoch may still have to fetch.
        parent: of the checkpoint to fetch first; 0 where the device has its shard.
        per_second: that its results take at its speed; 0 where it has no shard.
    """

    result: int
    begun: int = 0
    data: int = 0
    parent: int = 0
    per_second: float = 0.0

    @property
    def promised(self) -> float:
        """What may not go to anything else."""
        return SETUP * self.begun * self.result + (self.data if self.begun else 0)

    @property
    def next(self) -> float:
        """What one more result takes."""
        return SETUP * (self.result + self.parent) + self.data


@dataclass(frozen=True)
class BytesLeft:
    """What is left of the cap that leaves least: `bytes`, of `cap`, for the `period`, which ends at `until` (Unix seconds)."""

    bytes: float = math.inf
    cap: int = 0
    period: str = ""
    until: float = math.inf


def bytes_left(caps: ByteCaps, day: int, month: int, period: Period, now: float, records: float = 0.0) -> BytesLeft:
    """What is left for blobs. Below nothing where more was taken than allowed.

    Args:
        caps: the volunteer's.
        day: bytes of today.
        month: bytes of this month.
        period: today and this month.
        now: Unix seconds.
        records: bytes a second that the records of a node take that only waits; they are kept until the period ends.
    """
    choices = [BytesLeft()]
    if caps.day is not None:
        kept = records * (period.day_ends - now)
        choices.append(BytesLeft(caps.day - day - kept, caps.day, "day", period.day_ends))
    if caps.month is not None:
        kept = records * (period.month_ends - now)
        choices.append(BytesLeft(caps.month - month - kept, caps.month, "month", period.month_ends))
    return min(choices, key=lambda choice: choice.bytes)


def promised(devices: Iterable[DeviceBytes]) -> float:
    """Bytes of the results that are being trained or wait for their verdicts."""
    return sum(device.promised for device in devices)


def why_no_epoch(left: BytesLeft, devices: Iterable[DeviceBytes]) -> str | None:
    """Why no device may begin an epoch now; None if they may."""
    devices = tuple(devices)
    more = sum(device.next for device in devices)
    if left.bytes >= promised(devices) + more:
        return None
    shown = f"the cap of {_gb(left.cap)} a {left.period} leaves {_gb(max(0.0, left.bytes))} besides records"
    if more > left.cap:
        return f"{shown}, and one result takes {_gb(more)}, more than the cap allows at all; raise bytes_per_{left.period}"
    return f"{shown}, and results under way and the next one take {_gb(promised(devices) + more)}"


def spare_bytes(left: BytesLeft, devices: Iterable[DeviceBytes], now: float) -> float:
    """Bytes that copies, audits, lent checks and other peers may take: what training leaves until the end of the period.

    `now`: Unix seconds.
    """
    if math.isinf(left.bytes):
        return math.inf
    rest = 0.0
    for device in devices:
        coming = device.per_second * max(0.0, left.until - now)
        rest += device.promised + max(coming, device.next)
    return max(0.0, left.bytes - rest)


def _gb(count: float) -> str:
    """Bytes for people, in the units of the settings."""
    unit, name = next((each for each in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= each[0]), (1e3, "KB"))
    return f"{count / unit:.3g} {name}"
