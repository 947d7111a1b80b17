"""Log lines that strangers can cause: one a minute for each source, and how many more there were."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

PERIOD = 60.0
"""Seconds in which a source gets one line."""
MOST_SOURCES = 32
"""Sources with a line of their own in PERIOD. All further ones share one."""
_OTHERS = "other sources"

ExceptionInfo = BaseException | tuple[type[BaseException], BaseException, TracebackType | None] | None


class LimitedLog:
    """Writes lines of one kind to `log`. `clock` gives seconds."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._sources: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """Source -> when its minute ends, and how many lines were left out since."""

    def __call__(self, level: int, source: str, text: str, *values: object, exc_info: ExceptionInfo = None) -> None:
        """Log `text % values`, or count it if `source` had its line.

        Args:
            level: as in `logging`.
            source: whom the limit counts: a network origin where there is one.
            text: the line, with places for `values`.
            values: what the line says.
            exc_info: an error whose traceback to add.
        """
        if not self._log.isEnabledFor(level):
            return
        now = self._clock()
        self._end_minutes(level, now)
        if source not in self._sources and len(self._sources) >= MOST_SOURCES:
            source = _OTHERS
        if source in self._sources:
            ends, left_out = self._sources[source]
            self._sources[source] = ends, left_out + 1
            return
        self._sources[source] = now + PERIOD, 0
        self._log.log(level, text, *values, exc_info=exc_info)

    def _end_minutes(self, level: int, now: float) -> None:
        while self._sources and next(iter(self._sources.values()))[0] <= now:
            source, (_, left_out) = self._sources.popitem(last=False)
            if left_out:
                self._log.log(level, "left out %d more lines like the last one of %s", left_out, source)
