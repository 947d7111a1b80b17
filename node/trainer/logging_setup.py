"""Logging of child processes: to the stderr that they share with the daemon, in the same format."""

from __future__ import annotations

import logging
import os
import sys

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


def log_to_stderr() -> None:
    """One line per event; `LUTETIA_LOG` sets the level of Lutetia's loggers: debug, info or warning."""
    form = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=form, datefmt="%H:%M:%S")
    logging.getLogger("lutetia").setLevel(_LEVELS.get(os.environ.get("LUTETIA_LOG", "info").lower(), logging.INFO))
