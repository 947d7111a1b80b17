"""What a service does again and again, also while no file descriptor is free."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)


async def every(seconds: Callable[[], float], action: Callable[[], Awaitable[None]]) -> None:
    """Do `action`, wait `seconds()`, and so on. Without a free file descriptor it is done the next time."""
    while True:
        try:
            await action()
        except OSError as error:
            log_if_out_of_files(getattr(action, "__name__", "action"), error)
        await asyncio.sleep(seconds())


def log_if_out_of_files(what: str, error: OSError) -> None:
    """Log that no file descriptor is free. Raises any other `error`."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        raise error
    _log.warning("%s: no file descriptor is free; trying again", what.strip("_").replace("_", " "))
