"""Commands that keep running, the node and the coordinator: event loop, logging and systemd's watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

from lutetia.system.log_format import stderr_handler, wanted_level
from lutetia.system.notify import notify, watchdog_seconds
from lutetia.system.process import raise_file_limit


def set_up_logging(handler: logging.Handler | None = None) -> None:
    """Log one line per event to stderr, or to `handler`. `LUTETIA_LOG` sets the level: debug, info or warning."""
    logger = logging.getLogger("lutetia")
    logger.addHandler(handler or stderr_handler())
    logger.setLevel(wanted_level())
    logger.propagate = False


def run_service(main: Coroutine[Any, Any, None], handler: logging.Handler | None = None) -> None:
    """Set up logging, raise the limit of open files and run `main` on uvloop until it ends."""
    import uvloop

    set_up_logging(handler)
    raise_file_limit()
    try:
        uvloop.run(_watched(main))
    finally:
        if handler:
            handler.close()  # before an error is printed


async def _watched(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` and notify systemd's watchdog from the same event loop, so that systemd restarts a loop that hangs."""
    watchdog = asyncio.create_task(_watchdog())
    try:
        await main
    finally:
        notify("STOPPING=1")
        watchdog.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watchdog


async def _watchdog() -> None:
    while period := watchdog_seconds():
        notify("WATCHDOG=1")
        await asyncio.sleep(period)
