"""The one format of logs: a printable line per event on stderr, so that texts of other peers cannot forge lines of it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from types import TracebackType
from typing import TextIO

from lutetia.system.errors import plain, plain_lines

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class PlainFormatter(logging.Formatter):
    """Formats an event as one printable line, and the lines of its traceback."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: _ErrorInfo) -> str:
        return plain_lines(super().formatException(ei))


class StatusLineHandler(logging.StreamHandler[TextIO]):
    """Writes events to a terminal above a line that changes in place.

    The cursor stays at the beginning of that line, so that what a child process writes replaces it (see `stderr_handler`).
    `close` removes the line: what is printed afterwards may be shorter.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(PlainFormatter())
        self._status = ""

    def set_status(self, text: str) -> None:
        """Show `text`, cut to the terminal's width; an empty text removes the line."""
        with self.lock or contextlib.nullcontext():
            self._status = plain(text)
            self._draw()

    def emit(self, record: logging.LogRecord) -> None:
        self.stream.write("\r\x1b[2K")
        super().emit(record)
        self._draw()

    def close(self) -> None:
        if self._status:
            self.set_status("")
        super().close()

    def _draw(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal has gone
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[2K{self._status[:width]}\r")
            self.stream.flush()


class _ErasingHandler(logging.StreamHandler[TextIO]):
    """Writes events to a terminal on which another process may show a line of its own: the whole line is replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream.write("\r\x1b[2K")
        super().emit(record)


def stderr_handler() -> logging.Handler:
    """A handler that writes to stderr in the one format."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    handler = (_ErasingHandler if on_terminal else logging.StreamHandler)(sys.stderr)
    handler.setFormatter(PlainFormatter())
    return handler


def wanted_level() -> int:
    """The level that `LUTETIA_LOG` sets: debug, info or warning; info without it."""
    return LEVELS.get(os.environ.get("LUTETIA_LOG", "info").lower(), logging.INFO)
