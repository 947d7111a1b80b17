"""Logging of child processes: to the stderr that they share with the daemon, in the same format."""

from __future__ import annotations

import logging

from lutetia.system.log_format import stderr_handler, wanted_level


def log_to_stderr() -> None:
    """One line per event; `LUTETIA_LOG` sets the level of Lutetia's loggers: debug, info or warning."""
    logging.basicConfig(handlers=[stderr_handler()], level=logging.WARNING)
    logging.getLogger("lutetia").setLevel(wanted_level())
