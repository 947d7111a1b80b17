"""Finds what a swarm may leave behind: processes, listening ports, sockets and temporary files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil


def family(marks: tuple[str, ...]) -> dict[int, str]:
    """Processes whose command line or environment names one of `marks` (folders of the test)."""
    processes = {}
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            text = " ".join(process.info["cmdline"] or []) + " ".join(process.environ().values())
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(mark in text for mark in marks):
            processes[process.pid] = " ".join(process.info["cmdline"] or [])[:200]
    return processes


def litter() -> set[str]:
    """Lutetia's and hivemind's sockets and files in the system's folder for temporary files."""
    return {str(path) for pattern in ("hivemind*", "lutetia*", ".lutetia*") for path in Path(tempfile.gettempdir()).glob(pattern)}


def listening(pid: int) -> set[int]:
    """TCP ports on which `pid` and its descendants listen."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {
        link.laddr.port for process in processes for link in process.net_connections("tcp") if link.status == psutil.CONN_LISTEN
    }
