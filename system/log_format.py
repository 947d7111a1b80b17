"""The one format of logs: a printable line per event on stderr, so that texts of other peers cannot forge lines of it."""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType

from lutetia.system.errors import plain, plain_lines

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class PlainFormatter(logging.Formatter):
    """Formats an event as one printable line, and the lines of its traceback."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: _ErrorInfo) -> str:
        return plain_lines(super().formatException(ei))


def stderr_handler() -> logging.Handler:
    """A handler that writes to stderr in the one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter())
    return handler


def wanted_level() -> int:
    """The level that `LUTETIA_LOG` sets: debug, info or warning; info without it."""
    return _LEVELS.get(os.environ.get("LUTETIA_LOG", "info").lower(), logging.INFO)
