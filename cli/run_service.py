"""Commands that stay: the daemon and the coordinator in their own event loop, watched by systemd where it runs them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any

from lutetia.system.notify import notify, watchdog_seconds

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


def set_up_logging() -> None:
    """One line per event on stderr; `LUTETIA_LOG` chooses debug, info or warning."""
    level = LEVELS.get(os.environ.get("LUTETIA_LOG", "info").lower(), logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("lutetia")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def run_service(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` to its end on uvloop."""
    import uvloop

    set_up_logging()
    uvloop.run(_watched(main))


async def _watched(main: Coroutine[Any, Any, None]) -> None:
    """`main`, while systemd's watchdog hears from the same event loop: a loop that hangs is restarted."""
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
