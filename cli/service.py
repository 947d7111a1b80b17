"""Commands that stay: the daemon and the coordinator in their own event loop."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any

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
    uvloop.run(main)
