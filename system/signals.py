"""The signals that end a service."""

from __future__ import annotations

import signal


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a service to end: SIGTERM, SIGINT and, unless the caller ignores it as `nohup` does, SIGHUP."""
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    kept = () if hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN else (hang_up,)
    return signal.SIGTERM, signal.SIGINT, *kept
