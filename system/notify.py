"""What a service and its manager tell each other: systemd's notifications (sd_notify), and the signals that end a service."""

from __future__ import annotations

import contextlib
import os
import signal
import socket


def notify(state: str) -> bool:
    """Send `state` (`READY=1`, `STATUS=…`, `STOPPING=1`, `WATCHDOG=1`) to the service manager. Returns whether it was sent."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.connect("\0" + address[1:] if address.startswith("@") else address)
        link.send(state.encode())
        return True
    return False


def watchdog_seconds() -> float | None:
    """Seconds between `WATCHDOG=1` messages: half the manager's limit, as it advises. None if it does not watch this process."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID")
    if not microseconds or (pid and int(pid) != os.getpid()):
        return None
    return int(microseconds) / 2e6


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a service to end: SIGTERM, SIGINT and, unless the caller ignores it as `nohup` does, SIGHUP."""
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    kept = () if hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN else (hang_up,)
    return signal.SIGTERM, signal.SIGINT, *kept
