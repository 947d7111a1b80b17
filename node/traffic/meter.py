"""Counts a node's bytes across restarts, and says what the volunteer's cap still allows."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from lutetia.node.traffic.policy import (
    ByteCaps,
    BytesLeft,
    DeviceBytes,
    Period,
    bytes_left,
    period_at,
    spare_bytes,
    why_no_epoch,
)
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.system.errors import DiskError, UnreachableError
from lutetia.system.files import write_atomic

log = logging.getLogger(__name__)

OVERHEAD = 1.05
"""Factor on counted bytes for the headers, encryption and acknowledgements below a stream."""
SAVE_SECONDS, SAVE_BYTES = 10.0, 64 << 20
"""The counts are written after so many seconds or bytes; what came after the last time is lost if the machine crashes."""


class ByteCounts(Frozen):
    """Bytes of one local day, and of its month."""

    day: str = Field(default="", description="The local day, like 2026-11-30")
    sent: int = Field(default=0, description="Bytes sent on that day")
    received: int = Field(default=0, description="Bytes received on that day")
    month: int = Field(default=0, description="Bytes sent and received in its month")


class Traffic:
    """The bytes of this machine's nodes, one after another: a `ByteMeter`.

    Args:
        path: file of the counts, in the state folder.
        caps: the volunteer's.
        now: the clock, in Unix seconds.
    """

    def __init__(self, path: Path, caps: ByteCaps, now: Callable[[], float] = time.time) -> None:
        self.path, self.caps, self._now = path, caps, now
        self._counts = ByteCounts()
        with contextlib.suppress(OSError, ValidationError):
            self._counts = ByteCounts.model_validate_json(path.read_bytes())
        self._period = period_at(now())
        self._parts = [0.0, 0.0]
        self._saved = (now(), 0)
        self._spent: BytesLeft | None = None
        self._moving = 0.0
        self.why: str | None = None
        """Why no epoch may begin until the end of the period; None: they may."""
        self.records = 0.0
        """Bytes a second that are kept for records until the period ends."""
        self.devices: Sequence[DeviceBytes] = ()
        """What training takes, as far as it is known."""

    # --- counting -----------------------------------------------------------------------------------------------------------

    def sent(self, count: int) -> None:
        self._parts[0] += count * OVERHEAD

    def received(self, count: int) -> None:
        self._parts[1] += count * OVERHEAD

    @property
    def counts(self) -> ByteCounts:
        """Those of today. A clock that was set back begins no new day, so that nothing is forgotten."""
        if self._now() >= self._period.day_ends or self._counts.day < self._period.day:
            self._begin_day()
        sent, received = (int(part) for part in self._parts)
        self._parts = [part - int(part) for part in self._parts]
        old = self._counts
        if sent or received:
            changed = {"sent": old.sent + sent, "received": old.received + received, "month": old.month + sent + received}
            self._counts = old.model_copy(update=changed)
        return self._counts

    def _begin_day(self) -> None:
        self._period, old = period_at(self._now()), self._counts
        if self._period.day > old.day:
            month = old.month if old.day[:7] == self._period.month else 0
            self._counts = ByteCounts(day=self._period.day, month=month)

    def save(self, *, now: bool = False) -> None:
        """Write the counts where that is due, or `now`. A full disk must not stop training over a statistic."""
        counts, (at, written) = self.counts, self._saved
        due = abs(self._now() - at) >= SAVE_SECONDS or abs(counts.month - written) >= SAVE_BYTES
        if now or due:
            self._saved = self._now(), counts.month
            with contextlib.suppress(DiskError, OSError):
                write_atomic(self.path, canonical(counts))

    # --- the cap ------------------------------------------------------------------------------------------------------------

    @property
    def left(self) -> BytesLeft:
        """What is left for blobs."""
        counts = self.counts
        today = counts.sent + counts.received
        return bytes_left(self.caps, today, counts.month, self._period, self._now(), self.records)

    @property
    def spare(self) -> float:
        """Bytes that may go to anything but this node's own training."""
        return spare_bytes(self.left, self.devices, self._now())

    @property
    def spent_until(self) -> float | None:
        """Until when no epoch may begin, in Unix seconds; None: they may. It stays so until the period ends."""
        if self._spent is not None and self._now() >= self._spent.until:
            self._spent, self.why = None, None
        if self._spent is None and (why := why_no_epoch(self.left, self.devices)):
            self._spent, self.why = self.left, f"{why}; training goes on {_when(self.left, self._period)}"
        return self._spent.until if self._spent else None

    @contextlib.contextmanager
    def sending(self, count: int, *, own: bool) -> Iterator[bool]:
        """Whether to send `count` bytes of a blob; until the block ends they are kept for that.

        `own`: to a coordinator, which fetches what this node made.
        """
        allowed = self._moving + count * OVERHEAD <= (self.left.bytes if own else self.spare)
        with self._keeping(count if allowed else 0):
            yield allowed

    @contextlib.contextmanager
    def fetching(self, count: int) -> Iterator[None]:
        """Keep `count` bytes for a blob. Raises UnreachableError where less is left: nothing is begun that cannot end."""
        left = self.left
        if self._moving + count * OVERHEAD > left.bytes:
            raise UnreachableError(
                f"{count} bytes are to be fetched, and the cap on bytes leaves {max(0, int(left.bytes - self._moving))}; "
                f"raise bytes_per_{left.period}, or wait until the {left.period} has ended"
            )
        with self._keeping(count):
            yield

    @contextlib.contextmanager
    def _keeping(self, count: int) -> Iterator[None]:
        self._moving += count * OVERHEAD
        try:
            yield
        finally:
            self._moving -= count * OVERHEAD

    @property
    def capped(self) -> bool:
        return not math.isinf(self.left.bytes)


def _when(left: BytesLeft, period: Period) -> str:
    return "at midnight" if left.until == period.day_ends else "with the next month"
